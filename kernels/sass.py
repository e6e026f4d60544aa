"""What ptxas made of a kernel, read from its listing: loops, spills, and registers that a product still uses.

A wgmma is asynchronous: until a wait covers its group, the tensor cores read the registers of its left operand and
write those of its accumulators (PTX ISA, wgmma.wait_group). Every other instruction has to keep away from them. Triton
may wait too late (triton-lang/triton issue 9433), and versions of ptxas reuse the operand's registers too early (pull
request 11781): such a kernel is wrong on the GPU and nowhere else.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_NO_RESULT = re.compile(r"ST|RED|BRA|BRX|RET|CALL|EXIT|WARPSYNC|.?SETP|PLOP3|R2P|UTMA|BAR|LDGSTS|USETMAXREG")
_ENDS = ("EXIT", "RET", "BRX", "JMP")  # unless they are predicated, what follows is reached from elsewhere


class Instruction(NamedTuple):
    """One line of a listing."""

    at: int
    predicate: str
    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.at:#x} {self.predicate}{self.opcode} {', '.join(self.operands)}"


def instructions(sass: str) -> list[Instruction]:
    """The lines of cuobjdump's listing of one kernel."""
    code = []
    for at, predicate, opcode, rest in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([\w.]+)([^;]*);", sass):
        operands = tuple(operand.strip() for operand in rest.split(",") if operand.strip())
        code.append(Instruction(int(at, 16), predicate, opcode, operands))
    return code


def inner_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The instructions of each innermost loop: from the address that a branch goes back to, up to that branch."""
    loops = [(target, each.at) for each in code if (target := _target(each)) is not None and target < each.at]
    inner = [
        (first, last)
        for first, last in loops
        if not any(first <= other and end <= last and (other, end) != (first, last) for other, end in loops)
    ]
    return [[each for each in code if first <= each.at <= last] for first, last in inner]


def count_spills(loops: list[list[Instruction]]) -> int:
    """Loads and stores of local memory in the loops."""
    return sum(each.opcode.split(".")[0] in ("LDL", "STL") for loop in loops for each in loop)


def _target(each: Instruction) -> int | None:
    """Where a branch goes."""
    if each.opcode.split(".")[0] != "BRA":
        return None
    target = re.fullmatch(r"0x[0-9a-f]+", each.operands[-1])
    return int(target[0], 16) if target else None


class _State(NamedTuple):
    """Products under way, by their place in the code: first those not yet in a group, then group by group; and how many
    registers a thread has, where it has requested a number."""

    ungrouped: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    granted: int | None = None


def hazards(code: list[Instruction]) -> list[str]:
    """Descriptions of instructions that some path reaches while a product still uses one of their registers, or that
    use a register beyond those granted to a warp-specialised thread. Raises `ValueError` for a product of an unknown
    kind.
    """
    place = {each.at: index for index, each in enumerate(code)}
    targets = {place[to] for each in code if (to := _target(each)) in place}
    # Where an indirect branch goes is not in the listing: with nothing under way, paths begin after every jump too.
    starts = {0} | targets | {index + 1 for index, each in enumerate(code) if each.opcode.startswith((*_ENDS, "BRA"))}
    work, seen = [(start, _State()) for start in starts], set()
    found: dict[int, str] = {}
    while work:
        index, state = work.pop()
        while index < len(code):
            if index in starts:
                if (index, state) in seen:
                    break
                seen.add((index, state))
            each = code[index]
            state = _after(state, index, each)
            for wrong in _wrong(state, each, code):
                found.setdefault(each.at, f"{each}: {wrong}")
            if (to := _target(each)) in place:
                work.append((place[to], state))
            if not _goes_on(each):
                break
            index += 1
    return [found[at] for at in sorted(found)]


def _goes_on(each: Instruction) -> bool:
    """Whether the next line may follow."""
    ends = each.opcode.startswith(_ENDS) or (each.opcode.startswith("BRA") and len(each.operands) == 1)
    return bool(each.predicate) or not ends


def _after(state: _State, index: int, each: Instruction) -> _State:
    if each.opcode.startswith("HGMMA"):
        ungrouped = tuple(sorted({*state.ungrouped, index}))
        if each.operands[-1] != "gsb0":
            return state._replace(ungrouped=ungrouped)
        others = tuple(group for group in state.groups if group != ungrouped)  # round a loop: the same one again
        return state._replace(ungrouped=(), groups=(*others, ungrouped))
    if each.opcode.startswith("WARPGROUP.DEPBAR"):
        left = int(each.operands[-1], 16)
        return state._replace(groups=state.groups[-left:] if left else ())
    if each.opcode.startswith("USETMAXREG"):
        return state._replace(granted=int(each.operands[-1], 16))
    return state


def _wrong(state: _State, each: Instruction, code: list[Instruction]) -> Iterator[str]:
    written, read = _registers(each)
    if state.granted is not None and max(written | read, default=0) >= state.granted:
        yield f"a thread has {state.granted} registers here"
    if each.opcode.startswith("HGMMA"):
        return  # products run in the order of their issue
    for index in sorted({*state.ungrouped, *(index for group in state.groups for index in group)}):
        accumulators, left = _of_product(code[index])
        if written & left:
            yield f"writes what {code[index].at:#x} reads"
        if (written | read) & accumulators:
            yield f"touches what {code[index].at:#x} writes"


def _of_product(each: Instruction) -> tuple[set[int], set[int]]:
    """Registers of the accumulators, 32 bits an element, and of the left operand, none where that is in memory."""
    columns = re.match(r"HGMMA\.64x(\d+)x\d+\.F32\b", each.opcode)
    if columns is None:
        raise ValueError(f"{each} is a product of a kind that is not known here")
    left = re.fullmatch(r"R(\d+)", each.operands[1])
    first, held = int(each.operands[0][1:]), int(left[1]) if left else 0
    return set(range(first, first + int(columns[1]) // 2)), set(range(held, held + 4)) if left else set()


def _registers(each: Instruction) -> tuple[set[int], set[int]]:
    """Those that an instruction writes, and those that it reads, of wide ones the first."""
    named = [{int(number) for number in re.findall(r"(?<![\w.])R(\d+)", operand)} for operand in each.operands]
    result = _result(each)
    if result is None:
        return set(), set().union(*named)
    first = min(named[result])
    read = set().union(*(registers for number, registers in enumerate(named) if number != result))
    return set(range(first, first + _width(each.opcode))), read


def _result(each: Instruction) -> int | None:
    """Which operand is the result: the first, or after predicates (SHFL, ATOMG) the second, if it is a register."""
    if _NO_RESULT.match(each.opcode):
        return None
    for number, operand in enumerate(each.operands):
        if re.fullmatch(r"R\d+", operand):
            return number
        if not re.fullmatch(r"!?U?P(T|\d+)", operand):
            return None
    return None


def _width(opcode: str) -> int:
    """Registers of a result."""
    parts = opcode.split(".")
    if parts[0] == "LDSM":
        return int(parts[-1]) if parts[-1].isdigit() else 1
    if "128" in parts:
        return 4
    return 2 if "64" in parts or "WIDE" in parts or opcode == "CS2R" else 1
