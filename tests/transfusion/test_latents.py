"""A user's own images, an autoencoder trained on them, its latents kept, a model trained on these: every command."""

from pathlib import Path

import pytest
import tiny
from PIL import Image

from transfusion import cli
from transfusion.files import alone_in
from transfusion.run_config import RunConfig, with_saved_model
from transfusion.training import metrics

SMALL = tiny.run_options(model__patch_size=2, model__latent_channels=4, train__steps=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.data_folder(tmp_path / "data")


def _train_vae(folder: Path, out: Path) -> int:
    sizes = {"image-size": "16", "steps": "4", "batch-size": "2", "checkpoint-every": "2"}
    options = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    return cli.main(["train-vae", "--images", str(folder), "--out", str(out), "--channels", "4", "8", *options])


def test_from_a_folder_to_a_model_of_its_latents(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, cache, run = tmp_path / "vae", tmp_path / "cache", tmp_path / "run"
    assert _train_vae(folder, vae) == 0
    assert (vae / "reconstructions.png").is_file() and (vae / "config.json").is_file()
    data = ["--data.images", str(folder), "--data.texts", str(folder), "--data.autoencoder", str(vae)]
    data += ["--data.latent-cache", str(cache), "--data.loader.image-size", "16", "--data.loader.patch-size", "2"]
    assert cli.main(["train", "--out", str(run), *data, *SMALL]) == 2
    assert "run `transfusion encode` first" in capsys.readouterr().err
    assert cli.main(["encode", *data, "--data.loader.image-size", "18"]) == 2
    assert "image_size=18 does not divide into patches of" in capsys.readouterr().err
    with alone_in(cache):  # two at once would write over each other's files
        assert cli.main(["encode", *data]) == 2
    assert f"{cache} is in use by this process" in capsys.readouterr().err
    assert cli.main(["encode", *data]) == 0
    first = capsys.readouterr().out
    assert "1 skipped" in first and f"skipped {folder}/teal.png" in first
    assert cli.main(["encode", *data]) == 0
    assert ": 0 image(s) encoded" in capsys.readouterr().out
    from transfusion.data import DiffusersAutoencoder

    with monkeypatch.context() as patch:  # training reads every latent from the cache
        patch.setattr(DiffusersAutoencoder, "moments", lambda *_: pytest.fail("the encoder ran"))
        assert cli.main(["train", "--out", str(run), *data, *SMALL]) == 0
    log = metrics.read_log(run / "log.jsonl")
    assert log[-1]["step"] == 3 and (run / "model").is_dir()
    samples = tmp_path / "samples"
    assert cli.main(["sample", "--run", str(run), "--prompt", "red square", "--out", str(samples), "--steps", "2"]) == 0
    assert Image.open(next(samples.glob("*.png"))).size == (16, 16)
    tuned = with_saved_model(RunConfig(init=str(run / "model")))  # what --init would begin with
    assert tuned.data.autoencoder == str(run / "model" / "vae")
    assert (tuned.model.latent_channels, tuned.data.loader.patch_size) == (4, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train-vae", "--images", "{tmp}", "--out", "{tmp}/x"], "captions.jsonl does not exist"),
        (["train-vae", "--images", "{data}", "--out", "{tmp}/x", "--steps", "0"], "steps"),
        (["encode", "--data.images", "{data}", "--data.latent-cache", "{tmp}/c"], "pixels need none"),
        (["encode", "--data.images", "{data}", "--data.autoencoder", "{tmp}/x"], "give --data.latent-cache"),
        (["encode", "--data.autoencoder", "{tmp}/x", "--data.latent-cache", "{tmp}/c"], "give --data.images"),
        (["encode", "--config", "nowhere.toml"], "nowhere.toml"),
        (["encode", "--config", "emoji-32", "--data.latent-cache", "{tmp}/c"], "pixels need none"),
    ],
)
def test_mistakes_end_with_one_line(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"{tmp}": str(tmp_path), "{data}": str(folder)}
    for mark, place in places.items():
        arguments = [argument.replace(mark, place) for argument in arguments]
    try:
        status = cli.main(arguments)
    except SystemExit as error:  # options that tyro itself refuses
        status = error.code  # type: ignore[assignment]
    assert status == 2
    assert message in capsys.readouterr().err


def test_all_that_does_not_fit_the_autoencoder_is_named_at_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train_vae(folder, tmp_path / "vae") == 0
    data = ["--data.images", str(folder), "--data.texts", str(folder), "--data.autoencoder", str(tmp_path / "vae")]
    data += ["--data.loader.image-size", "18", "--data.loader.patch-size", "2"]
    assert cli.main(["train", "--out", str(tmp_path / "run"), *data, *SMALL, "--model.latent-channels", "8"]) == 2
    said = capsys.readouterr().err  # both mistakes at once, each with the option that mends it
    assert "model.latent_channels 8 differs from the 4 channels" in said and "--model.latent-channels 4" in said
    assert "image_size=18 does not divide" in said and "--data.loader.image-size" in said
    assert not (tmp_path / "run").exists()
