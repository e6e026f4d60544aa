"""What is left of a run by signals, by hand and by bad entries, and what is made of it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from tiny import TWO_STEPS, train

from transfusion import ModelConfig, cli, presets
from transfusion import config as configs
from transfusion.config import UNetConfig
from transfusion.data import DataConfig
from transfusion.evaluation import evenly
from transfusion.files import LOCK, alone_in
from transfusion.generation import TransfusionPipeline
from transfusion.model.flops import codec_flops
from transfusion.run import CHECKPOINTS, STEP, Run
from transfusion.run_config import MODEL, RunConfig, with_saved_model
from transfusion.training.metrics import DataErrors, read_log


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in model.parameters()])


def test_a_model_of_fewer_steps_is_not_taken_for_that_of_all(folder: Path, tmp_path: Path) -> None:
    """The longer run was killed between its last checkpoint and its model."""
    out = tmp_path / "run"
    assert train(out, folder) == 0
    early = tmp_path / "early"
    shutil.copytree(out / MODEL, early)
    assert train(out, folder, "--train.steps", "4") == 0
    assert (out / MODEL / STEP).read_text() == "4\n"
    late = weights(Run.open(out).model())
    shutil.rmtree(out / MODEL)
    shutil.copytree(early, out / MODEL)
    assert torch.equal(weights(Run.open(out).model()), late)


def test_a_model_without_a_checkpoint_is_not_trained_over(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(out, folder) == 0
    log = (out / "log.jsonl").read_text()
    shutil.rmtree(out / CHECKPOINTS)
    assert train(out, folder, "--train.steps", "4") == 2
    assert f"--init {out / MODEL}" in capsys.readouterr().err
    assert (out / "log.jsonl").read_text() == log


def test_an_interrupt_of_all_processes_saves(folder: Path, tmp_path: Path) -> None:
    """As Ctrl-C in a terminal, which reaches the decoding processes too."""
    out = tmp_path / "run"
    options = ["--train.steps", "100000", "--train.checkpoint-every", "100000", "--train.accumulation", "4"]
    command = [
        sys.executable,
        "-m",
        "transfusion",
        "train",
        "--out",
        str(out),
        "--data.images",
        str(folder),
        *TWO_STEPS,
    ]
    run = subprocess.Popen(
        [*command, *options, "--data.loader.workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        log = out / "log.jsonl"
        end = time.monotonic() + 120
        while not (log.is_file() and log.read_text().count("\n") > 3) and time.monotonic() < end:
            assert run.poll() is None, run.communicate()
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGINT)
        output, _ = run.communicate(timeout=120)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert "Traceback" not in output and "stopped at step" in output, output
    assert list((out / CHECKPOINTS).iterdir())


@pytest.mark.parametrize("command", ["train", "train-vae"])
def test_a_folder_in_use_is_refused_until_its_process_is_gone(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    program = f"""
import time
from pathlib import Path
from transfusion.files import alone_in
with alone_in(Path({str(out)!r})):
    print("in", flush=True)
    time.sleep(600)
"""
    small = ["--image-size", "16", "--channels", "4", "8", "--steps", "2", "--batch-size", "2", "--device", "cpu"]
    words = ["--data.images", str(folder), *TWO_STEPS] if command == "train" else ["--images", str(folder), *small]
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        assert cli.main([command, "--out", str(out), *words]) == 2
        said = capsys.readouterr().err
        assert f"{out} is in use by another process ({other.pid} on " in said and "another folder" in said
        assert [path.name for path in out.iterdir()] == [LOCK]
    finally:
        other.kill()
        other.communicate()
    assert cli.main([command, "--out", str(out), *words]) == 0
    assert not (out / LOCK).exists()


def test_a_run_holds_its_folder_to_the_end(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = tmp_path / "run", []
    save = TransfusionPipeline.save_pretrained
    monkeypatch.setattr(
        TransfusionPipeline, "save_pretrained", lambda *given: (seen.append((out / LOCK).is_file()), save(*given))
    )
    assert train(out, folder) == 0
    assert seen == [True]


def test_a_folder_is_entered_once_by_one_process(tmp_path: Path) -> None:
    """Of which the system's lock knows nothing; the second leaves the first what it has."""
    with alone_in(tmp_path / "run"):
        for path in (tmp_path / "run", tmp_path / "x" / ".." / "run"):
            with pytest.raises(ValueError, match="run is in use by this process"), alone_in(path):
                pass
        assert (tmp_path / "run" / LOCK).is_file()
    with alone_in(tmp_path / "run"):
        pass


def test_a_disk_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    with alone_in(tmp_path / "run"):
        assert f"{tmp_path / 'run'} cannot be locked (No locks available)" in caplog.text


def test_bad_entries_are_skipped_and_named(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with open(folder / "captions.jsonl", "a") as file:
        file.write('\n{"image": "red.png", "caption": "oh \\ud83d"}')
        file.write('\n{"image": "data:image/png;base64,' + "A" * 5000 + '", "caption": "inline"}')
        file.write("\n" + "[" * 100_000)
    Pictures.fromarray(np.random.rand(20, 20).astype(np.float32)).save(folder / "float.tiff")
    with open(folder / "captions.jsonl", "a") as file:
        file.write('\n{"image": "float.tiff", "caption": "levels of what"}')
    (folder / "bad.jsonl").write_text('{"text": "oh \\ud83d"}\n{"text": "fine"}\n')
    (folder / "gone.jsonl").symlink_to(folder / "nowhere.jsonl")
    (folder / "marked.txt").write_bytes(b"\xef\xbb\xbfhello")
    os.close(os.open(os.fsencode(folder) + b"/caf\xe9.txt", os.O_CREAT))
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text("a name that is no Unicode " * 5)
    assert train(tmp_path / "run", folder, "--data.texts", str(folder)) == 0
    said = capfd.readouterr().err + caplog.text
    for word in ("captions.jsonl:11", "captions.jsonl:12", "captions.jsonl:13", "bad.jsonl:1", "gone.jsonl"):
        assert word in said, word
    assert "float.tiff" in (tmp_path / "run" / "data_errors.jsonl").read_text()


def test_what_a_source_skips_is_counted_once_however_often_the_run_begins(folder: Path, tmp_path: Path) -> None:
    with open(folder / "captions.jsonl", "a") as file:
        file.write('\n{"image": "gone.png", "caption": "not there"}')
    for steps in ("2", "3"):
        assert train(tmp_path / "run", folder, "--train.steps", steps) == 0
        lines = [json.loads(line) for line in (tmp_path / "run" / "data_errors.jsonl").read_text().splitlines()]
        assert sorted(line["sample"] for line in lines) == [f"{folder}/gone.png", f"{folder}/teal.png"]
        log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        assert len(log) == int(steps) and log[-1]["skipped_samples"] == 2


def test_a_folder_whose_name_is_no_unicode_is_told_of_before_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(os.fsdecode(os.fsencode(tmp_path) + b"/im\xffages"))
    shutil.copytree(folder, other)
    assert train(tmp_path / "run", other) == 2
    assert "config.toml cannot hold a name that is no Unicode" in capsys.readouterr().err


def test_what_a_kill_cut_short_is_mended(tmp_path: Path) -> None:
    file = tmp_path / "data_errors.jsonl"
    for number in range(3):
        errors = DataErrors(file)
        errors.add(number, [[("a\u2028\udcff.png", "no image"), (f"{number}.png", "no image")]])
        with open(file, "a") as log:
            log.write('{"step": 1, "ra')
    assert [line["sample"] for line in read_log(file)] == ["a\u2028\udcff.png", "0.png", "1.png", "2.png"]


def test_ids_that_the_tokenizer_does_not_have_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", folder, "--model.special.boi", "10", "--model.special.eoi", "11") == 2
    assert "is not what the tokenizer has" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_file_says_what_a_saved_model_leaves_open(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, said = tmp_path / "old", tmp_path / "new", tmp_path / "said.toml"
    assert train(old, folder) == 0
    said.write_text('[model]\nimage_loss_weight = 1.5\nlayers = 7\ncodec = "linear"\n')
    words = ["--config", str(said), "--init", str(old / "model"), "--train.steps", "1", "--train.warmup-steps", "0"]
    data = ["--data.images", str(folder), "--data.loader.image-size", "16", "--data.loader.row-length", "48"]
    assert cli.main(["train", "--out", str(new), "--device", "cpu", *words, *data]) == 0
    config = Run.open(new).config
    assert config.model.image_loss_weight == 1.5 and config.model.layers == Run.open(old).config.model.layers
    assert "its network takes the place of the config's (model.layers)" in caplog.text
    said.write_text('[data]\nautoencoder = "somewhere"\n')
    begun = RunConfig(init=str(old / "model"), data=DataConfig(autoencoder="somewhere"))
    assert with_saved_model(begun, configs.read(said)).data.autoencoder == "somewhere"
    assert with_saved_model(begun).data.autoencoder == "pixels"


def test_what_is_looked_at_is_spread_evenly() -> None:
    assert evenly(368, 256)[-1] > 330 and len(set(evenly(368, 256))) == 256
    assert evenly(7, 256) == list(range(7)) and evenly(0, 4) == []


def test_an_evaluation_goes_on_without_what_holds_nothing_out(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "one.txt"
    alone.write_text("the only text there is. " * 20)
    single = tmp_path / "single"
    single.mkdir()
    Pictures.new("RGB", (16, 16), "red").save(single / "1.png")
    (single / "captions.jsonl").write_text('{"image": "1.png", "caption": "red"}')
    out = tmp_path / "run"
    sources = ["--data.images", str(folder), str(single), "--data.texts", str(alone)]
    assert cli.main(["train", "--out", str(out), *sources, *TWO_STEPS]) == 0
    assert cli.main(["eval", "--run", str(out), "--draws", "1"]) == 0
    figures = json.loads((out / "metrics.json").read_text())
    assert {"images_held_out", "images_train"} <= figures.keys() and "text_held_out" not in figures


def test_sizes_that_nothing_could_use_are_refused_at_the_start(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ratios = ["--data.loader.aspect-ratios", "1:1", "2:1"]
    assert train(tmp_path / "run", folder, "--data.loader.image-size", "18", *ratios) == 2
    assert "18" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert train(tmp_path / "run", folder, "--model.codec", "unet", *ratios) == 2
    assert "images of one size in a batch" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_an_end_in_bad_steps_is_no_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--train.learning-rate", "1e30", "--train.max-grad-norm", "inf", "--train.steps", "8"]
    assert train(tmp_path / "run", folder, *options) == 2
    assert "steps up to step 8 had a loss or gradient that is not finite" in capsys.readouterr().err
    assert not (tmp_path / "run" / MODEL).exists()


def test_a_partial_table_starts_from_the_defaults_that_the_help_shows(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        "[model]\nqk_norm = true\n[model.schedule]\nnum_train_timesteps = 500\n[data.loader]\nimage_size = 64\n"
    )
    config, default = configs.load(RunConfig, file), RunConfig()
    assert config.model.dim == default.model.dim == presets.get("tiny").dim and config.model.qk_norm
    assert config.model.schedule.prediction == default.model.schedule.prediction
    assert config.data.loader.rows == default.data.loader.rows and config.data.loader.image_size == 64
    assert configs.from_dict(RunConfig, configs.to_dict(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nbetas = [0.9]\n", r"train\.betas must hold 2 values, got \[0\.9\]"),
        ('[train]\nbetas = ["a", "b"]\n', r"train\.betas\[0\] must be float, got 'a'"),
        ("[data.loader]\naspect_ratios = [1.5]\n", r"data\.loader\.aspect_ratios\[0\] must be str, got 1\.5"),
    ],
)
def test_entries_of_lists_are_checked(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        configs.load(RunConfig, tmp_path / "mine.toml")


def test_counting_flops_changes_no_other_thread() -> None:
    """An autoencoder encodes beside it, and must do so with the kernels it always takes."""
    unet = ModelConfig(dim=64, layers=1, heads=2, codec="unet", unet=UNetConfig())
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 300, 64)
    attend, stop = torch.nn.functional.scaled_dot_product_attention, threading.Event()
    wanted = attend(q, k, v)

    def count() -> None:
        while not stop.is_set():
            codec_flops.cache_clear()
            codec_flops(unet, (8, 8))

    thread = threading.Thread(target=count)
    thread.start()
    try:
        found = [torch.equal(attend(q, k, v), wanted) for _ in range(300)]
    finally:
        stop.set()
        thread.join()
    assert all(found)
