"""`transfusion sample` on a saved pipeline: every kind of row, the files it writes, and every mistake in one line."""

import json
import os
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import rigged
import torch
from PIL import Image

from transfusion import cli
from transfusion.data import PixelAutoencoder, Tokenizer
from transfusion.files import write_whole
from transfusion.generation import TransfusionPipeline
from transfusion.generation.sheet import Card, write_sheet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sampling")
    model, tokenizer = rigged.random_model(seed=3, vocab_size=300), Tokenizer.train(["red green"], 300)
    TransfusionPipeline(model, tokenizer, PixelAutoencoder(), rigged.SHAPE, 90).save_pretrained(path / "pipe")
    Image.new("RGB", (12, 8), "orange").save(path / "fruit.png")
    Image.new("L", (12, 8), 255).save(path / "mask.png")
    return path


def sample(folder, out, *arguments):
    status = cli.main(["sample", "--model", str(folder / "pipe"), "--out", str(out), "--steps", "2", *arguments])
    return status, json.loads((out / "settings.json").read_text())


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_every_kind_of_row(folder, tmp_path, capsys):
    picture = str(folder / "fruit.png")
    rows = ["--prompt", "a <b>red</b> fox", "a/b: c", "--image", picture, "--text", "once", "--story", "a story"]
    status, settings = sample(folder, tmp_path, *rows, "--max-new-tokens", "6", "--max-images", "1", "--seed", "5")
    assert status == 0
    first, second, caption, continuation, story = settings["rows"]
    drawn = {"kind": "image", "prompt": "a <b>red</b> fox", "seed": 5, "files": ["000-a-b-red-b-fox.png"]}
    assert first == drawn and second["files"] == ["001-a-b-c.png"]
    assert caption == {"kind": "caption", "image": picture, "seed": 7, "text": caption["text"].strip()}
    assert continuation == {"kind": "continuation", "prompt": "once", "seed": 8, "text": continuation["text"]}
    assert story.keys() == {"kind", "prompt", "seed", "document"} and (story["kind"], story["seed"]) == ("story", 9)
    assert settings["options"]["guidance_scale"] == "3.0"
    assert all(Image.open(path).size == (6, 4) for path in tmp_path.glob("*.png"))
    assert json.loads(capsys.readouterr().out.rpartition("see ")[0]) == settings["rows"]
    page = Elements()
    page.feed((tmp_path / "sheet.html").read_text())
    assert page.tags.count("article") == 5 and page.tags.count("b") == 0 and "a <b>red</b> fox" in page.text
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?://", (tmp_path / "sheet.html").read_text())


def test_every_option_reaches_the_pipeline(folder, tmp_path, monkeypatch):
    """None of them with its default, and every argument that is given beside them is one of the row's."""
    calls, call = [], TransfusionPipeline.__call__
    monkeypatch.setattr(
        TransfusionPipeline,
        "__call__",
        lambda self, *rows, **given: calls.append((rows, given)) or call(self, *rows, **given),
    )
    picture, mask = str(folder / "fruit.png"), str(folder / "mask.png")
    numbers = {
        "guidance_scale": random.uniform(1.5, 5),
        "guidance_rescale": random.uniform(0.1, 0.9),
        "seed": random.randrange(1, 2**60),
        "max_new_tokens": random.randrange(2, 6),
        "max_images": random.choice([1, 2]),
        "temperature": random.uniform(0.5, 2),
        "top_k": random.randrange(2, 200),
        "top_p": random.uniform(0.1, 0.9),
        "min_p": random.uniform(0.01, 0.2),
        "height": 8,
        "width": 2,
    }
    words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in numbers.items()]
    others = ["--guidance-interval", "0.1", "0.8", "--scheduler", "ddpm", "--stop", "x", "yz"]
    rows = ["--prompt", "red", "--edit", picture, "--mask", mask, "--image", picture, "--text", "once", "--story", "a"]
    assert sample(folder, tmp_path, *rows, *others, *(word for pair in words for word in pair))[0] == 0
    edited, masked = [Path(picture), Path(picture), None, None], [Path(mask), None, None, None]
    wanted = {"image": edited, "mask_image": masked, "output": ["image", "text", "text", "both"], "stop": ("x", "yz")}
    wanted |= {"num_inference_steps": 2, "guidance_interval": (0.1, 0.8), "scheduler": "ddpm", **numbers}
    assert calls == [((["red", None, "once", "a"],), wanted)]


def test_the_same_seed_gives_the_same_files(folder, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        sample(folder, tmp_path / name, "--prompt", "red", "--seed", seed)
    a, b, c = ((tmp_path / name / "000-red.png").read_bytes() for name in "abc")
    assert a == b != c


def test_what_an_earlier_call_left_stays_and_is_told_of(folder, tmp_path, capsys):
    out = tmp_path / "out"
    sample(folder, out, "--prompt", "red", "green", "green")
    assert "earlier" not in capsys.readouterr().err
    (out / "mine.png").write_text("no sample")
    before = (out / "000-red.png").read_bytes()
    _, settings = sample(folder, out, "--prompt", "red", "--seed", "7")
    said = f"{out} had images of an earlier call: 1 replaced, 2 left, which are not in the sheet: "
    assert capsys.readouterr().err == said + "001-green.png, 002-green.png\n"
    assert [row["files"] for row in settings["rows"]] == [["000-red.png"]]
    assert (out / "sheet.html").read_text().count("<article") == 1
    assert (out / "000-red.png").read_bytes() != before
    left = ["000-red.png", "001-green.png", "002-green.png", "mine.png"]
    assert sorted(path.name for path in out.glob("*.png")) == left


def test_edits_and_inpainting(folder, tmp_path):
    edit = ["--edit", str(folder / "fruit.png"), "--prompt", "make it blue", "make it red"]
    status, settings = sample(folder, tmp_path / "edit", *edit)
    given = [(row["kind"], row["prompt"], row["image"]) for row in settings["rows"]]
    assert status == 0 and given == [("edit", prompt, edit[1]) for prompt in ("make it blue", "make it red")]
    status, _ = sample(folder, tmp_path / "paint", *edit, "--mask", str(folder / "mask.png"))
    assert status == 0 and "inpainting" in (tmp_path / "paint" / "sheet.html").read_text()
    Image.new("L", (12, 8), 0).save(folder / "none.png")
    sample(folder, tmp_path / "kept", *edit[:3], "nothing", "--mask", str(folder / "none.png"))
    colors = Image.open(tmp_path / "kept" / "000-nothing.png").getcolors()
    assert [color for _, color in colors] == [(255, 165, 0)]  # orange


def test_height_and_width(folder, tmp_path):
    rows = ["--prompt", "red", "--edit", str(folder / "fruit.png"), "--image", str(folder / "fruit.png")]
    status, settings = sample(folder, tmp_path, *rows, "--height", "8", "--width", "2", "--max-new-tokens", "2")
    assert status == 0 and [row["kind"] for row in settings["rows"]] == ["edit", "caption"]
    assert Image.open(tmp_path / "000-red.png").size == (2, 8)


def test_equal_prompts_and_those_in_other_scripts_are_all_kept(folder, tmp_path):
    prompts = ["red", "red", "Красный лис", "赤い_キツネ!", "🦊"]
    _, settings = sample(folder, tmp_path, "--prompt", *prompts, "--text", "once", "once", "--max-new-tokens", "3")
    assert [row["prompt"] for row in settings["rows"]] == [*prompts, "once", "once"]
    files = [name for row in settings["rows"] for name in row.get("files", ())]
    assert files == ["000-red.png", "001-red.png", "002-красный-лис.png", "003-赤い-キツネ.png", "004.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == files


def test_a_folder_that_cannot_be_written_to_fails_before_any_work(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TransfusionPipeline, "from_pretrained", None)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "dangling"):
        assert cli.main(["sample", "--model", str(folder / "pipe"), "--prompt", "red", "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"transfusion sample: --out {out}: no folder that can be written to (")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to sample: give --prompt, --image, --text or --story"),
        (["--prompt", "red", "--run", "runs/x"], "give one of --run"),
        (["--text", "red", "--edit", "x.png"], "--edit needs --prompt"),
        (["--prompt", "red", "--mask", "x.png"], "--mask needs --edit"),
        (["--text", "red", "--max-new-tokens", "0"], "--max-new-tokens 0 leaves nothing to write; give at least 1"),
        (["--story", "red", "--max-images", "-1"], "--max-images -1: a story cannot have fewer than 0"),
        (["--prompt", ""], "prompt 0 is empty"),
        (["--prompt", "red " * 90], "longer than max_length=90"),
        (["--prompt", "red", "--width", "7"], "width=7 does not divide into patches of 2 pixels"),
        (["--prompt", "red", "--scheduler", "plms"], "scheduler 'plms' is unknown"),
        (["--prompt", "red", "--steps", "7"], "steps=7 does not divide"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--image", __file__], ": unreadable image"),
        (["--text", "red", "--top-p", "2"], "top_p=2.0 must be within"),
        (["--prompt", "red", "--guidance-interval", "0.9", "0.1"], "guidance interval=(0.9, 0.1)"),
    ],
)
def test_mistakes_end_with_one_line_and_write_nothing(folder, tmp_path, capsys, arguments, message):
    options = ["sample", "--model", str(folder / "pipe"), "--out", str(tmp_path / "out")]
    assert cli.main([*options, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_nan_weights_end_with_one_line_and_the_process_goes_on(folder, tmp_path, capsys):
    """Found while images are drawn, or text: nothing is left behind, and other weights are sampled from as ever."""
    kinds = (["--prompt", "red"], ["--text", "once", "--max-new-tokens", "2"])
    broken, options = (
        TransfusionPipeline.from_pretrained(folder / "pipe"),
        ["--steps", "2", "--out", str(tmp_path / "out")],
    )
    with torch.no_grad():
        broken.model.codec.output.weight[0, 0] = torch.nan
        broken.model.head.weight[3, 0] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    before = sorted(tmp_path.rglob("*"))
    for kind in kinds:
        assert cli.main(["sample", "--model", str(tmp_path / "broken"), *options, *kind]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("transfusion sample: ") and "look for NaN in the weights" in line
        assert sorted(tmp_path.rglob("*")) == before
    for number, kind in enumerate(kinds):
        assert sample(folder, tmp_path / str(number), *kind)[0] == 0


def test_names_that_are_no_unicode_are_kept(folder, tmp_path):
    picture = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    Image.new("RGB", (16, 16), "red").save(picture)
    out = tmp_path / "out"
    status, settings = sample(folder, out, "--image", str(picture), "--max-new-tokens", "2")
    (row,) = settings["rows"]
    assert status == 0 and row["image"] == str(picture) and (out / "sheet.html").is_file()


def test_what_was_there_outlives_a_full_disk(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.json", "old")

    def half(path, content):
        with open(path, "wb") as file:
            file.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "a.json", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "old")]


def test_a_folder_that_is_no_pipeline(tmp_path, capsys):
    assert cli.main(["sample", "--model", str(tmp_path), "--prompt", "x"]) == 2
    assert "is no saved pipeline" in capsys.readouterr().err


def test_a_sheet_shows_what_it_is_given(tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    cards = [Card("a & b", [picture], ["text <i>", picture, "more"], "story"), Card("", [], [picture])]
    write_sheet(tmp_path / "s.html", "two <samples>", cards, {"seed": "</pre>"})
    page = Elements()
    page.feed((tmp_path / "s.html").read_text())
    assert page.tags.count("img") == 3 and page.tags.count("article") == 2 and page.tags.count("pre") == 1
    for shown in ("a & b", "text <i>", "more", "two <samples>", '"seed": "</pre>"'):
        assert shown in page.text
