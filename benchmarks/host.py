"""Suite "host": what a call costs the host, on sizes so small that the device is never behind.

It is what a call takes that has little to compute. A call's time ends where it is queued; each begins with an idle
device. Masks have their tiles, as from the second layer on.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import rows
from benchmarks.cases import DEVICE, DTYPE
from benchmarks.clock import Effort, Times, quantiles
from benchmarks.gate import failures
from transfusion.kernels import IntervalMask, denoise_step, diffusion_loss, patchify_noise, transfusion_attention
from transfusion.kernels.testing import Verdict, judge

SUITE = "host"
ATTENTION = ("attention", "attention forward + backward", "attention over a cache")
CASES = (*ATTENTION, "patchify_noise", "diffusion_loss", "denoise_step")

Call = Callable[[], Any]


def pairs() -> list[tuple[str, str]]:
    """(case, baseline) of the suite."""
    return [(case, baseline) for case in CASES for baseline in ("ours", *["sdpa causal"] * (case in ATTENTION[:2]))]


def why_not() -> str | None:
    """Why there is nothing to time here."""
    return None if DEVICE == "cuda" else "without a device to queue work for, a call's time is its computation"


def run(case: str, baseline: str, effort: Effort) -> Iterator[rows.Row]:
    """The time of a call, after its results passed the check."""
    what = (SUITE, case, baseline, "call")
    if reason := why_not():
        yield rows.row(*what, "skipped", reason=reason)
        return
    yield from rows.explained(_rows(case, baseline, effort), what[:3], what[3:], ours=baseline == "ours")


def _rows(case: str, baseline: str, effort: Effort) -> Iterator[rows.Row]:
    what = (SUITE, case, baseline, "call")
    if reason := failures(check(case, baseline)):
        yield rows.row(*what, "failed", reason=reason)
        return
    yield rows.row(*what, "ok", **host_time(call_of(case, baseline), effort)._asdict())


def host_time(call: Call, effort: Effort) -> Times:
    """Until a call returns. The first calls, which compile, are not in it."""
    for _ in range(20):
        call()
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < effort.least or (time.perf_counter() - began < effort.seconds and len(samples) < effort.most):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return quantiles(samples)


def check(case: str, baseline: str) -> dict[str, Verdict]:
    """Each result of the very call that is timed, beside the reference in its dtype and in float64."""
    found, eager = _tensors(call_of(case, baseline)()), _tensors(call_of(case, "reference")())
    gold = _tensors(call_of(case, "reference", torch.float64)())
    results = enumerate(zip(found, eager, gold, strict=True))
    return {f"result {number}": judge(*each) for number, each in results}


def _tensors(result: Any) -> list[Tensor]:
    return [t.detach() for t in (result if isinstance(result, tuple) else (result,))]


def call_of(case: str, baseline: str, dtype: torch.dtype = DTYPE) -> Call:
    """The call, on the same numbers for every baseline; of "reference" too, in a `dtype` of choice."""
    impl = "auto" if baseline == "ours" else "reference"
    generator = torch.Generator(DEVICE).manual_seed(0)

    def numbers(*shape: int, of: torch.dtype = DTYPE) -> Tensor:
        drawn = torch.randn(shape, device=DEVICE, generator=generator).to(of)
        return drawn.to(torch.float64) if dtype == torch.float64 else drawn

    if case in ATTENTION:
        return _attention_call(case, None if baseline == "sdpa causal" else impl, numbers)
    latents, tokens = numbers(2, 8, 8, 8, of=torch.float32), numbers(2, 16, 32)
    first, second = torch.rand(2, 2, device=DEVICE, generator=generator)
    seed, coefficients = torch.tensor(5, device=DEVICE), torch.rand(7, device=DEVICE, generator=generator)
    if case == "patchify_noise":
        return lambda: patchify_noise(latents, first, second, 2, seed=seed, dtype=dtype, impl=impl)
    if case == "diffusion_loss":
        return lambda: diffusion_loss(tokens, latents, first, second, 2, seed=seed, impl=impl)
    return lambda: denoise_step(tokens, latents, coefficients, 2, seed=seed, impl=impl)


def _attention_call(case: str, impl: str | None, numbers: Callable[..., Tensor]) -> Call:
    """By `impl` of ours, or by PyTorch's own causal attention."""
    q, k, v = (numbers(1, 4, 128, 64) for _ in range(3))
    mask = IntervalMask.causal(128, DEVICE)
    if case == ATTENTION[2]:
        q = q[:, :, :1]
        mask = IntervalMask.continuation(IntervalMask.causal(1, DEVICE), torch.tensor([100], device=DEVICE), 128)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if impl is None:
            return scaled_dot_product_attention(q, k, v, is_causal=True)
        return transfusion_attention(q, k, v, mask, impl=impl)

    if case != ATTENTION[1]:
        return lambda: attend(q, k, v)
    above, leaves = numbers(1, 4, 128, 64), [t.requires_grad_() for t in (q, k, v)]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, above)
