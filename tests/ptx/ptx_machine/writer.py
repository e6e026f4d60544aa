"""The source of a block's Python function, line by line, and its variables.

In a function a register is a local variable, one for each way in which it is read; `R` holds those that other blocks
read. `A` says which lanes are here, None for all. A function returns what is next: a block, a branch that lanes take
differently, or what a barrier says.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_machine import arithmetic, matrices
from ptx_machine.arithmetic import DTYPES
from ptx_machine.assembly import Program, Statement

NUMBER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)U?$")


class Writer:
    """One block's function, for so many lanes. places: of registers in `R`; shared: those that other blocks read."""

    def __init__(self, program: Program, lanes: int, number: int, places: dict[str, int], shared: set[str]) -> None:
        self.program, self.lanes, self.number, self.places, self.shared = program, lanes, number, places, shared
        self.lines: list[str] = []
        self.names: dict[str, dict[str, str]] = {}  # register -> kind -> variable
        self.written: dict[str, None] = {}
        self.read: set[str] = set()  # before it is written: a round of a loop reads what the one before wrote
        self.constants: dict[str, Any] = {}
        self.count = 0
        self.ended = False

    # -- registers

    def bits(self, register: str) -> int:
        return {"%p": 1, "%rs": 16, "%r": 32, "%rd": 64}[register.rstrip("0123456789")]

    def constant(self, value: Any) -> str:
        name = f"K{len(self.constants)}"
        self.constants[name] = value
        return name

    def immediate(self, text: str, bits: int, kind: str) -> str:
        if re.match(r"0f[0-9A-Fa-f]{8}$", text):
            value = np.array([int(text[2:], 16)], np.uint32)
            return self.constant(value.view(DTYPES[bits, kind])[0])
        if kind == "p":
            return self.constant(np.bool_(int(text, 0) != 0))
        value = int(text.rstrip("U"), 0) & ((1 << bits) - 1)
        return self.constant(np.array([value], f"u{bits // 8}").view(DTYPES[bits, kind])[0])

    def use(self, operand: str, kind: str, bits: int) -> str:
        """The variable that has an operand as `kind`."""
        if NUMBER.match(operand) or operand.startswith("0f"):
            return self.immediate(operand, bits, kind)
        if operand == "global_smem":
            return "w.shared_base"
        known = self.names.get(operand)
        if known is None:
            base = "p" if self.bits(operand) == 1 else "u"
            known = self.names[operand] = {base: self.fresh()}
            self.read.add(operand)
            self.lines.append(f"{known[base]} = R[{self.places[operand]}]")
        if self.bits(operand) > bits:  # the lower ones
            wide = self.use(operand, "u", self.bits(operand))
            return f"{wide}.astype({self.dtype(bits, 'u')}).view({self.dtype(bits, kind)})"
        assert self.bits(operand) == bits, f"{operand} read as {bits} bits"
        if kind not in known:
            source = next(iter(known.values()))
            known[kind] = self.fresh()
            self.lines.append(f"{known[kind]} = {source}.view({self.dtype(bits, kind)})")
        return known[kind]

    def fresh(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def dtype(self, bits: int, kind: str) -> str:
        return "np." + DTYPES[bits, kind].__name__

    def define(self, register: str, kind: str, expression: str, statement: Statement) -> None:
        """register = expression, where the guard lets it."""
        if register == "_":
            return
        name = self.fresh()
        if statement.guard:
            old = self.use(register, kind, self.bits(register))
            expression = f"np.where({self.guard(statement)}, {expression}, {old})"
        self.lines.append(f"{name} = {expression}")
        self.names[register] = {kind: name}
        self.written[register] = None

    def guard(self, statement: Statement) -> str:
        assert statement.guard
        return ("~" if statement.negated else "") + self.use(statement.guard, "p", 1)

    def mask(self, statement: Statement) -> str:
        """The lanes that a memory access is for, None for all."""
        return f"lanes({self.guard(statement)}, A)" if statement.guard else "A"

    def finish(self, following: str) -> None:
        kept = []
        for register in self.written:
            if register in self.shared | self.read:
                kind = "p" if self.bits(register) == 1 else "u"
                kept.append((self.places[register], self.use(register, kind, self.bits(register))))
        if kept:
            self.lines.append("if A is None: " + "; ".join(f"R[{place}] = {name}" for place, name in kept))
            places, names = zip(*kept, strict=True)
            self.lines.append(f"else: keep(R, {places}, ({', '.join(names)},), A)")
        self.lines.append(f"return {following}")
        self.ended = True

    def function(self) -> Callable[[Any, Any], Any]:
        if not self.ended:
            self.finish(str(self.number + 1))
        name = f"block_{self.number}"
        source = f"def {name}(w, R, A):\n    " + "\n    ".join(self.lines) + "\n"
        scope = {"np": np, "branch": branch, "keep": keep, "lanes": lanes}
        scope |= vars(arithmetic) | {"mma": matrices.mma} | self.constants
        exec(compile(source, f"<{self.program.name} {name}>", "exec"), scope)
        function: Callable[[Any, Any], Any] = scope[name]
        function.source = source  # type: ignore[attr-defined]
        return function


def branch(taken: Any, active: Any, there: int, here: int) -> Any:
    """Where the lanes go: a block, or (lanes that branch, there, here)."""
    lanes = taken if active is None else taken[active]
    if lanes.all():
        return there
    return (taken, there, here) if lanes.any() else here


def keep(registers: list[Any], places: tuple[int, ...], values: tuple[Any, ...], active: Any) -> None:
    """registers[place] = value for the lanes that are here."""
    for place, value in zip(places, values, strict=True):
        registers[place] = np.where(active, value, registers[place])


def lanes(guard: Any, active: Any) -> Any:
    """Lanes that are here and let by the guard."""
    return guard if active is None else guard & active
