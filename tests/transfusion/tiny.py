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
    """batch(step) is a function of the step alone."""

    def __init__(self, rows: int = 2, length: int = 40) -> None:
        self.rows, self.length = rows, length

    def batch(self, step: int) -> Batch:
        rng = random.Random(step)
        rows = [[document(rng), document(rng, with_image=False)] for _ in range(self.rows)]
        generator = torch.Generator().manual_seed(step)
        return collate(rows, self.length, CONFIG.patch_size, SpecialTokens(), generator)

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        step = start_step
        while True:
            yield self.batch(step)
            step += 1
