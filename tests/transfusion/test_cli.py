"""The command line on a user's own folder: train, stop, go on, evaluate, sample; and every mistake in one line."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from transfusion import cli
from transfusion import run as run_module
from transfusion.data import image_source, to_tensor
from transfusion.data.sources import SampleError
from transfusion.evaluation import image_distances
from transfusion.evaluation.metrics import Samples, image_figures
from transfusion.generation import TransfusionPipeline
from transfusion.kernels import registry
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
    options = ["--run", str(run), "--out", str(out), "--steps", "5", "--max-new-tokens", "5"]
    inputs = ["--prompt", "red square", "a/b: c", "--image", str(folder / "red.png"), "--text", "this is"]
    capsys.readouterr()
    assert cli.main(["sample", *options, *inputs]) == 0
    settings = json.loads((out / "settings.json").read_text())
    assert [row.get("files") for row in settings["rows"]] == [["000-red-square.png"], ["001-a-b-c.png"], None, None]
    given = [row.get("prompt") or row["image"] for row in settings["rows"]]
    assert given == ["red square", "a/b: c", str(folder / "red.png"), "this is"]
    assert Image.open(out / "000-red-square.png").size == (16, 16)


def test_a_held_out_image_that_cannot_be_read_is_named_and_the_rest_is_evaluated(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        names, captions = ["a.png", "b.png"], ["red", "green"]

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> None:
            raise SampleError(self.names[index], "truncated")

    usual = run_module.image_source
    broken = lambda data, split: Broken() if split == "test" else usual(data, split)  # noqa: E731
    monkeypatch.setattr(run_module, "image_source", broken)
    assert cli.main(["eval", "--run", str(run), "--draws", "1"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["images_held_out"] == {"images": 0, "skipped": 2} and metrics["images_train"]["loss"] > 0
    assert all(f"skipped {name}.png: truncated" in caplog.text for name in "ab")


class Moments(torch.nn.Module):
    """(I, 6): mean and standard deviation of each channel, of images in [0, 1] alone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.min() >= 0 and images.max() <= 1
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


def test_eval_measures_distances_in_the_features_of_a_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the images that can be read, and of what the model draws for their captions under the options given."""
    pytest.importorskip("torchmetrics")
    network = torch.jit.script(Moments())
    network.save(tmp_path / "moments.pt")
    options = ["--features", str(tmp_path / "moments.pt"), "--samples", "9", "--guidance-scale", "2", "--seed", "3"]
    assert cli.main(["eval", "--run", str(run), "--draws", "1", "--device", "cpu", *options]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["images_train"]["images"] == 8
    opened = Run.open(run)
    source = image_source(opened.config.data, "train")
    readable = [index for index, name in enumerate(source.names) if name != "teal.png"]
    real = torch.stack([to_tensor(source[index].image, 16) for index in readable])
    captions = [source.captions[index] for index in readable]
    drawn = opened.pipeline(opened.model()).images(captions, guidance_scale=2, seed=3)
    expected = image_distances(real, drawn, network, seed=3)
    assert metrics["image_distances"] == {"split": "train", **expected}
    assert (expected["features"], expected["real_images"], expected["generated_images"]) == (6, 8, 8)
    assert expected["frechet_distance"] > 0 and expected["kernel_distance"] > 0
    assert cli.main(["eval", "--run", str(run), *options, "--samples", "1"]) == 2
    assert "a distance needs two images or more; of 1 that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere.pt", "does not exist"), ("captions.jsonl", "is no TorchScript file")]
)
def test_eval_refuses_a_file_without_features_before_it_measures(
    name: str,
    message: str,
    run: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(Run, "evaluate", None)
    capsys.readouterr()
    assert cli.main(["eval", "--run", str(run), "--features", str(folder / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"transfusion eval: {folder / name} {message}")
    assert not (run / "metrics.json").exists()


def test_eval_needs_a_draw(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--run", str(run), "--draws", "0"]) == 2
    assert capsys.readouterr().err.endswith("--draws 0: there must be one at least; 8 is the usual number\n")


def test_a_run_with_another_config_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--out", str(run), "--train.learning-rate", "9"]) == 2
    assert "train.learning_rate: 0.0003, now 9" in capsys.readouterr().err


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
        (["train", "--out", "{tmp}/x", "--data.texts", "pydoc", "--train.impl", "fast", *SMALL], "choice 'fast' for"),
        (["train", "--out", "{tmp}/x", *SMALL], "give --data.images, --data.texts or both"),
        (["train", "--out", "{tmp}/x", "--train.steps", "1000"], "give it too, such as 50"),
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


@pytest.mark.parametrize(
    ("devices", "name", "message"),
    [
        (0, "foo", "--device 'foo' is unknown; give cpu, cuda or cuda:N, or auto"),
        (0, "meta", "--device 'meta' is unknown"),
        (0, "cuda", "--device 'cuda': torch finds no cuda here; give another one"),
        (2, "cuda:2", r"--device 'cuda:2': torch finds 2 cuda device\(s\) here"),
    ],
)
def test_a_device_that_is_not_there_is_named(
    devices: int, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with pytest.raises(ValueError, match=message):
        cli.pick_device(name)
    assert cli.pick_device("auto") == ("cuda" if devices else "cpu") and cli.pick_device("cpu") == "cpu"
    assert current == []
    assert not devices or (cli.pick_device("cuda:1") == "cuda:1" and current == ["cuda:1"])


def test_an_interrupt_is_a_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransfusionPipeline, "__call__", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["sample", "--run", str(run), "--prompt", "red", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.endswith("\ntransfusion sample: interrupted\n")


def test_a_reader_that_has_enough_of_the_help_ends_it_quietly():
    command = [sys.executable, "-m", "transfusion", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_every_command_names_a_device_that_is_not_there(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    data = ["--data.images", str(folder), "--data.autoencoder", out, "--data.latent-cache", out]
    capsys.readouterr()
    for command in (
        ["train", "--out", out, *SMALL],
        ["eval", "--run", str(run)],
        ["sample", "--run", str(run), "--prompt", "red", "--out", out],
        ["sample", "--prompt", "red", "--out", out],
        ["train-vae", "--images", str(folder), "--out", out],
        ["encode", *data],
    ):
        assert cli.main([*command, "--device", "foo"]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line == f"transfusion {command[0]}: --device 'foo' is unknown; give cpu, cuda or cuda:N, or auto"
    assert not Path(out, "config.toml").exists()


def test_kernels_that_cannot_run_here_are_a_message_and_bugs_are_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "TRITON_INTERPRET", False)
    options = ["--device", "cpu", "--train.impl", "triton", "--data.images", str(folder), "--data.texts", str(folder)]
    assert cli.main(["train", "--out", str(tmp_path / "run"), *options, *SMALL]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("transfusion train: "))
    assert "impl='triton' cannot run here: " in line and "tensors are on 'cpu'" in line

    def broken(arguments: object) -> int:
        raise RuntimeError("impl='triton' cannot run here")

    monkeypatch.setitem(cli._COMMANDS, "train", broken)
    with pytest.raises(RuntimeError):
        cli.main(["train"])


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
    for arguments, status in ((["--help"], 0), (["--bogus"], 2)):
        with pytest.raises(SystemExit) as ended:
            cli.main(["doctor", *arguments])
        said = capsys.readouterr()
        assert ended.value.code == status and "usage: transfusion doctor" in said.out + said.err
        assert "transfusion_attention" not in said.out


@pytest.mark.parametrize("others", [(16, 16), (8, 24)])
def test_the_gap_is_what_captions_are_worth(run: Path, others: tuple[int, int]) -> None:
    """A model blind to text has no gap; one that reads the answer in the caption has a large one."""
    opened = Run.open(run)
    model = opened.model()
    captions = [opened.tokenizer.encode(f"{color} square") for color in tiny.COLORS]
    latents = [torch.randn(3, *((16, 16) if index % 2 else others)) for index in range(len(captions))]
    samples = Samples(captions, latents, [None] * len(captions))
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attention.out.weight.zero_()  # no token sees another one
    blind = image_figures(model, samples, draws=2, seed=0)
    assert blind["conditioning_gap"] == pytest.approx(0, abs=1e-6)
    assert blind["loss"] == pytest.approx(blind["loss_shuffled_captions"])
    alone = image_figures(model, Samples(captions[:1], latents[:1], [None]), draws=2, seed=0)
    assert alone["conditioning_gap_missing"] == "more than half of the 1 captions are the same"
    assert "conditioning_gap_missing" not in blind and "conditioning_gap" not in alone


def test_what_the_terminal_cannot_say_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(cli, "COMMANDS", "\u7ea2 apple")
    assert cli.main([]) == 0
    sys.stdout.flush()
    assert written.getvalue() == b"\\u7ea2 apple\n"
