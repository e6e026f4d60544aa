"""Ahead-of-time compilation: the shipped kernels keep their limits on GPUs that this machine need not have."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from transfusion.kernels import ahead_of_time
from transfusion.kernels.ahead_of_time import GOLDEN, TARGETS, Case, Resources, broken_limits
from transfusion.kernels.registry import TRITON_INTERPRET
from transfusion.kernels.tuning import SPECIALISED, launches

SPECIALISED_KERNELS = {
    "forward": "specialised_forward",
    "backward_query": "specialised_query",
    "backward_key": "specialised_key",
}
FORWARD = Case(
    SimpleNamespace(fn=SimpleNamespace(__name__="forward_kernel")),
    {"p_q": "*bf16", "BLOCK_D": "constexpr", "PRECISION": "constexpr"},
    {"HEAD_DIM": 80, "BLOCK_D": 128, "BLOCK_Q": 128, "BLOCK_K": 64, "PRECISION": "tf32"},
    {},
)
GOOD = Resources(128, 0, 0, (900, 500), 100_000, 256, ("wgmma",), False)


def shipped_launches(target: str) -> set[tuple[Any, ...]]:
    """(kernel, dtype, padded head dim, block_q, block_k, warps, stages); decoding is a launch of the forward kernel.

    The plain stand-in of a warp-specialised launch ships with it.
    """
    rows = launches(TARGETS[target].table, "attention")
    return {
        (stage.replace("decode", "forward"), {2: "bf16", 4: "fp32"}[size], dim, *launch)
        for stage, size, dim, shipped in rows
        for launch in [shipped.plain]
    }


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "transfusion.kernels.ahead_of_time", "--format", "json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode in (0, 1), run.stderr
    rows: list[dict[str, Any]] = json.loads(run.stdout)
    assert run.returncode == any(row["broken"] for row in rows)
    return rows


@pytest.mark.xdist_group("ahead_of_time")
def test_every_limit_is_kept(compiled: list[dict[str, Any]]) -> None:
    assert [row for row in compiled if row["broken"]] == []


@pytest.mark.xdist_group("ahead_of_time")
def test_every_kernel_and_target_is_compiled(compiled: list[dict[str, Any]]) -> None:
    functions = {target: {row["case"].split()[0] for row in compiled if row["target"] == target} for target in TARGETS}
    fused = {"patchify_noise", "patchify_noise_backward", "diffusion_loss", "denoise_step"}
    fused |= {"key_extremes", "query_tiles", "key_tiles"}
    attention = {"forward", "combine", "delta", "backward_query", "backward_key", *SPECIALISED_KERNELS.values()}
    assert functions["sm_90"] == attention | fused
    assert functions["sm_80"] == functions["sm_100"] == functions["gfx942"] == {"forward", *fused}


def test_every_kernel_there_is_ships() -> None:
    """What is jitted and named a kernel, anywhere in kernels/, has its launches in `all_cases`."""
    folder, written = Path(ahead_of_time.__file__).parent, set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            jitted = isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
            if jitted and node.name.endswith("_kernel"):
                written.add(node.name.removesuffix("_kernel"))
    assert {case.function for target in TARGETS for case in ahead_of_time.all_cases(target)} == written


@pytest.mark.xdist_group("ahead_of_time")
def test_resources_are_read(compiled: list[dict[str, Any]]) -> None:
    assert all(0 < row["registers"] <= 512 and row["threads"] >= 32 for row in compiled)
    products = [row for row in compiled if " bf16 HEAD_DIM" in row["case"] and "BLOCK_K" in row["case"]]
    assert {(row["target"], *row["matrix_instructions"]) for row in products} == {
        ("sm_90", "wgmma"),
        ("sm_90", "mma"),  # one token is fewer rows than a warp group takes
        ("sm_80", "mma"),
        ("sm_100", "tcgen05"),
        ("sm_100", "mma"),
        ("gfx942", "mfma"),
    }


@pytest.mark.parametrize("target", TARGETS)
def test_cases_hold_every_shipped_launch_once(target: str) -> None:
    cases = list(ahead_of_time.all_cases(target))
    assert len({case.name for case in cases}) == len(cases)
    keys = ("BLOCK_D", "BLOCK_Q", "BLOCK_K")
    compiled = {
        (case.function, case.dtype, *(case.constants[key] for key in keys), case.num_warps, case.num_stages)
        for case in cases
        if "PRECISION" in case.constants
    }
    assert compiled == shipped_launches(target)


def test_every_warp_specialised_launch_is_compiled() -> None:
    """Those that tuning may choose; no table ships another, nor one for a GPU or a dtype that has none."""
    for table in ("default", "sm_90", "gfx942"):
        for stage, size, dim, launch in launches(table, "attention"):
            assert not launch.specialised or launch in SPECIALISED[stage][dim]
            assert not launch.specialised or (table, size) == ("sm_90", 2)
    keys = ("BLOCK_D", "BLOCK_Q", "BLOCK_K", "STAGES")
    for stage, function in SPECIALISED_KERNELS.items():
        cases = [case for case in ahead_of_time.all_cases("sm_90") if case.function == function]
        assert all(case.dtype == "bf16" for case in cases)
        compiled = {tuple(case.constants[key] for key in keys) for case in cases}
        own = SPECIALISED[stage]
        assert compiled == {(dim, *launch[:2], launch.num_stages) for dim in own for launch in own[dim]}


def test_lines_of_a_part_replace_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = GOLDEN.read_text()
    table = tmp_path / "table.txt"
    monkeypatch.setattr(ahead_of_time, "GOLDEN", table)
    table.write_text(before)
    lines = before.splitlines()[3:]
    changed = {line: line.replace("  0     0 ", "  7     7 ", 1) for line in lines if " delta bf16 " in line}
    ahead_of_time._keep([*reversed(changed.values()), lines[0].replace("HEAD_DIM=", "GONE=")])
    assert table.read_text().splitlines()[3:] == [changed.get(line, line) for line in lines]


def test_the_kept_table_has_a_line_for_each_shipped_launch() -> None:
    """Run `python -m transfusion.kernels.ahead_of_time --all --write` after a change of a kernel or of a table."""
    lines = [line.split() for line in GOLDEN.read_text().splitlines()[3:]]
    kept = {(line[0], " ".join(line[8:])) for line in lines}
    assert kept == {(target, case.name) for target in TARGETS for case in ahead_of_time.all_cases(target)}


def test_the_kept_table_keeps_every_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that ships, not a part. And no budget is larger than what is spilled."""
    made_with, *_ = GOLDEN.read_text().removeprefix("triton ").split(":")
    monkeypatch.setattr(ahead_of_time.triton, "__version__", made_with)
    cases = {(target, case.name): case for target in TARGETS for case in ahead_of_time.all_cases(target)}
    spilled: dict[tuple[str, str, str, int], int] = {}
    for line in GOLDEN.read_text().splitlines()[3:]:
        target, registers, spills, inner, loops, shared, threads, matrix, *name = line.split()
        case = cases[target, " ".join(name)]
        counts = () if loops == "-" else tuple(map(int, loops.split("+")))
        numbers = (int(registers), int(spills), int(inner), counts, int(shared), int(threads))
        resources = Resources(*numbers, tuple(matrix.split("+")), False)
        assert broken_limits(case, target, resources) == [], line
        key = target, case.function, case.dtype, case.constants.get("BLOCK_D", 0)
        spilled[key] = max(spilled.get(key, 0), resources.spill_bytes)
    assert {key: spilled[key] for key in ahead_of_time.SPILL_BUDGET} == ahead_of_time.SPILL_BUDGET


@pytest.mark.xdist_group("ahead_of_time")
def test_the_kept_table_is_what_this_compiler_makes(compiled: list[dict[str, Any]]) -> None:
    made_with, *_ = GOLDEN.read_text().split(":")
    if made_with != f"triton {ahead_of_time.triton.__version__}":
        pytest.skip(f"the table was made with {made_with}")
    kept = set(GOLDEN.read_text().splitlines())
    rows = [(row["case"], row["target"], Resources(*(row[name] for name in Resources._fields))) for row in compiled]
    changed = [line for line in (ahead_of_time._row(*row) for row in rows) if line not in kept]
    assert changed == [], "if that is meant: python -m transfusion.kernels.ahead_of_time --all --write"


def test_good_resources_break_nothing() -> None:
    assert broken_limits(FORWARD, "sm_90", GOOD) == []


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        ("sm_90", {"spill_bytes": 128}, "spills 128 bytes a thread"),
        ("sm_90", {"inner_spills": 1}, "moves spills 1 times in inner loops, 0 allowed"),
        ("sm_90", {"shared_bytes": 227 * 1024 + 1}, "232449 bytes of shared memory, 232448 allowed"),
        ("sm_80", {"shared_bytes": 99 * 1024 + 1, "matrix_instructions": ("mma",)}, "101377 bytes"),
        ("gfx942", {"shared_bytes": 64 * 1024 + 1, "matrix_instructions": ("mfma",)}, "65537 bytes"),
        ("sm_90", {"threads": 2048}, "2048 threads, 1024 allowed"),
        ("sm_90", {"has_f64": True}, "float64"),
        ("sm_90", {"hazards": ("0x20 MOV R8, R9: writes what 0x10 reads",)}, "writes what 0x10 reads"),
        ("sm_90", {"matrix_instructions": ("mma",)}, "no wgmma instruction"),
    ],
)
def test_each_limit_can_break(
    target: str,
    change: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ahead_of_time.triton, "__version__", f"{ahead_of_time.TABLES_MADE_WITH}.0")  # without leeway
    resources = GOOD._replace(**change)
    (broken,) = broken_limits(FORWARD, target, resources)
    assert message in broken
    monkeypatch.setattr(ahead_of_time, "all_cases", lambda target: iter([FORWARD]))
    monkeypatch.setattr(ahead_of_time, "compile_case", lambda case, target: resources)
    monkeypatch.setattr(ahead_of_time.triton.knobs.runtime, "interpret", False)
    assert ahead_of_time.main(["--target", target, "--all"]) == 1
    assert capsys.readouterr().out.endswith("0 passed, 1 failed\n")


def test_a_launch_that_does_not_compile_is_a_failure_and_the_next_follows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def compile_case(case: Case, target: str) -> Resources:
        if case == FORWARD:
            raise RuntimeError("PassManager::run failed\nand much more")
        return GOOD

    other = FORWARD._replace(num_warps=8)
    monkeypatch.setattr(ahead_of_time, "all_cases", lambda target: iter([FORWARD, other]))
    monkeypatch.setattr(ahead_of_time, "compile_case", compile_case)
    monkeypatch.setattr(ahead_of_time.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(ahead_of_time, "GOLDEN", tmp_path / "table.txt")
    with monkeypatch.context() as patch:  # the table of before has both
        patch.setattr(ahead_of_time, "compile_case", lambda case, target: GOOD)
        assert ahead_of_time.main(["--target", "sm_90", "--all", "--write", "--jobs", "1"]) == 0
    assert (tmp_path / "table.txt").read_text().count("stages=3\n") == 2
    assert ahead_of_time.main(["--target", "sm_90", "--all", "--write", "--jobs", "1"]) == 1
    said = capsys.readouterr().out
    assert "FAIL: RuntimeError: PassManager::run failed\n" in said and said.endswith("1 passed, 1 failed\n")
    lines = (tmp_path / "table.txt").read_text().splitlines()
    assert [line for line in lines if line.endswith(other.name)] and not any(
        line.endswith(FORWARD.name) for line in lines
    )


def test_spill_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_of_time.triton, "__version__", "3.7.9")
    monkeypatch.setattr(ahead_of_time, "SPILL_BUDGET", {})
    spilling = GOOD._replace(spill_bytes=41)
    assert broken_limits(FORWARD, "sm_90", spilling) == ["spills 41 bytes a thread, 0 allowed"]
    monkeypatch.setitem(ahead_of_time.SPILL_BUDGET, ("sm_90", "forward", "bf16", 128), 40)
    assert broken_limits(FORWARD, "sm_90", spilling) == ["spills 41 bytes a thread, 40 allowed"]
    assert broken_limits(FORWARD, "sm_90", spilling._replace(spill_bytes=40)) == []
    monkeypatch.setattr(ahead_of_time.triton, "__version__", "3.6.0")
    assert broken_limits(FORWARD, "sm_90", spilling) == []


def test_only_16_bit_products_need_the_matrix_units() -> None:
    bare = GOOD._replace(matrix_instructions=())
    assert broken_limits(FORWARD._replace(signature={"p_q": "*fp32"}), "sm_90", bare) == []
    assert broken_limits(FORWARD._replace(constants={"BLOCK_D": 128, "BLOCK_Q": 128}), "sm_90", bare) == []


@pytest.mark.skipif(not TRITON_INTERPRET, reason="only the interpreter has nothing to compile")
def test_the_interpreter_is_refused() -> None:
    case = next(ahead_of_time.all_cases("sm_90"))
    with pytest.raises(RuntimeError, match="unset it"):
        ahead_of_time.compile_case(case, "sm_90")
