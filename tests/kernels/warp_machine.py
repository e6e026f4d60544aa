"""Gluon's Hopper dialect on a CPU, with the freedoms that the hardware has: to test warp-specialised kernels on.

    WarpMachine(seed)(kernel)[(programs,)](*arguments, **constexprs)

Partitions run one instruction after the other, and which of them goes on is drawn at random. A copy lands at some
later time, some as late as can be, until when its place holds NaN. An asynchronous product reads its operands when it
is issued, or as late as when it is waited for. So a barrier that is missing or misplaced shows as NaN or as a wrong
number with some seed; an arrival too few or too many shows as a `Fault` that says where each partition stands. Layouts,
which say in which register a number is, mean nothing here: the compiler checks them.
"""

import importlib
import random
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gluon_language
from warp_memory import Descriptor, Fault, Pointer, Shared, load, poison, store


class Barrier:
    """An mbarrier: a phase is over when `count` have arrived and every expected byte has."""

    def __init__(self, count: int) -> None:
        self.count = self.awaited = count
        self.bytes = self.parity = 0

    def advance(self, arrivals: int = 0, landed: int = 0) -> None:
        self.awaited -= arrivals
        self.bytes -= landed
        if self.awaited < 0:
            raise Fault(f"more than {self.count} arrivals in one phase")
        if self.awaited == self.bytes == 0:
            self.parity, self.awaited = self.parity ^ 1, self.count


class Product:
    """A product that was issued."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute, self.result = compute, None

    def finish(self) -> None:
        self.result = self.compute() if self.result is None else self.result


class Stop(BaseException):
    """Ends a partition's thread after a fault elsewhere."""


class Partition(threading.Thread):
    """Warps that run one function. `ready` says whether they can go on, `where` what they stand at."""

    def __init__(self, program: "Program", function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        super().__init__(daemon=True)
        self.program, self.function, self.arguments = program, function, arguments
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.where, self.error = "its start", None
        self.products: list[Product] = []

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.program.stopped:
                self.function(*self.arguments)
        except Stop:
            pass
        except BaseException as error:
            self.error = error
        self.ready = lambda: False
        self.where = "its end"
        self.program.idle.release()

    def pause(self, where: str, ready: Callable[[], bool] = lambda: True) -> None:
        self.where, self.ready = where, ready
        self.program.idle.release()
        self.turn.acquire()
        if self.program.stopped:
            raise Stop


class Program:
    """One program of a launch: its shared memory, barriers, copies under way and partitions."""

    def __init__(self, index: int, programs: int, rng: random.Random) -> None:
        self.index, self.programs, self.rng = index, programs, rng
        self.barriers: dict[int, Barrier] = {}
        self.unfenced: set[int] = set()  # barriers that copies need not see yet
        self.copies: list[Callable[[], None]] = []
        self.late_copies: list[Callable[[], None]] = []  # which take as long as the rest lets them, mostly
        self.memory: list[Tensor] = []
        self.idle, self.stopped = threading.Semaphore(0), False
        self.current: Partition | None = None

    def specialise(self, functions: list[tuple[Any, tuple[Any, ...]]], *_: object) -> None:
        partitions = [Partition(self, function, arguments) for function, arguments in functions]
        for partition in partitions:
            partition.start()
        try:
            self._run(partitions)
        finally:
            self.stopped = True
            for partition in partitions:
                partition.turn.release()
                partition.join()
        if self.copies or self.late_copies or any(partition.products for partition in partitions):
            raise Fault("the kernel ended before a copy or a product had")

    def _run(self, partitions: list[Partition]) -> None:
        while any(partition.where != "its end" for partition in partitions):
            choices = [*(each for each in partitions if each.ready()), *self.copies]
            if not choices or self.rng.random() < 0.02:
                choices += self.late_copies
            if not choices:
                raise Fault(f"nobody can go on: {[partition.where for partition in partitions]}")
            chosen = self.rng.choice(choices)
            if isinstance(chosen, Partition):
                self.current = chosen
                chosen.turn.release()
                self.idle.acquire()
                if chosen.error is not None:
                    raise chosen.error
            else:
                (self.copies if chosen in self.copies else self.late_copies).remove(chosen)
                chosen()

    def pause(self, where: str, ready: Callable[[], bool] = lambda: True) -> None:
        if self.current is not None:
            self.current.pause(where, ready)

    # ---- memory

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: object) -> Shared:
        self.memory.append(poison(torch.empty(shape, dtype=dtype)))
        return Shared(self.memory[-1])

    def copy(self, descriptor: Descriptor, first: list[int], full: Shared, to: Shared) -> None:
        if to.shape != descriptor.block:
            raise Fault(f"a block of {descriptor.block} to a place of {to.shape}")
        self.pause("a copy")
        if full.tensor.data_ptr() in self.unfenced:
            raise Fault("a copy signals a barrier without a fence behind its initialisation")
        poison(to.tensor)

        def land() -> None:
            to.tensor.copy_(descriptor.read(first))
            self.barrier(full).advance(landed=to.tensor.numel() * to.tensor.itemsize)

        (self.late_copies if self.rng.random() < 0.25 else self.copies).append(land)

    # ---- barriers

    def barrier(self, view: Shared) -> Barrier:
        return self.barriers[view.tensor.data_ptr()]

    def init(self, view: Shared, count: int) -> None:
        self.barriers[view.tensor.data_ptr()] = Barrier(count)
        self.unfenced.add(view.tensor.data_ptr())

    def wait(self, view: Shared, parity: int) -> None:
        barrier = self.barrier(view)
        self.pause(f"wait for phase {parity} of {barrier.__dict__}", lambda: barrier.parity != parity)

    def arrive(self, view: Shared) -> None:
        self.pause("an arrival")
        self.barrier(view).advance(arrivals=1)

    def expect(self, view: Shared, size: int) -> None:
        self.pause("an expectation")
        self.barrier(view).bytes += size
        self.barrier(view).advance(arrivals=1)

    # ---- products

    def multiply(
        self, a: Shared | Tensor, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False
    ) -> Product:
        assert is_async and self.current is not None
        self.pause("a product")

        def compute() -> Tensor:
            left = a.tensor if isinstance(a, Shared) else a
            result = left.float() @ b.tensor.float()
            return result + acc if use_acc else result

        product, under_way = Product(compute), self.current.products
        under_way.append(product)
        if len(under_way) == 1 and self.rng.random() < 0.5:
            product.finish()
        return product

    def wait_products(self, outstanding: int, deps: list[Product]) -> Tensor | tuple[Tensor, ...]:
        assert self.current is not None
        self.pause("products")
        under_way = self.current.products
        while len(under_way) > outstanding:
            under_way.pop(0).finish()
        if any(product in under_way for product in deps):
            raise Fault("a product is used that was not waited for")
        results = [product.result for product in deps if product.result is not None]
        assert len(results) == len(deps)
        return results[0] if len(results) == 1 else tuple(results)


class Language:
    """`gl` for one program; layouts and the rest are Gluon's own."""

    float32, int64, int32 = torch.float32, torch.int64, torch.int32
    static_range = range
    exp2, log, where = torch.exp2, torch.log, torch.where

    def __init__(self, program: Program) -> None:
        self.program_id: Callable[[int], int] = lambda axis: program.index
        self.num_programs: Callable[[int], int] = lambda axis: program.programs
        self.allocate_shared_memory, self.warp_specialize = program.allocate, program.specialise

    def __getattr__(self, name: str) -> Any:
        return getattr(gluon_language, name)

    minimum = staticmethod(lambda a, b: min(a, b) if isinstance(a, int) else torch.minimum(a, b))
    maximum = staticmethod(lambda a, b: max(a, b) if isinstance(a, int) else torch.maximum(a, b))
    max = staticmethod(lambda x, axis: x.amax(axis))
    sum = staticmethod(lambda x, axis: x.sum(axis))
    cdiv = staticmethod(lambda a, b: -(-a // b))
    zeros = staticmethod(lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype))
    full = staticmethod(lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype))
    arange = staticmethod(lambda first, last, layout: torch.arange(first, last))
    expand_dims = staticmethod(lambda x, axis: x.unsqueeze(axis))
    convert_layout = staticmethod(lambda x, layout, assert_trivial=False: x)
    split = staticmethod(lambda x: (x[..., 0], x[..., 1]))
    cast = staticmethod(lambda x, dtype: x if isinstance(x, int) else x.to(dtype))
    load = staticmethod(load)
    store = staticmethod(store)


class WarpMachine:
    """Runs kernels of one module; `seed` draws the order of events."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def __call__(self, kernel: Any) -> Any:
        """`kernel` as it is launched."""
        machine = self

        class Launcher:
            def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
                def launch(*arguments: Any, num_warps: int, **constexprs: Any) -> None:
                    converted = [_argument(each) for each in arguments]
                    for index in range(grid[0]):
                        program = Program(index, grid[0], machine.rng)
                        _bound(kernel, program)(*converted, **constexprs)

                return launch

        return Launcher()


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value)
    return Descriptor(value) if hasattr(value, "block_shape") else value


def _bound(kernel: Any, program: Program) -> Callable[..., None]:
    """The kernel's Python function, with the machine for the dialect in it and in what it calls, of whatever module."""
    dialect = {
        "gl": Language(program),
        "mbarrier": types.SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=program.init,
            wait=program.wait,
            arrive=program.arrive,
            expect=program.expect,
        ),
        "tma": types.SimpleNamespace(async_copy_global_to_shared=program.copy),
        "fence_async_shared": program.unfenced.clear,
        "warpgroup_mma": program.multiply,
        "warpgroup_mma_wait": program.wait_products,
    }
    modules: dict[int, dict[str, Any]] = {}

    def translated(names: dict[str, Any]) -> dict[str, Any]:
        if id(names) not in modules:
            modules[id(names)] = result = {}
            for name, value in names.items():
                if hasattr(value, "fn") and hasattr(value, "is_gluon"):
                    value = function(value.fn)
                elif isinstance(value, gluon_language.constexpr):
                    value = value.value
                result[name] = value
            result |= dialect
        return modules[id(names)]

    def function(original: Any) -> Callable[..., None]:
        code, names = original.__code__, translated(original.__globals__)
        return types.FunctionType(code, names, original.__name__, original.__defaults__)

    return function(kernel.fn)


def changed(modules: list[types.ModuleType], changes: list[tuple[str, str]], folder: Path) -> types.ModuleType:
    """The last of the modules, which may import the others, with each `before` in their sources an `after`."""
    renamed = {module.__name__: f"changed_{module.__name__.rpartition('.')[2]}" for module in modules}
    sources = {module.__name__: Path(module.__file__ or "").read_text() for module in modules}
    for before, after in changes:
        assert sum(before in source for source in sources.values()) == 1, before
        sources = {name: source.replace(before, after) for name, source in sources.items()}
    for name, source in sources.items():
        for old, new in renamed.items():
            source = source.replace(f"from {old} import", f"from {new} import")
        (folder / f"{renamed[name]}.py").write_text(source)
        sys.modules.pop(renamed[name], None)
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        return importlib.import_module(renamed[modules[-1].__name__])
    finally:
        sys.path.remove(str(folder))
