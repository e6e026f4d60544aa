"""PTX text -> a program: parameters in order, basic blocks of statements, where each branch goes.

A block ends where a warp may go elsewhere or must wait, and where others may go on: at branches, `ret` and barriers.
"""

import re
from typing import NamedTuple

ENDS = ("bra", "ret", "exit", "brx.idx", "bar.sync", "barrier.sync", "mbarrier.arrive", "trap")

PREFIXES = {".pred": "%p", ".b16": "%rs", ".b32": "%r", ".f32": "%r", ".b64": "%rd"}  # of registers of a kernel


class Statement(NamedTuple):
    """`@[!]guard opcode operands`. What an inline block declares for itself has a name of its own in the kernel."""

    guard: str | None
    negated: bool
    opcode: str
    operands: tuple[str, ...]
    line: int

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"line {self.line}: {guard}{self.opcode} {', '.join(self.operands)}"


class Program(NamedTuple):
    """One kernel. `blocks[labels[name]]` is where a branch to that name goes; `tables`: the labels of each brx.idx."""

    name: str
    parameters: tuple[str, ...]
    threads: int
    blocks: tuple[tuple[Statement, ...], ...]
    labels: dict[str, int]
    tables: dict[str, tuple[str, ...]]


def parse(text: str) -> Program:
    """The one kernel of a PTX file as Triton writes it."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    head, _, body = text.partition("\n{\n")
    entry = re.search(r"\.entry\s+(\w+)\s*\(", head)
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", head)
    assert entry and threads, "no kernel in this PTX"
    parameters = tuple(re.findall(rf"\b({entry[1]}_param_\d+)", head))
    reader = _Reader(1 + head.count("\n") + 2)
    for number, line in enumerate(body.split("\n")):
        reader.take(re.sub(r"//.*", "", line).strip(), number)
    return Program(
        entry[1],
        parameters,
        int(threads[1]),
        tuple(map(tuple, reader.blocks)),
        reader.labels,
        reader.tables,
    )


class _Reader:
    """Lines -> blocks. `{` opens a scope: registers and labels that it declares get names that the kernel has not."""

    def __init__(self, first_line: int) -> None:
        self.first_line = first_line
        self.blocks: list[list[Statement]] = [[]]
        self.labels: dict[str, int] = {}
        self.tables: dict[str, tuple[str, ...]] = {}
        self.own: dict[str, str] | None = None  # in a scope: its names, and what they are called outside
        self.pending = ""
        self.count = 0

    def take(self, line: str, number: int) -> None:
        if line == "{":
            self.count += 1
            self.own = {}
        elif line == "}":
            self.own = None
        elif line and not line.startswith((".loc", ".file", ".section")):
            self.pending += " " + line
            while True:
                label = re.match(r"\s*([\w$]+):\s*(?!:)", self.pending)
                if label:
                    self.pending = self.pending[label.end() :]
                    if not self.pending.startswith(".branchtargets"):
                        self._label(label[1])
                        continue
                    self.pending = f" .branchtargets {label[1]}, " + self.pending.removeprefix(".branchtargets")
                if ";" not in self.pending:
                    return
                statement, _, self.pending = self.pending.partition(";")
                self._statement(statement.strip(), self.first_line + number)

    def _label(self, name: str) -> None:
        if self.blocks[-1]:
            self.blocks.append([])
        if self.own is not None:
            self.own[name] = f"{name}_{self.count}"
        self.labels[self._outside(name)] = len(self.blocks) - 1

    def _outside(self, name: str) -> str:
        return (self.own or {}).get(name, name)

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".branchtargets"):
            name, *targets = re.findall(r"[\w$]+", text.removeprefix(".branchtargets"))
            self.tables[name] = tuple(targets)
            return
        if text.startswith(".reg"):
            if self.own is not None:
                _, kind, names = text.split(None, 2)
                for index, name in enumerate(re.findall(r"[\w$]+", names)):
                    self.own[name] = f"{PREFIXES[kind]}{10**6 * self.count + index}"
            return
        if text.startswith((".pragma", ".local", ".shared")):
            assert not text.startswith((".local", ".shared")), f"line {line}: {text}"
            return
        match = re.match(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
        assert match, f"line {line}: what is {text!r}?"
        words = re.sub(r"(?<![%\w$])[A-Za-z_$][\w$]*", lambda word: self._outside(word[0]), match[4])
        guard = self._outside(match[2]) if match[2] else None
        opcode = match[3]
        self.blocks[-1].append(Statement(guard, bool(match[1]), opcode, _operands(words), line))
        if opcode.startswith(ENDS):
            self.blocks.append([])


def _operands(text: str) -> tuple[str, ...]:
    """Split at the commas outside braces and brackets."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return (*parts, part.strip()) if part.strip() else tuple(parts)
