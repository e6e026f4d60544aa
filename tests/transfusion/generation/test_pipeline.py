"""Strings and pictures in and out."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import rigged
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler
from PIL import Image as Pil

from transfusion.config import UNetConfig
from transfusion.data import DiffusersAutoencoder, PixelAutoencoder, Tokenizer
from transfusion.generation import TransfusionPipeline
from transfusion.generation.inputs import StopStrings, rows_of
from transfusion.generation.media import to_unknown
from transfusion.generation.score import score
from transfusion.model import pretrained
from transfusion.sequence import Image, Text

PROMPTS = ["red green", "green"]
HEIGHT, WIDTH = rigged.SHAPE[1:]
PICTURE = Pil.new("RGB", (17, 13), "orange")
FEW = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def pipeline():
    model = rigged.random_model(seed=3, vocab_size=300)
    return TransfusionPipeline(model, Tokenizer.train(["red green"], 300), PixelAutoencoder(), rigged.SHAPE, 60)


def images(done):
    return [image.tobytes() for image in done.images]


# ---------------------------------------------------------------- a call


def test_text_to_image(pipeline):
    done = pipeline(PROMPTS, seed=7, **FEW)
    assert [(image.mode, image.size) for image in done.images] == [("RGB", (WIDTH, HEIGHT))] * 2
    assert done.text == ["", ""] and done.documents == [[0], [1]] and done.finish_reasons == ["done"] * 2
    assert images(pipeline(PROMPTS[1], seed=8, **FEW)) == images(done)[1:]
    assert images(pipeline(PROMPTS[::-1], seed=[8, 7], **FEW)) == images(done)[::-1]
    assert images(pipeline(PROMPTS, seed=8, **FEW)) != images(done)


def test_whole_numbers_of_any_kind_are_seeds_and_steps(pipeline):
    drawn = images(pipeline(PROMPTS, seed=3, num_inference_steps=2))
    for seed in (np.int64(3), torch.tensor(3), [3, 4], (np.uint8(3), 4), np.array([3, 4]), torch.tensor([3, 4])):
        assert images(pipeline(PROMPTS, seed=seed, num_inference_steps=np.int64(2))) == drawn, seed
    assert images(pipeline(PROMPTS, seed=-(2**63), num_inference_steps=2)) != drawn


def test_every_kind_of_row_in_one_call(pipeline):
    rows = {
        "prompt": ["red", None, "green", "red", None, "red"],
        "image": [None, PICTURE, None, PICTURE, None, PICTURE],
        "mask_image": [None, None, None, None, None, Pil.new("L", PICTURE.size, 255)],
        "output": ["image", "text", "text", "image", "image", None],
    }
    done = pipeline(**rows, max_new_tokens=5, **FEW)
    assert [[type(part) for part in document] for document in done.documents] == [
        [int], [str], [str], [int], [int], [int],
    ]  # fmt: skip
    assert len(done.images) == 4 and [len(each) for each in done.logprobs] == [
        0,
        *map(len, done.logprobs[1:3]),
        0,
        0,
        0,
    ]
    for index in range(6):
        single = {name: values[index] for name, values in rows.items()}
        alone = pipeline(**single, seed=index, max_new_tokens=5, **FEW)
        assert alone.text == [done.text[index]]
        drawn = [number for number in done.documents[index] if isinstance(number, int)]
        assert images(alone) == [images(done)[number] for number in drawn]
    story = pipeline("red", output="both", max_new_tokens=8, max_images=2, temperature=2.0, seed=1, **FEW)
    assert "".join(part for part in story.documents[0] if isinstance(part, str)) == story.text[0]


def test_output_types(pipeline):
    latents = pipeline(PROMPTS, output_type="latent", **FEW).images
    tensors = pipeline(PROMPTS, output_type="pt", **FEW).images
    assert latents.shape == (2, *rigged.SHAPE) and tensors.shape == (2, 3, HEIGHT, WIDTH)
    assert torch.equal(tensors, (latents.clamp(-1, 1) + 1) / 2)
    as_pil = pipeline(PROMPTS, **FEW).images
    levels = torch.from_numpy(np.array(as_pil[1])).permute(2, 0, 1) / 255
    assert (levels - tensors[1]).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(pipeline.images(PROMPTS, steps=4), latents.clamp(-1, 1))
    assert pipeline("red", output="text", max_new_tokens=1, output_type="latent").images.shape == (0, *rigged.SHAPE)
    assert pipeline("red", output="text", max_new_tokens=1).images == []


def test_generators_stand_for_seeds(pipeline):
    def draw(generator):
        return images(pipeline(PROMPTS, generator=generator, **FEW))

    first = draw(torch.Generator().manual_seed(1))
    assert first == draw(torch.Generator().manual_seed(1)) != draw(torch.Generator().manual_seed(2))
    own = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    assert draw(own)[1] == images(pipeline(PROMPTS[1], generator=torch.Generator().manual_seed(6), **FEW))[0]


def test_schedulers_by_name_and_as_objects(pipeline):
    options = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    by_object = images(pipeline(PROMPTS, scheduler=DDIMScheduler(clip_sample=True, **options), **FEW))
    assert by_object == images(pipeline(PROMPTS, scheduler="ddim", **FEW)) == images(pipeline(PROMPTS, **FEW))
    assert by_object != images(pipeline(PROMPTS, scheduler="dpmsolver", **FEW))
    assert by_object != images(pipeline(PROMPTS, scheduler=EulerDiscreteScheduler(**options), **FEW))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduler": "euler"}, "'euler' cannot sample 'v_prediction'"),
        ({"num_inference_steps": 30}, "steps=30 does not divide"),
        ({"prompt": "red " * 60}, "longer than max_length=60"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"stop": ""}, "a stop string is empty"),
        ({"image": "nowhere.png"}, "nowhere.png"),
    ],
)
def test_a_call_that_is_refused_draws_nothing_from_the_users_generator(pipeline, change, message):
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pipeline(**({"prompt": PROMPTS[0], "generator": generator} | change))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(("name", "steps"), [("fast", 50), ("paper", 250), ("dpmsolver", 20)])
def test_each_scheduler_has_its_usual_number_of_steps(pipeline, name, steps):
    seen = []
    pipeline("red", scheduler=name, callback_on_step_end=lambda pipe, step, t, kwargs: seen.append(step))
    assert seen == list(range(steps))


def test_the_callback_is_that_of_diffusers(pipeline):
    seen = []

    def steer(pipe, step, timestep, kwargs):
        seen.append((pipe, step, int(timestep), list(kwargs)))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 3 else None

    done = pipeline(PROMPTS, callback_on_step_end=steer, output_type="latent", **FEW)
    assert seen == [(pipeline, step, 999 - 250 * step, ["latents"]) for step in range(4)]
    assert not done.images.any()


def test_progress(pipeline, capsys):
    pipeline("red", progress=True, **FEW)
    assert "4/4" in capsys.readouterr().err
    pipeline("red", **FEW)  # no terminal
    assert capsys.readouterr().err == ""


def test_guidance_reaches_the_images(pipeline):
    plain = images(pipeline("red", guidance_scale=1.0, **FEW))
    assert plain == images(pipeline("red", guidance_scale=5.0, guidance_interval=(0.0, 0.01), **FEW))
    guided = images(pipeline("red", guidance_scale=5.0, **FEW))
    assert plain != guided != images(pipeline("red", guidance_scale=5.0, guidance_rescale=0.9, **FEW))


def test_inpainting_keeps_the_rest_of_the_picture(pipeline):
    shown = torch.rand(3, HEIGHT, WIDTH)
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[:2] = 1
    done = pipeline("red", image=shown, mask_image=mask, output_type="pt", **FEW).images[0]
    torch.testing.assert_close(done[:, 2:], shown[:, 2:])
    assert not torch.allclose(done[:, :2], shown[:, :2])


@pytest.mark.parametrize("codec", ["linear", "unet"])
def test_height_and_width_are_of_every_image(codec):
    """As if it were the size of a model's own; either stands alone, and what is given is cropped to it."""
    unet = UNetConfig(width=8, deep_width=16, blocks=1, head_dim=8)
    model, tokenizer = (
        rigged.random_model(seed=3, vocab_size=300, codec=codec, unet=unet),
        Tokenizer.train(["red"], 300),
    )
    usual, own = (
        TransfusionPipeline(model, tokenizer, PixelAutoencoder(), shape, 60) for shape in (rigged.SHAPE, (3, 10, 4))
    )
    mask = Pil.new("L", PICTURE.size, 255)
    mask.paste(0, (8, 0, 17, 13))
    rows = {"prompt": ["red", None, "red", "red"], "image": [None, PICTURE, PICTURE, PICTURE]}
    rows |= {"mask_image": [None, None, None, mask], "max_new_tokens": 4} | FEW
    wanted, found = own(**rows), usual(**rows, height=np.int64(10), width=4)
    assert images(found) == images(wanted) and found.text == wanted.text
    assert [image.size for image in found.images] == [(4, 10)] * 3
    assert torch.equal(usual.images(["red"], steps=2, height=10, width=4), own.images(["red"], steps=2))
    assert usual.images(["red"], steps=2, width=2).shape == (1, 3, HEIGHT, 2)
    assert usual("red", output="text", max_new_tokens=1, height=2, output_type="pt").images.shape == (0, 3, 2, WIDTH)


# ---------------------------------------------------------------- text


def test_stop_strings_end_a_text_before_them(pipeline, monkeypatch):
    word = pipeline.tokenizer.encode("abcdefghij").tolist()
    successor = dict(itertools.pairwise(word))
    with monkeypatch.context() as patch:
        rigged.chain(pipeline.model, patch, successor)
        patch.setattr(rigged, "VOCABULARY", 300)
        done = pipeline(["a", "c"], output="text", stop=["fg", "x"])
        assert done.text == ["bcde", "de"] and done.finish_reasons == ["stop", "stop"]
        assert pipeline("a", output="text", stop="j").text == ["bcdefghi"]
        assert pipeline("a", output="text").text == ["bcdefghij"]


def test_text_is_told_as_it_comes_without_half_characters(pipeline, monkeypatch):
    told = {0: [], 1: []}
    with monkeypatch.context() as patch:
        rigged.chain(pipeline.model, patch, dict(itertools.pairwise(pipeline.tokenizer.encode("xqné").tolist())))
        patch.setattr(rigged, "VOCABULARY", 300)
        done = pipeline(["x", "q"], output="text", callback_on_text=lambda row, text: told[row].append(text))
        cut = []
        pipeline("x", output="text", stop="n", callback_on_text=lambda _, text: cut.append(text))
    # é is two tokens; EOS says nothing
    assert told == {0: ["q", "qn", "qn", "qné", "qné"], 1: ["n", "n", "né", "né"]}
    assert done.text == ["qné", "né"] and cut == ["q", "q"]


def test_a_stop_string_may_lie_across_tokens_and_letters(pipeline):
    stops = StopStrings(pipeline.tokenizer, ("né", "zz"))
    first, *others = pipeline.tokenizer.encode("né").tolist()
    assert others and stops.reached([first, *[pipeline.tokenizer.special.pad] * 9, *others])  # which says nothing
    ids = pipeline.tokenizer.encode("xx né y").tolist()
    assert [stops.reached(ids[:count]) for count in range(1, len(ids) + 1)].index(True) == len(ids) - 3
    assert stops.cut("a zz né") == "a " and stops.cut("nothing") == "nothing"


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}], ids=str)
def test_every_limit_of_sampling_reaches_the_text(pipeline, limit):
    """Each as tight as it gets leaves the likeliest token alone, whatever the temperature."""
    options = {"prompt": ["red", "green"], "output": "text", "max_new_tokens": 20}
    greedy, free = pipeline(**options).text, pipeline(**options, temperature=5.0).text
    assert free != greedy == pipeline(**options, temperature=5.0, **limit).text


def test_captions_and_continuations_are_one_text_each(pipeline):
    captions = pipeline.captions(torch.rand(3, *rigged.SHAPE) * 2 - 1, max_new_tokens=4)
    assert len(captions) == 3 and all(isinstance(caption, str) for caption in captions)
    assert pipeline.captions([PICTURE, PICTURE], max_new_tokens=4) == [
        text.strip() for text in pipeline(image=[PICTURE] * 2, max_new_tokens=4).text
    ]
    texts = pipeline.continuations(["red", "green"], max_new_tokens=4, temperature=1.0, seed=2)
    assert texts == pipeline.continuations(["red", "green"], max_new_tokens=4, temperature=1.0, seed=2)


def test_score_is_the_log_probability_that_generation_reports(pipeline):
    done = pipeline(image=PICTURE, max_new_tokens=1, temperature=1.0, seed=5)
    with_end = pipeline.score([PICTURE, PICTURE], ["red green", "red"])
    assert with_end.shape == (2,) and (with_end < 0).all() and done.logprobs[0] < 0
    again = pipeline.score([PICTURE], ["red"])
    torch.testing.assert_close(again, with_end[1:])
    with pytest.raises(ValueError, match="1 images and 2 texts"):
        pipeline.score([PICTURE], ["a", "b"])
    with pytest.raises(ValueError, match="images is an empty list: give at least one image and its text"):
        pipeline.score([], [])


def test_score_counts_the_end(pipeline):
    """log p(text | image) + log p(EOS | image, text)."""
    shown, special = torch.rand(3, HEIGHT, WIDTH), pipeline.tokenizer.special
    context = (Text(torch.tensor([special.bos])), Image(2 * shown - 1))
    target = torch.cat([pipeline.tokenizer.encode("red green"), torch.tensor([special.eos])])
    (logprobs,) = score(pipeline.model, [context], [target])
    assert torch.equal(pipeline.score([shown], ["red green"]), logprobs.sum()[None])


def test_nan_weights_are_named_and_mended_ones_work(pipeline):
    """The same pipeline, before and after, gives the same image and text."""
    head, output = pipeline.model.head.weight, pipeline.model.codec.output.weight
    kinds = ({"prompt": "red", **FEW}, {"image": PICTURE, "max_new_tokens": 3})
    before = [pipeline(**kind) for kind in kinds]
    for weight, kind in ((output, kinds[0]), (head, kinds[1])):
        good = weight.detach().clone()
        with torch.no_grad():
            weight[5, 0] = torch.nan
            with pytest.raises(FloatingPointError, match="NaN in the weights"):
                pipeline(**kind)
            weight.copy_(good)
    after = [pipeline(**kind) for kind in kinds]
    assert images(after[0]) == images(before[0]) and after[1].text == before[1].text


# ---------------------------------------------------------------- the folder


def test_a_saved_pipeline_is_the_same_one(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "p")
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        "config.toml", "model.safetensors", "pipeline.toml", "tokenizer.json",
    ]  # fmt: skip
    again = TransfusionPipeline.from_pretrained(tmp_path / "p")
    assert images(again(PROMPTS, **FEW)) == images(pipeline(PROMPTS, **FEW))
    assert again.latent_shape == rigged.SHAPE and again.max_length == 60
    assert again(image=PICTURE).text == pipeline(image=PICTURE).text


def test_a_pipeline_comes_from_the_hub_and_in_another_type(pipeline, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path / "me" / "mine")
    hub = SimpleNamespace(snapshot_download=lambda name, allow_patterns: str(tmp_path / name))
    monkeypatch.setattr(pretrained, "_hub", lambda purpose: hub)
    assert images(TransfusionPipeline.from_pretrained("me/mine")(PROMPTS, **FEW)) == images(pipeline(PROMPTS, **FEW))
    double = TransfusionPipeline.from_pretrained("me/mine", dtype=torch.float64).model
    assert {weight.dtype for weight in double.parameters()} == {torch.float64} and not double.training


def test_a_vae_is_saved_with_the_pipeline(tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(latent_channels=3, block_out_channels=[8, 8], norm_num_groups=4, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    model, tokenizer = rigged.random_model(seed=3, vocab_size=300), Tokenizer.train(["red green"], 300)
    pipeline = TransfusionPipeline(model, tokenizer, DiffusersAutoencoder(tmp_path / "vae"), rigged.SHAPE)
    pipeline.save_pretrained(tmp_path / "p")
    again = TransfusionPipeline.from_pretrained(tmp_path / "p")
    assert again.images(["red"], steps=2, height=4, width=8).shape == (1, 3, 4, 8)
    with pytest.raises(ValueError, match=r"width=6 .* 4 pixels \(patch_size 2 x .* downscale 2\); use e\.g\. 8"):
        again.images(["red"], steps=2, width=6)
    done = again("red", **FEW)
    assert images(done) == images(pipeline("red", **FEW)) and done.images[0].size == (2 * WIDTH, 2 * HEIGHT)
    assert again(image=PICTURE, max_new_tokens=3).text == pipeline(image=PICTURE, max_new_tokens=3).text
    assert again.max_length is None
    mask = Pil.new("L", (2 * WIDTH, 2 * HEIGHT), 0)
    mask.putpixel((0, 0), 255)
    unknown = to_unknown(mask, mask, (2 * HEIGHT, 2 * WIDTH), (HEIGHT, WIDTH))
    assert unknown.shape == (1, HEIGHT, WIDTH) and unknown[0, 0, 0] and unknown.sum() == 1


def test_what_is_no_pipeline_is_refused(pipeline, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no saved pipeline: it has no pipeline\.toml$"):
        TransfusionPipeline.from_pretrained(tmp_path)
    pipeline.model.save_pretrained(tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match=r"it is a model alone, which Transfusion\.from_pretrained reads"):
        TransfusionPipeline.from_pretrained(tmp_path / "alone")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        with pytest.raises(
            FileNotFoundError, match=r"`transfusion sample --run .*run` takes the run's last checkpoint"
        ):
            TransfusionPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "pipeline.toml").write_text('latent_shape = [3, 4, 6]\nautoencoder = "other"\n')
    with pytest.raises(ValueError, match=r"pipeline\.toml: autoencoder='other' must be"):
        TransfusionPipeline.from_pretrained(tmp_path)
    (tmp_path / "pipeline.toml").write_text("latent_shape = [3, 4, 6]\ncolour = 1\n")
    with pytest.raises(ValueError, match=r"pipeline\.toml.*unknown key 'colour'"):
        TransfusionPipeline.from_pretrained(tmp_path)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "prompt 0 is empty"),
        ({"prompt": ["red", " "]}, "prompt 1 is empty"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": None}, "row 0 has neither prompt nor image"),
        ({"prompt": [7]}, "prompt 0 must be a string or None, got int"),
        ({"prompt": ["red"] * 2, "image": [PICTURE]}, "lists of different lengths"),
        ({"prompt": "red " * 60}, r"context 0 has \d+ tokens; .* longer than max_length=60"),
        ({"output": "picture"}, "output='picture' of row 0 is unknown"),
        ({"output_type": "jpeg"}, "output_type='jpeg' is unknown"),
        ({"mask_image": PICTURE}, "mask_image of row 0 .* needs image="),
        ({"image": torch.rand(3, 5, 6)}, r"must be \(3, 4, 6\) .* got \(3, 5, 6\)"),
        ({"image": torch.rand(3, 4, 6) + 1}, r"must lie in \[0, 1\]"),
        ({"image": torch.full((3, 4, 6), torch.nan)}, r"must lie in \[0, 1\]"),
        ({"image": 7}, "must be a PIL image, a path or a tensor"),
        ({"image": PICTURE, "mask_image": torch.ones(4, 5)}, r"mask tensor must be \(4, 6\) .* got \(4, 5\)"),
        ({"image": PICTURE, "mask_image": Pil.new("L", (13, 17))}, "mask is 13×17 pixels and its image 17×13"),
        ({"image": __file__}, ": unreadable image"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"image": torch.rand(3, 4, 6), "width": 8}, r"must be \(3, 4, 8\) .* got \(3, 4, 6\)"),
        ({"height": 7}, r"height=7 does not divide .* use e\.g\. 8"),
        ({"width": 0}, r"width=0 does not divide .* use e\.g\. 2"),
        ({"width": 2.0}, r"width=2\.0 must be a whole number, got float"),
        ({"height": 40}, "context 0 has .* with 62 more .* longer than max_length=60"),
        ({"scheduler": "plms"}, "scheduler 'plms' is unknown"),
        ({"scheduler": 7}, "7 is no scheduler"),
        ({"scheduler": DDIMScheduler()}, "beta_schedule='linear'|prediction_type='epsilon'"),
        ({"num_inference_steps": 0}, "steps=0 must be within"),
        ({"num_inference_steps": 2.5}, r"steps=2\.5 must be a whole number, got float"),
        ({"num_inference_steps": 30}, "steps=30 does not divide"),
        ({"guidance_scale": -1.0}, "guidance scale=-1.0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"seed": [1, 2]}, "2 seeds for 1 rows"),
        ({"seed": "3"}, "seed='3' must be a whole number, got str"),
        ({"seed": 0.5}, r"seed=0\.5 must be a whole number"),
        ({"seed": [None]}, "seed=None must be a whole number"),
        ({"seed": 2**70}, f"seed={2**70} must be of 64 bits"),
        ({"seed": 2**63 - 1, "prompt": ["red", "red"]}, f"seed={2**63} must be of 64 bits"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 1 rows"),
        ({"stop": ""}, "a stop string is empty"),
        ({"output": "text", "max_new_tokens": 0}, "max_new_tokens=0 asks for nothing where output='text'; give at"),
        ({"output": "both", "max_new_tokens": 0}, "max_new_tokens=0 asks for nothing where output='both'; give at"),
        ({"output": "both", "max_new_tokens": 2.5}, r"max_new_tokens=2\.5 must be a whole number, got float"),
        ({"callback_on_step_end": 5}, "callback_on_step_end=5 must be a function or None, got int"),
        ({"callback_on_text": "x"}, "callback_on_text='x' must be a function or None, got str"),
    ],
)
def test_bad_input_is_named_and_the_pipeline_goes_on(pipeline, change, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        pipeline(**({"prompt": "red"} | FEW | change))
    assert len(pipeline("red", num_inference_steps=1).images) == 1


def test_lists_and_single_values_go_together():
    rows = rows_of(["a", "b"], PICTURE, None, "image")
    assert [(row.prompt, row.image, row.output) for row in rows] == [("a", PICTURE, "image"), ("b", PICTURE, "image")]
    assert rows_of(None, [PICTURE], None, None)[0].output == "text"
