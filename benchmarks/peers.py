"""lucidrains' transfusion-pytorch on the same documents: as many parameters, its defaults, rows padded, not packed."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from benchmarks.cases import DEVICE
from transfusion import Transfusion
from transfusion.config import ModelConfig
from transfusion.sequence import Document, Text

NAME = "transfusion-pytorch"
_WIDTHS = range(32, 8192, 32)


def why_not() -> str | None:
    """Why it cannot run here."""
    if importlib.util.find_spec("transfusion_pytorch") is None:
        return "transfusion_pytorch is not installed (pip install transfusion-pytorch)"
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without its progress bars and log lines."""
    from loguru import logger

    logger.disable("transfusion_pytorch")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def training_step(
    batches: Sequence[Sequence[Sequence[Document]]], config: ModelConfig
) -> tuple[Callable[[int], Any], nn.Module, float]:
    """-> a step over all documents of one batch in turn, the model, the tokens of a step on average. The width is that
    of the closest size."""
    with torch.device("meta"):
        wanted = Transfusion(config).num_parameters()
    model = _build(_width(config, wanted), config).to(DEVICE)
    samples = [
        [[_item(segment, config) for segment in document] for row in rows for document in row] for rows in batches
    ]
    items = [item for batch in samples for sample in batch for item in sample]
    tokens = sum(item.shape[0] if item.ndim == 1 else item.shape[0] * item.shape[1] for item in items) / len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(number: int) -> None:
        moved = [[item.to(DEVICE) for item in sample] for sample in samples[number % len(samples)]]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = model(moved)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, model, tokens


def _item(segment: Any, config: ModelConfig) -> Tensor:
    """Text as token ids; an image as its patches (rows, columns, P·P·C)."""
    if isinstance(segment, Text):
        return segment.token_ids
    patch = config.patch_size
    return rearrange(segment.latent, "c (y p) (x q) -> y x (p q c)", p=patch, q=patch)


def _build(width: int, config: ModelConfig) -> nn.Module:
    from transfusion_pytorch import Transfusion as Peer

    return Peer(
        num_text_tokens=config.vocab_size,
        dim_latent=config.patch_dim,
        modality_num_dim=2,
        transformer={"dim": width, "depth": config.layers, "dim_head": config.head_dim, "heads": config.heads},
    )


def _width(config: ModelConfig, wanted: int) -> int:
    """The width, a multiple of 32, with the number of parameters closest to `wanted`."""
    # It does not build on the meta device; its parameters are a polynomial of degree 2 in the width.
    widths = torch.tensor([96.0, 192.0, 384.0], dtype=torch.float64)
    counts = torch.tensor([_parameters(int(width), config) for width in widths], dtype=torch.float64)
    c, b, a = torch.linalg.solve(torch.stack([widths**0, widths, widths**2], 1), counts).tolist()
    return min(_WIDTHS, key=lambda width: abs(a * width**2 + b * width + c - wanted))


def _parameters(width: int, config: ModelConfig) -> int:
    return sum(weight.numel() for weight in _build(width, config).parameters())
