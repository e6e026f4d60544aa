"""The command line on a user's own folder: train, stop, go on, evaluate, sample; and every mistake in one line."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from transfusion import cli
from transfusion.evaluation.metrics import image_figures
from transfusion.run import Run

SMALL = tiny.run_options(data__loader__image_size=16, train__log_every=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.data_folder(tmp_path / "data")


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    data = ["--data.images", str(folder), "--data.texts", str(folder)]
    assert cli.main(["train", "--out", str(out), *data, *SMALL]) == 0
    return out


def test_train_evaluate_sample(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--out", str(run)]) == 0  # ended already: its config needs no repeating
    assert cli.main(["eval", "--run", str(run), "--draws", "2"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["images_train"]["images"] >= 7
    assert metrics["images_train"]["loss_predicting_zero"] > 0
    assert metrics["text_held_out"]["unigram_entropy"] > 0
    out = tmp_path / "samples"
    options = ["--run", str(run), "--out", str(out), "--steps", "5", "--max-tokens", "5"]
    inputs = ["--prompt", "red square", "a/b: c", "--image", str(folder / "red.png"), "--text", "this is"]
    capsys.readouterr()
    assert cli.main(["sample", *options, *inputs]) == 0
    settings = json.loads((out / "settings.json").read_text())
    assert settings["images"] == {"000-red-square.png": "red square", "001-a-b-c.png": "a/b: c"}
    assert list(settings["captions"]) == [str(folder / "red.png")]
    assert list(settings["continuations"]) == ["this is"]
    assert Image.open(out / "000-red-square.png").size == (16, 16)


def test_a_run_with_another_config_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--out", str(run), "--train.steps", "9"]) == 2
    assert "train.steps: 4, now 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "unknown command 'fly'"),
        (["sample", "--run", "nowhere", "--prompt", "x"], "nowhere holds no run"),
        (["sample", "--run", "nowhere"], "give --prompt, --image, --text or --story"),
        (["eval", "--run", "nowhere"], "nowhere holds no run"),
        (["train", "--config", "nowhere.toml"], "nowhere.toml"),
        (["train", "--out", "{tmp}/x", "--data.images", "{tmp}"], "captions.jsonl does not exist"),
        (["train", "--out", "{tmp}/x", "--model.patch-size", "4"], "model.patch_size 4"),
        (["train", "--out", "{tmp}/x", "--train.impl", "fast", *SMALL], "impl='fast' is unknown"),
    ],
)
def test_mistakes_end_with_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    except SystemExit as error:  # options that tyro itself refuses
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    for command in ("train", "sample", "eval", "verify", "doctor"):
        assert command in capsys.readouterr().out or command != "train"
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "--train.learning-rate" in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert "transfusion_attention" in capsys.readouterr().out


def test_the_gap_is_what_captions_are_worth(run: Path) -> None:
    """A model blind to text has no gap; one that reads the answer in the caption has a large one."""
    opened = Run.open(run)
    model = opened.model()
    captions = [opened.tokenizer.encode(f"{color} square") for color in tiny.COLORS]
    latents = torch.randn(len(tiny.COLORS), *opened.latent_shape)
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attention.out.weight.zero_()  # no token sees another one
    blind = image_figures(model, captions, latents, draws=2, seed=0)
    assert blind["conditioning_gap"] == pytest.approx(0, abs=1e-6)
    assert blind["loss"] == pytest.approx(blind["loss_shuffled_captions"])
