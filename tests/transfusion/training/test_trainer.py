"""The trainer: exact resume, and what it does when it is stopped, killed, out of disk, or fed nonsense."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from transfusion.sequence import Batch
from transfusion.training import TrainConfig, Trainer
from transfusion.training.metrics import DataErrors, JsonLines, read_log
from transfusion.training.optimizer import average, learning_rate

CONFIG = TrainConfig(steps=10, learning_rate=1e-2, warmup_steps=2, log_every=1, checkpoint_every=5, ema_decay=0.9)


def trainer(directory: Path, **changes: object) -> Trainer:
    return Trainer(tiny.model(), tiny.Batches(), replace(CONFIG, **changes), directory)  # type: ignore[arg-type]


def weights(each: Trainer) -> torch.Tensor:
    state = [*each.model.parameters(), *each.ema.values()]
    moments = [v for s in each.optimizer.state.values() for v in s.values()]
    return torch.cat([t.detach().flatten().float() for t in (*state, *moments)])


def test_ten_steps_are_five_and_five_bitwise(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    assert whole.run()
    half = trainer(tmp_path / "parts")
    half.config = replace(half.config, steps=10)
    batches = half.loader.iterate()
    for _ in range(5):
        half.train_step(batches)
        half.step += 1
    half.save()
    resumed = trainer(tmp_path / "parts")
    assert resumed.run()
    assert resumed.step == 10
    assert torch.equal(weights(whole), weights(resumed))


def test_training_learns(tmp_path: Path) -> None:
    each = trainer(tmp_path, steps=30, log_every=1)
    each.loader = Same()
    each.run()
    log = read_log(tmp_path / "log.jsonl")
    assert log[-1]["text_loss"] < 0.5 * log[0]["text_loss"]
    assert [line["step"] for line in log] == list(range(1, 31))


class Same(tiny.Batches):
    """One batch again and again."""

    def batch(self, step: int) -> Batch:
        return super().batch(0)


def test_accumulated_gradients_are_the_mean(tmp_path: Path) -> None:
    once, twice = trainer(tmp_path / "a"), trainer(tmp_path / "b", accumulation=2)
    once.loader = twice.loader = Same()
    for each in (once, twice):
        each.train_step(each.loader.iterate())
    torch.testing.assert_close(weights(once), weights(twice))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(tmp_path: Path, number: int) -> None:
    class Interrupting(tiny.Batches):
        def batch(self, step: int) -> Batch:
            if step == 3:
                os.kill(os.getpid(), number)
            return super().batch(step)

    before = signal.getsignal(number)
    stopped = trainer(tmp_path)
    stopped.loader = Interrupting()
    assert not stopped.run()
    assert signal.getsignal(number) == before
    assert 0 < stopped.step < 10
    resumed = trainer(tmp_path)
    assert resumed.run()
    whole = trainer(tmp_path / "whole")
    whole.run()
    assert torch.equal(weights(whole), weights(resumed))
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == list(range(1, 11))


@pytest.mark.parametrize("stop", [3, 7])
def test_a_stop_leaves_no_step_out_of_the_log(tmp_path: Path, stop: int) -> None:
    """Neither one that a signal stops, nor one that is killed and goes on from an earlier checkpoint."""

    class Interrupting(tiny.Batches):
        def batch(self, step: int) -> Batch:
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(step)

    class Killed(tiny.Batches):
        def batch(self, step: int) -> Batch:
            if step == stop:
                raise KeyboardInterrupt
            return super().batch(step)

    every = {"log_every": 4, "checkpoint_every": 3}
    assert trainer(tmp_path / "whole", **every).run()
    stopped, killed = trainer(tmp_path / "stopped", **every), trainer(tmp_path / "killed", **every)
    stopped.loader, killed.loader = Interrupting(), Killed()
    assert not stopped.run()
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    whole = _curves(tmp_path / "whole")
    for name in ("stopped", "killed"):
        assert trainer(tmp_path / name, **every).run()
        assert _curves(tmp_path / name) == whole


def _curves(directory: Path) -> list[str]:
    """The lines of the log, but for what the clock and the memory say."""
    measured = ("per_second", "mfu", "data_wait", "peak_memory")
    lines = read_log(directory / "log.jsonl")
    return [json.dumps({n: v for n, v in each.items() if not any(m in n for m in measured)}) for each in lines]


def test_other_bins_begin_the_sums_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    each = trainer(tmp_path, timestep_bins=2)
    each.train_step(each.loader.iterate())
    each.save()
    again = trainer(tmp_path, timestep_bins=3)
    again.resume()
    assert "timestep_bins has changed" in caplog.text
    assert not again.losses_seen._interval.any() and again.speed.state_dict()["steps"] == 1


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """kill -9 in the middle: the next run starts from the last checkpoint, drops the log's later lines and .tmp."""
    program = f"""
import os, sys
sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
import test_trainer as t
class Killing(t.tiny.Batches):
    def batch(self, step):
        if step == 8:
            os.kill(os.getpid(), 9)
        return super().batch(step)
each = t.trainer(t.Path({str(tmp_path)!r}))
each.loader = Killing()
each.run()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == -9, result.stderr
    (tmp_path / "checkpoints" / "step-00000007.tmp").mkdir()
    (tmp_path / "checkpoints" / "step-00000007.tmp" / "__0_0.distcp").write_bytes(b"half")
    resumed = trainer(tmp_path)
    assert resumed.run()
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == list(range(1, 11))


def test_a_damaged_line_of_a_log_is_named_and_the_others_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = [json.dumps({"step": step, "text_loss": None}) for step in (1, 2, 3)]
    damage = [b"[3]", b"\xff\x00\x00", b'{"step": 2, "tex']
    for bad in damage:
        lines = [*(line.encode() for line in whole[:2]), bad, whole[2].encode(), b'{"step": 4, "te']
        (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
        caplog.clear()
        assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]
        assert [message.partition(" is damaged")[0] for message in caplog.messages] == [f"{tmp_path}/log.jsonl:3"]
    JsonLines(tmp_path / "log.jsonl", 2).close()
    assert (tmp_path / "log.jsonl").read_text() == "".join(f"{line}\n" for line in whole[:2])
    (tmp_path / "data_errors.jsonl").write_text('{"who": 1}\n')
    assert len(DataErrors(tmp_path / "data_errors.jsonl")) == 1


def test_steps_that_are_not_finite_are_skipped(tmp_path: Path) -> None:
    class Poisoned(tiny.Batches):
        def batch(self, step: int) -> Batch:
            batch = super().batch(step)
            return replace(batch, latents=batch.latents * math.nan) if step == 1 else batch

    each = trainer(tmp_path)
    each.loader = Poisoned()
    batches = each.loader.iterate()
    each.train_step(batches)
    before = [p.clone() for p in each.model.parameters()]
    each.train_step(batches)
    assert all(torch.equal(a, b) for a, b in zip(before, each.model.parameters(), strict=True))
    assert each.losses_seen.skipped == 1
    each.train_step(batches)
    assert each.losses_seen.bad_in_a_row == 0
    assert not torch.equal(before[0], next(each.model.parameters()))
    assert weights(each).isfinite().all()


def test_too_many_such_steps_end_the_run_and_keep_the_checkpoint(tmp_path: Path) -> None:
    class Broken(tiny.Batches):
        def batch(self, step: int) -> Batch:
            batch = super().batch(step)
            return replace(batch, latents=batch.latents * math.inf) if step >= 5 else batch

    each = trainer(tmp_path, max_bad_steps=3)
    each.loader = Broken()
    with pytest.raises(FloatingPointError, match=r"the last 3 steps up to step 8.*step-00000005"):
        each.run()
    assert [path.name for path in each.checkpoints.paths()] == ["step-00000005"]
    assert trainer(tmp_path).checkpoints.load_last(each._tensors())["step"] == 5  # type: ignore[index]


def test_a_run_that_skipped_every_step_does_not_pass_for_one_that_finished(tmp_path: Path) -> None:
    """Fewer steps than `max_bad_steps`, and none of them taken; nor when it is asked to go on."""

    class Broken(tiny.Batches):
        def batch(self, step: int) -> Batch:
            batch = super().batch(step)
            return replace(batch, latents=batch.latents * math.nan)

    for _ in range(2):
        each = trainer(tmp_path, steps=3)
        each.loader = Broken()
        with pytest.raises(FloatingPointError, match=r"each of the 3 steps .* Lower learning_rate \(0.01\)"):
            each.run()


def test_learning_rate_warms_up_and_decays() -> None:
    config = TrainConfig(steps=110, learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_average() -> None:
    ema, model = torch.randn(2), torch.randn(2)
    before = ema.clone()
    average([ema], [model], step=10_000, decay=0.75)
    torch.testing.assert_close(ema, 0.75 * before + 0.25 * model)
    old = ema.clone()
    average([ema], [model], step=0, decay=0.75)  # young: a tenth of the old
    torch.testing.assert_close(ema, 0.1 * old + 0.9 * model)


def test_a_preview_that_fails_is_told_of_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def preview(model: object) -> object:
        raise MemoryError("no room for pictures")

    each = trainer(tmp_path, steps=2, preview_every=1)
    each.preview = preview  # type: ignore[assignment]
    assert each.run()
    said = capsys.readouterr().out
    assert all(f"no preview at step {step}: MemoryError: no room for pictures" in said for step in (1, 2))


def test_preview_and_tensorboard(tmp_path: Path) -> None:
    each = trainer(tmp_path, steps=2, preview_every=1)
    each.preview = lambda model: np.zeros((4, 4, 3), np.uint8)
    each.run()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"preview" in content
    assert b"image_loss" in content


def test_plain_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, steps=2).run()
    assert "step 2/2  text " in capsys.readouterr().out


def test_a_log_cut_off_by_a_kill_is_read(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1}) + '\n{"st')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}]


def test_the_log_is_json_for_every_reader(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    log = JsonLines(tmp_path / "log.jsonl", 0)
    log.scalars(1, {"image": math.nan, "text": math.inf, "norm": 1.5})
    log.close()
    JsonLines(tmp_path / "log.jsonl", 1).close()  # goes on, and writes what was there anew
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "image": None, "text": None, "norm": 1.5}
    (found,) = read_log(tmp_path / "log.jsonl")
    assert math.isnan(found["image"]) and found["norm"] == 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"min_learning_rate": 1.0}, "min_learning_rate 1.0"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"learning_rate": 0.0, "min_learning_rate": 0.0}, "learning_rate must be positive and finite, got 0"),
        ({"learning_rate": math.inf}, "learning_rate must be positive and finite, got inf"),
        (
            {"steps": 1000, "warmup_steps": 4000},
            r"warmup_steps 4000 is not in 0\.\.1000, .* give it too, such as 50 \(--train\.warmup-steps\)$",
        ),
        ({"warmup_steps": -1}, "warmup_steps -1 is not in"),
        ({"eps": 0.0}, "eps must be positive and finite, got 0"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and not negative, got -0.1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, got 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be positive, got -1"),
        ({"preview_every": -1}, "preview_every must be finite and not negative, got -1"),
    ],
)
def test_bad_configs_are_named(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)  # type: ignore[arg-type]
