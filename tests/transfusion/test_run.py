"""A run's folder: begun once, left as it was by a start that fails, gone on with, and read before it has finished."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image as Pictures
from tiny import TWO_STEPS, train

from transfusion import cli, run
from transfusion import config as configs
from transfusion.data import PixelAutoencoder
from transfusion.generation import TransfusionPipeline
from transfusion.run import Run
from transfusion.run_config import CONFIG, RunConfig
from transfusion.training import Trainer


def test_a_start_that_fails_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert train(out, folder, "--data.loader.row-length", "4") == 2
    assert "row_length=4 holds no caption" in capsys.readouterr().err and not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda *_: (_ for _ in ()).throw(ValueError("at the first step")))
        assert train(out, folder) == 2
    assert train(out, folder, "--model.dim", "48") == 0  # nothing had been learned
    assert Run.open(out).model().config.dim == 48
    assert train(out, folder, "--model.dim", "32") == 2
    assert "model.dim: 48, now 32" in capsys.readouterr().err


def test_images_alone_and_texts_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "images", folder) == 0
    (folder / "one.txt").unlink(), (folder / "two.txt").unlink()
    assert train(tmp_path / "named", folder, "--data.texts", str(folder)) == 2
    assert "has no readable text" in capsys.readouterr().err
    assert train(tmp_path / "named", folder, "--data.texts", "none") == 0
    assert train(tmp_path / "texts", "none", "--data.texts", "pydoc") == 0
    seen = {}
    for name in ("images", "named", "texts"):
        log = (tmp_path / name / "log.jsonl").read_text().splitlines()
        seen[name] = [json.loads(line)["image_token_share"] > 0 for line in log]
    assert seen == {"images": [True, True], "named": [True, True], "texts": [False, False]}
    assert cli.main(["eval", "--run", str(tmp_path / "images"), "--draws", "1"]) == 0
    assert "text_held_out" not in json.loads((tmp_path / "images" / "metrics.json").read_text())


def test_a_run_that_has_not_finished_gives_its_averaged_weights(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two steps of two are a model; of six they are the last checkpoint, until the six are done."""
    out = tmp_path / "run"
    assert train(out, folder) == 0
    finished = Run.open(out).model()
    assert "has not finished" not in caplog.text
    longer = configs.load(RunConfig, out / CONFIG)
    configs.save(
        configs.from_dict(RunConfig, configs.to_dict(longer) | {"train": {"steps": 6, "warmup_steps": 1}}), out / CONFIG
    )
    unfinished = Run.open(out).model()
    assert f"{out} has not finished (step 2 of 6): using its averaged weights" in caplog.messages
    for name, weight in finished.state_dict().items():
        assert torch.equal(weight, unfinished.state_dict()[name]), name
    sample = ["sample", "--run", str(out), "--prompt", "red square", "--steps", "2", "--device", "cpu"]
    assert cli.main([*sample, "--out", str(tmp_path / "samples")]) == 0
    assert cli.main(["eval", "--run", str(out), "--draws", "1", "--device", "cpu"]) == 0


def test_a_run_without_a_checkpoint_says_how_far_it_is(folder: Path, tmp_path: Path) -> None:
    options = ["--data.images", str(folder), *TWO_STEPS]
    assert cli.main(["train", "--out", str(tmp_path / "whole"), *options]) == 0
    begun = Run.start(configs.load(RunConfig, tmp_path / "whole" / CONFIG), tmp_path / "begun")
    with pytest.raises(FileNotFoundError, match=r"begun has not finished \(step 0 of 2\) and has no checkpoint yet"):
        begun.model()


def test_all_of_a_run_computes_where_it_is_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The autoencoder too, whatever other devices there are."""
    assert train(tmp_path / "run", folder) == 0
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "make_autoencoder", lambda _, device: asked.append(device) or PixelAutoencoder())
    for device in ("cpu", "meta"):
        assert Run.open(tmp_path / "run", device).autoencoder.latent_channels == 3
    assert asked == [torch.device("cpu"), torch.device("meta")]
    with pytest.raises(ValueError, match="device 'meta'"):  # holds no numbers
        Run.open(tmp_path / "run", "meta").model()


def test_a_config_that_says_the_same_keeps_its_comments(folder: Path, tmp_path: Path) -> None:
    """`--config mine/config.toml --out mine` would write over it."""
    out = tmp_path / "run"
    assert train(out, folder) == 0
    commented = "# why this rate\n" + (out / CONFIG).read_text()
    (out / CONFIG).write_text(commented)
    assert cli.main(["train", "--config", str(out / CONFIG), "--out", str(out), "--device", "cpu"]) == 0
    assert (out / CONFIG).read_text() == commented
    assert train(out, folder, "--train.log-every", "2") == 0
    assert (out / CONFIG).read_text() != commented and Run.open(out).config.train.log_every == 2


def test_a_run_may_become_longer(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says what the learning rate does; not shorter than it is."""
    out = tmp_path / "run"
    assert train(out, folder) == 0
    assert cli.main(["train", "--out", str(out), "--train.steps", "5", "--device", "cpu"]) == 0
    (said,) = [message for message in caplog.messages if "cosine" in message]
    assert said.startswith(
        f"{out}: train.steps 2, now 5: the learning rate's cosine now ends at step 5; at step 2 it is"
    )
    assert said.endswith("0.000258, not 1.5e-05")
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == 5
    assert Run.open(out).config.train.steps == 5
    assert cli.main(["train", "--out", str(out), "--train.steps", "4", "--device", "cpu"]) == 2
    assert (
        f"train.steps 4 is fewer than the 5 that {out} has trained already; give 5 or more" in capsys.readouterr().err
    )
    assert Run.open(out).config.train.steps == 5


def test_previews_are_drawn(folder: Path, tmp_path: Path) -> None:
    """For captions that fit a row: one that does not is left out, and draws nothing."""
    with open(folder / "captions.jsonl", "a") as file:
        file.write("\n" + json.dumps({"image": "red.png", "caption": "much too long " * 30}))
    assert train(tmp_path / "run", folder, "--train.preview-every", "2") == 0
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"preview" in events.read_bytes()


def test_a_folder_may_be_named_from_where_one_stands(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run finds it from elsewhere, to be evaluated and to go on."""
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path / "run", "data", "--data.texts", "data") == 0
    data = Run.open(tmp_path / "run").config.data
    assert (data.images, data.texts) == (str(folder), str(folder))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["eval", "--run", "../run", "--draws", "1"]) == 0
    assert cli.main(["train", "--out", "../run", "--train.steps", "3", "--device", "cpu"]) == 0
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path / "run", "data", "--data.texts", "data", "--train.steps", "4") == 0  # as it was begun


def test_data_that_changed_is_noticed(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "run"
    again = ["train", "--out", str(out), "--device", "cpu", "--train.steps"]
    assert train(out, folder, "--data.texts", str(folder)) == 0
    assert cli.main([*again, "3"]) == 0
    assert "have changed" not in caplog.text
    captions = folder / "captions.jsonl"
    captions.write_text(captions.read_text().replace("square", "circle"))
    (folder / "three.txt").write_text("this is text three, about circles. " * 20)
    assert cli.main([*again, "4"]) == 0
    changes = [message.partition(":")[0] for message in caplog.messages if "have changed" in message]
    size = len(run.image_source(Run.open(out).config.data, "train"))
    assert changes == [
        "the texts have changed since the checkpoint (1 of them, now 2)",
        f"the images have changed since the checkpoint ({size} of them, not the same ones)",
    ]
    caplog.clear()
    assert cli.main([*again, "5"]) == 0
    assert "have changed" not in caplog.text


def test_distances_are_measured_where_the_weights_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline gives images on the host; the network of features is on the model's device, and so must they be."""
    assert train(tmp_path / "run", folder) == 0
    opened, seen = Run.open(tmp_path / "run"), {}

    class Drawing:
        def images(self, captions: list[str], **options: object) -> torch.Tensor:
            return torch.zeros(len(captions), 3, 16, 16)

    def distances(real: list[torch.Tensor], generated: list[torch.Tensor], network: str, seed: int) -> dict[str, float]:
        seen.update(real={each.device for each in real}, generated={each.device for each in generated})
        seen.update(network={network})
        return {}

    monkeypatch.setattr(run, "load_features", lambda name, device: device)
    monkeypatch.setattr(run, "image_distances", distances)
    monkeypatch.setattr(opened, "pipeline", lambda model: Drawing())
    opened.distances(opened.model().to("meta"), "features.pt", samples=4)
    assert seen == {name: {torch.device("meta")} for name in ("real", "generated", "network")}


def test_a_run_may_start_from_a_saved_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its network and its tokenizer, and with its weights once alone."""
    first, out = tmp_path / "first", tmp_path / "out"
    assert train(first, folder, "--data.texts", str(folder)) == 0
    monkeypatch.chdir(tmp_path)
    still = ["--train.learning-rate", "1e-9", "--train.min-learning-rate", "0", "--train.warmup-steps", "0"]
    options = ["--data.images", str(folder), "--data.loader.image-size", "16", "--train.steps", "1", *still]
    again = ["train", "--out", str(out), "--device", "cpu", *options]
    assert cli.main([*again, "--init", "first/model", "--model.dim", "48"]) == 2
    assert "the network of init" in (said := capsys.readouterr().err) and "model.dim: 32, now 48" in said
    assert cli.main([*again, "--init", "first"]) == 2
    assert "first is no saved pipeline" in (said := capsys.readouterr().err) and "emoji-32" in said
    assert cli.main([*again, "--init", "first/model", "--preset", "tiny"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert cli.main([*again, "--init", "first/model", "--model.image-loss-weight", "2"]) == 0
    before, after = Run.open(first), Run.open(out)
    assert (out / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert after.config.init == str(first / "model") and after.config.model.dim == 32
    for weight, learned in zip(after.model().parameters(), before.model().parameters(), strict=True):
        torch.testing.assert_close(weight, learned)
    shutil.rmtree(first)
    assert cli.main([*again, "--train.steps", "2"]) == 0


@pytest.mark.parametrize(
    ("ratios", "usual"),
    [(("3:1", "1:2", "2:1"), (48, 24)), (("3:1", "4:3", "1:2"), (24, 40)), (("1:4", "1:2"), (48, 24))],
)
def test_the_usual_shape_is_the_nearest_to_square_of_those_trained_on(
    ratios: tuple[str, ...], usual: tuple[int, int], folder: Path, tmp_path: Path
) -> None:
    """As the saved pipeline says and the run draws."""
    options = ["--data.loader.image-size", "32", "--data.loader.aspect-ratios", *ratios]
    assert train(tmp_path / "run", folder, *options) == 0
    opened = Run.open(tmp_path / "run")
    saved = TransfusionPipeline.from_pretrained(tmp_path / "run" / "model")
    assert opened.latent_shape == saved.latent_shape == (3, *usual)


def test_each_image_is_evaluated_and_previewed_at_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was trained; the caption that fits beside the smaller images alone is of no use."""
    data, shapes, lines = tmp_path / "data", {"wide": (40, 18), "tall": (20, 40), "square": (30, 31)}, []
    data.mkdir()
    for index, name in enumerate([*shapes] * 4):
        Pictures.new("RGB", shapes[name], "blue").save(data / f"{index}.png")
        lines.append({"image": f"{index}.png", "caption": f"{name} {index}"})
    (data / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ratios = ["--data.loader.aspect-ratios", "1:1", "3:1", "1:3", "--data.loader.image-size", "24"]
    options = [*ratios, "--data.texts", "none", "--train.preview-every", "2"]
    assert train(tmp_path / "run", data, *options) == 0
    Pictures.new("RGB", (30, 30)).save(data / "long.png")
    room = 48 - 9 - 4  # beside 9 tokens, BOS, BOI, EOI and EOS; one too many beside 10
    lines.append({"image": "long.png", "caption": "Z" * room})  # a token a letter
    (data / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    opened = Run.open(tmp_path / "run")
    sizes = {"wide": (16, 40), "tall": (40, 16), "square": (24, 24)}
    assert set(opened.sizes) == set(sizes.values())
    model = opened.model()
    figures = opened.evaluate(model, draws=1)["images_train"]
    source = run.image_source(opened.config.data, "train")
    assert (figures["images"], figures["skipped"]) == (len(source) - 1, 1)
    sets: list[list[torch.Tensor]] = []
    monkeypatch.setattr(run, "load_features", lambda name, device: None)
    monkeypatch.setattr(run, "image_distances", lambda real, drawn, network, seed: sets.extend((real, drawn)) or {})
    assert opened.distances(model, "features.pt", seed=5)["split"] == "train"
    captions = [caption for caption in source.captions if caption[0] != "Z"]
    real, drawn = sets
    for index, caption in enumerate(captions):
        height, width = sizes[caption.split()[0]]
        assert real[index].shape == drawn[index].shape == (3, height, width)
        (alone,) = opened.pipeline(model).images([caption], height=height, width=width, seed=5 + index)
        torch.testing.assert_close(drawn[index], alone)
    preview = opened._preview(room - 1)
    assert preview is not None
    sheet = preview(model)
    assert sheet.shape == (2 * 40, 8 * 40, 3)
    for index, caption in enumerate(captions):
        height, width = sizes[caption.split()[0]]
        cell = sheet[40 * (index // 8) :][:40, 40 * (index % 8) :][:, :40]
        blank = (cell == 255).all(-1)
        assert blank[: (40 - height) // 2].all() and blank[:, : (40 - width) // 2].all()
        assert not blank[(40 - height) // 2 :, (40 - width) // 2 :].all(), caption
