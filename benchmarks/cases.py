"""What is timed: shapes and masks as data, most important first; command line and pytest both read them here.

a  the paper's 7B attention over rows packed with captions, 256-token images and text      b  with 16-token images
c  head dimension 64: the paper's 0.16B and 0.37B        d  grouped heads over long documents with few long images
e  plain causal and full                                 f  one new token, or a block of image tokens, over a cache
"""

import random
from dataclasses import dataclass
from typing import Literal

import torch

from transfusion.kernels import IntervalMask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32

Layout = Literal["packed", "long_images", "causal", "full", "continuation"]


@dataclass(frozen=True)
class AttentionCase:
    """Attention of `batch` rows: q (batch, heads, queries, head_dim) over k, v (batch, kv_heads, keys, head_dim).

    group: the letter above. image_tokens: of one image. backward: whether gradients are timed too.
    """

    group: str
    layout: Layout
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    image_tokens: int = 0
    backward: bool = True

    def mask(self, device: torch.device | str = "cpu", seed: int = 0) -> IntervalMask:
        """The case's mask, the same at every call with the same seed."""
        rng = random.Random(seed)
        if self.layout == "causal":
            return IntervalMask.causal(self.queries, device)
        if self.layout == "full":
            return IntervalMask.full(self.queries, self.keys, device)
        if self.layout == "continuation":
            room = self.keys - self.queries
            prefixes = torch.tensor([room - rng.randrange(1 + room // 4) for _ in range(self.batch)])
            new = IntervalMask.full(self.queries, self.queries)
            return IntervalMask.continuation(new, prefixes, self.keys).to(device)
        row = packed_row if self.layout == "packed" else long_images_row
        return IntervalMask.stack([row(self.queries, self.image_tokens, rng) for _ in range(self.batch)]).to(device)


def packed_row(length: int, image_tokens: int, rng: random.Random) -> IntervalMask:
    """Documents up to the row's end: 7 in 10 a caption of 8 to 40 tokens and its image, others 128 to 1024 of text."""
    images, documents, start = [], [], 0
    while start < length:
        caption = rng.randint(8, 40)
        with_image = rng.random() < 0.7
        wanted = caption + image_tokens + 2 if with_image else rng.randint(128, 1024)
        size = min(wanted, length - start)
        if with_image and size == wanted:
            images.append((start + caption + 1, start + caption + 1 + image_tokens))
        documents.append(size)
        start += size
    return IntervalMask.from_spans(length, images, documents)


def long_images_row(length: int, image_tokens: int, rng: random.Random) -> IntervalMask:
    """One document: text of a sixteenth to a fourth of the row, an image, text, an image, ..."""
    images, start = [], rng.randint(length // 16, length // 4)
    while start + image_tokens <= length:
        images.append((start, start + image_tokens))
        start += image_tokens + rng.randint(length // 16, length // 4)
    return IntervalMask.from_spans(length, images)


def _training(group: str, batch: int, length: int, heads: int, kv_heads: int, dim: int, image: int) -> AttentionCase:
    layout: Layout = "long_images" if group == "d" else "packed"
    return AttentionCase(group, layout, batch, length, length, heads, kv_heads, dim, image)


def _plain(layout: Layout, length: int) -> AttentionCase:
    return AttentionCase("e", layout, max(1, 16384 // length), length, length, 32, 32, 128)


def _cache(batch: int, queries: int, prefix: int) -> AttentionCase:
    keys = prefix if queries == 1 else prefix + queries
    return AttentionCase("f", "continuation", batch, queries, keys, 32, 8, 128, queries - 1, backward=False)


_CUDA = {
    "a_7b_4k_images_256": _training("a", 4, 4096, 32, 32, 128, 256),
    "c_0.37b_4k_images_256": _training("c", 8, 4096, 16, 16, 64, 256),
    "d_gqa_64_8_8k": _training("d", 2, 8192, 64, 8, 128, 2048),
    "f_decode_64k_batch_8": _cache(8, 1, 65536),
    "f_image_256_over_16k": _cache(4, 256, 16384),
    "b_7b_4k_images_16": _training("b", 4, 4096, 32, 32, 128, 16),
    "e_causal_4k": _plain("causal", 4096),
    "e_full_4k": _plain("full", 4096),
    "c_0.16b_4k_images_256": _training("c", 8, 4096, 12, 12, 64, 256),
    "d_gqa_28_4_8k": _training("d", 2, 8192, 28, 4, 128, 2048),
    "a_7b_8k_images_256": _training("a", 4, 8192, 32, 32, 128, 256),
    "f_decode_4k_batch_1": _cache(1, 1, 4096),
    "f_decode_4k_batch_64": _cache(64, 1, 4096),
    "f_decode_16k_batch_8": _cache(8, 1, 16384),
    "f_decode_64k_batch_1": _cache(1, 1, 65536),
    "f_image_1024_over_4k": _cache(4, 1024, 4096),
    "f_image_16_over_4k": _cache(4, 16, 4096),
    "f_image_1024_over_32k": _cache(4, 1024, 32768),
    "f_image_16_over_32k": _cache(4, 16, 32768),
    "d_gqa_64_8_16k": _training("d", 1, 16384, 64, 8, 128, 4096),
    "e_causal_16k": _plain("causal", 16384),
    "d_gqa_28_4_16k": _training("d", 1, 16384, 28, 4, 128, 4096),
    "d_gqa_64_8_32k": _training("d", 1, 32768, 64, 8, 128, 4096),
    "d_gqa_28_4_32k": _training("d", 1, 32768, 28, 4, 128, 4096),
    "e_causal_2k": _plain("causal", 2048),
    "e_causal_8k": _plain("causal", 8192),
    "e_full_2k": _plain("full", 2048),
    "e_full_8k": _plain("full", 8192),
    "e_full_16k": _plain("full", 16384),
    "f_decode_4k_batch_8": _cache(8, 1, 4096),
    "f_decode_16k_batch_64": _cache(64, 1, 16384),
}

_CPU = {
    "a_small_1k_images_256": _training("a", 1, 1024, 4, 4, 64, 256),
    "b_small_512_images_16": _training("b", 2, 512, 4, 4, 64, 16),
    "d_gqa_8_2_1k": _training("d", 1, 1024, 8, 2, 64, 256),
    "e_causal_512": AttentionCase("e", "causal", 1, 512, 512, 4, 4, 64),
    "e_full_512": AttentionCase("e", "full", 1, 512, 512, 4, 4, 64),
    "f_decode_4k_batch_4": AttentionCase("f", "continuation", 4, 1, 4096, 8, 2, 64, 0, backward=False),
    "f_image_64_over_1k": AttentionCase("f", "continuation", 2, 64, 1088, 8, 2, 64, 63, backward=False),
}

ATTENTION: dict[str, AttentionCase] = {"cpu": _CPU, "cuda": _CUDA}[DEVICE]

Images = tuple[int, int, int, int, int]


def _images(*shapes: Images) -> dict[str, Images]:
    return {"{}x{}x{}x{}_p{}".format(*shape): shape for shape in shapes}


# (images, channels, height, width, patch size): the paper's latents at 256 pixels a side, and latents of 1024.
IMAGES: dict[str, Images] = {
    "cpu": _images((64, 8, 32, 32, 2), (64, 3, 32, 32, 8)),
    "cuda": _images(
        *((images, 8, 32, 32, patch) for patch in (2, 1, 4, 8) for images in (512, 64, 2048)),
        *((images, 16, 128, 128, patch) for patch in (2, 1, 4, 8) for images in (512, 64, 2048)),
    ),
}[DEVICE]

# Sizes of a batch's images whose aspect ratios differ at about one area: 1:1, 4:3, 3:4, 16:9, 9:16, over and over.
RAGGED_SIZES = ((32, 32), (28, 36), (36, 28), (24, 42), (42, 24))
