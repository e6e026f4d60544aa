"""What is timed: shapes of the paper's training batches, as data.

A row of a training batch is packed: captions with their images, and text documents, one after the other.
"""

import random
from typing import NamedTuple

import torch

from transfusion.kernels import IntervalMask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


class AttentionCase(NamedTuple):
    """B rows of N tokens, heads, head dimension, tokens of an image."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    image_tokens: int

    def mask(self, seed: int = 0) -> IntervalMask:
        """Rows packed with documents of a caption (8 to 40 tokens) and an image, and of text (128 to 1024 tokens)."""
        rng = random.Random(seed)
        rows = []
        for _ in range(self.batch):
            images, documents, start = [], [], 0
            while start < self.length:
                caption = rng.randint(8, 40)
                with_image = rng.random() < 0.7
                size = caption + self.image_tokens + 2 if with_image else rng.randint(128, 1024)
                size = min(size, self.length - start)
                if with_image and size > caption + 1:
                    images.append((start + caption + 1, min(start + size, start + caption + 1 + self.image_tokens)))
                documents.append(size)
                start += size
            rows.append(IntervalMask.from_spans(self.length, images, documents))
        return IntervalMask.stack(rows).to(DEVICE)


ATTENTION = {
    "cpu": {
        "packed_512_d64": AttentionCase(2, 512, 4, 4, 64, 64),
        "packed_1024_d64": AttentionCase(1, 1024, 4, 4, 64, 256),
    },
    "cuda": {
        "7b_4096_d128_256_patches": AttentionCase(4, 4096, 32, 32, 128, 256),
        "7b_4096_d128_16_patches": AttentionCase(4, 4096, 32, 32, 128, 16),
        "0.16b_4096_d64": AttentionCase(8, 4096, 12, 12, 64, 256),
        "gqa_8192_d128": AttentionCase(2, 8192, 64, 8, 128, 1024),
    },
}[DEVICE]

# (images, channels, height, width, patch size)
IMAGES = {
    "cpu": {"64x8x32x32_p2": (64, 8, 32, 32, 2), "64x3x32x32_p8": (64, 3, 32, 32, 8)},
    "cuda": {"512x8x32x32_p2": (512, 8, 32, 32, 2), "512x16x128x128_p2": (512, 16, 128, 128, 2)},
}[DEVICE]
