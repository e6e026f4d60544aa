"""weight = f(seed, name, shape): every parameter is drawn from its own generator, on the CPU.

So a parameter's first value depends neither on the device, nor on the order of initialisation, nor on which other
parameters this process holds: a rank that keeps a shard draws the whole tensor and cuts its part out.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from transfusion.config import ModelConfig


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The first value of parameter `name`, float32 on the CPU.

    Vectors: biases zero, norms one. Matrices: normal of standard deviation 0.02 (GPT-2's; the paper is silent), in the
    U-Net 1/√fan_in. The last weight of a residual branch is divided by √(number of branches) on the same path.
    """
    if len(shape) < 2:
        made = torch.zeros if name.endswith("bias") else torch.ones
        return made(shape, dtype=torch.float32, device="cpu")
    branches = 2 * config.layers
    deviation = 0.02
    if config.codec == "unet" and name.startswith("codec."):
        deviation = 1 / math.sqrt(shape[1:].numel())
        levels = config.patch_size.bit_length()
        branches = levels * (2 * config.unet.blocks + 1) * (2 if config.unet.attention else 1)
    if name.endswith(("attention.out.weight", "ffn.down.weight", "close.weight")):
        deviation /= math.sqrt(branches)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(std=deviation, generator=generator)


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Gives every parameter its first value, one at a time, on the device and in the dtype that it has."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, config, seed))
