"""`make demo`: trains a small model on real captioned images and real English, and shows what it generates.

On a CPU it learns 96 emoji of animals and food at 32×32 pixels in a few minutes; on a GPU, all emoji at 64×64 with the
Triton kernels; `--recipe` names another recipe. Stopped and started again, it resumes. Everything lands in
`runs/demo/`.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from transfusion import config as configs
from transfusion import recipes
from transfusion.cli import pick_device
from transfusion.data import image_source, text_source, to_tensor
from transfusion.data.sources import ImageSource
from transfusion.evaluation import sheets
from transfusion.files import alone_in
from transfusion.run import Run
from transfusion.run_config import RunConfig
from transfusion.training.metrics import read_log, to_json

_SHEET = 24  # images in a sheet


def config(device: str) -> RunConfig:
    """What the demo trains: the recipe `demo`, sized for minutes on two CPU cores; on a GPU, the recipe `emoji`."""
    return configs.load(RunConfig, recipes.find("demo" if device == "cpu" else "emoji"))


def pictures(source: ImageSource, count: int, size: int) -> tuple[list[str], Tensor]:
    """Captions and images (I, 3, size, size) in [-1, 1], spread evenly over the source."""
    chosen = range(0, len(source), max(1, len(source) // count))[:count]
    return [source.captions[i] for i in chosen], torch.stack([to_tensor(source[i].image, size) for i in chosen])


def show(run: Run) -> list[Path]:
    """Writes figures and pictures of a trained run. -> the files, in the order to look at them."""
    directory, size = run.directory, run.config.data.loader.image_size
    model = run.model()
    pipeline = run.pipeline(model)
    training = image_source(run.config.data, "train")
    texts = text_source(run.config.data, "test")
    assert training is not None and texts is not None
    prompts, originals = pictures(training, _SHEET, size)
    everything = pictures(training, len(training), size)[1]
    print("drawing ...", flush=True)
    sheets.sample_sheet(directory / "samples.png", prompts, pipeline.images(prompts).cpu(), everything)
    by_scale = {scale: pipeline.images(prompts[:8], guidance_scale=scale).cpu() for scale in (1.0, 3.0)}
    sheets.guidance_sheet(directory / "guidance.png", prompts[:8], by_scale)
    sheets.caption_sheet(directory / "captions.png", originals, prompts, pipeline.captions(originals))
    sheets.loss_curves(directory / "curves.png", read_log(directory / "log.jsonl"))
    beginning = " ".join(texts[0].split()[:24])
    (continuation,) = pipeline.continuations([beginning], temperature=0.7)
    (directory / "text.txt").write_text(f"held-out text: {beginning}\n\nthe model goes on: {continuation}\n")
    print("measuring ...", flush=True)
    (directory / "metrics.json").write_text(to_json(run.evaluate(model), indent=2) + "\n")
    names = ("samples.png", "guidance.png", "captions.png", "text.txt", "curves.png", "metrics.json")
    return [directory / name for name in names]


def summary(metrics: dict[str, dict[str, float]]) -> str:
    """The figures that show whether it worked, in words."""
    text = metrics["text_held_out"]
    lines = [
        "",
        f"text (held out)    loss {text['loss']:.2f} nats per token; "
        f"a model that ignores context reaches {text['unigram_entropy']:.2f} at best",
    ]
    for name, key in (("images (trained) ", "images_train"), ("images (held out)", "images_held_out")):
        image = metrics[key]
        lines += [
            f"{name}  diffusion loss {image['loss']:.3f}; predicting zero {image['loss_predicting_zero']:.3f}",
            f"{'':17}  conditioning gap {image['conditioning_gap']:+.4f} = "
            f"{image['conditioning_gap_in_standard_errors']:.1f} standard errors",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, draws, measures, and says where to look."""
    parser = argparse.ArgumentParser(prog="python -m transfusion.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--recipe", choices=recipes.names(), help="what to train instead, on a CPU or a GPU")
    parser.add_argument("--steps", type=int, help="fewer steps than usual, for a quick look")
    options = parser.parse_args(arguments)
    device = pick_device("auto")
    chosen = configs.load(RunConfig, recipes.find(options.recipe)) if options.recipe else config(device)
    if options.steps:
        warmup = min(chosen.train.warmup_steps, options.steps // 10)
        chosen = replace(chosen, train=replace(chosen.train, steps=options.steps, warmup_steps=warmup))
    with alone_in(options.out):
        run, start = Run.start(chosen, options.out, device), time.monotonic()
        print(
            f"training on {device}; stop it any time, the same command resumes. TensorBoard: {options.out}/tensorboard"
        )
        if not run.train():
            return 0
        files = show(run)
        print(summary(json.loads((options.out / "metrics.json").read_text())))
        print(f"\ndone in {(time.monotonic() - start) / 60:.1f} minutes; look at\n  " + "\n  ".join(map(str, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
