"""philox: known answers, statistics of the normals, and the kernels' generator against the one in plain torch."""

import math
import random

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from transfusion.kernels.patchify_noise.kernel import normals
from transfusion.kernels.philox import philox4x32, randn, uniform
from transfusion.kernels.testing import judge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORD = 0xFFFFFFFF


def fresh_seed() -> Tensor:
    seed = random.randrange(-(2**63), 2**63)
    print(f"seed {seed}")
    return torch.tensor(seed, device=DEVICE)


# Random123, kat_vectors: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    def words(text: str) -> list[Tensor]:
        return [torch.tensor([int(word, 16)], device=DEVICE) for word in text.split()]

    c0, c1, c2, c3 = words(counter)
    k0, k1 = words(key)
    output = philox4x32((c0, c1, c2, c3), (k0, k1))
    assert " ".join(f"{word.item():08x}" for word in output) == answer


def test_multiplication_keeps_all_64_bits() -> None:
    """Against Python's integers, on words near 2^32, where the int64 product wraps."""
    counter = [random.randrange(2**32 - 2**16, 2**32) for _ in range(4)]
    key = [random.randrange(2**32) for _ in range(2)]
    print(counter, key)
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & WORD, (a >> 32) ^ c[3] ^ k[1], a & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    output = philox4x32((c0, c1, c2, c3), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert [word.item() for word in output] == c


def test_every_element_is_a_function_of_its_index() -> None:
    seed = fresh_seed()
    whole = randn((5, 7, 11), seed)
    for _ in range(20):
        offset = random.randrange(whole.numel())
        count = random.randrange(whole.numel() - offset + 1)
        assert torch.equal(randn((count,), seed, offset=offset), whole.flatten()[offset : offset + count])


def test_counter_has_64_bits() -> None:
    """Elements 2^34 apart share the low counter word, and are not the same."""
    seed = fresh_seed()
    far = randn((64,), seed, offset=2**34)
    assert not torch.isclose(far, randn((64,), seed)).any()
    straddling = randn((64,), seed, offset=2**34 - 32)
    assert torch.equal(straddling[32:], far[:32])


def test_seed_is_a_64_bit_key() -> None:
    base = randn((256,), torch.tensor(1, device=DEVICE))
    for other in (2, 1 + 2**32, 1 - 2**63):
        assert not torch.isclose(base, randn((256,), torch.tensor(other, device=DEVICE))).all()


def test_uniform_is_in_the_unit_interval() -> None:
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    values = uniform(words)
    assert values.tolist()[0] == values.tolist()[-1] == 0.0
    assert (values >= 0).all() and (values < 1).all()


def test_moments_and_distribution() -> None:
    """Over 10^7 normals: every statistic within five standard errors of its value for a standard normal."""
    count = 10 * 2**20
    noise = randn((count,), fresh_seed(), dtype=torch.float64)
    # E[x^k] and the variance of x^k for a standard normal.
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}
    for order, (mean, variance) in moments.items():
        z = (noise.pow(order).mean().item() - mean) / math.sqrt(variance / count)
        assert abs(z) < 5, f"moment {order} is {z:.1f} standard errors off"
    ordered = noise.sort().values
    expected = 0.5 * torch.erfc(-ordered / math.sqrt(2))
    steps = torch.arange(count, device=DEVICE) / count
    distance = torch.maximum((expected - steps).abs(), (expected - steps - 1 / count).abs()).max().item()
    # Kolmogorov-Smirnov: P(sqrt(n)·D > x) -> 2·exp(-2x²), here 2·exp(-18) = 3e-8.
    assert distance * math.sqrt(count) < 3.0
    assert noise.abs().max().item() <= math.sqrt(-2 * math.log(1e-7))


def test_neighbours_and_words_are_uncorrelated() -> None:
    count = 2**20
    noise = randn((count,), fresh_seed(), dtype=torch.float64)
    for lag in (1, 2, 3, 4, 32, 1024):
        z = (noise[:-lag] * noise[lag:]).sum().item() / math.sqrt(count - lag)
        assert abs(z) < 5, f"elements {lag} apart correlate: {z:.1f} standard errors"


def test_ranks_draw_disjoint_noise() -> None:
    """A rank's batches have seeds of their own; a seed is the key, so no call of Philox is common to two streams."""
    generator = torch.Generator().manual_seed(random.randrange(2**32))
    seeds = torch.randint(0, 2**62, (8,), generator=generator).to(DEVICE)  # as a batch draws its seed
    print(f"seeds {seeds.tolist()}")
    streams = torch.stack([randn((2**14,), seed, dtype=torch.float64) for seed in seeds])
    calls = streams.view(8 * 2**12, 4)
    assert calls.unique(dim=0).shape == calls.shape
    z = streams @ streams.T / math.sqrt(streams.shape[1])
    assert (z.triu(1).abs() < 5).all(), z


@triton.jit
def stream_kernel(seed, first_call, out, BLOCK: tl.constexpr):
    call = first_call + tl.arange(0, BLOCK).to(tl.int64)
    n0, n1, n2, n3 = normals(tl.load(seed), call)
    place = out + 4 * tl.arange(0, BLOCK)
    tl.store(place, n0)
    tl.store(place + 1, n1)
    tl.store(place + 2, n2)
    tl.store(place + 3, n3)


@triton.jit
def triton_stream_kernel(seed, first_call, out, BLOCK: tl.constexpr):
    call = first_call + tl.arange(0, BLOCK).to(tl.int64)
    n0, n1, n2, n3 = tl.randn4x(tl.load(seed), call)
    place = out + 4 * tl.arange(0, BLOCK)
    tl.store(place, n0)
    tl.store(place + 1, n1)
    tl.store(place + 2, n2)
    tl.store(place + 3, n3)


@pytest.mark.parametrize("first_call", [0, 2**31 - 512, 2**32 - 512, 2**40 + 12345])
def test_kernel_matches_torch(first_call: int) -> None:
    """The kernel's normals are at least as near to the float64 ones as plain torch's in float32, past 2^34 too."""
    seed, block = fresh_seed(), 1024
    out = torch.full((4 * block,), torch.nan, device=DEVICE)
    stream_kernel[(1,)](seed, first_call, out, BLOCK=block)
    eager = randn(out.shape, seed, offset=4 * first_call)
    gold = randn(out.shape, seed, offset=4 * first_call, dtype=torch.float64)
    verdict = judge(out, eager, gold, factor=1.0)
    assert verdict.passed, verdict


def test_matches_the_generator_of_triton() -> None:
    """The same uniforms and the same transform as tl.randn4x: only rounding tells them apart."""
    seed, block = fresh_seed(), 1024
    out = torch.full((4 * block,), torch.nan, device=DEVICE)
    triton_stream_kernel[(1,)](seed, 0, out, BLOCK=block)
    gold = randn(out.shape, seed, dtype=torch.float64)
    verdict = judge(out, randn(out.shape, seed), gold)
    assert verdict.passed, verdict


def test_dtypes_shapes_and_device() -> None:
    seed = fresh_seed()
    gold = randn((3, 5), seed)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        noise = randn((3, 5), seed, dtype=dtype, device=DEVICE)
        assert noise.is_contiguous() and noise.device.type == DEVICE
        assert torch.equal(noise, gold.to(dtype))
    assert randn((0, 4), seed).shape == (0, 4)
    assert randn((), seed).shape == ()


@pytest.mark.parametrize(
    ("seed", "error"),
    [
        (5, TypeError),
        (torch.tensor(5.0), TypeError),
        (torch.tensor(5, dtype=torch.int32), TypeError),
        (torch.tensor([5]), ValueError),
    ],
)
def test_refuses_other_seeds(seed: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="seed"):
        randn((4,), seed)


def test_refuses_a_negative_offset_and_integer_dtypes() -> None:
    with pytest.raises(ValueError, match="offset=-1"):
        randn((4,), torch.tensor(0), offset=-1)
    with pytest.raises(TypeError, match=r"torch\.int32"):
        randn((4,), torch.tensor(0), dtype=torch.int32)


def test_compiles_without_graph_breaks() -> None:
    seed = fresh_seed()
    compiled = torch.compile(lambda s: randn((6, 5), s), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(seed), randn((6, 5), seed))
