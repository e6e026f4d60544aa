"""Every shipped launch compiles within its limits: registers, spills, shared memory, threads, the right matrix
instruction, and no hazard with asynchronous products, read from the compiler's output without a GPU.

    python -m transfusion.kernels.ahead_of_time                  # a representative part, in seconds
    python -m transfusion.kernels.ahead_of_time --all            # everything that ships, in minutes
    python -m transfusion.kernels.ahead_of_time --all --write    # and keep the table in ahead_of_time.txt

Exit status 1 where a limit is broken. Not for a process under TRITON_INTERPRET=1, where nothing is compiled.
`ahead_of_time.txt` shows in a diff what a change of a kernel or of a launch does to registers, spills and memory.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from transfusion.kernels.attention.compile_cases import compile_cases as attention_cases
from transfusion.kernels.denoise_step.kernel import compile_cases as denoise_step_cases
from transfusion.kernels.diffusion_loss.kernel import compile_cases as diffusion_loss_cases
from transfusion.kernels.mask_tiles.compile_cases import compile_cases as mask_tiles_cases
from transfusion.kernels.patchify_noise.kernel import compile_cases as patchify_noise_cases
from transfusion.kernels.sass import count_spills, hazards, inner_loops, instructions
from transfusion.kernels.testing import in_a_line


class Target(NamedTuple):
    """What is compiled for: Triton's backend and architecture, the launch table that serves it, its limits.

    `spill_bytes`: what a thread may spill where `SPILL_BUDGET` does not say otherwise; no innermost loop may move it.
    The tables of sm_90 are made for it. sm_80 stands for all that `default.json` serves, which is made for no one
    architecture and may spill a few addresses: 99 KiB is what sm_86, sm_89 and sm_120 have.
    """

    backend: str
    architecture: int | str
    lanes: int
    table: str
    shared_bytes: int
    matrix_instruction: str
    spill_bytes: int


TARGETS = {
    "sm_90": Target("cuda", 90, 32, "sm_90", 227 * 1024, "wgmma", 0),
    "sm_80": Target("cuda", 80, 32, "default", 99 * 1024, "mma", 64),
    "sm_100": Target("cuda", 100, 32, "default", 227 * 1024, "tcgen05", 64),
    "gfx942": Target("hip", "gfx942", 64, "gfx942", 64 * 1024, "mfma", 0),
}
MAX_THREADS = 1024
WAITING = 16  # a loop of so few instructions waits for a barrier
GOLDEN = Path(__file__).with_name("ahead_of_time.txt")

# Attention compiled without --all: every kernel for sm_90 in 16 bits, else the forward one.
REPRESENTATIVE_HEAD_DIMS: dict[str, dict[str, tuple[int, ...]]] = {
    "sm_90": {"bf16": (64, 80, 128), "fp32": (16,)},
    "sm_80": {"bf16": (64, 128)},
    "sm_100": {"bf16": (128,)},
    "gfx942": {"bf16": (64, 128)},
}

# Exceptions to a target's `spill_bytes`, by kernel, element type and padded head dim; decoding is the forward's kernel.
# What they spill are addresses, written before the loops over tiles and read again after them.
SPILL_BUDGET: dict[tuple[str, str, str, int], int] = {
    ("sm_90", "backward_key", "bf16", 128): 64,
    ("sm_90", "backward_key", "bf16", 256): 48,
    ("sm_90", "backward_query", "bf16", 256): 40,
    ("sm_90", "backward_query", "fp32", 256): 48,
    ("sm_90", "forward", "bf16", 64): 24,
    ("sm_90", "forward", "bf16", 128): 32,
    ("sm_90", "forward", "fp32", 32): 24,
    ("sm_90", "forward", "fp32", 64): 24,
    ("sm_90", "forward", "fp32", 128): 16,
    ("sm_90", "forward", "fp32", 256): 56,
    ("sm_90", "specialised_forward", "bf16", 64): 8,
    ("sm_90", "specialised_key", "bf16", 64): 8,
    ("sm_90", "specialised_key", "bf16", 128): 72,
    ("sm_90", "specialised_query", "bf16", 128): 32,
}
# The tables were made with this compiler; another allocates registers a little differently and may spill this more.
TABLES_MADE_WITH = "3.7"
OTHER_COMPILER_SPILL_BYTES = 64
OTHER_COMPILER_INNER_SPILLS = 8


class Case(NamedTuple):
    """One specialisation of a jit function, as `ASTSource` takes it, and its options (the defaults are Triton's)."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    num_warps: int = 4
    num_stages: int = 3

    @property
    def dtype(self) -> str:
        """Element type of the first tensor, say "bf16"."""
        return next(kind[1:] for kind in self.signature.values() if kind.startswith("*"))

    @property
    def function(self) -> str:
        """The kernel's name without its ending."""
        name: str = self.kernel.fn.__name__.removesuffix("_kernel")
        return name

    @property
    def name(self) -> str:
        """Function, element type, what it is specialised on, warps and stages: unique among the cases of a target."""
        hidden = re.compile("BLOCK_D|PRECISION|stride_|gl_")
        parts = [f"{key}={value}" for key, value in self.constants.items() if not hidden.match(key)]
        return " ".join([self.function, self.dtype, *parts, f"warps={self.num_warps}", f"stages={self.num_stages}"])


class Resources(NamedTuple):
    """What the compiler gave a kernel; registers and spills are those of one thread.

    `spill_bytes`: the stack frame (CUDA) or scratch (HIP), where a kernel without arrays or calls has only spills.
    `inner_loops`: instructions of each innermost loop that computes, in the order of the code; not read on HIP.
    `inner_spills`: those of them that move spills.
    `matrix_instructions`: of the kinds wgmma, tcgen05, mma, mfma, those in the code. `has_f64`: any of float64.
    `hazards`: see `sass.hazards`; not read on HIP.
    """

    registers: int
    spill_bytes: int
    inner_spills: int
    inner_loops: tuple[int, ...]
    shared_bytes: int
    threads: int
    matrix_instructions: tuple[str, ...]
    has_f64: bool
    hazards: tuple[str, ...] = ()


def compile_case(case: Case, target: str) -> Resources:
    """What the compiler gives `case`, for a name in `TARGETS`."""
    compiled = assembled(case, target)
    read = _cuda_resources if TARGETS[target].backend == "cuda" else _hip_resources
    return read(compiled.asm, compiled.metadata.shared)


def assembled(case: Case, target: str) -> Any:
    """Triton's compiled kernel, made past its cache."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 turns kernels into Python functions: nothing to compile; unset it")
    backend, architecture, lanes, *_ = TARGETS[target]
    kind = GluonASTSource if case.kernel.is_gluon() else ASTSource
    source = kind(case.kernel, case.signature, case.constants, case.attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        return triton.compile(source, target=GPUTarget(backend, architecture, lanes), options=options)


def dumped(cubin: bytes, what: str) -> str:
    """What cuobjdump says of a kernel: "sass", "resource-usage"."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, f"--dump-{what}", str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _cuda_resources(asm: Any, shared_bytes: int) -> Resources:
    usage, code = dumped(asm["cubin"], "resource-usage"), instructions(dumped(asm["cubin"], "sass"))
    loops = inner_loops(code)
    ptx = asm["ptx"]
    kinds = {"wgmma": r"\bwgmma\.mma_async\b", "tcgen05": r"\btcgen05\.mma\b", "mma": r"\bmma\.sync\b"}
    return Resources(
        registers=_number(r"\bREG:(\d+)", usage),
        spill_bytes=_number(r"\bSTACK:(\d+)", usage),
        inner_spills=count_spills(loops),
        inner_loops=tuple(len(loop) for loop in loops if len(loop) > WAITING),
        shared_bytes=shared_bytes,
        threads=_number(r"\.(?:req|max)ntid (\d+)", ptx),
        matrix_instructions=tuple(kind for kind, pattern in kinds.items() if re.search(pattern, ptx)),
        has_f64=re.search(r"\.f64\b", ptx) is not None,
        hazards=tuple(hazards(code)),
    )


def _hip_resources(asm: Any, shared_bytes: int) -> Resources:
    code = asm["amdgcn"]
    return Resources(
        registers=_number(r"\.vgpr_count:\s+(\d+)", code),
        spill_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", code),
        inner_spills=len(re.findall(r"\bscratch_(?:load|store)", code)),  # in a loop or not
        inner_loops=(),
        shared_bytes=shared_bytes,
        threads=_number(r"\.max_flat_workgroup_size:\s+(\d+)", code),
        matrix_instructions=("mfma",) if "v_mfma_" in code else (),
        has_f64=re.search(r"\bv_\w+_f64\b", code) is not None,
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}:\n{text[:2000]}")
    return int(match[1])


def broken_limits(case: Case, target: str, resources: Resources) -> list[str]:
    """What exceeds its limit, in words; empty when nothing does."""
    limits = TARGETS[target]
    block_d = case.constants.get("BLOCK_D", 0)
    budget = SPILL_BUDGET.get((target, case.function, case.dtype, block_d), limits.spill_bytes)
    inner = 0
    if not triton.__version__.startswith(f"{TABLES_MADE_WITH}."):
        budget += OTHER_COMPILER_SPILL_BYTES
        inner += OTHER_COMPILER_INNER_SPILLS
    broken = []
    if resources.spill_bytes > budget:
        broken.append(f"spills {resources.spill_bytes} bytes a thread, {budget} allowed")
    if resources.inner_spills > inner:
        broken.append(f"moves spills {resources.inner_spills} times in inner loops, {inner} allowed")
    if resources.shared_bytes > limits.shared_bytes:
        broken.append(f"{resources.shared_bytes} bytes of shared memory, {limits.shared_bytes} allowed")
    if resources.threads > MAX_THREADS:
        broken.append(f"{resources.threads} threads, {MAX_THREADS} allowed")
    if resources.has_f64:
        broken.append("computes in float64")
    broken += resources.hazards
    wanted = _matrix_instruction(case, limits)
    if wanted and wanted not in resources.matrix_instructions:
        broken.append(f"no {wanted} instruction")
    return broken


def _matrix_instruction(case: Case, limits: Target) -> str | None:
    """What the products of attention in 16 bits belong on; a tile of fewer rows than a warp group's 64 is mma's."""
    if not case.constants.keys() >= {"BLOCK_Q", "BLOCK_K", "BLOCK_D"} or case.dtype not in ("bf16", "fp16"):
        return None
    rows = case.constants["BLOCK_K" if case.function == "backward_key" else "BLOCK_Q"]
    return "mma" if rows < 64 and limits.backend == "cuda" else limits.matrix_instruction


def all_cases(target: str) -> Iterator[Case]:
    """Every launch that ships for `target`."""
    yield from (Case(*case) for case in attention_cases(TARGETS[target].table))
    yield from (Case(*case) for case in mask_tiles_cases(TARGETS[target].table))
    yield from (Case(*case) for case in patchify_noise_cases())
    yield from (Case(*case) for case in diffusion_loss_cases())
    yield from (Case(*case) for case in denoise_step_cases())


def representative(case: Case, target: str) -> bool:
    """Whether `case` is in the part that is compiled without --all."""
    head_dim = case.constants.get("HEAD_DIM")
    if head_dim is None:
        return case.dtype in ("bf16", "i32")
    if case.kernel.is_gluon():  # seconds each; tests/ptx compiles others
        return head_dim == 128 and "group" not in case.constants
    wanted = head_dim in REPRESENTATIVE_HEAD_DIMS[target].get(case.dtype, ())
    return wanted and (case.function.endswith("forward") or (target == "sm_90" and case.dtype == "bf16"))


def _row(name: str, target: str, resources: Resources) -> str:
    matrix = "+".join(resources.matrix_instructions) or "-"
    loops = "+".join(map(str, resources.inner_loops)) or "-"
    numbers = f"{resources.registers:>9} {resources.spill_bytes:>6} {resources.inner_spills:>5} {loops:>9}"
    return f"{target:7} {numbers} {resources.shared_bytes:>7} {resources.threads:>7} {matrix:11}  {name}"


def header() -> str:
    """The compiler's version and the names of the columns."""
    numbers = f"{'registers':>9} {'spills':>6} {'inner':>5} {'loops':>9} {'shared':>7} {'threads':>7}"
    columns = f"{'target':7} {numbers} {'matrix':11}  launch"
    units = "bytes and registers are those of one thread, shared those of one program"
    what = "attention: masked, full tile; two of them in specialised_forward and _query"
    loops = f"loops: instructions of each innermost loop ({what}); inner: those that move spills"
    return f"triton {triton.__version__}: {units}\n{loops}\n{columns}"


Compiled = tuple[str, str, Resources | None, list[str]]


def _compile(number: tuple[str, int]) -> Compiled:
    """Target, name, resources and broken limits of a target's case of that number, as a worker process can send them.
    For a case that does not compile: no resources, and why."""
    target, index = number
    case = list(all_cases(target))[index]
    try:
        resources = compile_case(case, target)
    except Exception as error:  # a compiler's
        return target, case.name, None, [in_a_line(error)]
    return target, case.name, resources, broken_limits(case, target, resources)


def compile_all(numbers: Sequence[tuple[str, int]], jobs: int) -> Iterator[Compiled]:
    """`_compile` of each, in order, `jobs` at a time."""
    if jobs == 1:
        yield from map(_compile, numbers)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(_compile, numbers)


def _keep(lines: Sequence[str], failed: Container[tuple[str, str]] = ()) -> None:
    """Writes lines into the table in place of those of the same launches; launches that no longer ship, or no longer
    compile, are dropped."""
    before = GOLDEN.read_text().splitlines()[3:] if GOLDEN.exists() else []
    kept = {_launch_of(line): line for line in (*before, *lines) if _launch_of(line) not in failed}
    shipped = [(target, case.name) for target in TARGETS for case in all_cases(target)]
    GOLDEN.write_text("\n".join([header(), *(kept[launch] for launch in shipped if launch in kept), ""]))


def _launch_of(line: str) -> tuple[str, str]:
    """Target and name of a line of the table."""
    target, *numbers_and_name = line.split()
    return target, " ".join(numbers_and_name[7:])


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints a row each, and returns 1 where a limit is broken, else 0."""
    parser = argparse.ArgumentParser(description="Compile the shipped kernels without a GPU and check their limits.")
    parser.add_argument("--all", action="store_true", help="every launch that ships (minutes), not a part")
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated; default: every target")
    parser.add_argument("--function", action="append", help="as the table names it; may be repeated; default: all")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    parser.add_argument("--write", action="store_true", help=f"keep the table of --all in {GOLDEN.name}")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("kernels under Triton's interpreter are not compiled: unset TRITON_INTERPRET")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs} must be at least 1")
    if options.write and not options.all:
        parser.error("--write keeps the table of everything: give --all")
    numbers = [
        (target, index)
        for target in options.target or TARGETS
        for index, case in enumerate(all_cases(target))
        if (options.all or representative(case, target)) and case.function in (options.function or [case.function])
    ]
    if not numbers:
        part = "" if options.all else " in the part that is compiled without --all"
        parser.error(f"no launch{part} is of {' or '.join(options.function)}")
    as_table = options.format == "table"
    if as_table:
        print(header(), flush=True)
    rows, lines, failed = [], [], 0
    try:
        for target, name, resources, broken in compile_all(numbers, options.jobs):
            failed += bool(broken)
            rows.append(
                {"case": name, "target": target, **(resources._asdict() if resources else {}), "broken": broken}
            )
            line = _row(name, target, resources) if resources else f"{target} {name}"
            lines += [line] if resources else []
            if as_table:
                print(line + "".join(f"\n    FAIL: {reason}" for reason in broken), flush=True)
    finally:  # a run that is stopped in the middle has compiled for minutes
        if options.write:
            _keep(lines, {(row["target"], row["case"]) for row in rows if "registers" not in row})
    print(f"\n{len(rows) - failed} passed, {failed} failed" if as_table else json.dumps(rows, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
