"""`Linear`: one product, whichever way it is computed, and which way that is."""

from contextlib import nullcontext

import pytest
import torch
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion.kernels.testing import judge
from transfusion.model.linear import Linear, swiglu


class Seen(TorchDispatchMode):
    """The names of the products that run."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
            self.products.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def products(layer, x, around=nullcontext):
    with torch.no_grad(), around(), Seen() as seen:
        layer(x)
    return seen.products


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (3, 5), (64,), (1, 65), (2, 0)])
@pytest.mark.parametrize("outputs", [96, 100], ids=["stretches", "odd"])
def test_the_result_is_that_of_nn_linear(shape, outputs):
    layer, x = Linear(48, outputs), torch.randn(*shape, 48)
    with torch.no_grad():
        out = layer(x)
    eager, gold = functional.linear(x, layer.weight), functional.linear(x.double(), layer.weight.double())
    assert out.shape == (*shape, outputs) and out.is_contiguous()
    if out.numel():
        in_pieces = sum(functional.linear(x[..., i : i + 16], layer.weight[:, i : i + 16]) for i in (0, 16, 32))
        assert judge(out, [eager, in_pieces], gold).passed


def test_few_rows_go_in_stretches_and_what_a_core_alone_would_not_wait_for_does_not():
    layer, few = Linear(48, 96), torch.randn(1, 3, 48)
    assert products(layer, few) == ["bmm"]
    assert products(layer, torch.randn(1, 65, 48)) == ["mm"]
    assert products(Linear(48, 100), few) == ["mm"]
    assert products(layer.bfloat16(), few.bfloat16()) == ["mm"]


def formula(product):
    gate, up = product.chunk(2, dim=-1)
    return functional.silu(gate) * up


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (65,), (5, 13, 2), (2, 0)])
@pytest.mark.parametrize("outputs", [96, 100], ids=["stretches", "odd"])
def test_swiglu_is_the_formula(shape, outputs):
    layer, x = Linear(48, outputs), torch.randn(*shape, 48)
    before = x.clone(), layer.weight.clone()
    with torch.no_grad():
        out = swiglu(layer, x)
    assert out.shape == (*shape, outputs // 2) and torch.equal(x, before[0]) and torch.equal(layer.weight, before[1])
    if out.numel():
        in_pieces = sum(functional.linear(x[..., i : i + 16], layer.weight[:, i : i + 16]) for i in (0, 16, 32))
        eager = [formula(functional.linear(x, layer.weight)), formula(in_pieces)]
        assert judge(out, eager, formula(functional.linear(x.double(), layer.weight.double()))).passed


def test_of_many_rows_gate_and_up_are_products_of_their_own():
    layer, many = Linear(48, 96), torch.randn(65, 48)
    with torch.no_grad(), Seen() as seen:
        for x in (many, many[:64]):
            swiglu(layer, x)
        swiglu(layer.bfloat16(), many.bfloat16())
    assert seen.products == ["mm", "mm", "bmm", "mm"]


def test_swiglu_calls_what_took_the_layer_s_place_and_its_hooks():
    class Adapted(Linear):
        def forward(self, x):
            return super().forward(x) + 1

    many, observed, led = torch.randn(65, 48), Linear(48, 96), Linear(48, 96)
    outputs = []
    observed.register_forward_hook(lambda module, args, out: outputs.append(out))
    led.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    patched = Linear(48, 96)
    patched.forward = lambda x: functional.linear(x, patched.weight) * 3  # as accelerate does
    replaced = Adapted(48, 96), torch.nn.Sequential(Linear(48, 96)), torch.nn.Linear(48, 96)
    for layer in (*replaced, observed, led, patched):
        with torch.no_grad():
            assert torch.equal(swiglu(layer, many), formula(layer(many)))
    assert torch.equal(outputs[0], outputs[1])  # as it was when the hook saw it
    layer = Linear(48, 96)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: out + 1)
    try:
        with torch.no_grad():
            assert torch.equal(swiglu(layer, many), formula(layer(many)))
    finally:
        hook.remove()


def test_a_weight_that_is_elsewhere_until_its_forward_is_not_read_before():
    layer, many, weight = Linear(48, 96), torch.randn(65, 48), torch.randn(96, 48)
    layer.to("meta").forward = lambda x: functional.linear(x, weight)  # as accelerate offloads
    with torch.no_grad():
        assert torch.equal(swiglu(layer, many), formula(functional.linear(many, weight)))


def test_under_autocast_the_product_is_autocast_s():
    layer, few = Linear(48, 96), torch.randn(1, 3, 48)
    assert products(layer, few, lambda: torch.autocast("cpu", torch.bfloat16)) == ["mm"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(few).dtype == torch.bfloat16


def test_training_runs_the_plain_product():
    layer, x = Linear(48, 96), torch.randn(2, 3, 48, requires_grad=True)
    with Seen() as seen:
        out = layer(x)
    assert seen.products == ["mm"] and out.grad_fn is not None
    with Seen() as seen:
        swiglu(layer, torch.randn(65, 48))
    assert seen.products == ["mm"]


def test_an_evaluation_can_be_compiled_for_any_number_of_rows():
    torch._dynamo.reset()
    layer = Linear(48, 96)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (2, 5, 64, 65, 90):
            x = torch.randn(rows, 48)
            eager, gold = functional.linear(x, layer.weight), functional.linear(x.double(), layer.weight.double())
            assert judge(compiled(x), eager, gold).passed


class Quantized(torch.Tensor):
    """A weight that knows `linear` and nothing else, as quantized ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is functional.linear:
            return functional.linear(args[0], args[1].as_subclass(torch.Tensor))
        if function.__name__ in ("__get__", "as_subclass", "detach", "requires_grad_"):
            return super().__torch_function__(function, types, args, kwargs or {})
        raise NotImplementedError(f"{function} of a quantized weight")


@pytest.mark.parametrize("kind", ["quantized", "sparse", "grown", "shrunk"])
def test_a_weight_may_be_replaced(kind):
    layer, x = Linear(48, 96), torch.randn(2, 3, 48)
    weight = torch.randn(104 if kind == "grown" else 96, 40 if kind == "shrunk" else 48)
    x = x[..., : weight.shape[1]]
    own = {"quantized": lambda: weight.as_subclass(Quantized), "sparse": weight.to_sparse}.get(kind, lambda: weight)()
    layer.weight = torch.nn.Parameter(own, requires_grad=False)
    with torch.no_grad():
        out = layer(x)
    assert judge(out, functional.linear(x, weight), functional.linear(x.double(), weight.double())).passed


@pytest.mark.parametrize("kind", ["quantized", "sparse"])
def test_a_weight_that_knows_no_halves_is_asked_for_the_whole_product(kind):
    layer, many, weight = Linear(48, 96), torch.randn(65, 48), torch.randn(96, 48)
    own = weight.as_subclass(Quantized) if kind == "quantized" else weight.to_sparse()
    layer.weight = torch.nn.Parameter(own, requires_grad=False)
    with torch.no_grad():
        out = swiglu(layer, many)
    eager, gold = (formula(functional.linear(x, w)) for x, w in ((many, weight), (many.double(), weight.double())))
    assert judge(out, eager, gold).passed


def test_a_parametrized_weight_is_computed_once_a_call():
    class Counted(torch.nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return weight

    layer, counted = Linear(48, 96), Counted()
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", counted)
    before = counted.calls
    with torch.no_grad():
        layer(torch.randn(3, 48))
    assert counted.calls == before + 1


def test_a_trace_on_few_rows_holds_for_other_numbers_of_them():
    layer = Linear(48, 96)
    with torch.no_grad():
        graph = make_fx(lambda x, weight: functional_call(layer, {"weight": weight}, x), tracing_mode="symbolic")
        traced = graph(torch.randn(3, 48), layer.weight)
        assert traced(torch.randn(5, 48), layer.weight).shape == (5, 96)


def test_what_does_not_fit_is_refused_as_nn_linear_refuses_it():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), torch.no_grad():
        Linear(48, 96)(torch.randn(4, 24))
