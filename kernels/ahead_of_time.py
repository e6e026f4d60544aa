"""Every shipped launch compiles within its limits: registers, spills, shared memory, threads, and which matrix
instruction, read from the compiler's output on a machine without a GPU.

    python -m transfusion.kernels.ahead_of_time              # a representative part, in seconds
    python -m transfusion.kernels.ahead_of_time --all        # everything that ships, in minutes

Exit status 1 where a limit is broken. Not for a process under TRITON_INTERPRET=1, where nothing is compiled.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from transfusion.kernels.attention.compile_cases import compile_cases as attention_cases
from transfusion.kernels.diffusion_loss.kernel import compile_cases as diffusion_loss_cases
from transfusion.kernels.patchify_noise.kernel import compile_cases as patchify_noise_cases


class Target(NamedTuple):
    """What is compiled for: Triton's backend and architecture, the launch table that serves it, its limits.

    `spill_bytes`: what a thread may spill where `SPILL_BUDGET` does not say otherwise. The tables of sm_90 are made for
    it; sm_80 shares `default.json`, which is made for no one architecture, and may spill a few addresses.
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
    "sm_80": Target("cuda", 80, 32, "default", 163 * 1024, "mma", 64),
    "gfx942": Target("hip", "gfx942", 64, "gfx942", 64 * 1024, "mfma", 0),
}
MAX_THREADS = 1024

# Attention compiled without --all: every kernel for sm_90 in 16 bits, else the forward one.
REPRESENTATIVE_HEAD_DIMS: dict[str, dict[str, tuple[int, ...]]] = {
    "sm_90": {"bf16": (64, 80, 128), "fp32": (16,)},
    "sm_80": {"bf16": (64, 128)},
    "gfx942": {"bf16": (64, 128)},
}

# Exceptions to a target's `spill_bytes`, by kernel, element type and padded head dim.
# dk and dv are two accumulators of a tile of keys: with wide heads they fill the 255 registers of a thread.
SPILL_BUDGET: dict[tuple[str, str, str, int], int] = {
    ("sm_90", "backward_key", "bf16", 128): 16,
    ("sm_90", "backward_key", "bf16", 256): 56,
}
# The tables were made with this compiler; another allocates registers a little differently and may spill this more.
TABLES_MADE_WITH = "3.7"
OTHER_COMPILER_SPILL_BYTES = 64


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
        hidden = re.compile("BLOCK_D|PRECISION|stride_")
        parts = [f"{key}={value}" for key, value in self.constants.items() if not hidden.match(key)]
        return " ".join([self.function, self.dtype, *parts, f"warps={self.num_warps}", f"stages={self.num_stages}"])


class Resources(NamedTuple):
    """What the compiler gave a kernel; registers and spills are those of one thread.

    `spill_bytes`: the stack frame (CUDA) or scratch (HIP), where a kernel without arrays or calls has only spills.
    `matrix_instructions`: of the kinds wgmma, mma, mfma, those in the code. `has_f64`: any float64 instruction.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    matrix_instructions: tuple[str, ...]
    has_f64: bool


def compile_case(case: Case, target: str) -> Resources:
    """Compiles `case` for a name in `TARGETS`, past Triton's cache."""
    if not isinstance(case.kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET=1 turns kernels into Python functions: nothing to compile; unset it")
    backend, architecture, lanes, *_ = TARGETS[target]
    source = ASTSource(case.kernel, case.signature, case.constants, case.attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        compiled = triton.compile(source, target=GPUTarget(backend, architecture, lanes), options=options)
    read = _cuda_resources if backend == "cuda" else _hip_resources
    return read(compiled.asm, compiled.metadata.shared)


def _cuda_resources(asm: Any, shared_bytes: int) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ptx = asm["ptx"]
    kinds = {"wgmma": r"\bwgmma\.mma_async\b", "mma": r"\bmma\.sync\b"}
    return Resources(
        registers=_number(r"\bREG:(\d+)", usage),
        spill_bytes=_number(r"\bSTACK:(\d+)", usage),
        shared_bytes=shared_bytes,
        threads=_number(r"\.(?:req|max)ntid (\d+)", ptx),
        matrix_instructions=tuple(kind for kind, pattern in kinds.items() if re.search(pattern, ptx)),
        has_f64=re.search(r"\.f64\b", ptx) is not None,
    )


def _hip_resources(asm: Any, shared_bytes: int) -> Resources:
    code = asm["amdgcn"]
    return Resources(
        registers=_number(r"\.vgpr_count:\s+(\d+)", code),
        spill_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", code),
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
    if not triton.__version__.startswith(f"{TABLES_MADE_WITH}."):
        budget += OTHER_COMPILER_SPILL_BYTES
    broken = []
    if resources.spill_bytes > budget:
        broken.append(f"spills {resources.spill_bytes} bytes a thread, {budget} allowed")
    if resources.shared_bytes > limits.shared_bytes:
        broken.append(f"{resources.shared_bytes} bytes of shared memory, {limits.shared_bytes} allowed")
    if resources.threads > MAX_THREADS:
        broken.append(f"{resources.threads} threads, {MAX_THREADS} allowed")
    if resources.has_f64:
        broken.append("computes in float64")
    if _multiplies(case) and limits.matrix_instruction not in resources.matrix_instructions:
        broken.append(f"no {limits.matrix_instruction} instruction")
    return broken


def _multiplies(case: Case) -> bool:
    """Whether the kernel's products belong on the matrix units: attention in 16 bits."""
    return "PRECISION" in case.constants and case.dtype in ("bf16", "fp16")


def all_cases(target: str) -> Iterator[Case]:
    """Every launch that ships for `target`."""
    yield from (Case(*case) for case in attention_cases(TARGETS[target].table))
    yield from (Case(*case) for case in patchify_noise_cases())
    yield from (Case(*case) for case in diffusion_loss_cases())


def representative(case: Case, target: str) -> bool:
    """Whether `case` is in the part that is compiled without --all."""
    head_dim = case.constants.get("HEAD_DIM")
    if head_dim is None:
        return case.dtype == "bf16"
    wanted = head_dim in REPRESENTATIVE_HEAD_DIMS[target].get(case.dtype, ())
    return wanted and (case.function == "forward" or (target == "sm_90" and case.dtype == "bf16"))


def _row(case: Case, target: str, resources: Resources, broken: list[str]) -> str:
    matrix = "+".join(resources.matrix_instructions) or "-"
    numbers = f"{resources.registers:>9} {resources.spill_bytes:>6} {resources.shared_bytes:>7} {resources.threads:>7}"
    return f"{target:7} {numbers} {matrix:9}  {case.name}" + "".join(f"\n    FAIL: {reason}" for reason in broken)


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints a row each, and returns 1 where a limit is broken, else 0."""
    parser = argparse.ArgumentParser(description="Compile the shipped kernels without a GPU and check their limits.")
    parser.add_argument("--all", action="store_true", help="every launch that ships (minutes), not a part")
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated; default: every target")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args(argv)
    as_table = options.format == "table"
    if as_table:
        print(
            f"triton {triton.__version__}, bytes and registers are those of one thread, shared those of one program\n"
        )
        print(f"{'target':7} {'registers':>9} {'spills':>6} {'shared':>7} {'threads':>7} {'matrix':9}  launch")
    rows, failed = [], 0
    for target in options.target or TARGETS:
        for case in all_cases(target):
            if not (options.all or representative(case, target)):
                continue
            resources = compile_case(case, target)
            broken = broken_limits(case, target, resources)
            failed += bool(broken)
            rows.append({"case": case.name, "target": target, **resources._asdict(), "broken": broken})
            if as_table:
                print(_row(case, target, resources, broken), flush=True)
    print(f"\n{len(rows) - failed} passed, {failed} failed" if as_table else json.dumps(rows, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
