"""transfusion train | sample | eval | verify | doctor: each command's options are the fields of one dataclass."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

COMMANDS = """usage: transfusion COMMAND [options]      (transfusion COMMAND --help lists them)

  train    train a model, or go on with a run that was stopped
  sample   images from captions, captions from images, text from text
  eval     held-out losses and the conditioning gap of a run, into its metrics.json
  verify   check every kernel against its reference on this machine
  doctor   versions, devices, and the path that each kernel takes here, and why
"""


@dataclass(frozen=True)
class SampleOptions:
    """Images from captions (--prompt), captions of images (--image), continuations of texts (--text).

    Args:
        run: folder of a run that has ended.
        prompt: captions to draw.
        image: files to caption.
        text: texts to continue.
        out: where PNGs and settings.json go.
        steps: denoising steps of an image.
        guidance: classifier-free guidance scale; 1 is none.
        scheduler: "ddim", "ddpm", "dpmsolver", "euler" or "scm"; None takes the first that fits the run.
        temperature: of text; 0 is greedy.
        max_tokens: of text.
        seed: the same seed gives the same samples.
        device: "auto" is CUDA where there is one.
    """

    run: Path
    prompt: tuple[str, ...] = ()
    image: tuple[Path, ...] = ()
    text: tuple[str, ...] = ()
    out: Path = Path("samples")
    steps: int = 50
    guidance: float = 3.0
    scheduler: str | None = None
    temperature: float = 0.0
    max_tokens: int = 60
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class EvalOptions:
    """Figures of a run, printed and written to its metrics.json.

    Args:
        run: folder of a run that has ended.
        draws: timesteps that each image is judged at.
        seed: of noise and timesteps.
        device: "auto" is CUDA where there is one.
    """

    run: Path
    draws: int = 8
    seed: int = 0
    device: str = "auto"


def pick_device(name: str) -> str:
    """For "auto" the name "cuda" where there is one, else "cpu"; any other name as it is."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def train(arguments: Sequence[str]) -> int:
    """`transfusion train [--config FILE] [--preset NAME] [--out DIR] [--section.field VALUE ...]`."""
    import tyro

    from transfusion import config as configs
    from transfusion import presets
    from transfusion.run import CONFIG, Run, RunConfig

    @dataclass(frozen=True)
    class Start:
        """Train a model, or go on with the run in `out`, whose config then needs no repeating.

        Args:
            config: a TOML file of a run; the options below override its fields.
            preset: model preset in place of the config's model.
            out: the run's folder; a run that is there already goes on.
            device: "auto" is CUDA where there is one.
        """

        config: Path | None = None
        preset: Literal["tiny", "0.16b", "0.37b", "0.76b", "1.4b", "7b"] | None = None
        out: Path = Path("runs/run")
        device: str = "auto"

    @dataclass(frozen=True)
    class Options(Start):
        __doc__ = Start.__doc__
        run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)

    wants_help = any(flag in arguments for flag in ("-h", "--help"))
    start, _ = tyro.cli(Start, args=[] if wants_help else list(arguments), return_unknown_args=True)
    begun = (start.out / CONFIG).is_file() and not (start.config or start.preset)
    source = start.out / CONFIG if begun else start.config
    config = configs.load(RunConfig, source) if source else RunConfig()
    if start.preset:
        model = presets.get(start.preset)
        loader = replace(config.data.loader, patch_size=model.patch_size)
        config = replace(config, model=model, data=replace(config.data, loader=loader))
    options = tyro.cli(Options, args=list(arguments), default=Options(run=config), prog="transfusion train")
    finished = Run.start(options.run, options.out).train(pick_device(options.device))
    print(f"{options.out}: {'finished' if finished else 'stopped; the same command goes on'}")
    return 0


def sample(arguments: Sequence[str]) -> int:
    """`transfusion sample --run DIR --prompt TEXT ...`."""
    import tyro

    options = tyro.cli(SampleOptions, args=list(arguments), prog="transfusion sample")
    if not (options.prompt or options.image or options.text):
        raise ValueError("nothing to sample: give --prompt, --image or --text")
    write_samples(options)
    print(f"see {options.out}")
    return 0


def write_samples(options: SampleOptions) -> None:
    """NNN-caption.png for each prompt, and settings.json with the options, captions and continuations."""
    import torch

    from transfusion.data import to_image, to_tensor
    from transfusion.data.sources import open_rgb
    from transfusion.run import Run

    run = Run.open(options.run)
    pipeline = run.pipeline(run.model(pick_device(options.device)))
    size = run.config.data.loader.image_size
    given = [
        to_tensor(open_rgb(path, str(path)), size) for path in options.image
    ]  # before any work: a bad file ends it here
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"options": {name: str(value) for name, value in vars(options).items()}}
    if options.prompt:
        images = pipeline.images(
            options.prompt,
            steps=options.steps,
            guidance_scale=options.guidance,
            scheduler=options.scheduler,
            seed=options.seed,
            progress=sys.stderr.isatty(),
        )
        names = [f"{i:03d}-{re.sub('[^a-z0-9]+', '-', p.lower())[:40]}.png" for i, p in enumerate(options.prompt)]
        for name, image in zip(names, images, strict=True):
            to_image(image).save(options.out / name)
        record["images"] = dict(zip(names, options.prompt, strict=True))
    text: dict[str, Any] = {
        "max_new_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
    }
    if given:
        captions = pipeline.captions(torch.stack(given), **text)
        record["captions"] = {str(path): caption for path, caption in zip(options.image, captions, strict=True)}
    if options.text:
        record["continuations"] = dict(zip(options.text, pipeline.continuations(options.text, **text), strict=True))
    (options.out / "settings.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps({key: record[key] for key in record if key != "options"}, indent=2, ensure_ascii=False))


def evaluate(arguments: Sequence[str]) -> int:
    """`transfusion eval --run DIR`."""
    import tyro

    from transfusion.run import Run

    options = tyro.cli(EvalOptions, args=list(arguments), prog="transfusion eval")
    run = Run.open(options.run)
    figures = run.evaluate(run.model(pick_device(options.device)), options.draws, options.seed)
    result = json.dumps(figures, indent=2)
    (options.run / "metrics.json").write_text(result + "\n")
    print(result)
    return 0


def verify(arguments: Sequence[str]) -> int:
    """`transfusion verify`: see `transfusion.kernels.verify`."""
    from transfusion.kernels.verify import main as run_verify

    return run_verify(arguments)


def doctor(arguments: Sequence[str]) -> int:
    """`transfusion doctor`."""
    from transfusion.doctor import report

    print(report())
    return 0


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "sample": sample,
    "eval": evaluate,
    "verify": verify,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. A user's mistake ends with its message and status 2, without a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(COMMANDS)
        return 0
    if given[0] not in _COMMANDS:
        print(f"transfusion: unknown command {given[0]!r}\n\n{COMMANDS}", file=sys.stderr)
        return 2
    try:
        return _COMMANDS[given[0]](given[1:])
    except (ValueError, FileNotFoundError, FloatingPointError, OSError, ImportError) as error:
        print(f"transfusion {given[0]}: {error}", file=sys.stderr)
        return 2
