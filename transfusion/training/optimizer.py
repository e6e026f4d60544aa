"""AdamW on matrices with decay, on vectors without; warm-up, then a cosine; an average of the weights beside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from transfusion.config import check_finite
from transfusion.training.parallel import ParallelConfig, Precision, local, whole

Implementation = Literal["auto", "triton", "reference"]


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Defaults are the paper's (arXiv 2408.11039, section 4.1) where it says.

    Args:
        steps: optimizer steps.
        accumulation: batches that each rank adds up for one step.
        learning_rate: the peak, reached after the warm-up.
        min_learning_rate: where the cosine ends, one step behind the last.
        warmup_steps: linear; at most `steps`.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW, on matrices.
        max_grad_norm: what gradients are clipped to.
        ema_decay: of the averaged weights that sampling and evaluation use (the paper is silent).
        precision: "auto" is bfloat16 on CUDA (from sm_80 on) and float32 elsewhere; weights, moments and average are
            float32 in any.
        impl: implementation of every kernel.
        log_every: steps.
        checkpoint_every: steps.
        async_checkpoint: continue training while a checkpoint is written; costs host memory for a copy.
        preview_every: steps between pictures in TensorBoard, drawn for captions of the training set; 0 is none.
        keep_checkpoints: how many.
        max_bad_steps: end the run after so many steps in a row whose loss or gradient is not finite, or where the
            last half of all its steps were skipped.
        timestep_bins: parts of the diffusion path whose losses are logged apart.
        peak_tflops: of one device in the precision of training, for the log's MFU; None looks the device up.
        wandb_project: also log to Weights & Biases, where it is installed; "" is off.
        parallel: where a step runs, and what it recomputes.
    """

    steps: int = 250_000
    accumulation: int = 1
    learning_rate: float = 3e-4
    min_learning_rate: float = 1.5e-5
    warmup_steps: int = 4000
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    precision: Precision = "auto"
    impl: Implementation = "auto"
    log_every: int = 10
    checkpoint_every: int = 1000
    async_checkpoint: bool = False
    preview_every: int = 0
    keep_checkpoints: int = 2
    max_bad_steps: int = 20
    timestep_bins: int = 4
    peak_tflops: float | None = None
    wandb_project: str = ""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        counts = ("steps", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints", "max_bad_steps")
        for name in (*counts, "timestep_bins"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_finite(self, ("learning_rate", "eps"), ("weight_decay", "preview_every"))
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is not in 0..{self.learning_rate}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} is not in 0..{self.steps}, the steps of the run, of which it is a "
                f"part: give it too, such as {self.steps // 20} (--train.warmup-steps)"
            )
        if self.peak_tflops is not None:
            check_finite(self, ("peak_tflops",))
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, got {self.max_grad_norm}; inf does not clip")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


def learning_rate(step: int, config: TrainConfig) -> float:
    """lr of step 0, 1, ...: (step + 1) / warm-up of the peak, then half a cosine down to the minimum."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1), 1.0)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices alone (not on norms and biases). Moments are allocated at once."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
    for parameter in trained:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def step_unless(not_finite: Tensor, optimizer: torch.optim.AdamW) -> None:
    """One step, or none if `not_finite` (0-dim bool): decided on the device, without a host sync.

    The fused optimizer's own switch for mixed precision (`found_inf`) leaves weights, moments and step count alone.
    """
    optimizer.found_inf = not_finite.float()  # type: ignore[attr-defined]
    optimizer.step()


@torch.no_grad()
def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scales all gradients so that their norm is at most `largest`. -> the norm before, over all ranks' shards."""
    return whole(torch.nn.utils.clip_grad_norm_(model.parameters(), largest))


@torch.no_grad()
def average(averages: Sequence[Tensor], weights: Sequence[Tensor], step: int, decay: float) -> None:
    """average += (1 - d)·(weight - average), d = min(decay, (1 + step) / (10 + step)): early averages forget faster."""
    amount = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_([local(tensor) for tensor in averages], [local(tensor) for tensor in weights], amount)
