"""Models of random weights, made where they run: a large one's first values take half a minute to draw on a CPU."""

import torch

from benchmarks.cases import DEVICE
from transfusion import ModelConfig, Transfusion


@torch.no_grad()
def random_model(config: ModelConfig) -> Transfusion:
    """The same weights at every call: matrices normal of deviation 0.02, norms one, biases zero."""
    with torch.device("meta"):
        model = Transfusion(config)
    model.to_empty(device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=0.02, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return model
