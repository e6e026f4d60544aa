"""transfusion train | sample | demo-ui | eval | ...: each command's options are the fields of one dataclass."""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

COMMANDS = """usage: transfusion COMMAND [options]      (transfusion COMMAND --help lists them)

  train      train a model, or resume a run that was stopped
  train-vae  train an autoencoder on your images
  encode     encode images once, for training
  sample     images from captions, captions from images, text from text
  demo-ui    a page in the browser to talk to a trained model on
  eval       held-out losses and the conditioning gap of a run, into its metrics.json
  verify     check every kernel against its reference on this machine
  doctor     versions, devices, and the path that each kernel takes here, and why
"""


@dataclass(frozen=True)
class EvalOptions:
    """Figures of a run, printed and written to its metrics.json.

    Args:
        run: folder of a run; if it has not finished, the averaged weights of its last checkpoint are evaluated.
        draws: timesteps at which each image is evaluated, one in each of so many equal parts of the path.
        features: also draw images, and measure their distance to the real ones in these features: "inception" (FID and
            KID), or a TorchScript file from images (I, 3, h, w) in [0, 1] to features (I, F).
        samples: images to draw for that.
        guidance_scale: classifier-free guidance scale of those images.
        seed: of noise and timesteps.
        device: "auto" is CUDA where there is one.
    """

    run: Path
    draws: int = 8
    features: str | None = None
    samples: int = 256
    guidance_scale: float = 3.0
    seed: int = 0
    device: str = "auto"


def pick_device(name: str) -> str:
    """The name of the device to use: for "auto", "cuda" where there is one, else "cpu"; any other name as it is. A GPU
    named by its number becomes the current one.

    Raises `ValueError` where torch has no such device here.
    """
    import torch

    from transfusion.model.pretrained import check_device

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        check_device(name)
    except ValueError as error:
        raise ValueError(f"--{error}, or auto") from error
    if torch.device(name).type == "cuda" and torch.device(name).index is not None:
        torch.cuda.set_device(name)
    return name


def train(arguments: Sequence[str]) -> int:
    """`transfusion train [--config FILE | RECIPE] [--preset NAME] [--out DIR] [--section.field VALUE ...]`."""
    import tyro

    from transfusion import config as configs
    from transfusion import presets, recipes
    from transfusion.files import alone_in
    from transfusion.run import Run
    from transfusion.run_config import CONFIG, RunConfig, with_saved_model
    from transfusion.training import join

    @dataclass(frozen=True)
    class Start:
        """Train a model, or resume the run in `out`, whose config then needs no repeating.

        Args:
            config: a TOML file of a run, or the name of a recipe, such as demo; the options below override its fields.
            preset: model preset in place of the config's model.
            out: the run's folder; a run that is there already is resumed.
            device: "auto" is CUDA where there is one.
        """

        config: Path | None = None
        preset: Literal[tuple(presets.PRESETS)] | None = None  # type: ignore[valid-type]
        out: Path = Path("runs/run")
        device: str = "auto"

    @dataclass(frozen=True)
    class Early(Start):
        init: str = ""

    @dataclass(frozen=True)
    class Options(Start):
        __doc__ = Start.__doc__
        run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)

    wants_help = any(flag in arguments for flag in ("-h", "--help"))
    start, _ = tyro.cli(Early, args=[] if wants_help else list(arguments), return_unknown_args=True)
    begun = (start.out / CONFIG).is_file() and not (start.config or start.preset)
    source = start.out / CONFIG if begun else start.config and recipes.find(start.config)
    config = configs.load(RunConfig, source) if source else RunConfig()
    init = start.init or config.init
    if init and start.preset:
        raise ValueError(f"--preset {start.preset} and init {init} both say what the network is: give one of them")
    if init and not begun:
        config = with_saved_model(replace(config, init=init), configs.read(source) if source else {})
    if start.preset:
        model = presets.get(start.preset)
        loader = replace(config.data.loader, patch_size=model.patch_size)
        config = replace(config, model=model, data=replace(config.data, loader=loader))
    options = tyro.cli(Options, args=list(arguments), default=Options(run=config), prog="transfusion train")
    spread = options.run.train.parallel
    with join(pick_device(options.device), spread.shard, spread.timeout_seconds) as world, ExitStack() as held:
        world.main_first(lambda: held.enter_context(alone_in(options.out)) if world.main else None)
        finished = Run.start(options.run, options.out, world).train()
        if world.main:
            print(f"{options.out}: {'finished' if finished else 'stopped; the same command resumes it'}")
    return 0


def train_vae(arguments: Sequence[str]) -> int:
    """`transfusion train-vae`: see `transfusion.latents`."""
    from transfusion.latents import train_vae as run_train_vae

    return run_train_vae(arguments)


def encode(arguments: Sequence[str]) -> int:
    """`transfusion encode`: see `transfusion.latents`."""
    from transfusion.latents import encode as run_encode

    return run_encode(arguments)


def sample(arguments: Sequence[str]) -> int:
    """`transfusion sample`: see `transfusion.sampling_cli`."""
    from transfusion.sampling_cli import main as run_sample

    return run_sample(arguments)


def demo_ui(arguments: Sequence[str]) -> int:
    """`transfusion demo-ui`: see `transfusion.ui`."""
    from transfusion.ui import main as run_demo_ui

    return run_demo_ui(arguments)


def evaluate(arguments: Sequence[str]) -> int:
    """`transfusion eval --run DIR`."""
    import tyro

    from transfusion.files import write_whole
    from transfusion.run import Run
    from transfusion.training.metrics import to_json

    options = tyro.cli(EvalOptions, args=list(arguments), prog="transfusion eval")
    if options.draws < 1:  # before the distances, which take a long time
        raise ValueError(f"--draws {options.draws}: there must be one at least; 8 is the usual number")
    run = Run.open(options.run, pick_device(options.device))
    model = run.model()
    distances = {}
    if options.features:  # first, for the file may be none
        chosen = options.features, options.samples, options.guidance_scale, options.seed
        distances["image_distances"] = run.distances(model, *chosen)
    figures = run.evaluate(model, options.draws, options.seed) | distances
    result = to_json(figures, indent=2)
    write_whole(options.run / "metrics.json", result + "\n")
    print(result)
    return 0


def verify(arguments: Sequence[str]) -> int:
    """`transfusion verify`: see `transfusion.kernels.verify`."""
    from transfusion.kernels.verify import main as run_verify

    return run_verify(arguments)


def doctor(arguments: Sequence[str]) -> int:
    """`transfusion doctor`."""
    about = "Versions, devices, and for every op the path that it takes here and why not each other one."
    argparse.ArgumentParser(prog="transfusion doctor", description=about).parse_args(arguments)
    from transfusion.doctor import report

    print(report())
    return 0


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "train-vae": train_vae,
    "encode": encode,
    "sample": sample,
    "demo-ui": demo_ui,
    "eval": evaluate,
    "verify": verify,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. A user's mistake ends with its message and status 2, without a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a caption that its encoding lacks is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    if not given or given[0] in ("-h", "--help"):
        print(COMMANDS)
        return 0
    if given[0] not in _COMMANDS:
        print(f"transfusion: unknown command {given[0]!r}\n\n{COMMANDS}", file=sys.stderr)
        return 2
    try:
        return _COMMANDS[given[0]](given[1:])
    except (ValueError, FloatingPointError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and {"-h", "--help"} & set(given):  # `head`, say, has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter still flushes
            return 141
        if isinstance(error, RuntimeError) and not _is_refusal(error):
            raise
        print(f"transfusion {given[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ntransfusion {given[0]}: interrupted", file=sys.stderr)
        return 130


def _is_refusal(error: RuntimeError) -> bool:
    """Whether the kernels' registry raised it: what runs, by `impl` or TRANSFUSION_STRICT, cannot run here."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"] == "transfusion.kernels.registry"
