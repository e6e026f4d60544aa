"""Instructions of PTX -> lines of a block's function: numpy for what registers hold, a team's methods for the rest."""

import re

import numpy as np

from ptx_machine.arithmetic import BINARY, COMPARISONS, DTYPES, FLOAT, INTEGER
from ptx_machine.assembly import Statement
from ptx_machine.writer import NUMBER, Writer

END = 1 << 30  # after every block
SPECIAL = {"%tid.x": "tid", "%ctaid.x": "ctaid", "%nctaid.x": "nctaid", "%laneid": "laneid"}
IGNORED = ("bar.warp.sync", "setmaxnreg", "fence.mbarrier_init", "griddepcontrol", "wgmma.fence", "membar", "fence.acq")

Words, Operands = list[str], tuple[str, ...]


class Instructions(Writer):
    """`write` takes a statement; a method per first word of an opcode, the others are arithmetic."""

    def write(self, statement: Statement) -> None:
        self.lines.append(f"# {statement}")
        opcode, operands = statement.opcode, statement.operands
        if opcode.startswith(IGNORED):
            return
        words = opcode.split(".")
        special = getattr(self, "_" + words[0], None)
        if special is not None:
            special(statement, words, operands)
        elif words[-1].endswith("x2"):
            self._packed(statement, words, operands)
        else:
            self._arithmetic(statement, words, operands)

    def _arithmetic(self, statement: Statement, words: Words, operands: Operands) -> None:
        bits, kind = _type(words[-1])
        target = operands[0]
        if words[0] in BINARY:
            template = BINARY[words[0]]
        elif kind == "f":
            template = FLOAT.get(f"{words[0]}.{words[1]}") or FLOAT[words[0]]
        else:
            template = INTEGER.get(f"{words[0]}.{words[1]}") or INTEGER[words[0]]
        wide = "wide" in words
        result = 2 * bits if wide else bits
        assert self.bits(target) == result
        sources = []
        for index, operand in enumerate(operands[1:]):
            if words[0] == "bfe" and index:
                sources.append(str(int(operand)))
            elif words[0] in ("shl", "shr") and index:
                sources.append(self._shift(operand, bits, kind))
            elif wide and index == 2:
                sources.append(self.use(operand, kind, result))
            elif NUMBER.match(operand) and wide:
                sources.append(self.immediate(operand, result, kind))
            else:
                sources.append(self.use(operand, kind, bits))
        names = {"T": self.dtype(result, kind), "W": "", "bits": ""}
        if words[:2] == ["mul", "hi"]:
            names["W"] = self.dtype(64, kind)
            names["bits"] = self.constant(DTYPES[64, kind](bits))
        if words[0] == "popc":
            names["T"], kind = "np.uint32", "u"
        self.define(target, kind, template.format(*sources, **names), statement)

    def _packed(self, statement: Statement, words: Words, operands: Operands) -> None:
        """Two numbers of 16 bits in one register."""
        bits, kind = _type(words[-1].removesuffix("x2"))
        template = BINARY.get(words[0]) or (FLOAT if kind == "f" else INTEGER)[words[0]]
        sources = [f"parts({self.use(each, 'u', 32)}, {self.dtype(bits, kind)})" for each in operands[1:]]
        self.define(operands[0], "u", f"whole({template.format(*sources)})", statement)

    def _shift(self, operand: str, bits: int, kind: str) -> str:
        if NUMBER.match(operand):
            return self.immediate(operand, bits, kind)
        return f"{self.use(operand, 'u', 32)}.astype({self.dtype(bits, kind)})"

    def _mov(self, statement: Statement, words: Words, operands: Operands) -> None:
        target, source = operands
        bits, kind = _type(words[-1])
        if source in SPECIAL:
            self.define(target, "u", f"w.{SPECIAL[source]}", statement)
        elif source.startswith("{"):
            parts = [self.use(part, "u", bits // 2) for part in _list(source)]
            self.define(target, "u", f"pair({', '.join(parts)})", statement)
        elif target.startswith("{"):
            parts = self.fresh()
            self.lines.append(f"{parts} = halves({self.use(source, 'u', bits)})")
            for index, part in enumerate(_list(target)):
                self.define(part, "u", f"{parts}[{index}]", statement)
        elif source == "global_smem":
            self.define(target, "u", "w.shared_base", statement)
        elif source in self.program.parameters:
            self.define(target, "u", f"w.parameter_address({source!r})", statement)
        elif NUMBER.match(source) or source.startswith("0f"):
            constant = self.constant(np.full(self.lanes, self.constants[self.immediate(source, bits, kind)]))
            self.define(target, kind, constant, statement)
        else:
            self.define(target, kind, self.use(source, kind, bits), statement)

    def _cvta(self, statement: Statement, words: Words, operands: Operands) -> None:
        self.define(operands[0], "u", self.use(operands[1], "u", 64), statement)

    def _selp(self, statement: Statement, words: Words, operands: Operands) -> None:
        bits, kind = _type(words[-1])
        target, yes, no, chooser = operands
        yes, no = self.use(yes, kind, bits), self.use(no, kind, bits)
        self.define(target, kind, f"np.where({self.use(chooser, 'p', 1)}, {yes}, {no})", statement)

    def _setp(self, statement: Statement, words: Words, operands: Operands) -> None:
        bits, kind = _type(words[-1])
        target, a, b = operands
        assert len(words) == 3
        comparison = COMPARISONS[words[1]]
        if words[1] == "ne" and kind == "f":
            raise NotImplementedError("an ordered !=")
        self.define(target, "p", f"{self.use(a, kind, bits)} {comparison} {self.use(b, kind, bits)}", statement)

    def _cvt(self, statement: Statement, words: Words, operands: Operands) -> None:
        target, *sources = operands
        to, of = words[-2:]
        if of == "f32" and to in ("bf16x2", "f16x2"):
            function = "bf16" if to == "bf16x2" else "fp16"
            high, low = (f"{function}({self.use(source, 'f', 32)})" for source in sources)
            self.define(target, "u", f"pair({low}, {high})", statement)
        elif of == "f32" and to in ("bf16", "f16"):
            self.define(
                target, "u", f"{'bf16' if to == 'bf16' else 'fp16'}({self.use(sources[0], 'f', 32)})", statement
            )
        elif of == "bf16":
            self.define(target, "f", f"from_bf16({self.use(sources[0], 'u', 16)})", statement)
        else:
            bits, kind = _type(of)
            result, into = _type(to)
            value = self.use(sources[0], kind, bits)
            if kind == "f" and into != "f":
                assert "rzi" in words
                self.define(target, into, f"to_integer({value}, {self.dtype(result, into)})", statement)
            else:
                self.define(target, into, f"{value}.astype({self.dtype(result, into)})", statement)

    def _prmt(self, statement: Statement, words: Words, operands: Operands) -> None:
        values = ", ".join(self.use(operand, "u", 32) for operand in operands[1:])
        self.define(operands[0], "u", f"permute({values})", statement)

    def _shfl(self, statement: Statement, words: Words, operands: Operands) -> None:
        target, value, offset, clamp, _ = operands
        assert clamp == ("0" if words[2] == "up" else "31") and words[-1] == "b32"
        self.lines.append("assert A is None")
        value, offset = self.use(value, "u", 32), self.use(offset, "u", 32)
        self.define(target, "u", f"shuffle({words[2]!r}, {value}, {offset})", statement)

    def _redux(self, statement: Statement, words: Words, operands: Operands) -> None:
        bits, kind = _type(words[-1])
        self.lines.append("assert A is None")
        value = self.use(operands[1], kind, bits)
        self.define(operands[0], kind, f"reduce({words[2]!r}, {value})", statement)

    def _elect(self, statement: Statement, words: Words, operands: Operands) -> None:
        self.lines.append("assert A is None")
        self.define(operands[0].split("|")[1], "p", "w.laneid == 0", statement)

    # -- memory

    def _address(self, operand: str) -> str:
        base, _, offset = operand.strip("[] ").partition("+")
        base, offset = base.strip(), int(offset or "0", 0)
        if base == "global_smem":
            return f"w.shared_base + {self.constant(np.uint32(offset))}"
        bits = self.bits(base)
        name = self.use(base, "u", bits)
        return f"{name} + {self.immediate(str(offset), bits, 'u')}" if offset else name

    def _ld(self, statement: Statement, words: Words, operands: Operands) -> None:
        targets = _list(operands[0])
        bits, kind = _type(words[-1])
        if words[1] == "param":
            value = f"w.parameter({operands[1].strip('[] ')!r}, {bits})"
            self.define(targets[0], "u", self._widened(value, targets[0], bits, kind), statement)
            return
        parts = self.fresh()
        space = words[1].split("::")[0]
        address, mask = self._address(operands[1]), self.mask(statement)
        self.lines.append(f"{parts} = w.load_{space}({address}, {len(targets)}, {bits}, {mask})")
        for index, target in enumerate(targets):
            self.define(target, "u", self._widened(f"{parts}[{index}]", target, bits, kind), statement)

    def _widened(self, value: str, target: str, bits: int, kind: str) -> str:
        """What a register wider than what is loaded gets: with the sign's bits before it, or zeros."""
        if target == "_" or self.bits(target) == bits:
            return value
        wider = self.bits(target)
        return (
            f"{value}.view({self.dtype(bits, kind)}).astype({self.dtype(wider, kind)}).view({self.dtype(wider, 'u')})"
        )

    def _st(self, statement: Statement, words: Words, operands: Operands) -> None:
        bits, _ = _type(words[-1])
        values = [
            self.use(value, "u", bits if NUMBER.match(value) else self.bits(value)) for value in _list(operands[1])
        ]
        space = words[1].split("::")[0]
        address, mask = self._address(operands[0]), self.mask(statement)
        self.lines.append(f"w.store_{space}({address}, ({', '.join(values)},), {bits}, {mask})")

    def _atom(self, statement: Statement, words: Words, operands: Operands) -> None:
        assert words[1:-1] == ["global", "gpu", "relaxed", "add"], words
        bits, _ = _type(words[-1])
        address, value = self._address(operands[1]), self.use(operands[2], "u", bits)
        self.define(operands[0], "u", f"w.add_global({address}, {value}, {bits}, {self.mask(statement)})", statement)

    def _ldmatrix(self, statement: Statement, words: Words, operands: Operands) -> None:
        targets, parts = _list(operands[0]), self.fresh()
        transposed = "trans" in words
        self.lines.append(f"{parts} = w.load_matrices({self._address(operands[1])}, {len(targets)}, {transposed}, A)")
        for index, target in enumerate(targets):
            self.define(target, "u", f"{parts}[{index}]", statement)

    def _stmatrix(self, statement: Statement, words: Words, operands: Operands) -> None:
        values = ", ".join(self.use(value, "u", 32) for value in _list(operands[1]))
        self.lines.append(f"w.store_matrices({self._address(operands[0])}, ({values},), {'trans' in words}, A)")

    # -- products

    def _mma(self, statement: Statement, words: Words, operands: Operands) -> None:
        assert words[3:6] == ["m16n8k16", "row", "col"] and words[6] == words[9] == "f32"
        d, a, b, c = (_list(operand) for operand in operands)
        a, b = ("(" + ", ".join(self.use(x, "u", 32) for x in regs) + ")" for regs in (a, b))
        c = "(" + ", ".join(self.use(x, "f", 32) for x in c) + ")"
        parts = self.fresh()
        self.lines.append(f"{parts} = mma({a}, {b}, {c}, {words[7]!r})")
        for index, target in enumerate(d):
            self.define(target, "f", f"{parts}[{index}]", statement)

    def _wgmma(self, statement: Statement, words: Words, operands: Operands) -> None:
        self.lines.append("assert A is None")
        if words[1] == "commit_group":
            self.lines.append("w.commit_products()")
            return
        if words[1] == "wait_group":
            self.lines.append(f"w.await_products({int(operands[0])})")
            return
        d = _list(operands[0])
        shape = re.match(r"m64n(\d+)k16$", words[4])
        assert words[1] == "mma_async" and shape and words[5] == "f32" and words[6] == words[7]
        assert len(d) == int(shape[1]) // 2 and operands[4:6] == ("1", "1")
        in_registers = operands[1].startswith("{")
        a = (
            "(" + ", ".join(self.use(x, "u", 32) for x in _list(operands[1])) + ",)"
            if in_registers
            else self.use(operands[1], "u", 64)
        )
        transposed = [int(bit) for bit in operands[6:]]
        a_rows_last, b_rows_last = (0, *transposed) if in_registers else transposed
        b = self.use(operands[2], "u", 64)
        scale = operands[3] if NUMBER.match(operands[3]) else self.use(operands[3], "p", 1)
        old = ", ".join(self.use(x, "f", 32) for x in d)
        parts = self.fresh()
        layout = f"{words[6]!r}, {shape[1]}, {a_rows_last}, {b_rows_last}"
        self.lines.append(f"{parts} = w.multiply(({old},), {a}, {b}, {scale}, {layout})")
        for index, target in enumerate(d):
            self.define(target, "f", f"{parts}[{index}]", statement)

    # -- copies and barriers

    def _cp(self, statement: Statement, words: Words, operands: Operands) -> None:
        assert words[1] == "async"
        if words[2] == "commit_group":
            self.lines.append("w.commit_copies()")
        elif words[2] == "wait_group":
            self.lines.append(f"w.await_copies({int(operands[0])})")
        elif words[2] == "bulk":
            assert words[3] == "tensor" and not operands[3:]
            descriptor, _, at = operands[1].strip("[] ").partition(",")
            index = ", ".join(self.use(x, "i", 32) for x in _list(at.strip()))
            descriptor = self.use(descriptor, "u", 64)
            to, barrier = self._address(operands[0]), self._address(operands[2])
            self.lines.append(f"w.copy_block({to}, {descriptor}, ({index},), {barrier}, {self.mask(statement)})")
        else:
            assert words[2] in ("cg", "ca") and words[3:5] == ["shared", "global"]
            size = int(operands[2], 0)
            read = self.use(operands[3], "u", 32) if len(operands) > 3 else str(size)
            to, of = self._address(operands[0]), self._address(operands[1])
            self.lines.append(f"w.copy({to}, {of}, {size}, {read}, {self.mask(statement)})")

    def _mbarrier(self, statement: Statement, words: Words, operands: Operands) -> None:
        mask = self.mask(statement)
        if words[1] == "init":
            self.lines.append(f"w.barrier_init({self._address(operands[0])}, {int(operands[1])}, {mask})")
        elif words[1] == "arrive":
            assert operands[0] == "_"
            expected = int(operands[2]) if words[2].startswith("expect_tx") else 0
            self.lines.append(f"w.barrier_arrive({self._address(operands[1])}, {expected}, {mask})")
        elif words[1] == "try_wait":
            parity = self.use(operands[2], "u", 32)
            self.define(operands[0], "p", f"w.barrier_try({self._address(operands[1])}, {parity}, A)", statement)
        elif words[1] == "inval":
            self.lines.append(f"w.barrier_end({self._address(operands[0])}, {mask})")
        else:
            raise KeyError(words[1])

    def _fence(self, statement: Statement, words: Words, operands: Operands) -> None:
        assert words[1] == "proxy" and words[2].startswith("async")
        self.lines.append("w.fence()")

    # -- where to go

    def _bra(self, statement: Statement, words: Words, operands: Operands) -> None:
        there = self.program.labels[operands[0]]
        if statement.guard:
            self.finish(f"branch({self.guard(statement)}, A, {there}, {self.number + 1})")
        else:
            self.finish(str(there))

    def _brx(self, statement: Statement, words: Words, operands: Operands) -> None:
        targets = [self.program.labels[name] for name in self.program.tables[operands[1]]]
        index = self.use(operands[0], "u", 32)
        self.lines.append(f"assert A is None and ({index} == {index}[0]).all()")
        self.finish(f"{targets}[{index}[0]]")

    def _ret(self, statement: Statement, words: Words, operands: Operands) -> None:
        if statement.guard:
            self.finish(f"branch({self.guard(statement)}, A, {END}, {self.number + 1})")
        else:
            self.finish(str(END))

    def _bar(self, statement: Statement, words: Words, operands: Operands) -> None:
        assert not statement.guard
        identifier, *threads = (self.use(operand, "u", 32) for operand in operands)
        self.finish(f"w.meet({identifier}, {threads[0] if threads else None}, {self.number + 1}, A)")

    _barrier = _bar


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{} ").split(",")]


def _type(word: str) -> tuple[int, str]:
    """ "s32" -> (32, "i")"""
    if word == "pred":
        return 1, "p"
    return int(word[1:]), {"b": "u", "u": "u", "s": "i", "f": "f"}[word[0]]
