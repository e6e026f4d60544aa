"""The tune command: what fails its check is never timed, the fastest launch wins, and what is written is read."""

import copy
import importlib
import json
import multiprocessing
import pickle
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from transfusion.kernels import tune, tuning
from transfusion.kernels.tune import STAGES, Checkers, Trial, candidates, fastest
from transfusion.kernels.tuning import SPECIALISED, Launch

GPU = "sm_120"  # has no table of its own


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU whose every launch takes as many milliseconds as its tile has queries; tables are written to a folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "stand-in")
    monkeypatch.setattr(tuning, "architecture", lambda device: GPU)
    monkeypatch.setattr(tuning, "table_name", lambda device: GPU)
    monkeypatch.setattr(tuning, "_TABLES", copy.deepcopy(tuning._TABLES))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tune, "make_call", lambda stage, dtype, dim: lambda: stage)
    return tmp_path


def in_table(stage: str, head_dim: int = 64, table: str = GPU) -> Launch:
    return tuning.launch("attention", stage, table, torch.bfloat16, head_dim)


def test_the_fastest_launch_is_written(machine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timed: list[Launch] = []

    def clock(call: object) -> float:
        timed.append(in_table("forward"))
        return 1.0 if timed[-1] == Launch(64, 32, 4, 3) else 2.0

    monkeypatch.setattr(tune, "passes", lambda stage, dtype, dim: in_table(stage).num_stages != 2)
    monkeypatch.setattr(tune, "median_milliseconds", clock)
    rows = tmp_path / "rows.jsonl"
    assert tune.main(["--stage", "forward", "--head-dim", "64", "--jobs", "1", "--rows", str(rows)]) == 0
    assert timed and all(launch.num_stages != 2 for launch in timed), "what fails its check is never timed"
    written = json.loads((machine / f"{GPU}.json").read_text())
    assert written["attention"]["forward"]["2"]["64"] == [64, 32, 4, 3]
    default = tuning.launch("attention", "forward", "default", torch.bfloat16, 128)
    assert written["attention"]["forward"]["2"]["128"] == list(default)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {line["reason"] for line in lines} == {"", "misses its bound"}
    assert all((line["milliseconds"] is None) == bool(line["reason"]) for line in lines)


def test_hopper_tries_the_warp_specialised_launches(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "table_name", lambda device: "sm_90")
    monkeypatch.setattr(tune, "passes", lambda stage, dtype, dim: True)
    for stage, dtype, tried in (
        ("forward", "bfloat16", True),
        ("backward_query", "float16", True),
        ("backward_key", "bfloat16", True),
        ("forward", "float32", False),
        ("backward_key", "float32", False),
        ("decode", "float16", False),
    ):
        own = tune.specialised_launches(stage, getattr(torch, dtype), 80)
        assert own == (SPECIALISED[stage][128] if tried else ())
    for stage, by_head_dim in SPECIALISED.items():
        monkeypatch.setattr(
            tune, "median_milliseconds", lambda call, stage=stage: float(not in_table(stage, 128, "sm_90").specialised)
        )
        assert tune.main(["--stage", stage, "--head-dim", "128", "--jobs", "1"]) == 0
        written = json.loads((machine / "sm_90.json").read_text())
        assert written["attention"][stage]["2"]["128"] == list(by_head_dim[128][0])
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_100")
    assert tune.specialised_launches("forward", torch.bfloat16, 128) == ()


def test_a_table_is_left_as_it_was_where_nothing_passes(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "passes", lambda stage, dtype, dim: False)
    assert tune.main(["--stage", "decode", "--head-dim", "64", "--jobs", "1"]) == 0
    assert tuning._TABLES[GPU] == tuning._TABLES["default"]
    assert not list(machine.iterdir())


def test_time_runs_out(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "passes", lambda stage, dtype, dim: True)
    monkeypatch.setattr(tune, "median_milliseconds", lambda call: 1.0)
    assert tune.main(["--seconds", "0", "--jobs", "1"]) == 0
    assert not list(machine.iterdir())


def test_what_was_timed_before_an_interrupt_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([2.0, 1.0, 3.0])
    timed: list[Launch] = []

    def clock(call: object) -> float:
        timed.append(in_table("forward"))
        for milliseconds in times:
            return milliseconds
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "passes", lambda stage, dtype, dim: True)
    monkeypatch.setattr(tune, "median_milliseconds", clock)
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--stage", "forward", "--head-dim", "64", "--jobs", "1"])
    written = json.loads((machine / f"{GPU}.json").read_text())
    assert written["attention"]["forward"]["2"]["64"] == list(timed[1])


def test_a_table_that_cannot_be_written_ends_it_at_once(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != machine)
    with pytest.raises(SystemExit, match="2"):
        tune.main([])
    assert f"{machine}, where the table goes, cannot be written to" in capsys.readouterr().err


def test_a_candidate_that_fails_is_out_and_the_next_is_tried(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's way: every candidate is judged before one is timed. (A pool of threads sees the stand-ins.)"""
    tuning.add_table(GPU)
    before = in_table("forward")
    judged: list[Launch] = []

    def passes(stage: str, dtype: torch.dtype, head_dim: int) -> bool:
        judged.append(in_table(stage))
        if judged[-1].num_warps == 8:
            raise RuntimeError("PassManager::run failed\nand much more")
        return True

    def clock(call: object) -> float:
        assert len(judged) == len(candidates("forward", 64, before))
        return float(in_table("forward").block_q)

    monkeypatch.setattr(tune, "passes", passes)
    monkeypatch.setattr(tune, "median_milliseconds", clock)
    with Checkers(1, ThreadPoolExecutor) as checkers:
        trials = list(tune.tune("forward", torch.bfloat16, 64, time.monotonic() + 60, checkers))
    assert [trial.launch for trial in trials] == judged == candidates("forward", 64, before)
    for trial in trials:
        failed = trial.launch.num_warps == 8
        assert trial.reason == ("RuntimeError: PassManager::run failed" if failed else "")
        assert trial.milliseconds == (None if failed else float(trial.launch.block_q))
    assert in_table("forward") == before
    pickle.loads(pickle.dumps(partial(tune.why_not, "forward", torch.bfloat16, 64)))  # as processes are sent it


def test_a_launch_that_hangs_is_out_and_the_others_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """`time.sleep` for the check: it ends with None, after as long as the launch says."""
    monkeypatch.setattr(tune, "GRACE_SECONDS", 0.5)
    with Checkers(2, partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))) as checkers:
        began = time.monotonic()
        reasons = checkers.reasons(time.sleep, [0.0, 600.0, 0.0, 600.0, 0.0], 10.0)
        assert reasons == [None, hung := "its check does not end", None, hung, "no time was left to check it"]
        assert time.monotonic() - began < 10.0 + 5.0, "what is left is for timing"
        assert checkers.reasons(time.sleep, [2.0], 60.0) == [None], "longer than grace, but within its time"
        assert time.monotonic() - began < 60


JUDGE = """
import os, time
from transfusion.kernels.tune import FaultError

useless = False  # this process, after a fault

def judge(kind):
    global useless
    if kind == "dies":
        os._exit(1)
    if kind == "faults" or useless:
        useless = True
        raise FaultError(f"{kind}: illegal address")
    time.sleep(0.2)  # so that others are under way when a process dies
    return "" if kind == "good" else "misses its bound"
"""


def test_a_hang_beside_a_fault_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        """Answers at once, or never."""

        def submit(self, ask: object, kind: str) -> "Future[str]":
            future: Future[str] = Future()
            if kind == "faults":
                future.set_exception(tune.FaultError("faults"))
            elif kind == "good":
                future.set_result("")
            return future

        def shutdown(self, wait: bool = True) -> None:
            pass

    monkeypatch.setattr(tune, "GRACE_SECONDS", 0.1)
    kinds: list[Any] = ["hangs", "faults", "good"]
    with Checkers(2, lambda jobs: Pool()) as checkers:  # type: ignore[arg-type, return-value]
        assert checkers.reasons(str, kinds, 1.0) == ["its check does not end", "faults", ""]


def test_a_launch_that_faults_or_ends_its_process_is_out_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judge_of_test_tune.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)  # which the processes inherit
    judge = importlib.import_module("judge_of_test_tune").judge
    kinds: list[Any] = ["good", "faults", "dies", "bad"]
    with Checkers(2, partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))) as checkers:
        reasons = checkers.reasons(judge, kinds, 300.0)
    answer = {
        "good": "",
        "bad": "misses its bound",
        "faults": "faults: illegal address",
    }
    for kind, reason in zip(kinds, reasons, strict=True):
        assert "terminated abruptly" in reason if kind == "dies" else reason == answer[kind]


def test_a_fault_is_told_from_a_failure(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*call: object) -> bool:
        raise RuntimeError("an error\nand more")

    monkeypatch.setattr(tune, "passes", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    assert tune.why_not("forward", torch.bfloat16, 64, in_table("forward", table="default")) == "RuntimeError: an error"
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(tune.FaultError, match=r"RuntimeError: an error$"):
        tune.why_not("forward", torch.bfloat16, 64, in_table("forward", table="default"))


def test_the_nearest_candidates_come_first() -> None:
    current = Launch(128, 64, 8, 3)
    _, *others = candidates("forward", 128, current)
    assert {tuple(a != b for a, b in zip(each, current, strict=True)).count(True) for each in others[:4]} == {1}
    assert others[-1].num_warps == 4 and others[-1].block_q == 64


def test_candidates_are_what_triton_takes() -> None:
    for stage in STAGES:
        for head_dim in (16, 64, 128, 256):
            current = Launch(32, 16, 2, 1)
            first, *others = candidates(stage, head_dim, current)
            assert first == current and len(set(others)) == len(others) >= 6
            assert all(min(launch.block_q, launch.block_k) >= 16 for launch in others)


def test_a_shipped_table_is_saved_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = (tuning.FOLDER / "sm_90.json").read_text()
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    assert tuning.save("sm_90").read_text() == original


def test_fastest_of_none() -> None:
    assert fastest([Trial("forward", "bfloat16", 64, Launch(64, 64, 4, 2), None, "no")]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head-dim", "300"], "--head-dim 300: the kernels take 16 to 256"),
        (["--head-dim", "8"], "--head-dim 8"),
        (["--jobs", "0"], "--jobs 0: there must be one process"),
        (["--seconds", "-5"], "--seconds -5"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--rows", "{tmp}/missing/rows.jsonl"], "missing/rows.jsonl: No such file or directory; name a file"),
    ],
)
def test_options_that_do_not_fit_end_it_before_anything_is_timed(
    arguments: list[str], message: str, machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune.main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 1
    assert "needs a GPU" in capsys.readouterr().err
