"""Suite "ops": the ops on image latents against the eager chain and its compiled form, each checked first.

"image_side" is both in turn with the gradient, what a training step does with its images beside the network: its peak
memory shows what it is worth never to store the noise.

"denoise_step" is a sampler's guided step, patches to latents.

"seeded" makes the noise inside, as training does; eagerly that is `randn_like` and then the chain. "given" reads it;
"none" is a step without any.
Bytes are each input once and each output once; the share is that of this machine's copy bandwidth in the same run.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from benchmarks import rows
from benchmarks.cases import DEVICE, DTYPE, IMAGES
from benchmarks.clock import Effort, copies_past_cache, copy_bandwidth, device_time, peak_memory
from benchmarks.gate import failures
from transfusion.kernels import denoise_step, diffusion_loss, patchify_noise, philox
from transfusion.kernels.testing import Verdict, judge

SUITE = "ops"
# Where the noise of each op comes from.
OPS = {
    "patchify_noise": ("seeded", "given"),
    "diffusion_loss": ("seeded", "given"),
    "image_side": ("seeded", "given"),
    "denoise_step": ("seeded", "none"),
}
MEASURES = {"image_side": ("forward + backward",), "diffusion_loss": ("forward", "backward")}  # others: forward
NEXT = (0.9, -0.3, 0.2)  # of the latents, the prediction and the noise in the next latents


class Inputs(NamedTuple):
    """What the ops read: `first`, `second` are alpha and sigma, or the weights of the data and of the noise; a step is
    guided by `first`, away from `base`."""

    latents: Tensor
    noise: Tensor
    first: Tensor
    second: Tensor
    seed: Tensor
    prediction: Tensor
    base: Tensor
    patch: int

    def tensors(self) -> list[Tensor]:
        return [self.latents, self.noise, self.prediction]


def pairs() -> list[tuple[str, str]]:
    """(op and images, baseline)."""
    return [
        (f"{op} {images}", f"{kind}, {noise}")
        for images in IMAGES
        for op, noises in OPS.items()
        for kind in ("ours", "eager", "torch.compile")
        for noise in noises
    ]


def tokens(latents: Tensor, first: Tensor, second: Tensor, patch: int, noise: Tensor) -> Tensor:
    """The formula of patchify_noise, and of diffusion_loss's target."""
    mixed = first.view(-1, 1, 1, 1) * latents + second.view(-1, 1, 1, 1) * noise
    return rearrange(mixed, "i c (y p) (x q) -> i (y x) (p q c)", p=patch, q=patch)


def next_latents(
    prediction: Tensor, base: Tensor, latents: Tensor, guidance: Tensor, patch: int, noise: Tensor | None
) -> Tensor:
    """The formula of a guided denoise_step, in the type of the latents."""
    base = base.to(latents.dtype)
    guided = base + guidance.view(-1, 1, 1) * (prediction.to(latents.dtype) - base)
    sides = {"p": patch, "q": patch, "y": latents.shape[2] // patch}
    a, b, c = torch.tensor(NEXT).tolist()  # the op reads them in float32
    result = a * latents + b * rearrange(guided, "i (y x) (p q c) -> i c (y p) (x q)", **sides)
    return result if noise is None else result + c * noise


def losses(prediction: Tensor, target: Tensor) -> Tensor:
    """(I,): the mean squared error of each image."""
    return (prediction.to(target.dtype) - target).square().mean((1, 2))


def run(case: str, baseline: str, effort: Effort) -> Iterator[rows.Row]:
    """The rows of one op on one kind of images by one baseline."""
    kind = baseline.split(", ")[0]
    if kind == "torch.compile" and DEVICE != "cuda":
        yield rows.row(SUITE, case, baseline, "forward", "skipped", reason="it needs a C++ compiler on a CPU")
        return
    torch._dynamo.reset()
    work = _rows(case, baseline, effort)
    measures = MEASURES.get(case.split(" ")[0], ("forward",))
    yield from rows.explained(work, (SUITE, case, baseline), measures, ours=kind != "torch.compile")


def _rows(case: str, baseline: str, effort: Effort) -> Iterator[rows.Row]:
    op, images = case.split(" ", 1)
    kind, noise = baseline.split(", ")
    sets = [make(images)]
    sets += [make(images) for _ in range(copies_past_cache(sets[0].tensors()) - 1)]
    work = work_of(op, kind)
    start = time.perf_counter()
    checked = check(op, kind, sets[0], noise)
    conditions = {"dtype": str(DTYPE).removeprefix("torch."), "rotated": len(sets), "gate": checked}
    conditions["first_call"] = time.perf_counter() - start  # compiled, and checked
    wrong = failures(checked)
    if wrong:
        yield rows.row(SUITE, case, baseline, "forward", "failed", reason=wrong, **conditions)
        return
    for measure, figures in _measured(op, work, sets, noise, effort):
        yield rows.row(SUITE, case, baseline, measure, "ok", **conditions, **figures)


def make(images: str) -> Inputs:
    """Random inputs; the prediction is a leaf."""
    *shape, patch = IMAGES[images]
    latents, noise = torch.randn(2, *shape, device=DEVICE)
    first, second = torch.rand(2, shape[0], device=DEVICE)
    seed = torch.randint(2**62, (), device=DEVICE)
    like = tokens(latents, first, second, patch, noise)
    prediction, base = (torch.randn_like(like).to(DTYPE) for _ in range(2))
    return Inputs(latents, noise, first, second, seed, prediction.requires_grad_(), base, patch)


Work = Callable[[Inputs, str], Tensor]


def work_of(op: str, kind: str) -> Work:
    """A call of (inputs, where the noise comes from)."""
    ours, eager = {
        "patchify_noise": (_our_tokens, _eager_tokens),
        "diffusion_loss": (_our_losses, _eager_losses),
        "image_side": (_our_side, _eager_side),
        "denoise_step": (_our_step, _eager_step),
    }[op]
    if kind == "ours":
        return ours
    return _compiled(eager) if kind == "torch.compile" else eager


def _our_noise(x: Inputs, noise: str) -> dict[str, Tensor]:
    return {"seeded": {"seed": x.seed}, "given": {"noise": x.noise}, "none": {}}[noise]


def _eager_noise(x: Inputs, noise: str) -> Tensor:
    return torch.randn_like(x.latents) if noise == "seeded" else x.noise


def _our_tokens(x: Inputs, noise: str) -> Tensor:
    return patchify_noise(x.latents, x.first, x.second, x.patch, dtype=DTYPE, **_our_noise(x, noise))


def _our_losses(x: Inputs, noise: str) -> Tensor:
    return diffusion_loss(x.prediction, x.latents, x.first, x.second, x.patch, **_our_noise(x, noise))


def _eager_tokens(x: Inputs, noise: str) -> Tensor:
    return tokens(x.latents, x.first, x.second, x.patch, _eager_noise(x, noise)).to(DTYPE)


def _eager_losses(x: Inputs, noise: str) -> Tensor:
    return losses(x.prediction, tokens(x.latents, x.first, x.second, x.patch, _eager_noise(x, noise)))


def _our_side(x: Inputs, noise: str) -> Tensor:
    tokens_of_step = _our_tokens(x, noise)  # the network holds them until its backward
    loss = _our_losses(x, noise)
    del tokens_of_step
    return loss


def _eager_side(x: Inputs, noise: str) -> Tensor:
    drawn = _eager_noise(x, noise)
    tokens_of_step = tokens(x.latents, x.first, x.second, x.patch, drawn).to(DTYPE)
    loss = losses(x.prediction, tokens(x.latents, x.first, x.second, x.patch, drawn))
    del tokens_of_step
    return loss


def _our_step(x: Inputs, noise: str) -> Tensor:
    guided = {"unconditional": x.base, "guidance": x.first}
    coefficients = _coefficients(x.latents.device)
    return denoise_step(x.prediction.detach(), x.latents, coefficients, x.patch, **guided, **_our_noise(x, noise))


def _eager_step(x: Inputs, noise: str) -> Tensor:
    drawn = None if noise == "none" else _eager_noise(x, noise)
    return next_latents(x.prediction.detach(), x.base, x.latents, x.first, x.patch, drawn)


@functools.cache
def _coefficients(device: torch.device) -> Tensor:
    a, b, c = NEXT
    return torch.tensor([a, b, 0.0, c, 0.0, 0.0, math.inf], device=device)


@functools.cache
def _compiled(function: Work) -> Work:
    return torch.compile(function, dynamic=False)


def check(op: str, kind: str, x: Inputs, noise: str) -> dict[str, Verdict]:
    """Result and gradient against float64. What draws by `randn_like` is checked on given noise, by the same chain."""
    if noise == "seeded" and kind != "ours":
        noise = "given"
    result = work_of(op, kind)(x, noise)
    drawn = {"given": x.noise, "seeded": philox.randn(tuple(x.latents.shape), x.seed), "none": None}[noise]
    if op == "denoise_step":
        inputs = (x.prediction.detach(), x.base, x.latents, x.first)
        eager, gold = (
            next_latents(*(t.to(dtype) for t in inputs), x.patch, None if drawn is None else drawn.to(dtype))
            for dtype in (torch.float32, torch.float64)
        )
        return {"latents": judge(result, eager, gold)}
    assert drawn is not None
    gold = tokens(*(t.double() for t in (x.latents, x.first, x.second)), x.patch, drawn.double())
    eager = tokens(x.latents, x.first, x.second, x.patch, drawn.float())
    if op == "patchify_noise":
        return {"out": judge(result, eager.to(DTYPE), gold, factor=1)}
    (gradient,) = torch.autograd.grad(result.sum(), x.prediction)
    (loss, dp), (gold_loss, gold_dp) = (_losses_and_gradient(x.prediction, t) for t in (eager, gold))
    return {"out": judge(result.detach(), loss, gold_loss), "gradient": judge(gradient, dp.to(DTYPE), gold_dp)}


def _losses_and_gradient(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = prediction.detach().to(target.dtype).requires_grad_()
    result = losses(leaf, target)
    return result.detach(), torch.autograd.grad(result.sum(), leaf)[0]


def _measured(
    op: str, work: Work, sets: list[Inputs], noise: str, effort: Effort
) -> Iterator[tuple[str, dict[str, Any]]]:
    def forward(number: int) -> Tensor:
        return work(sets[number % len(sets)], noise)

    x = sets[0]
    read = x.latents.nbytes + (x.noise.nbytes if noise == "given" else 0)
    if op == "image_side":

        def step(number: int) -> Any:
            return torch.autograd.grad(forward(number).sum(), sets[number % len(sets)].prediction)

        yield "forward + backward", _timed(step, 3 * read + 4 * x.prediction.nbytes, effort)
        return
    if op == "denoise_step":
        yield "forward", _timed(forward, 2 * x.latents.nbytes + 2 * x.prediction.nbytes, effort)
        return
    yield "forward", _timed(forward, read + x.prediction.nbytes, effort)
    if op == "patchify_noise":
        return
    totals = [work(each, noise).sum() for each in sets]

    def backward(number: int) -> Any:
        place = number % len(sets)
        return torch.autograd.grad(totals[place], sets[place].prediction, retain_graph=True)

    yield "backward", _timed(backward, read + 2 * x.prediction.nbytes, effort)


def _timed(call: Callable[[int], Any], moved: int, effort: Effort) -> dict[str, Any]:
    with peak_memory() as peak:
        call(0)
    times = device_time(call, effort)
    return {
        **times._asdict(),
        "bytes": moved,
        "gigabytes_per_second": moved / times.p50 / 1e9,
        "ceiling_gigabytes_per_second": copy_bandwidth() / 1e9,
        "bound": "memory",
        "share": moved / times.p50 / copy_bandwidth(),
        "peak_bytes": (peak or [None])[0],
    }
