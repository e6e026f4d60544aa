"""The chunked text loss: the plain formula, judged against float64, and the memory that it is there to save."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from transfusion.kernels.testing import judge
from transfusion.model.losses import _with_gradients, linear_cross_entropy


def case(dtype: torch.dtype, rows: int = 93, dim: int = 32, vocabulary: int = 157) -> tuple[torch.Tensor, ...]:
    seed = torch.seed() % 2**31
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator).to(dtype)
    weight = (0.3 * torch.randn(vocabulary, dim, generator=generator)).to(dtype)
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


def plain(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    exact = torch.promote_types(hidden.dtype, torch.float32)
    return functional.cross_entropy((hidden @ weight.T).to(exact), target)


def results(function, hidden, weight, target):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(hidden, weight, target)
    return loss.detach(), *torch.autograd.grad(3 * loss, (hidden, weight))


def in_several_orders(hidden, weight, target):
    """The plain formula's results with every sum in other orders: one of them may be exact by luck. The loss and the
    weight's gradient sum over rows, the hidden state's gradient over the vocabulary, the logits over features."""
    yield results(plain, hidden, weight, target)
    for _ in range(7):
        rows, vocabulary, features = (torch.randperm(size) for size in (*hidden.shape[:1], *weight.shape))
        moved = hidden[rows][:, features], weight[vocabulary][:, features], vocabulary.argsort()[target[rows]]
        loss, grad_hidden, grad_weight = results(plain, *moved)
        back = features.argsort()
        yield loss, grad_hidden[rows.argsort()][:, back], grad_weight[vocabulary.argsort()][:, back]


@pytest.mark.parametrize("chunk", [10, 40, 93, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_the_plain_formula(dtype, chunk):
    hidden, weight, target = case(dtype)
    ours = results(lambda *given: linear_cross_entropy(*given, chunk=chunk), hidden, weight, target)
    eager = zip(*in_several_orders(hidden, weight, target), strict=True)
    gold = results(plain, hidden.double(), weight.double(), target)
    for actual, orders, exact in zip(ours, eager, gold, strict=True):
        assert actual.dtype == orders[0].dtype
        verdict = judge(actual, orders, exact)
        assert verdict.passed and verdict.bound < 0.1 * exact.abs().max(), verdict


def test_the_mean_over_rows_is_taken_in_float64():
    hidden, weight, _ = case(torch.float32)
    targets = torch.randint(len(weight), (20, len(hidden)))  # one mean may be right by luck
    ours = torch.stack([linear_cross_entropy(hidden, weight, target, chunk=len(hidden)) for target in targets])
    logits = hidden @ weight.T
    each = torch.stack([functional.cross_entropy(logits, target, reduction="none") for target in targets])
    assert torch.equal(ours, each.mean(1, dtype=torch.float64).float())


def test_derivatives_that_it_has_not_are_refused():
    hidden, weight, target = case(torch.float32)
    hidden.requires_grad_()
    for power in (1, 2):  # of the first, the gradient from above is a constant
        loss = linear_cross_entropy(hidden.tanh(), weight, target) ** power
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(NotImplementedError, match="linear_cross_entropy_backward has no derivative"):
            torch.autograd.grad(gradient.square().sum(), hidden)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no forward-mode"):
        dual = torch.autograd.forward_ad.make_dual(hidden.detach(), torch.ones_like(hidden))
        linear_cross_entropy(dual, weight, target)


def test_gradcheck():
    hidden, weight, target = case(torch.float64, 12, 5, 9)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, target, chunk=5), inputs)


@pytest.mark.parametrize(("hidden_learns", "weight_learns"), [(True, True), (True, False), (False, True)])
def test_opcheck(hidden_learns, weight_learns):
    hidden, weight, target = case(torch.float32, 12, 5, 9)
    hidden.requires_grad_(hidden_learns), weight.requires_grad_(weight_learns)
    torch.library.opcheck(_with_gradients, (hidden, weight, target, 5, hidden_learns, weight_learns))
    linear_cross_entropy(hidden, weight, target, chunk=5).backward()
    assert (hidden.grad is not None) == hidden_learns and (weight.grad is not None) == weight_learns


def test_compiles_whole_for_any_number_of_rows():
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (7, 30, 31, 93):
        hidden, weight, target = case(torch.float32, rows)
        ours, theirs = (results(f, hidden, weight, target) for f in (compiled, linear_cross_entropy))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_autocast_is_that_of_a_linear_layer():
    hidden, weight, target = case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(linear_cross_entropy, hidden, weight, target)
        eager = results(plain, hidden, weight, target)
    exact = results(plain, hidden.double(), weight.double(), target)
    assert [t.dtype for t in ours] == [torch.float32] * 3
    for actual, one, gold in zip(ours, eager, exact, strict=True):
        verdict = judge(actual.bfloat16(), one, gold)
        assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h, w, t: (h, w[:, :-1], t), ValueError, "have shapes"),
        (lambda h, w, t: (h[:0], w, t[:0]), ValueError, "mean over 0 rows"),
        (lambda h, w, t: (h, w.double(), t), TypeError, "weight is torch.float64"),
    ],
)
def test_mistakes_are_named(change, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(*change(*case(torch.float32)))


# ru_maxrss would be the parent's where that was larger, for it outlives an exec; the high-water mark does not.
PROGRAM = """
import re, sys, torch
from torch.nn import functional
from transfusion.model.losses import linear_cross_entropy
torch.set_num_threads(1)
high_water = lambda: int(re.search("VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
hidden, weight = torch.zeros(4096, 8, requires_grad=True), torch.zeros(16000, 8, requires_grad=True)
target = torch.zeros(4096, dtype=torch.int64)
linear_cross_entropy(hidden[:1], weight[:2], target[:1], chunk=1).backward()  # what the first call loads
before = high_water()
if sys.argv[1] == "plain":
    loss = functional.cross_entropy(hidden @ weight.T, target)
else:
    loss = linear_cross_entropy(hidden, weight, target, chunk=int(sys.argv[1]))
loss.backward()
print(high_water() - before)
"""


def peak(how: str) -> int:
    """Bytes by which a fresh process grows; what it frees goes back at once, not to the heap of malloc."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_peak_memory_is_that_of_a_chunk():
    """4096 rows of 16,000 logits are 262 MB: the plain formula holds them, chunks of 256 rows never."""
    all_logits = 4096 * 16000 * 4
    assert peak("plain") > all_logits
    assert peak("256") < 0.4 * all_logits


def test_float16_does_not_overflow_in_sums_over_rows() -> None:
    hidden = torch.full((1024, 8), 100.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(16, 8, dtype=torch.float16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.full((1024,), 3)).backward()
    wanted = 100 * (1 / 16 - torch.nn.functional.one_hot(torch.tensor(3), 16).float())
    torch.testing.assert_close(weight.grad.float(), wanted[:, None].expand(16, 8), rtol=2e-3, atol=0.0)
