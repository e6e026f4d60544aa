"""A case that ends in an error is a row that says why, and the command goes on with the next."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import denoise, generation, ops, rows, train
from benchmarks.clock import QUICK

SUITES = [
    (ops, "make", ("patchify_noise small", "ours, given")),
    (train, "check", ("small", "ours")),
    (denoise, "check", ("small", "ours")),
    (generation, "in_turn", ("small", "recomputed")),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ops, "IMAGES", {"small": (4, 2, 8, 12, 2)})
    monkeypatch.setattr(train, "CASES", {"small": train.TrainCase("tiny", 1, 64, 32)})
    monkeypatch.setattr(denoise, "CASES", {"small": denoise.DenoiseCase("tiny", 1, 8)})
    pair = generation.Pair(list, list, lambda: "", 1, "steps")
    monkeypatch.setattr(generation, "CASES", {"small": generation.Case("recomputed", lambda: pair)})
    for suite in (denoise, generation):
        monkeypatch.setattr(suite, "why_not", lambda: None, raising=False)


def crash(error):
    def crashed(*_, **__):
        raise error

    return crashed


@pytest.mark.parametrize(("suite", "broken", "what"), SUITES, ids=[suite.SUITE for suite, _, _ in SUITES])
def test_an_error_is_a_row(suite, broken, what, monkeypatch):
    for error, status, reason in (
        (RuntimeError("no such kernel\nand more"), "failed", "RuntimeError: no such kernel"),
        (torch.OutOfMemoryError("all is taken"), "skipped", "OutOfMemoryError: all is taken"),
    ):
        monkeypatch.setattr(suite, broken, crash(error))
        (row,) = suite.run(*what, QUICK)
        assert (row["status"], row["reason"], row["case"], row["baseline"]) == (status, reason, *what)


def test_an_error_after_a_figure_is_of_what_was_to_come(monkeypatch):
    def figures(*_):
        yield "forward", {"p50": 1.0}
        raise RuntimeError("no backward")

    monkeypatch.setattr(ops, "check", lambda *_: {})
    monkeypatch.setattr(ops, "_measured", figures)
    found = rows.latest(list(ops.run("diffusion_loss small", "ours, given", QUICK)))
    assert [(row["measure"], row["status"]) for row in found] == [("forward", "ok"), ("backward", "failed")]


def test_a_lost_gpu_ends_the_run_and_only_its_pair_has_a_row(monkeypatch, tmp_path, capsys):
    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(ops, "make", crash(RuntimeError("an illegal memory access was encountered")))
    monkeypatch.setattr(rows, "DEVICE", "cuda")
    monkeypatch.setattr(rows, "machine", lambda: "lost")
    monkeypatch.setattr(rows, "environment", lambda: dict.fromkeys(("commit", "dirty", "torch", "triton", "device")))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    arguments = ["--suite", "ops", "--filter", "ours, given", "--quick", "--resume", "--rows", str(tmp_path)]
    for count in (1, 2, 3):  # and the next time the next pair's turn comes
        assert command.main(arguments) == 3
        assert "the GPU is lost to this process: RuntimeError: an illegal" in capsys.readouterr().err
        found = rows.read(rows.path("ops", tmp_path))
        assert len({rows.key(row) for row in found}) == len(found) == count


def test_a_pair_that_does_not_end_is_a_row_and_ends_the_run(monkeypatch, tmp_path):
    class EndedError(BaseException):
        pass

    class AtOnce:  # a timer whose time is up as soon as the pair has its first row
        daemon = False

        def __init__(self, seconds, end):
            self.end = end

        def start(self):
            monkeypatch.setattr(ops, "_rows", self.hang)

        def hang(self, case, baseline, effort):
            yield rows.row("ops", case, baseline, "forward", "ok", p50=1.0, p20=1.0, p80=1.0)
            self.end()

        def cancel(self):
            pass

        join = cancel

    monkeypatch.setattr(command.threading, "Timer", AtOnce)
    monkeypatch.setattr(command.os, "_exit", crash(EndedError()))
    with pytest.raises(EndedError):
        command.main(["--suite", "ops", "--filter", "ours, given", "--limit", "7", "--rows", str(tmp_path)])
    ok, ended = rows.read(rows.path("ops", tmp_path))
    assert ok["status"] == "ok" and (ended["measure"], ended["status"]) == ("pair", "failed")
    assert ended["reason"] == "it did not end within 7 s (--limit)" and rows.key(ok)[:3] == rows.key(ended)[:3]


def test_a_step_is_timed_whatever_becomes_of_the_profiler(monkeypatch):
    monkeypatch.setattr(train, "breakdown", crash(RuntimeError("no profiler")))
    monkeypatch.setattr(train, "check", lambda *_: {})
    (row,) = train.run("small", "ours", QUICK)
    assert row["status"] == "ok" and row["p50"] > 0 and row["breakdown_error"] == "RuntimeError: no profiler"


def test_what_torch_compiles_is_not_ours(monkeypatch):
    monkeypatch.setattr(ops, "DEVICE", "cuda")
    monkeypatch.setattr(ops, "make", crash(RuntimeError("no C++ compiler")))
    (row,) = ops.run("patchify_noise small", "torch.compile, given", QUICK)
    assert row["status"] == "skipped" and "no C++ compiler" in row["reason"]


def test_the_command_goes_on_and_its_status_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ops, "make", crash(RuntimeError("no such kernel")))
    chosen = ["--suite", "ops", "--filter", "ours, given", "--quick", "--rows", str(tmp_path)]
    assert command.main(chosen) == 1
    cases = [row["case"] for row in rows.read(rows.path("ops", tmp_path))]
    assert cases == [f"{op} small" for op in ("patchify_noise", "diffusion_loss", "image_side")]
    assert "3 FAILED and were not timed" in capsys.readouterr().out


def test_rows_that_nothing_can_keep_are_told_of_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ops, "make", crash(AssertionError("measured")))
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(SystemExit):
        command.main(["--suite", "ops", "--quick", "--rows", str(tmp_path / "taken")])
    assert f"no rows can be written to {tmp_path / 'taken'}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--report", "--rows", str(tmp_path)])
    assert "--report takes every row" in capsys.readouterr().err


def test_a_breakdown_knows_every_kernel_by_its_name():
    sources = "\n".join(path.read_text() for path in Path(train.__file__).parents[1].glob("kernels/**/*.py"))
    kernels = re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE)
    assert len(kernels) >= 12
    unknown = [name for name in kernels if not any(re.search(part, name) for _, part in train._PARTS)]
    assert not unknown
