"""Suite "ops": patchify_noise and diffusion_loss against the eager chain and its compiled form, each checked first.

"image_side" is both in turn with the gradient, what a training step does with its images beside the network: its peak
memory shows what it is worth never to store the noise.

"seeded" makes the noise inside, as training does; eagerly that is `randn_like` and then the chain. "given" reads it.
Bytes are each input once and each output once; the share is that of this machine's copy bandwidth in the same run.
"""

import functools
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
from transfusion.kernels import diffusion_loss, patchify_noise, philox
from transfusion.kernels.testing import Verdict, judge

SUITE = "ops"
OPS = ("patchify_noise", "diffusion_loss", "image_side")
BASELINES = tuple(f"{name}, {noise}" for name in ("ours", "eager", "torch.compile") for noise in ("seeded", "given"))


class Inputs(NamedTuple):
    """What both ops read: `first`, `second` are alpha and sigma, or the weights of the data and of the noise."""

    latents: Tensor
    noise: Tensor
    first: Tensor
    second: Tensor
    seed: Tensor
    prediction: Tensor
    patch: int

    def tensors(self) -> list[Tensor]:
        return [self.latents, self.noise, self.prediction]


def pairs() -> list[tuple[str, str]]:
    """(op and images, baseline)."""
    return [(f"{op} {images}", baseline) for images in IMAGES for op in OPS for baseline in BASELINES]


def tokens(latents: Tensor, first: Tensor, second: Tensor, patch: int, noise: Tensor | None) -> Tensor:
    """The formula of patchify_noise, and of diffusion_loss's target."""
    noise = torch.randn_like(latents) if noise is None else noise
    mixed = first.view(-1, 1, 1, 1) * latents + second.view(-1, 1, 1, 1) * noise
    return rearrange(mixed, "i c (y p) (x q) -> i (y x) (p q c)", p=patch, q=patch)


def losses(prediction: Tensor, target: Tensor) -> Tensor:
    """(I,): the mean squared error of each image."""
    return (prediction.to(target.dtype) - target).square().mean((1, 2))


def run(case: str, baseline: str, effort: Effort) -> Iterator[rows.Row]:
    """The rows of one op on one kind of images by one baseline."""
    op, images = case.split(" ", 1)
    kind, noise = baseline.split(", ")
    if kind == "torch.compile" and DEVICE != "cuda":
        yield rows.row(SUITE, case, baseline, "forward", "skipped", reason="it needs a C++ compiler on a CPU")
        return
    torch._dynamo.reset()
    sets = [make(images)]
    sets += [make(images) for _ in range(copies_past_cache(sets[0].tensors()) - 1)]
    work = work_of(op, kind)
    start = time.perf_counter()
    checked = check(op, work, sets[0], noise == "given" or kind != "ours")
    conditions = {"dtype": str(DTYPE).removeprefix("torch."), "rotated": len(sets), "gate": checked}
    conditions["first_call"] = time.perf_counter() - start  # compiled, and checked
    wrong = failures(checked)
    if wrong:
        yield rows.row(SUITE, case, baseline, "forward", "failed", reason=wrong, **conditions)
        return
    for measure, figures in _measured(op, work, sets, noise == "given", effort):
        yield rows.row(SUITE, case, baseline, measure, "ok", **conditions, **figures)


def make(images: str) -> Inputs:
    """Random inputs; the prediction is a leaf."""
    *shape, patch = IMAGES[images]
    latents, noise = torch.randn(2, *shape, device=DEVICE)
    first, second = torch.rand(2, shape[0], device=DEVICE)
    seed = torch.randint(2**62, (), device=DEVICE)
    like = tokens(latents, first, second, patch, noise)
    prediction = torch.randn_like(like).to(DTYPE).requires_grad_()
    return Inputs(latents, noise, first, second, seed, prediction, patch)


Work = Callable[[Inputs, bool], Tensor]


def work_of(op: str, kind: str) -> Work:
    """A call of (inputs, whether the noise is given)."""
    ours, eager = {
        "patchify_noise": (_our_tokens, _eager_tokens),
        "diffusion_loss": (_our_losses, _eager_losses),
        "image_side": (_our_side, _eager_side),
    }[op]
    if kind == "ours":
        return ours
    return _compiled(eager) if kind == "torch.compile" else eager


def _our_tokens(x: Inputs, given: bool) -> Tensor:
    source = {"noise": x.noise} if given else {"seed": x.seed}
    return patchify_noise(x.latents, x.first, x.second, x.patch, dtype=DTYPE, **source)


def _our_losses(x: Inputs, given: bool) -> Tensor:
    source = {"noise": x.noise} if given else {"seed": x.seed}
    return diffusion_loss(x.prediction, x.latents, x.first, x.second, x.patch, **source)


def _eager_tokens(x: Inputs, given: bool) -> Tensor:
    return tokens(x.latents, x.first, x.second, x.patch, x.noise if given else None).to(DTYPE)


def _eager_losses(x: Inputs, given: bool) -> Tensor:
    return losses(x.prediction, tokens(x.latents, x.first, x.second, x.patch, x.noise if given else None))


def _our_side(x: Inputs, given: bool) -> Tensor:
    tokens_of_step = _our_tokens(x, given)  # the network holds them until its backward
    loss = _our_losses(x, given)
    del tokens_of_step
    return loss


def _eager_side(x: Inputs, given: bool) -> Tensor:
    noise = x.noise if given else torch.randn_like(x.latents)
    tokens_of_step = tokens(x.latents, x.first, x.second, x.patch, noise).to(DTYPE)
    loss = losses(x.prediction, tokens(x.latents, x.first, x.second, x.patch, noise))
    del tokens_of_step
    return loss


@functools.cache
def _compiled(function: Work) -> Work:
    return torch.compile(function, dynamic=False)


def check(op: str, work: Work, x: Inputs, given: bool) -> dict[str, Verdict]:
    """Result and gradient against float64. What draws noise itself is checked on given noise: the chain is the same."""
    noise = x.noise if given else philox.randn(tuple(x.latents.shape), x.seed)
    gold = tokens(*(t.double() for t in (x.latents, x.first, x.second)), x.patch, noise.double())
    eager = tokens(x.latents, x.first, x.second, x.patch, noise.float())
    result = work(x, given)
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
    op: str, work: Work, sets: list[Inputs], given: bool, effort: Effort
) -> Iterator[tuple[str, dict[str, Any]]]:
    def forward(number: int) -> Tensor:
        return work(sets[number % len(sets)], given)

    x = sets[0]
    read = x.latents.nbytes + (x.noise.nbytes if given else 0)
    if op == "image_side":

        def step(number: int) -> Any:
            return torch.autograd.grad(forward(number).sum(), sets[number % len(sets)].prediction)

        yield "forward + backward", _timed(step, 3 * read + 4 * x.prediction.nbytes, effort)
        return
    yield "forward", _timed(forward, read + x.prediction.nbytes, effort)
    if op == "patchify_noise":
        return
    totals = [work(each, given).sum() for each in sets]

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
