"""What attention is compared with: eager, torch.compile, SDPA, FlexAttention; other libraries are in libraries.py."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.adapter import Baseline
from benchmarks.cases import DEVICE, AttentionCase
from benchmarks.libraries import CudnnFlex, FlashAttention4
from transfusion.kernels import IntervalMask, prepare_attention
from transfusion.kernels.attention import reference, torch_paths


class Ours(Baseline):
    """What `impl="auto"` takes: the Triton kernels on CUDA, elsewhere the fastest path that PyTorch has."""

    def __init__(self) -> None:
        super().__init__("ours", "triton" if DEVICE == "cuda" else "auto", ours=True)

    def prepare(self, mask: IntervalMask, q: Tensor, k: Tensor, v: Tensor) -> Any:
        batch, heads, _, head_dim = q.shape
        sizes = {"batch": batch, "heads": heads, "kv_heads": k.shape[1], "head_dim": head_dim}
        trains = torch.is_grad_enabled() and q.requires_grad
        prepare_attention(mask, dtype=q.dtype, needs_grad=trains, impl=self.impl, **sizes)
        return mask


class Eager(Baseline):
    """The formula, eagerly: every score in memory, several times over."""

    measures = ("forward", "backward")

    def __init__(self) -> None:
        super().__init__("eager", "reference", ours=True)

    def why_not(self, case: AttentionCase) -> str | None:
        return scores_too_large(case, bytes_each=20)


class Compiled(Baseline):
    """`torch.compile` of the formula."""

    measures = ("forward", "backward")

    def __init__(self) -> None:
        super().__init__("torch.compile", "reference")

    def why_not(self, case: AttentionCase) -> str | None:
        if DEVICE != "cuda":
            return "the compiled formula needs a C++ compiler and minutes on a CPU; it is a baseline of GPUs"
        return scores_too_large(case, bytes_each=16)

    def __call__(self, prepared: IntervalMask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[3] ** -0.5
        out: Tensor = _compiled(reference.forward)(q, k, v, prepared.intervals, scale)[0]
        return out


class DenseSdpa(Baseline):
    """PyTorch's SDPA under the mask's dense form, uncut on a CPU too.

    With a mask no fused path takes grouped heads, and the one that does makes the scores of all heads, which do not
    fit. So each key head is copied for the query heads that read it, as a user would; the copies are timed.
    """

    def __init__(self) -> None:
        super().__init__("sdpa dense", "sdpa")

    def why_not(self, case: AttentionCase) -> str | None:
        return scores_too_large(case, bytes_each=8, heads=1)

    def prepare(self, mask: IntervalMask, q: Tensor, k: Tensor, v: Tensor) -> Any:
        torch_paths.prepare_dense(mask)
        return mask

    def __call__(self, prepared: IntervalMask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[1] != k.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return torch_paths.dense_sdpa(q, k, v, prepared, q.shape[3] ** -0.5)


class SpeedOfLight(Baseline):
    """A vendor's kernel without the mask: causal (full for the full cases), the same shapes, FLOPs of its own mask."""

    measures = ("forward", "backward")

    def __init__(self, name: str, backend: SDPBackend) -> None:
        super().__init__(name, "sdpa")
        self.backend = backend

    def why_not(self, case: AttentionCase) -> str | None:
        if DEVICE != "cuda":
            return "it runs on CUDA only"
        return None if case.layout != "continuation" else "queries over a cache are not a causal square"

    def mask(self, case: AttentionCase, mask: IntervalMask) -> IntervalMask:
        return mask if case.layout in ("causal", "full") else IntervalMask.causal(case.queries, mask.device)

    def prepare(self, mask: IntervalMask, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return mask.once("is causal", lambda: bool(mask.query_start[0, -1] > 0))

    def __call__(self, prepared: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(self.backend):
            grouped = q.shape[1] != k.shape[1]
            return functional.scaled_dot_product_attention(q, k, v, is_causal=prepared, enable_gqa=grouped)


class Flex(Baseline):
    """Compiled FlexAttention under the BlockMask that `to_block_mask` makes from tile extremes: the fair way."""

    def __init__(self) -> None:
        super().__init__("flex", "flex")

    def why_not(self, case: AttentionCase) -> str | None:
        return None if DEVICE == "cuda" else "FlexAttention compiles for minutes on a CPU and has no backward there"

    def prepare(self, mask: IntervalMask, q: Tensor, k: Tensor, v: Tensor) -> Any:
        torch_paths.prepare_flex(mask)
        return mask


class CreateBlockMask(Baseline):
    """How a user of FlexAttention makes the mask: `create_block_mask`, plain or compiled; the rest is as for `flex`."""

    measures = ("prepare",)

    def __init__(self, compiled: bool) -> None:
        super().__init__("create_block_mask compiled" if compiled else "create_block_mask", "flex")
        self.compiled = compiled

    def why_not(self, case: AttentionCase) -> str | None:
        if self.compiled and DEVICE != "cuda":
            return "it is compiled for minutes on a CPU"
        return None if self.compiled else scores_too_large(case, bytes_each=10, heads=1)

    def prepare(self, mask: IntervalMask, q: Tensor, k: Tensor, v: Tensor) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        start, end, rows = mask.query_start.contiguous(), mask.query_end.contiguous(), mask.batch_size

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            row = b if rows > 1 else b * 0
            return (start[row, key] <= query) & (query < end[row, key])

        make: Callable[..., Any] = _compiled(create_block_mask) if self.compiled else create_block_mask
        return make(visible, rows if rows > 1 else None, None, mask.num_queries, mask.num_keys, device=mask.device)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def scores_too_large(case: AttentionCase, bytes_each: int, heads: int | None = None) -> str | None:
    """The reason to leave out what holds `bytes_each` bytes for every (row, head, query, key) at once."""
    wanted = case.batch * (heads or case.heads) * case.queries * case.keys * bytes_each
    room = torch.cuda.get_device_properties(0).total_memory // 2 if DEVICE == "cuda" else 2 << 30
    if wanted <= room:
        return None
    return f"its matrices of scores would take {wanted / 2**30:.0f} GiB, more than half of the memory"


BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Ours(),
        Flex(),
        SpeedOfLight("cudnn causal", SDPBackend.CUDNN_ATTENTION),
        SpeedOfLight("flash causal", SDPBackend.FLASH_ATTENTION),
        FlashAttention4(),
        CudnnFlex(),
        DenseSdpa(),
        CreateBlockMask(compiled=True),
        CreateBlockMask(compiled=False),
        Compiled(),
        Eager(),
    )
}
