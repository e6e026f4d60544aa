"""The verification command: what it prints and returns, and that a wrong kernel fails it."""

import itertools
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from transfusion.kernels import registry, tuning
from transfusion.kernels.attention import check as attention_check
from transfusion.kernels.attention.plan import plan_forward
from transfusion.kernels.diffusion_loss import check as diffusion_loss_check
from transfusion.kernels.diffusion_loss import kernel as diffusion_loss_kernel
from transfusion.kernels.mask_tiles import reference as mask_tiles
from transfusion.kernels.patchify_noise import check as patchify_noise_check
from transfusion.kernels.patchify_noise import kernel as patchify_noise_kernel
from transfusion.kernels.testing import Verdict, judge
from transfusion.kernels.tuning import SPECIALISED
from transfusion.kernels.verify import CHECKS, Row, format_row, main, verify


def test_every_op_is_verified() -> None:
    assert set(CHECKS) == {*registry.OPS, "mask_tiles"}


def test_command_chooses_the_interpreter_by_itself(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "transfusion.kernels.verify", "--op", "diffusion_loss", "--seed", "7"]
    junit = tmp_path / "verify.xml"
    run = subprocess.run(
        [*command, "--junit", str(junit)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"torch {torch.__version__}" in run.stdout
    assert "seed: 7\n" in run.stdout
    assert ("Triton interpreter" in run.stdout) == (not torch.cuda.is_available())
    passed = re.search(r"\n(\d+) passed, 0 failed\n$", run.stdout)
    assert passed is not None, run.stdout
    suite = ElementTree.parse(junit).getroot()
    cases = [case for case in suite if case.get("classname") == "diffusion_loss"]
    assert len(cases) == int(suite.attrib["tests"]) == int(passed[1]) > 20
    assert len({case.get("name") for case in cases}) == len(cases)
    assert suite.get("failures") == "0"


def test_attention_rows_judge_every_result() -> None:
    for row in itertools.islice(verify(ops=["transfusion_attention"]), 4):
        assert set(row.verdicts) == {"out", "lse", "dq", "dk", "dv"}
        assert row.passed, format_row(row)
        assert all(verdict.bound > 0 for verdict in row.verdicts.values())


@pytest.mark.parametrize(("gpu", "processors"), [(False, 8), (True, 132), (True, 148), (True, 304)])
def test_a_forward_that_splits_no_keys_is_verified(gpu: bool, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda" if gpu else "cpu")
    monkeypatch.setattr(tuning, "processors", lambda device: processors)
    monkeypatch.setattr(tuning, "table_name", lambda device: "sm_90" if gpu else "interpret")
    case = attention_check.unsplit(device)
    queries, heads, batch = case["mask"].num_queries, case["heads"], case["batch"]
    for dtype in (torch.float32, torch.float16):
        for head_dim in (64, 128) if gpu else (16,):
            plan = plan_forward(device, dtype, batch, *heads, queries, queries, head_dim)
            assert (plan.splits, plan.packed) == (1, 1)
    monkeypatch.setattr(mask_tiles, "FEW", 4 if gpu else 0)  # as it is there
    for launch in (plan.launch, *SPECIALISED["forward"][64], *SPECIALISED["forward"][128]) if gpu else (plan.launch,):
        lines = mask_tiles.query_tiles(case["mask"].intervals, queries, launch.block_q, launch.block_k)
        every, masked = lines.view(-1, mask_tiles.WIDTH)[:, 2:4].sum(0).tolist()
        assert 0 < masked < every, "both loops of the forward are verified"


class Pool:
    """A process pool without processes: what would cross to one and back is pickled."""

    def __init__(self, workers: int, context: BaseContext) -> None:
        assert workers == 2 and context.get_start_method() == "spawn"

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, *work: object) -> Future[object]:
        function, *arguments = pickle.loads(pickle.dumps(work))
        future: Future[object] = Future()
        future.set_result(pickle.loads(pickle.dumps(function(*arguments))))
        return future

    def shutdown(self, cancel_futures: bool) -> None:
        assert cancel_futures


def test_processes_share_the_work_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diffusion_loss_check, "SHAPES", patchify_noise_check.SHAPES[:1])
    monkeypatch.setattr("transfusion.kernels.verify.ProcessPoolExecutor", Pool)

    def table(*jobs: str) -> list[str]:
        assert main(["--op", "diffusion_loss", "--seed", "7", *jobs]) == 0
        return sorted(capsys.readouterr().out.splitlines())  # the part that is done first comes first

    assert table("--jobs", "1") == table("--jobs", "2")


@pytest.mark.parametrize("early", [False, True])
def test_a_process_that_dies_is_a_failed_row(
    early: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Dying(Pool):
        def submit(self, *work: object) -> Future[object]:
            if torch.float16 not in work:
                return super().submit(*work)
            if early:
                raise BrokenProcessPool("a process was terminated abruptly")
            future: Future[object] = Future()
            future.set_exception(BrokenProcessPool("a process was terminated abruptly"))
            return future

    monkeypatch.setattr(patchify_noise_check, "SHAPES", patchify_noise_check.SHAPES[:1])
    monkeypatch.setattr("transfusion.kernels.verify.ProcessPoolExecutor", Dying)
    junit = tmp_path / "verify.xml"
    assert main(["--op", "patchify_noise", "--jobs", "2", "--junit", str(junit)]) == 1
    assert "FAIL: BrokenProcessPool: a process was terminated abruptly\n" in capsys.readouterr().out
    suite = ElementTree.parse(junit).getroot()
    assert suite.get("failures") == "1" and int(suite.attrib["tests"]) > 1


@pytest.mark.parametrize("lost", [False, True])
def test_an_error_is_a_failed_row_and_the_rest_follows_unless_the_gpu_is_lost(
    lost: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def wrong() -> dict[str, Verdict]:
        raise RuntimeError("out of resource: shared memory\nand more")

    parts = []

    def checks(*_: object) -> Iterator[tuple[str, object]]:
        parts.append(1)
        if lost and len(parts) > 1:
            raise RuntimeError("no input can be made on it")
        yield "first", lambda: {"out": Verdict(0.0, 1.0)}
        yield "second", wrong
        yield "third", lambda: {"out": Verdict(0.0, 1.0)}

    monkeypatch.setitem(CHECKS, "patchify_noise", checks)
    monkeypatch.setattr(registry, "TRITON_INTERPRET", True)
    monkeypatch.setattr("transfusion.kernels.verify.is_lost", lambda device: lost)
    junit = tmp_path / "verify.xml"
    assert main(["--op", "patchify_noise", "--junit", str(junit)]) == 1
    said = capsys.readouterr().out
    assert "FAIL: RuntimeError: out of resource: shared memory\n" in said
    assert f"{1 if lost else 4} passed, 2 failed" in said
    messages = [each.get("message") for each in ElementTree.parse(junit).iter("failure")]
    first = "RuntimeError: out of resource: shared memory"
    assert messages == [first, "RuntimeError: no input can be made on it" if lost else first]


def test_options_that_cannot_be_met_end_before_the_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(registry, "TRITON_INTERPRET", True)
    monkeypatch.setattr("transfusion.kernels.verify.verify", lambda *_: pytest.fail("it began"))
    missing = str(tmp_path / "missing" / "verify.xml")
    for options, message in ((["--junit", missing], f"--junit {missing}: No such"), (["--jobs", "0"], "--jobs 0")):
        with pytest.raises(SystemExit, match="2"):
            main(options)
        assert message in capsys.readouterr().err


def test_an_interrupt_is_a_line_and_leaves_the_last_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: object) -> Iterator[Row]:
        yield Row("op", torch.float16, "case", {"out": Verdict(0.0, 1.0)})
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "TRITON_INTERPRET", True)
    monkeypatch.setattr("transfusion.kernels.verify.verify", interrupted)
    junit = tmp_path / "verify.xml"
    junit.write_text("the last one")
    assert main(["--junit", str(junit)]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
    assert [(path, path.read_text()) for path in tmp_path.iterdir()] == [(junit, "the last one")]


def test_the_interpreter_is_chosen_in_the_process_s_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child would go on when the command is killed."""
    calls = []

    class ReplacedError(Exception):
        pass

    def execve(*call: object) -> None:
        calls.append(call)
        raise ReplacedError

    monkeypatch.setattr(registry, "TRITON_INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(ReplacedError):
        main(["--op", "denoise_step"])
    ((program, command, environment),) = calls
    assert command == [program, "-m", "transfusion.kernels.verify", "--op", "denoise_step"]
    assert environment["TRITON_INTERPRET"] == "1"


def nearly_right(result: Tensor) -> Tensor:
    return result * 1.02


def unwritten(result: Tensor) -> Tensor:
    return torch.empty_like(result)


@pytest.mark.parametrize("fault", [nearly_right, unwritten])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("op", "module"), [("patchify_noise", patchify_noise_kernel), ("diffusion_loss", diffusion_loss_kernel)]
)
def test_a_wrong_kernel_fails(
    op: str,
    module: object,
    direction: str,
    fault: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    right = getattr(module, direction)
    monkeypatch.setattr(module, direction, lambda *arguments: fault(right(*arguments)))  # type: ignore[operator]
    for check in (patchify_noise_check, diffusion_loss_check):
        monkeypatch.setattr(check, "SHAPES", patchify_noise_check.SHAPES[:1])
    junit = tmp_path / "verify.xml"
    assert main(["--op", op, "--junit", str(junit), "--jobs", "1"]) == 1
    output = capsys.readouterr().out
    rows = len(re.findall("FAIL", output))
    assert rows >= 4, output  # two dtypes, two sources of noise
    assert output.endswith(f"0 passed, {rows} failed\n")
    assert ElementTree.parse(junit).getroot().get("failures") == str(rows)


def test_a_row_shows_the_result_nearest_to_its_bound() -> None:
    verdicts = {"out": Verdict(1e-3, 1e-2), "dq": Verdict(2e-7, 3e-7), "dk": Verdict(0.0, 0.0)}
    row = Row("op", torch.float16, "case", verdicts)
    assert row.worst == "dq" and row.passed and format_row(row).endswith("pass")
    failed = row._replace(verdicts={**verdicts, "dv": Verdict(1e-30, 0.0), "lse": Verdict(torch.nan, 1.0)})
    assert not failed.passed
    assert [line.split()[3] for line in format_row(failed).splitlines()] == ["dv", "lse"]


def test_empty_tensors_are_poisoned_only_while_a_case_runs() -> None:
    empty = torch.empty
    for _ in itertools.islice(verify(ops=["patchify_noise"]), 2):
        assert torch.empty is empty


@pytest.mark.parametrize("op", registry.OPS)
def test_a_seed_repeats_inputs_errors_and_bounds(op: str) -> None:
    def found(seed: int) -> list[dict[str, Verdict]]:
        return [row.verdicts for row in itertools.islice(verify(ops=[op], seed=seed), 2)]

    assert found(5) == found(5) != found(6)


def test_what_is_not_finite_fails() -> None:
    nan, gold = torch.tensor([torch.nan, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert judge(gold.float(), gold.float(), gold).passed
    assert not judge(nan, gold.float(), gold).passed
    for overflown in (nan, torch.tensor([torch.inf, 2.0])):  # of which no bound follows
        assert not judge(overflown, overflown, gold).passed
        assert not judge(gold.float(), overflown, gold).passed


def test_without_triton_there_is_nothing_to_verify(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "TRITON_INSTALLED", False)
    assert main([]) == 1
    assert "pip install triton" in capsys.readouterr().err
