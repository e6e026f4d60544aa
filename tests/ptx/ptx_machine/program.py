"""Programs of a grid, each with its warps: who runs next is chosen at random, from a seed.

Programs run one after another, those that tell each other by atomic operations in turns.
Between two barriers a warp runs alone until it waits or is interrupted between blocks, so two accesses that no barrier
orders happen in either order. Lanes that branch differently run apart, the ones behind first. Warps may also run
together, as a team of many lanes: several times as fast, and blind for races among them.
"""

import random
import re
from itertools import accumulate
from typing import Any

import numpy as np

from ptx_machine import matrices
from ptx_machine.assembly import Program, Statement
from ptx_machine.asynchronous import Barrier, Events, Groups, TensorMap
from ptx_machine.instructions import END, Instructions
from ptx_machine.memory import Fault, GlobalMemory, SharedMemory

INTERRUPTED = 0.3  # chance after each block


class Kernel:
    """A program, and its warps in teams that run together: all as one; each alone; or, of a warp-specialised kernel,
    consumers by fours and the last four, of which one is the producer, alone.

    `functions` are those of its blocks, for a number of lanes; `places`: of each register among a team's.
    """

    def __init__(self, program: Program, together: bool) -> None:
        self.program = program
        warps = program.threads // 32
        specialised = any("mbarrier" in statement.opcode for block in program.blocks for statement in block)
        self.in_turns = any(statement.opcode.startswith("atom.") for block in program.blocks for statement in block)
        self.teams = [warps] if together else [1] * warps
        if together and specialised:
            self.teams = [4] * (warps // 4 - 1) + [1] * 4
        read_in: dict[str, set[int]] = {}
        for number, block in enumerate(program.blocks):
            for name in set().union(*map(_registers, block)):
                read_in.setdefault(name, set()).add(number)
        self.places = {name: place for place, name in enumerate(sorted(read_in))}
        shared = {name for name, blocks in read_in.items() if len(blocks) > 1}
        self.functions = {
            32 * team: [
                self._translate(32 * team, number, block, shared) for number, block in enumerate(program.blocks)
            ]
            for team in set(self.teams)
        }

    def _translate(self, lanes: int, number: int, block: tuple[Statement, ...], shared: set[str]) -> Any:
        writer = Instructions(self.program, lanes, number, self.places, shared)
        for statement in block:
            try:
                writer.write(statement)
            except (KeyError, ValueError, AssertionError) as error:
                raise NotImplementedError(f"{self.program.name}, {statement}") from error
        return writer.function()

    def launch(
        self, grid: tuple[int, int, int], arguments: list[Any], memory: GlobalMemory, shared_bytes: int, seed: int
    ) -> None:
        """Runs every program of the grid, in random order. arguments: bits of numbers, or `TensorMap`s."""
        assert len(arguments) == len(self.program.parameters), (len(arguments), len(self.program.parameters))
        assert grid[1] == grid[2] == 1
        generator = random.Random(seed)
        order = list(range(grid[0]))
        generator.shuffle(order)
        parameters = dict(zip(self.program.parameters, arguments, strict=True))
        programs = (Block(self, number, grid[0], parameters, memory, shared_bytes, generator) for number in order)
        with np.errstate(all="ignore"):
            running = list(programs) if self.in_turns else []
            while running:
                program = generator.choice(running)
                if not program.turn():
                    running.remove(program)
            for program in programs:
                while program.turn():
                    pass


class Block:
    """The warps of one program of the grid, their shared memory and barriers."""

    def __init__(
        self,
        kernel: Kernel,
        number: int,
        count: int,
        parameters: dict[str, Any],
        memory: GlobalMemory,
        shared_bytes: int,
        generator: random.Random,
    ) -> None:
        self.kernel, self.number, self.count, self.parameters = kernel, number, count, parameters
        self.memory, self.shared = memory, SharedMemory(shared_bytes)
        self.generator = generator
        self.events = Events(generator)
        self.barriers: dict[int, Barrier] = {}
        self.meetings: dict[int, list[Team]] = {}
        firsts = accumulate([0, *kernel.teams])
        self.teams = [Team(self, first, warps) for first, warps in zip(firsts, kernel.teams, strict=False)]

    def turn(self) -> bool:
        """One event, or some blocks of one team -> whether anything was left to do."""
        choose = self.generator
        ready = [team for team in self.teams if team.ready()]
        lines = list(self.events.lines)
        if not ready and not lines:
            stuck = [team for team in self.teams if team.at != END]
            if stuck:
                raise Fault("deadlock: " + "; ".join(map(str, stuck)))
            return False
        if lines and (not ready or choose.random() < self.events.between):
            self.events.happen_one(choose.choice(lines))
            return True
        team = choose.choice(ready)
        team.step()
        while team.ready() and choose.random() >= INTERRUPTED:
            team.step()
        return True

    def meet(self, team: "Team", identifier: int, threads: int) -> None:
        """bar.sync: the last to come lets all go on."""
        waiting = self.meetings.setdefault(identifier, [])
        waiting.append(team)
        team.meeting = identifier
        if sum(each.lanes for each in waiting) == threads:
            for each in waiting:
                each.meeting = None
            del self.meetings[identifier]


class Team:
    """Warps that run together: their registers, where they are, what they wait for. Instructions call its methods."""

    def __init__(self, block: Block, first: int, warps: int) -> None:
        self.block, self.first = block, first
        self.shared = block.shared
        self.lanes = 32 * warps
        self.functions = block.kernel.functions[self.lanes]
        lanes = np.arange(self.lanes, dtype=np.uint32)
        self.tid, self.laneid = np.uint32(32 * first) + lanes, lanes % np.uint32(32)
        self.ctaid, self.nctaid = self.full(block.number, np.uint32), self.full(block.count, np.uint32)
        self.shared_base = self.full(SharedMemory.BASE, np.uint32)
        poison = {kind: self.full(value, dtype) for kind, (value, dtype) in _POISON.items()}
        self.registers = [poison[name.rstrip("0123456789")] for name in block.kernel.places]
        self.at = 0  # the block that is next, for lanes apart the first
        self.apart: Any = None  # the block of each lane, where they differ
        self.meeting: int | None = None
        self.waits_for: tuple[int, int] | None = None
        self.copies = Groups(block.events, ("copies", first))
        self.products = Groups(block.events, ("products", first))

    def __str__(self) -> str:
        return f"warp {self.first} at block {self.at}, meeting {self.meeting}, waits for {self.waits_for}"

    def full(self, value: int, dtype: Any) -> Any:
        return np.full(self.lanes, value, dtype)

    def ready(self) -> bool:
        if self.waits_for:
            address, parity = self.waits_for
            if not self.block.barriers[address].passed(parity):
                return False
            self.waits_for = None
        return self.meeting is None and self.at != END

    def step(self) -> None:
        """Runs one block."""
        function = self.functions[self.at]
        active = None
        if self.apart is not None:
            active = self.apart == self.at
            if active.all():
                active = self.apart = None
        try:
            following = function(self, self.registers, active)
        except Exception as error:
            raise Fault(f"{_where(error, function)}, {self}: {error or type(error).__name__}") from error
        if active is None and isinstance(following, int):
            self.at = following
            return
        apart = self.full(self.at, np.int64) if active is None else self.apart.copy()
        here = self.full(True, bool) if active is None else active
        if isinstance(following, int):
            apart[here] = following
        else:
            taken, there, otherwise = following
            apart[here] = np.where(taken, there, otherwise)[here]
        self.apart, self.at = apart, int(apart.min())
        if (apart == self.at).all():
            self.apart = None

    # -- parameters

    def parameter(self, name: str, bits: int) -> Any:
        return self.full(self.block.parameters[name] & ((1 << bits) - 1), f"u{bits // 8}")

    def parameter_address(self, name: str) -> Any:
        """Of a tensor map: its place among the parameters stands for it."""
        return self.full(list(self.block.parameters).index(name), np.uint64)

    # -- memory

    def load_global(self, address: Any, count: int, bits: int, mask: Any) -> Any:
        return self.block.memory.load(address, count, bits, mask)

    def store_global(self, address: Any, values: Any, bits: int, mask: Any) -> None:
        self.block.memory.store(address, [_narrow(value, bits) for value in values], bits, mask)

    def add_global(self, address: Any, value: Any, bits: int, mask: Any) -> Any:
        """atom.add: lanes one after another; what those not in the mask get is anything."""
        found = self.full(-1, f"i{bits // 8}").view(f"u{bits // 8}")
        for lane in np.flatnonzero(self.full(True, bool) if mask is None else mask):
            one = np.arange(self.lanes) == lane
            found[lane] = self.block.memory.load(address, 1, bits, one)[0][lane]
            self.block.memory.store(address, [found + value], bits, one)
        return found

    def load_shared(self, address: Any, count: int, bits: int, mask: Any) -> Any:
        return self.shared.load_at(address, count, bits, mask)

    def store_shared(self, address: Any, values: Any, bits: int, mask: Any) -> None:
        self.shared.store_at(address, [_narrow(value, bits) for value in values], bits, mask)

    def _matrix_rows(self, address: Any, count: int, active: Any) -> Any:
        """Addresses of (warps, count, 8, 8) elements: lanes 8m .. 8m + 7 of a warp have those of matrix m's rows."""
        _together(active)
        rows = address.reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8, 1)
        if (rows % 16).any():
            raise Fault(f"rows of matrices at {rows.ravel()}, not multiples of 16")
        return rows + np.uint32(2) * np.arange(8, dtype=np.uint32)

    def load_matrices(self, address: Any, count: int, transposed: bool, active: Any) -> Any:
        """ldmatrix"""
        places = self._matrix_rows(address, count, active)
        matrix = self.shared.load_at(places.ravel(), 1, 16, None).reshape(places.shape)
        if transposed:
            matrix = matrix.swapaxes(2, 3)
        words = np.ascontiguousarray(matrix).reshape(-1, count, 64).view(np.uint32)
        return words.transpose(1, 0, 2).reshape(count, -1)

    def store_matrices(self, address: Any, values: Any, transposed: bool, active: Any) -> None:
        """stmatrix"""
        places = self._matrix_rows(address, len(values), active)
        words = np.stack(values).reshape(len(values), -1, 32).transpose(1, 0, 2)
        matrix = np.ascontiguousarray(words).view(np.uint16).reshape(places.shape)
        if transposed:
            matrix = matrix.swapaxes(2, 3)
        self.shared.store_at(places.ravel(), [matrix.ravel()], 16, None)

    # -- products

    def multiply(
        self, old: Any, a: Any, b: Any, scale: Any, kind: str, columns: int, a_rows_last: int, b_rows_last: int
    ) -> Any:
        """wgmma. Its results are NaN until it happens."""
        accumulate = bool(np.all(scale))
        if not accumulate and np.any(scale):
            raise Fault("lanes differ in wgmma's scale-d")
        result = np.full((len(old), self.lanes), np.nan, np.float32)

        def happen() -> None:
            product = matrices.multiply(self.shared, self.first, a, b, columns, kind, a_rows_last, b_rows_last)
            result[:] = matrices.spread(product + matrices.gather(old) if accumulate else product)

        self.products.issue(happen)
        return result

    def commit_products(self) -> None:
        self.products.commit()

    def await_products(self, allowed: int) -> None:
        self.products.wait(allowed)

    # -- copies

    def copy(self, to: Any, of: Any, size: int, read: Any, mask: Any) -> None:
        """cp.async: `read` of `size` bytes, the others 0."""
        count, bits = (size // 4, 32) if size >= 4 else (1, 8 * size)
        read = np.broadcast_to(np.asarray(read, np.int64), self.lanes)
        if not np.isin(read, (0, size)).all():
            raise Fault(f"cp.async of {read} of {size} bytes")
        reading = read > 0 if mask is None else mask & (read > 0)
        kind = f"u{bits // 8}"

        def happen() -> None:
            found = self.block.memory.load(of, count, bits, reading)
            values = [np.where(reading, each, 0).astype(kind) for each in found]
            self.shared.store_at(to, values, bits, mask, unfenced=False)

        self.copies.issue(happen)

    def commit_copies(self) -> None:
        self.copies.commit()

    def await_copies(self, allowed: int) -> None:
        self.copies.wait(allowed)

    def copy_block(self, to: Any, descriptor: Any, index: Any, barrier: Any, mask: Any) -> None:
        """cp.async.bulk.tensor, by one lane; coordinates from the innermost on."""
        lane = _one(mask)
        tensor_map = list(self.block.parameters.values())[int(descriptor[lane])]
        assert isinstance(tensor_map, TensorMap)
        place = tuple(int(each[lane]) for each in reversed(index))
        target, signal = int(to[lane]), int(barrier[lane])

        def happen() -> None:
            tensor_map.copy(self.shared, target, place)
            self.block.barriers[signal].complete(tensor_map.bytes())

        self.block.events.issue(("block", target, signal), happen)

    # -- barriers

    def barrier_init(self, address: Any, count: int, mask: Any) -> None:
        if mask is None or mask.any():
            self.block.barriers[int(address[_one(mask)])] = Barrier(count)

    def barrier_end(self, address: Any, mask: Any) -> None:
        if mask is None or mask.any():
            del self.block.barriers[int(address[_one(mask)])]

    def barrier_arrive(self, address: Any, expected: int, mask: Any) -> None:
        for lane in range(self.lanes) if mask is None else np.flatnonzero(mask):
            self.block.barriers[int(address[lane])].arrive(expected)

    def barrier_try(self, address: Any, parity: Any, active: Any) -> Any:
        """Whether the phase is complete; where it is not, the team rests until it is."""
        _together(active)
        where, which = int(address[0]), int(np.ravel(parity)[0])
        passed = self.block.barriers[where].passed(which)
        if not passed:
            self.waits_for = where, which
        return self.full(passed, bool)

    def fence(self) -> None:
        """Of the proxies: what was stored is seen by wgmma and tensor copies from now on."""
        self.shared.unfenced[:] = False
        for barrier in self.block.barriers.values():
            barrier.fenced = True

    def meet(self, identifier: Any, threads: Any, following: int, active: Any) -> int:
        _together(active)
        everyone = self.block.kernel.program.threads
        number = int(np.ravel(identifier)[0])
        self.block.meet(self, number, everyone if threads is None else int(np.ravel(threads)[0]))
        return following


# Of registers that nothing has written.
_POISON = {
    "%p": (0, bool),
    "%rs": (0xFFFF, np.uint16),
    "%r": (0xFFFFFFFF, np.uint32),
    "%rd": (0xFFFFFFFFFFFFFFFF, np.uint64),
}


def _registers(statement: Statement) -> set[str]:
    text = " ".join([statement.guard or "", *statement.operands])
    return set(re.findall(r"%[a-z]+\d+", text))


def _together(active: Any) -> None:
    if active is not None:
        raise Fault("not all lanes came here")


def _one(mask: Any) -> int:
    if mask is None or mask.sum() != 1:
        raise Fault(f"not one lane: {mask}")
    return int(mask.argmax())


def _narrow(value: Any, bits: int) -> Any:
    return value if np.ndim(value) and value.itemsize * 8 == bits else np.asarray(value).astype(f"u{bits // 8}")


def _where(error: BaseException, function: Any) -> str:
    """The instruction of a block's function in which an error was raised."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == function.__name__:
            lines = function.source.split("\n")[: trace.tb_lineno]
            return next((line.strip(" #") for line in reversed(lines) if line.startswith("    #")), "?")
        trace = trace.tb_next
    return "?"
