"""How `transfusion_attention` is judged: forward and every gradient against the formula in float64, on random inputs.

The error of the formula in the inputs' own precision bounds a kernel's, see `transfusion.kernels.testing.judge`.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfusion.kernels import tuning
from transfusion.kernels.attention import reference
from transfusion.kernels.attention.op import transfusion_attention
from transfusion.kernels.interval_mask import IntervalMask
from transfusion.kernels.testing import LAYOUTS, Layout, Verdict, judge, random_layout

RESULTS = ("out", "lse", "dq", "dk", "dv")


class Case(NamedTuple):
    """Leaves to differentiate, the mask, and the gradients that come back from above."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: IntervalMask
    grad_out: Tensor
    grad_lse: Tensor


def make_case(
    mask: IntervalMask,
    dtype: torch.dtype,
    generator: torch.Generator,
    head_dim: int = 16,
    heads: tuple[int, int] = (2, 1),
    batch: int | None = None,
) -> Case:
    """Normal inputs on the mask's device, drawn from a CPU generator; `heads` of queries and of keys.

    A row of few queries gets several batch elements: the largest of a handful of errors says little.
    """
    batch = batch or max(mask.batch_size, 8 // mask.num_queries)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(mask.device, to)

    q = normal(batch, heads[0], mask.num_queries, head_dim)
    k, v = (normal(batch, heads[1], mask.num_keys, head_dim) for _ in range(2))
    return Case(q, k, v, mask, normal(*q.shape), normal(*q.shape[:3], to=torch.float32))


def formula(case: Case, wide: torch.dtype, compute: torch.dtype) -> list[Tensor]:
    """`RESULTS` by the reference's formulas on inputs of dtype `wide`, carried out in `compute`."""
    q, k, v, grad_out, grad_lse = (t.to(wide) for t in (case.q, case.k, case.v, case.grad_out, case.grad_lse))
    scale = case.q.shape[-1] ** -0.5
    out, lse = reference.forward(q, k, v, case.mask.intervals, scale, compute)
    return [out, lse, *reference.backward(grad_out, grad_lse, q, k, v, out, lse, case.mask.intervals, scale, compute)]


def eager_orders(case: Case, count: int = 64) -> list[list[Tensor]]:
    """The formula in the inputs' own precision, `count` times with head dimension and keys, so their sums, reordered.

    lse is rounded once, for a whole row of probabilities: one order of keys may round it exactly, by luck. Backward
    sums its scores in an order of its own, as kernels do: with the forward's, their errors would cancel those of lse.
    The orders are the same at every call.
    """
    dtype, scale, generator = case.q.dtype, case.q.shape[-1] ** -0.5, torch.Generator().manual_seed(0)

    def one() -> list[Tensor]:
        lanes, _, shuffled = _reordered(case, generator)
        out, lse = reference.forward(*shuffled[:3], shuffled.mask.intervals, scale, dtype)
        out = out[..., lanes.argsort()]
        lanes, keys, shuffled = _reordered(case, generator)
        grads = reference.backward(
            shuffled.grad_out, case.grad_lse, *shuffled[:3], out[..., lanes], lse, shuffled.mask.intervals, scale, dtype
        )
        dq, dk, dv = (grad[..., lanes.argsort()] for grad in grads)
        return [out, lse, dq, dk[:, :, keys.argsort()], dv[:, :, keys.argsort()]]

    return [list(results) for results in zip(*(one() for _ in range(count)), strict=True)]


def _reordered(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor, Case]:
    """Random orders of the head dimension and of the keys, and the case in them."""
    sizes = case.q.shape[-1], case.k.shape[2]
    lanes, keys = (torch.randperm(size, generator=generator).to(case.q.device) for size in sizes)
    mask = IntervalMask(case.mask.query_start[:, keys], case.mask.query_end[:, keys], case.mask.num_queries)
    k, v = (t[:, :, keys][..., lanes] for t in (case.k, case.v))
    return lanes, keys, Case(case.q[..., lanes], k, v, mask, case.grad_out[..., lanes], case.grad_lse)


def run(case: Case, impl: str) -> list[Tensor]:
    """`RESULTS` of the op."""
    q, k, v = (t.detach().requires_grad_() for t in (case.q, case.k, case.v))
    out, lse = transfusion_attention(q, k, v, case.mask, return_lse=True, impl=impl)
    grads = torch.autograd.grad([out, lse], [q, k, v], [case.grad_out, case.grad_lse])
    return [out.detach(), lse.detach(), *grads]


def verdicts(case: Case, results: list[Tensor]) -> dict[str, Verdict]:
    """Each of `RESULTS` against the formula in float64."""
    gold = formula(case, torch.float64, torch.float64)
    judged = map(judge, results, eager_orders(case), gold)
    return dict(zip(RESULTS, judged, strict=True))


def checks(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Callable[[], dict[str, Verdict]]]]:
    """(what, a call that judges it), in turn, of the Triton kernels over layouts, sizes and heads."""
    # A GPU's tiles are several times as wide as the interpreter's; an odd factor keeps the sizes undivided.
    factor = 17 if device.type == "cuda" else 1

    def check(mask: IntervalMask, **shape: Any) -> dict[str, Verdict]:
        case = make_case(mask.to(device), dtype, generator, **shape)
        return verdicts(case, run(case, "triton"))

    for name, layout in LAYOUTS.items():
        yield name, partial(check, _enlarged(layout, factor).mask(), heads=(1, 1))
    images = _enlarged(LAYOUTS["adjacent_images"], factor).mask()
    for head_dim in (24, 64, 80, 128, 160, 256):
        yield f"head_dim_{head_dim}", partial(check, images, head_dim=head_dim, heads=(1, 1))
    for head_dim in (64, 128) if device.type == "cuda" else (16,):
        yield f"unsplit_head_dim_{head_dim}", partial(check, **unsplit(device), head_dim=head_dim)
    rng = random.Random(generator.initial_seed())
    for heads in ((2, 2), (4, 2), (3, 1)):
        masks = [_enlarged(random_layout(rng, 50), factor).mask() for _ in range(2)]
        yield f"random_layouts_{heads[0]}_heads_over_{heads[1]}", partial(check, IntervalMask.stack(masks), heads=heads)
    lengths = torch.randint(0, 90 * factor, (3,), generator=generator)
    for name, new in (("one_token", Layout(1, [])), ("an_image", Layout(30 * factor, [(0, 30 * factor)]))):
        cache = IntervalMask.continuation(new.mask(), lengths, 120 * factor)
        yield f"{name}_over_a_cache", partial(check, cache, heads=(4, 2), batch=3)
    for queries, keys in ((1, 65), (33, 7), (5, 100)):
        start, end = torch.randint(-3, queries * factor + 3, (2, 1, keys * factor), generator=generator)
        mask = IntervalMask(start, end, queries * factor)
        yield f"random_intervals_{mask.num_queries}_by_{mask.num_keys}", partial(check, mask, batch=2)


def unsplit(device: torch.device) -> dict[str, Any]:
    """Mask, heads and batch of so many programs that a forward has none to spare for a second one of the same block.

    Lines of tiles are long enough for full ones beside the masked.
    """
    factor, tile = (17, 128) if device.type == "cuda" else (1, 32)  # the widest that a table ships
    mask, heads = _enlarged(LAYOUTS["adjacent_images"], factor).mask(), (4, 2)
    least = -(-mask.num_queries // tile) * heads[0]  # programs of one row
    return {"mask": mask, "heads": heads, "batch": -(-tuning.processors(device) // least)}


def _enlarged(layout: Layout, factor: int) -> Layout:
    images = [(first * factor, last * factor) for first, last in layout.images]
    documents = None if layout.documents is None else [length * factor for length in layout.documents]
    return Layout(layout.length * factor, images, documents, layout.hidden)
