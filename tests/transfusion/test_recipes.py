"""The recipes that come with the package: each loads, is what its page says, and is what the demo trains on a GPU."""

import json
import re
from dataclasses import replace
from operator import eq
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from transfusion import Transfusion, cli, demo, recipes
from transfusion import config as configs
from transfusion.data import PixelAutoencoder, Tokenizer, to_tensor
from transfusion.data.emoji import EmojiSource
from transfusion.evaluation import sheets
from transfusion.generation import TransfusionPipeline
from transfusion.model import pretrained
from transfusion.run import Run
from transfusion.run_config import CONFIG, RunConfig
from transfusion.sequence import image_tokens

LARGEST = 16_000_000  # bytes: what fits beside the code


def read(name):
    return configs.load(RunConfig, recipes.find(name))


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_a_run(name):
    config = read(name)
    with torch.device("meta"):
        model = Transfusion(config.model)
    page = recipes.find(name).with_name("README.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    parameters, size = re.search(r"\| ([\d,]+) \| ([\d.]+) MB", row).groups()
    assert int(parameters.replace(",", "")) == model.num_parameters()
    assert float(size) == round(2 * model.num_parameters() / 1e6, 1)
    side = config.data.loader.image_size
    assert image_tokens((3, side, side), config.model.patch_size) + 64 < config.data.loader.row_length


def test_the_emoji_weights_fit_beside_the_code_and_draw(tmp_path):
    """As the page says: the folder in bfloat16 is written, measured, read again, and goes on in bfloat16."""
    config = read("emoji")
    torch.manual_seed(0)
    model, side = Transfusion(config.model), config.data.loader.image_size
    pipe = TransfusionPipeline(model, Tokenizer.train(["red apple"], 300), PixelAutoencoder(), (3, side, side), 1024)
    pipe.model.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert 2 * model.num_parameters() <= (tmp_path / "model.safetensors").stat().st_size <= LARGEST
    read_again = TransfusionPipeline.from_pretrained(tmp_path)
    assert {weight.dtype for weight in read_again.model.parameters()} == {torch.bfloat16}
    images = [p(prompt="red apple", num_inference_steps=2).images[0] for p in (pipe, read_again)]
    assert images[0].size == (64, 64) and images[0].tobytes() == images[1].tobytes()


@pytest.mark.parametrize("name", recipes.trained())
def test_what_comes_with_the_package_is_a_recipes_and_small(name):
    folder, config = recipes.trained()[name], read(name)
    model = Transfusion.from_pretrained(name)
    assert model.config == config.model and sum(file.stat().st_size for file in folder.iterdir()) <= LARGEST
    assert {weight.dtype for weight in pretrained.read_weights(folder).values()} == {torch.float16}
    assert all(weight.isfinite().all() for weight in model.parameters())
    card = (folder / "README.md").read_text()
    assert "CC BY-SA 4.0" in card and f"{model.num_parameters():,} parameters" in card


def test_emoji_32_draws_what_it_is_asked_for_and_names_what_it_is_shown(seed):
    """Each image is nearest, of all that it has learned, to the emoji of its caption; chance would be 1 in 252."""
    source = EmojiSource(32, "train", "animals-and-food")
    pipe = TransfusionPipeline.from_pretrained("emoji-32")
    learned = torch.stack([to_tensor(sample.image, 32) for sample in source])
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:8].tolist()
    captions = [source.captions[index] for index in chosen]
    drawn = pipe.images(captions, seed=seed)
    found = sheets.nearest(drawn, learned).tolist()
    assert sum(map(eq, found, chosen)) >= 6, [source.captions[index] for index in found]
    said = pipe.captions(learned[chosen])
    assert sum(map(eq, said, captions)) >= 6, said


def test_sample_draws_with_what_comes_with_the_package(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji-32").mkdir()  # a folder of that name, such as samples go to, is not what is meant
    arguments = ["--prompt", "red apple", "--steps", "2", "--out", str(tmp_path), "--device", "cpu"]
    assert cli.main(["sample", *arguments]) == 0
    assert capsys.readouterr().err == "neither --run nor --model: emoji-32, which comes with the package\n"
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["options"]["model"] == "emoji-32" and Image.open(tmp_path / "000-red-apple.png").size == (32, 32)


def test_the_demo_trains_a_recipe_and_shows_it(tmp_path, monkeypatch, capsys):
    """To the end, with a small model in the recipe's place: every file that it says to look at is there."""
    recipe = read("emoji-32")
    small = replace(recipe.model, dim=32, layers=1, heads=2)
    train = replace(recipe.train, steps=1, warmup_steps=1)
    configs.save(replace(recipe, model=small, train=train), tmp_path / "small.toml")
    monkeypatch.setattr(demo.recipes, "find", lambda name: tmp_path / "small.toml")
    assert demo.main(["--recipe", "emoji-32", "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out.rpartition("look at\n")[2].split()
    assert {"samples.png", "metrics.json"} <= {Path(file).name for file in shown}
    assert all(Path(file).stat().st_size > 0 for file in shown)


def test_the_demo_trains_one_recipe_on_a_gpu_and_another_on_a_cpu():
    assert demo.config("cuda") == read("emoji") != demo.config("cpu") == read("demo")


def test_a_file_goes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes.find("emoji").parent.name == "recipes"
    (tmp_path / "emoji").write_text("seed = 3")
    assert read("emoji").seed == 3
    with pytest.raises(FileNotFoundError, match=r"nothing is no file and no recipe; the recipes are .*emoji"):
        recipes.find("nothing")


def test_train_takes_a_recipe_by_name(tmp_path, capsys):
    """Its own fields, the options over them; and what it leaves is a pipeline, which draws as the run does."""
    options = tiny.run_options(
        data__images=tiny.data_folder(tmp_path / "data"),
        data__texts="none",
        data__loader__rows=2,
        data__loader__row_length=64,
        data__loader__image_size=16,
        train__steps=2,
        device="cpu",
    )
    out = tmp_path / "run"
    assert cli.main(["train", "--config", "emoji", "--out", str(out), *options]) == 0, capsys.readouterr().err
    config, recipe = configs.load(RunConfig, out / CONFIG), read("emoji")
    assert (config.train.learning_rate, config.model.patch_size) == (recipe.train.learning_rate, 4)
    assert (config.model.dim, config.train.steps) == (32, 2)

    run = Run.open(out)
    saved = TransfusionPipeline.from_pretrained(out / "model")
    assert (saved.latent_shape, saved.max_length) == (run.latent_shape, 64)
    assert saved.tokenizer.encode("red square").tolist() == run.tokenizer.encode("red square").tolist()
    from_run, from_model = run.pipeline(run.model()).images(["red"], steps=2), saved.images(["red"], steps=2)
    assert torch.equal(from_run, from_model)
    for source in (["--run", str(out)], ["--model", str(out / "model")]):
        samples = tmp_path / source[0].strip("-")
        arguments = ["--prompt", "red", "--steps", "2", "--out", str(samples), "--device", "cpu"]
        assert cli.main(["sample", *source, *arguments]) == 0
    first, second = ((tmp_path / name / "000-red.png").read_bytes() for name in ("run", "model"))
    assert first == second
