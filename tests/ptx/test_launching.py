"""`launch`: what is looked up is what Triton's JIT would have launched, and is given the same."""

import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from ptx_machine import Device
from torch import Tensor

from transfusion.kernels import IntervalMask, diffusion_loss, patchify_noise, transfusion_attention
from transfusion.kernels.attention.kernel import warp_specialised
from transfusion.kernels.attention.plan import plan_forward
from transfusion.kernels.launching import launch


@triton.jit
def _scale_kernel(source, offset, result, stride, count, factor, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    value = tl.load(source + index * stride, mask=index < count, other=0.0).to(tl.float32) * factor
    if offset is not None:
        value += tl.load(offset)
    tl.store(result + index, value + FIRST, mask=index < count)


Launch = tuple[tuple[int, ...], Any, tuple[Any, ...]]


@pytest.fixture
def launches(device: Device, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Grid, what was compiled and arguments of each launch."""
    seen: list[Launch] = []
    execute = Device.launch

    def record(self: Device, *call: Any) -> None:
        seen.append((call[:3], call[4], call[9:]))
        execute(self, *call)

    monkeypatch.setattr(Device, "launch", record)
    return seen


def alike(a: Any, b: Any) -> bool:
    """Equal, or tensors of one kind: each call has results of its own. Descriptors by what they describe."""
    if hasattr(a, "base"):
        return (
            a.shape == b.shape and a.strides == b.strides and a.block_shape == b.block_shape and alike(a.base, b.base)
        )
    if isinstance(a, Tensor):
        return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    return type(a) is type(b) and a == b


def test_kernels_of_the_library_are_launched_alike(launches: list[Launch]) -> None:
    """The first call's launches are the JIT's, the second's are looked up."""
    leaves = list(torch.randn(3, 1, 2, 40, 64, dtype=torch.bfloat16).unbind())
    latents, seed, alpha, sigma = torch.randn(1, 4, 8, 8), torch.tensor(3), torch.rand(1), torch.rand(1)

    def calls() -> None:
        q, k, v = (t.clone().requires_grad_() for t in leaves)
        mask = IntervalMask.from_spans(40, [(3, 20)])
        out = transfusion_attention(q, k, v, mask, impl="triton")
        out.backward(leaves[0])
        tokens = patchify_noise(latents, alpha, sigma, 2, seed=seed, impl="triton").requires_grad_()
        loss = diffusion_loss(tokens, latents, alpha, sigma, patch_size=2, seed=seed, impl="triton")
        loss.sum().backward()
        transfusion_attention(q[:, :, :1], k, v, IntervalMask.full(1, 40, "cpu"), impl="triton")
        plan = plan_forward(q.device, q.dtype, 1, 2, 2, 40, 40, 64).launch._replace(num_warps=12, block_k=128)
        out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
        tiles = mask.query_tiles(plan.block_q, plan.block_k)
        with torch.no_grad():
            warp_specialised.forward(q, k, v, mask.intervals, tiles, 0.1, plan._replace(num_stages=2), out, lse)

    calls()
    first = list(launches)
    launches.clear()
    calls()
    assert len({id(compiled) for _, compiled, _ in first}) >= 11
    assert len(first) == len(launches)
    for (grid, compiled, arguments), (grid_then, compiled_then, arguments_then) in zip(first, launches, strict=True):
        assert grid == grid_then and compiled is compiled_then
        assert all(map(alike, arguments, arguments_then)), compiled.name


def test_what_the_jit_tells_apart_is_told_apart(launches: list[Launch], seed: int) -> None:
    """In any order, so that what is right for another call is at hand; the machine faults where addresses are not."""
    numbers = torch.randn(70)
    sources = [numbers[:32], numbers[1:33], numbers[4:36], numbers.bfloat16()[:32], numbers.bfloat16()[1:33]]
    variations = [
        (source, offset, stride, count, factor, first, block, warps)
        for source in sources
        for factor in (0.5, 1, 1.0)
        for offset in (None, torch.tensor(2.0))
        for stride in (0, 1, 2)
        for count, block in ((1, 16), (16, 16), (13, 32))
        for first, warps in ((1.0, 1), (2.0, 1), (1.0, 2))
    ]
    for source, offset, stride, count, factor, first, block, warps in random.Random(seed).sample(variations, 60) * 2:
        result = torch.full((32,), torch.nan)
        arguments = (source, offset, result, stride, count, factor)
        options: dict[str, Any] = {"FIRST": first, "BLOCK": block, "num_warps": warps}
        launch(_scale_kernel, 1, *arguments, **options)
        index = torch.arange(count) * stride
        taken = torch.as_strided(source, (count,), (stride,)) if stride else source[index]
        wanted = taken.float() * factor + (0 if offset is None else offset) + first
        assert torch.equal(result[:count], wanted) and result[count:].isnan().all()
        _scale_kernel[(1,)](*arguments, **options)
        assert launches[-2][1] is launches[-1][1], "what the JIT compiles for this call was not launched"


def test_keys_are_kept_to_a_limit(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from transfusion.kernels import launching

    monkeypatch.setattr(launching, "_LIMIT", 3)
    for count in range(1, 9):
        result = torch.full((32,), torch.nan)
        launch(_scale_kernel, 1, torch.ones(32), None, result, 1, count, 0.5, FIRST=1.0, BLOCK=32, num_warps=1)
        assert result[:count].eq(1.5).all() and result[count:].isnan().all()
        ((_, known),) = launching._KNOWN.values()
        assert 1 <= len(known) <= 3
