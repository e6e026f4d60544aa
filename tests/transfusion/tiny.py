"""A model, batches and a run of the command line, small enough for a test."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image as Pictures

from transfusion import ModelConfig, Transfusion, cli
from transfusion.config import UNetConfig
from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.sequence import Batch, Document, Image, SpecialTokens, Text, collate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the tests that name the Triton kernels

CONFIG = ModelConfig(
    vocab_size=40,
    dim=32,
    layers=2,
    heads=2,
    latent_channels=3,
    patch_size=2,
    schedule=NoiseSchedule("v_prediction"),
)


UNET = replace(CONFIG, codec="unet", unet=UNetConfig(width=16, deep_width=32, blocks=1, head_dim=16))


def model(config: ModelConfig = CONFIG, seed: int = 0) -> Transfusion:
    """A freshly initialised model."""
    torch.manual_seed(seed)
    return Transfusion(config)


def document(rng: random.Random, with_image: bool = True) -> Document:
    """BOS, some words, an image perhaps, EOS."""
    words = torch.tensor([1, *(rng.randrange(5, 40) for _ in range(rng.randint(1, 6)))])
    latent = torch.tensor([rng.gauss(0, 1) for _ in range(48)]).view(3, 4, 4)
    image = (Image(latent),) if with_image else ()
    return (Text(words), *image, Text(torch.tensor([2])))


def image_batch(patch_size: int = 2, sides: tuple[int, int] = (4, 4), images: int = 2, seed: int = 0) -> Batch:
    """One row of captioned images of one size, as the U-Net takes them."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(images):
        words = torch.tensor([1, rng.randrange(5, 40), rng.randrange(5, 40)])
        latent = torch.randn(3, *sides, generator=generator)
        documents.append((Text(words), Image(latent), Text(torch.tensor([2]))))
    length = sum(6 + sides[0] * sides[1] // patch_size**2 for _ in documents)
    return collate([documents], length, patch_size, SpecialTokens(), generator)


class Batches:
    """batch(step) is a function of the step alone; `iterate` deals them to ranks, and goes on from its state."""

    skipped: tuple[()] = ()

    def __init__(self, rows: int = 2, length: int = 40, rank: int = 0, ranks: int = 1) -> None:
        self.rows, self.length, self.rank, self.ranks, self.position = rows, length, rank, ranks, 0

    def batch(self, step: int) -> Batch:
        rng = random.Random(step)
        rows = [[document(rng), document(rng, with_image=False)] for _ in range(self.rows)]
        generator = torch.Generator().manual_seed(step)
        return collate(rows, self.length, CONFIG.patch_size, SpecialTokens(), generator)

    def iterate(self) -> Iterator[Batch]:
        while True:
            batch = self.batch(self.position + self.rank)
            self.position += self.ranks
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


COLORS = ["red", "green", "blue", "black", "gray", "purple", "orange", "navy", "teal", "olive"]


def data_folder(path: Path) -> Path:
    """Ten plain images with captions, teal.png cut short, and two texts, in a new folder."""
    path.mkdir()
    lines = []
    for index, color in enumerate(COLORS):
        Pictures.new("RGB", (20 + index, 24), color).save(path / f"{color}.png")
        lines.append(json.dumps({"image": f"{color}.png", "caption": f"{color} square"}))
    (path / "captions.jsonl").write_text("\n".join(lines))
    damaged = path / "teal.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    for name in ("one", "two"):
        (path / f"{name}.txt").write_text(f"this is text {name}, about squares and colors. " * 20)
    return path


def run_options(**changes: object) -> list[str]:
    """Words for `transfusion train`; `data__loader__rows=2` is --data.loader.rows 2."""
    sizes = {
        "model__dim": 32,
        "model__layers": 1,
        "model__heads": 2,
        "model__vocab_size": 300,
        "data__loader__rows": 4,
        "data__loader__row_length": 48,
        "train__steps": 4,
        "train__warmup_steps": 1,
        "train__log_every": 1,
    }
    options = {f"--{name.replace('__', '.').replace('_', '-')}": value for name, value in (sizes | changes).items()}
    return [str(word) for option in options.items() for word in option]


TWO_STEPS = run_options(data__loader__image_size=16, train__steps=2, device="cpu")


def train(out: Path, images: Path | str, *options: str) -> int:
    """`transfusion train` for two steps, or as later options say -> its status."""
    return cli.main(["train", "--out", str(out), "--data.images", str(images), *TWO_STEPS, *options])
