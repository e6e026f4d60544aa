"""A model and batches small enough for a test."""

import random
from collections.abc import Iterator

import torch

from transfusion import ModelConfig, Transfusion
from transfusion.diffusion.schedule import NoiseSchedule
from transfusion.sequence import Batch, Document, Image, SpecialTokens, Text, collate

CONFIG = ModelConfig(
    vocab_size=40,
    dim=32,
    layers=2,
    heads=2,
    latent_channels=3,
    patch_size=2,
    schedule=NoiseSchedule("v_prediction"),
)


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
