"""FLOPs of one training step, by what they are spent on: 2 per multiply-add, matrix products and convolutions alone.

    text, image   2·N·(weights of the blocks' matrices), N tokens of the modality, padding being text   × 3
    head          2·T·dim·vocab_size, T rows of the text loss                                             × 3
    attention     4·area·heads·head_dim·layers, area the visible (query, key) pairs                       × 3.5
    codec         what torch counts of one image, forward and backward, times the images

The backward pass costs twice the forward pass; of attention 2.5 times, for it recomputes the scores, as the kernels do
and torch's own count has it. Recomputation by activation checkpointing is not counted: MFU measures progress of the
model.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from transfusion.config import ModelConfig
from transfusion.kernels import IntervalMask, RaggedLatents
from transfusion.model.image_codec import LinearCodec
from transfusion.model.unet_codec import UNetCodec
from transfusion.sequence import Batch


class FlopCount(NamedTuple):
    """FLOPs by their purpose; attention, read from the mask, is a tensor () float64 on its device."""

    text: float
    image: float
    head: float
    codec: float
    attention: Tensor

    @property
    def total(self) -> Tensor:
        """All of them, () float64 on the mask's device."""
        return self.attention + (self.text + self.image + self.head + self.codec)


def training_flops(config: ModelConfig, batch: Batch) -> FlopCount:
    """FLOPs of forward and backward of `batch` with every weight trained. No host sync: sizes are the host's."""
    image_tokens = batch.image_rows.numel()
    text_tokens = batch.token_ids.numel() - image_tokens
    per_token = 3 * 2 * config.layers * block_weights(config)
    if isinstance(batch.latents, RaggedLatents):
        sides = list(batch.latents.sizes)
    else:
        sides = [(int(batch.latents.shape[-2]), int(batch.latents.shape[-1]))] * batch.num_images
    return FlopCount(
        text=float(per_token * text_tokens),
        image=float(per_token * image_tokens),
        head=float(3 * 2 * batch.text_rows.numel() * config.dim * config.vocab_size),
        codec=float(sum(codec_flops(config, side) for side in sides)),
        attention=3.5 * attention_flops(config, batch.mask, batch.token_ids.shape[0]),
    )


def block_weights(config: ModelConfig) -> int:
    """Numbers in the matrices of one block: q, k, v, out; gate, up, down."""
    attention = config.dim * config.head_dim * (config.heads + 2 * config.num_kv_heads) + config.dim**2
    return attention + 3 * config.dim * config.ffn_dim


def attention_flops(config: ModelConfig, mask: IntervalMask, rows: int) -> Tensor:
    """4·area·heads·head_dim·layers, () float64: the forward pass of every layer under `mask` over a batch of rows."""
    area = mask.area().sum().double() * (rows // mask.batch_size)
    return area * (4 * config.layers * config.heads * config.head_dim)


class _TwoProducts(TorchFunctionMode):
    """Attention as softmax(q kᵀ) v, of which torch counts both products, on every machine alike.

    Of this thread alone: `sdpa_kernel` is of the process, and an autoencoder in another thread would change kernels.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            q, k, v = args
            return (q @ k.mT).softmax(-1) @ v
        return func(*args, **(kwargs or {}))


@functools.cache
def codec_flops(config: ModelConfig, sides: tuple[int, int]) -> int:
    """Forward and backward of the codec for one image of latents (C, h, w), counted by torch on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    height, width = sides
    tokens = (height // config.patch_size) * (width // config.patch_size)
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.enable_grad(), _TwoProducts(), counter:
        hidden, timestep = torch.empty(1, tokens, config.dim, requires_grad=True), torch.empty(1)
        if config.codec == "linear":
            linear = LinearCodec(config)
            encoded = linear.encode(torch.empty(1, tokens, config.patch_dim), timestep)
            decoded = linear.decode(hidden)
        else:
            unet = UNetCodec(config)
            encoded, skips = unet.encode(torch.empty(1, height * width, config.latent_channels), timestep, sides)
            decoded = unet.decode(hidden, skips)
        (encoded.sum() + decoded.sum()).backward()
    return int(counter.get_total_flops())
