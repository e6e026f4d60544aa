"""The machine itself: what small kernels compute on it is what torch computes, and what no GPU would do is a fault."""

import pytest
import torch
import triton
import triton.language as tl
from ptx_machine import Device, Fault


@triton.jit
def integers_kernel(p_a, p_b, p_out, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(p_a + at), tl.load(p_b + at)
    tl.store(p_out + at, a // b)
    tl.store(p_out + N + at, a % b)
    tl.store(p_out + 2 * N + at, (a << 3) ^ (b >> 1))
    tl.store(p_out + 3 * N + at, tl.umulhi(a, b))
    tl.store(p_out + 4 * N + at, tl.cumsum(a))
    tl.store(p_out + 5 * N + at, tl.where((a < b) & (b > 0), tl.max(a), tl.sum(b)))


def test_integers(seed: int) -> None:
    a, b = torch.randint(-(2**31), 2**31, (2, 256), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    b[b == 0] = 1
    out = torch.zeros(6, 256, dtype=torch.int32)
    with Device(seed):
        integers_kernel[(1,)](a, b, out, 256)
    wide_a, wide_b = a.long(), b.long()
    high = torch.zeros(256, dtype=torch.int64)
    for at, (x, y) in enumerate(zip((wide_a & 0xFFFFFFFF).tolist(), (wide_b & 0xFFFFFFFF).tolist(), strict=True)):
        high[at] = x * y >> 32
    expected = [
        torch.div(wide_a, wide_b, rounding_mode="trunc"),
        torch.fmod(wide_a, wide_b),
        (wide_a << 3) ^ (wide_b >> 1),
        high,
        wide_a.cumsum(0),
        torch.where((a < b) & (b > 0), wide_a.max(), wide_b.sum()),
    ]
    assert torch.equal(out, torch.stack(expected).to(torch.int32))  # modulo 2^32


@triton.jit
def numbers_kernel(p_x, p_half, p_brain, p_float, p_int, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(p_x + at)
    tl.store(p_half + at, x.to(tl.float16))
    tl.store(p_brain + at, x.to(tl.bfloat16))
    tl.store(p_float + at, tl.exp2(tl.load(p_half + at).to(tl.float32)) / (1.0 + tl.abs(x)))
    tl.store(p_int + at, (x * 1e6).to(tl.int32))


def test_numbers(seed: int) -> None:
    """Rounding to the nearest, ties to even, infinities and NaN; towards zero to integers."""
    x = 4 * torch.randn(512, generator=torch.Generator().manual_seed(seed))
    x[:5] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1 + 2**-8, 1 + 2**-11 + 2**-22])
    half, brain, number = (torch.zeros(512, dtype=kind) for kind in (torch.float16, torch.bfloat16, torch.float32))
    integer = torch.zeros(512, dtype=torch.int32)
    with Device(seed):
        numbers_kernel[(1,)](x, half, brain, number, integer, 512)
    assert torch.equal(half.nan_to_num(7), x.half().nan_to_num(7)) and half[2].isnan()
    assert torch.equal(brain.nan_to_num(7), x.bfloat16().nan_to_num(7)) and brain[2].isnan()
    torch.testing.assert_close(number, torch.exp2(x.half().float()) / (1 + x.abs()), equal_nan=True)
    assert torch.equal(integer[3:], (x * 1e6)[3:].to(torch.int32))


@triton.jit
def product_kernel(
    p_a, p_b, p_c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
    REGISTERS: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.trans(tl.load(p_a + k[:, None] * M + m)) if A_TURNED else tl.load(p_a + m[:, None] * K + k)
    b = tl.trans(tl.load(p_b + n[:, None] * K + k)) if B_TURNED else tl.load(p_b + k[:, None] * N + n)
    if REGISTERS:
        a = (a.to(tl.float32) * 0.3).to(a.dtype)
    tl.store(p_c + m[:, None] * N + n, tl.dot(a, b))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("a_turned", "b_turned", "registers"), [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 1, 1)])
def test_products(a_turned: int, b_turned: int, registers: int, capability: int, seed: int) -> None:
    """mma on sm_80, wgmma on sm_90: operands of either order in memory, in lines of 32, 64 and 128 bytes."""
    generator = torch.Generator().manual_seed(seed)
    for m, n, k in ((64, 64, 64), (128, 32, 16), (64, 128, 32), (128, 16, 128)):
        dtype = torch.float16 if m == 64 else torch.bfloat16
        a, b = torch.randn(m, k, generator=generator).to(dtype), torch.randn(k, n, generator=generator).to(dtype)
        in_memory = (a.T.contiguous() if a_turned else a, b.T.contiguous() if b_turned else b)
        c = torch.full((m, n), torch.nan)
        with Device(seed, capability) as device:
            product_kernel[(1,)](*in_memory, c, m, n, k, a_turned, b_turned, registers)
        (compiled,) = device.compiled
        assert ("wgmma" in compiled.asm["ptx"]) == (capability == 90), (m, n, k)
        a = (a.float() * 0.3).to(dtype) if registers else a
        torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-4, atol=1e-4)


@triton.jit
def copy_kernel(p_in, p_out, length, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(p_out + at, tl.load(p_in + at), mask=at < length)


def test_a_touch_beyond_a_tensor_is_a_fault(seed: int) -> None:
    """Of what is stored as of what is loaded, though storage goes on behind it."""
    whole = torch.arange(300.0)
    with Device(seed):
        copy_kernel[(2,)](whole[:256], torch.zeros(256), 256, 128)
        with pytest.raises(Fault, match="belong to no tensor"):
            copy_kernel[(2,)](whole[:255], torch.zeros(256), 256, 128)
        with pytest.raises(Fault, match="belong to no tensor"):
            copy_kernel[(2,)](whole[:256], torch.zeros(300)[:255], 256, 128)
        with pytest.raises(Fault, match=r"line .* ld\.global"):
            copy_kernel[(3,)](whole, torch.zeros(300), 300, 128)


def test_unknown_instructions_are_named(seed: int) -> None:
    with Device(seed) as device, pytest.raises(NotImplementedError, match=r"vote\.sync"):
        device.edit = lambda name, ptx: ptx.replace("\tret;", "\tvote.sync.all.pred %p1, %p1, -1;\n\tret;")
        copy_kernel[(1,)](torch.zeros(8), torch.zeros(8), 8, 8)
