"""What a user gives that does not fit is named; what is another kind of the right thing is taken as that thing."""

import copy
import pickle
import threading
from collections import UserList

import numpy as np
import pytest
import rigged
import torch
from PIL import Image as Pil

from transfusion.data import PixelAutoencoder, Tokenizer
from transfusion.data.packing import seeded
from transfusion.diffusion.sampler import Known, make_scheduler
from transfusion.generation import Guidance, TextSampling, TransfusionPipeline, generate
from transfusion.generation.media import to_pixels, to_unknown
from transfusion.generation.requests import Request
from transfusion.generation.rows import inference
from transfusion.generation.score import score
from transfusion.generation.text import token_probabilities
from transfusion.sequence import Text

CONTEXT = (Text(torch.tensor([1, 7])),)
SHAPE = rigged.SHAPE


@pytest.fixture(scope="module")
def pipeline():
    model = rigged.random_model(seed=3, vocab_size=300)
    return TransfusionPipeline(model, Tokenizer.train(["red green"], 300), PixelAutoencoder(), SHAPE, 60)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copied_tokenizer_takes_text_for_text(pipeline, copied):
    for text in ("a <eos> b", "<boi>", "<bos><pad>"):
        assert torch.equal(copied(pipeline.tokenizer).encode(text), pipeline.tokenizer.encode(text))
        assert pipeline.tokenizer.encode(text).min() > 4


def test_seeds_are_numbers_whatever_their_kind():
    wanted = torch.rand(3, generator=seeded(3, "image", 0))
    for seed in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert torch.equal(torch.rand(3, generator=seeded(seed, "image", 0)), wanted)
        assert Request(CONTEXT, 1, seed=seed).seed == 3 and type(Request(CONTEXT, 1, seed=seed).seed) is int
    for seed in (None, 3.0):
        with pytest.raises(TypeError):
            seeded(seed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request(CONTEXT, 2.5), r"max_new_tokens=2\.5 must be a whole number, got float"),
        (lambda: Request(CONTEXT, 1, 1.5), r"max_images=1\.5 must be a whole number, got float"),
        (lambda: Request(CONTEXT, "8"), "max_new_tokens='8' must be a whole number, got str"),
        (lambda: Request(CONTEXT, 1, seed="x"), "seed='x' must be a whole number, got str"),
        (lambda: TextSampling(None), "temperature=None must be a number, got NoneType"),
        (lambda: TextSampling(1.0, top_k=2.0), r"top_k=2\.0 must be a whole number, got float"),
        (lambda: TextSampling(1.0, top_p="x"), "top_p='x' must be a number, got str"),
        (lambda: TextSampling(1.0, min_p=[1]), r"min_p=\[1\] must be a number, got list"),
        (lambda: TextSampling(stop_tokens=5), r"stop_tokens=5 must be token ids, such as \(2,\), got int"),
        (lambda: TextSampling(stop_tokens=None), "stop_tokens=None must be token ids"),
        (lambda: TextSampling(stop_tokens=("a",)), "a stop token='a' must be a whole number, got str"),
        (lambda: Guidance("3"), "guidance scale='3' must be a number, got str"),
        (lambda: Guidance(3.0, 0.5), r"guidance interval=0\.5 must be two times"),
        (lambda: Guidance(3.0, (0.0, "x")), "a time of the guidance interval='x' must be a number, got str"),
        (lambda: Guidance(3.0, {0, 1}), r"guidance interval=\{0, 1\} must be two times"),
        (lambda: Guidance(3.0, rescale=None), "guidance rescale=None must be a number, got NoneType"),
    ],
)
def test_no_numbers_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("make", [Guidance, TextSampling])
def test_numbers_beyond_all_floats_are_named(make):
    with pytest.raises(ValueError, match="is a whole number beyond all floats"):
        make(10**400)


def test_stop_is_given_lists_of_its_own(pipeline):
    seen = []
    options = {"latent_shape": SHAPE, "stop": seen.append}
    (done,) = generate(pipeline.model, [Request(CONTEXT, 4)], **options)
    assert [len(each) for each in seen] == list(range(1, len(seen) + 1)) and len(seen) == len(done.token_ids)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"requests": Request(CONTEXT, 1)}, TypeError, r"must be a list of Request, got Request; give \[request\]"),
        ({"requests": [CONTEXT]}, TypeError, "request 0 must be a Request, got tuple"),
        (
            {"requests": [Request(CONTEXT[0], 1)]},
            TypeError,
            r"context 0 must be a tuple .* got Text; give \(segment,\)",
        ),
        (
            {"requests": [Request((torch.tensor([1]),), 1)]},
            TypeError,
            "context 0 holds a Tensor; its segments are Text",
        ),
        ({"requests": [Request(None, 1)]}, TypeError, "context 0 must be a tuple of Text and Image .* got NoneType"),
        ({"latent_shape": (3, 4.0, 6.0)}, TypeError, r"a side of latent_shape=4\.0 must be a whole number, got float"),
        ({"latent_shape": 4}, TypeError, r"latent_shape=4 must be \(C, h, w\), got int"),
        ({"guidance": 3.0}, TypeError, r"guidance=3\.0 must be a Guidance, got float"),
        ({"sampling": None}, TypeError, "sampling=None must be a TextSampling, got NoneType"),
        ({"stop": "x"}, TypeError, "stop='x' must be a function or None, got str"),
        ({"max_length": "x"}, TypeError, "max_length='x' must be a whole number, got str"),
        ({"on_token": 5}, TypeError, "on_token=5 must be a function or None, got int"),
        ({"on_step_end": 5}, TypeError, "on_step_end=5 must be a function or None, got int"),
        (
            {"on_step_end": lambda *_: None},
            ValueError,
            r"on_step_end gave latents NoneType; .* \(1, 3, 4, 6\) floating",
        ),
        ({"on_step_end": lambda *_: torch.zeros(2)}, ValueError, r"on_step_end gave latents \(2,\) torch\.float32"),
        ({"on_step_end": lambda s, t, x: x.long()}, ValueError, r"gave latents \(1, 3, 4, 6\) torch\.int64"),
        ({"sampling": TextSampling(stop_tokens=[300])}, ValueError, r"stop_tokens=\(300,\) .* vocabulary of 300"),
    ],
)
def test_arguments_of_generate_are_named(pipeline, change, error, message):
    model = pipeline.model
    options = {"latent_shape": SHAPE, "scheduler": make_scheduler(model.config.schedule), "steps": 2}
    given = {"requests": [Request(CONTEXT, 0, 1, image_next=True)]} | options | change
    with pytest.raises(error, match=message):
        generate(model, **given)


def test_stop_tokens_are_ids_of_any_kind():
    assert TextSampling(stop_tokens=torch.tensor([2, 7])).stop_tokens == (2, 7)
    with pytest.raises(ValueError, match=r"stop_tokens=\(2, -1\) must be token ids, from 0 on"):
        TextSampling(stop_tokens=[2, -1])


def test_a_part_that_is_given_has_numbers(pipeline):
    """Where it is painted over it need have none."""
    model, unknown = pipeline.model, torch.zeros(1, *SHAPE[1:], dtype=torch.bool)
    unknown[:, :2] = True
    options = {"latent_shape": SHAPE, "scheduler": make_scheduler(model.config.schedule), "steps": 2}
    for row, fits in ((0, True), (3, False)):
        latents = torch.zeros(SHAPE)
        latents[:, row] = torch.nan
        request = Request(CONTEXT, 0, 1, image_next=True, known=Known(latents, unknown))
        if fits:
            assert generate(model, [request], **options)[0].images[0].isfinite().all()
            continue
        with pytest.raises(ValueError, match="known of request 0 has latents with NaN or infinities"):
            generate(model, [request], **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stop": None}, TypeError, "stop=None must be a string or a list of strings"),
        ({"stop": ["a", 1]}, TypeError, r"stop=\['a', 1\] must be a string or a list of strings"),
        ({"generator": 3}, TypeError, r"generator=3 must be a torch\.Generator"),
        ({"generator": [None]}, TypeError, r"generator=None must be a torch\.Generator"),
        ({"prompt": "\ud800"}, ValueError, "is no valid Unicode"),
        ({"callback_on_step_end": lambda *_: torch.zeros(1)}, TypeError, "must give a dict or None, got Tensor"),
        ({"callback_on_step_end": lambda *_: {"latents": None}}, ValueError, "gave latents NoneType"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(2)}}, ValueError, r"gave latents \(2,\)"),
    ],
)
def test_arguments_of_a_call_are_named(pipeline, change, error, message):
    with pytest.raises(error, match=message):
        pipeline(**{"prompt": "red", "num_inference_steps": 2} | change)


def test_any_sequence_is_a_list_of_rows_and_any_iterable_one_of_requests(pipeline):
    prompts = UserList(["red", "green"])
    assert len(pipeline(prompts, num_inference_steps=1).images) == 2
    requests = [Request(CONTEXT, 2), Request(CONTEXT, 3)]
    found = generate(pipeline.model, (each for each in requests), latent_shape=SHAPE)
    assert [len(each.token_ids) for each in found] == [2, 3]


@pytest.mark.parametrize(
    ("token_ids", "error"),
    [([1, 5], TypeError), (torch.tensor([[1, 5]]), ValueError), (torch.tensor([1.0, 5.7]), TypeError)],
)
def test_token_ids_are_a_tensor_of_whole_numbers(pipeline, token_ids, error):
    with pytest.raises(error, match="the text of context 0"):
        generate(pipeline.model, [Request((Text(token_ids),), 1)], latent_shape=SHAPE)
    with pytest.raises(error, match="target 0"):
        score(pipeline.model, [CONTEXT], [token_ids])
    with pytest.raises(TypeError, match="context 0 must be a tuple of Text and Image segments, got Text"):
        score(pipeline.model, [CONTEXT[0]], [torch.tensor([5])])


def test_the_smallest_temperature_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    shares = token_probabilities(logits, TextSampling(1e-310))
    assert shares.tolist() == [[0.0, 1.0, 0.0]]


def test_boi_as_a_stop_token_stops():
    model = rigged.random_model(seed=0)
    boi = model.config.special.boi
    with torch.no_grad():  # always BOI
        model.head.weight.zero_()
        model.head.weight[boi] = 10.0
        model.transformer.norm.weight.abs_()
    scheduler = make_scheduler(model.config.schedule)
    for images in (0, 1):
        (found,) = generate(
            model,
            [Request(CONTEXT, 5, images)],
            latent_shape=SHAPE,
            scheduler=scheduler,
            steps=1,
            sampling=TextSampling(stop_tokens=(boi, *range(5, model.config.vocab_size))),
        )
        assert found.finish_reason == "stop" and len(found.token_ids) == 1 and not found.images


def test_the_mode_outlives_calls_that_overlap():
    model = rigged.random_model(seed=0).train()
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with inference(model):
            inside.set()
            leave.wait(30)
            seen.append(model.training)

    with inference(model):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(30)
    assert not model.training, "another call is under way"
    leave.set()
    thread.join()
    assert seen == [False] and all(module.training for module in model.modules())


def test_a_small_mark_in_a_large_mask_is_painted():
    picture, mask = Pil.new("RGB", (320, 240)), Pil.new("L", (320, 240), 0)
    mask.paste(255, (161, 0, 162, 240))
    unknown = to_unknown(mask, picture, (32, 32), (16, 16))
    assert unknown.nonzero()[:, 2].unique().tolist() == [8]
    assert unknown[0, :, 8].all()
    mask.paste(255, (0, 0, 39, 240))  # left of what a square cut leaves
    assert torch.equal(to_unknown(mask, picture, (32, 32), (16, 16)), unknown)
    assert to_unknown(Pil.new("L", (8, 8), 255), Pil.new("RGB", (8, 8)), (32, 32), (16, 16)).all()


@pytest.mark.parametrize("value", [torch.nan, -0.5, 2.0])
def test_a_mask_tensor_lies_within_0_and_1(value):
    with pytest.raises(ValueError, match=r"a mask tensor must lie in \[0, 1\]"):
        to_unknown(torch.full((32, 32), value), None, (32, 32), (16, 16))


def test_a_mask_marks_by_levels_of_any_depth_and_where_it_is_seen():
    picture = Pil.new("RGB", (8, 8))
    for level, marked in ((20_000, 0), (50_000, 64)):
        deep = Pil.fromarray(np.full((8, 8), level, dtype=np.uint16))
        assert to_unknown(deep, picture, (8, 8), (8, 8)).sum() == marked
    seen = np.full((8, 8, 4), 255, dtype=np.uint8)
    seen[3:, :, 3] = 0
    assert (
        to_unknown(Pil.fromarray(seen, "RGBA"), picture, (8, 8), (8, 8))[0].any(1).tolist() == [True] * 3 + [False] * 5
    )
    with pytest.raises(ValueError, match="mode 'F' have no range"):
        to_unknown(Pil.fromarray(np.ones((8, 8), dtype=np.float32)), picture, (8, 8), (8, 8))


def test_noise_is_of_the_seed_whatever_torchs_default(pipeline):
    wanted = pipeline(prompt="red", seed=3, num_inference_steps=2, output_type="pt").images
    torch.set_default_dtype(torch.float64)
    try:
        found = pipeline(prompt="red", seed=3, num_inference_steps=2, output_type="pt").images
    finally:
        torch.set_default_dtype(torch.float32)
    assert (found[0] - wanted[0]).abs().max() < 1e-4


def test_what_is_of_the_host_is_there_whatever_torchs_default_device(pipeline, elsewhere):
    picture, mask = Pil.new("RGB", (12, 8), "orange"), Pil.new("L", (12, 8), 255)
    rows = {"prompt": ["red", None, "green", "red", "red"], "image": [None, picture, None, picture, picture]}
    rows |= {"mask_image": [None] * 4 + [mask], "output": ["image", "text", "both", "image", "image"]}
    options = {"num_inference_steps": 2, "max_new_tokens": 5, "temperature": 1.5, "output_type": "latent"}

    def everything():
        done = pipeline(**rows, **options)
        few = pipeline("red", scheduler="dpmsolver", num_inference_steps=5).images
        none = pipeline("red", output="text", max_new_tokens=1, output_type="pt")
        return done, few, none.images, pipeline.score([picture], ["red"])

    wanted = everything()
    with elsewhere():
        found = everything()
    assert found[0].text == wanted[0].text and torch.equal(found[0].images, wanted[0].images)
    for mine, theirs in zip(found[0].logprobs, wanted[0].logprobs, strict=True):
        assert torch.equal(mine, theirs)
    assert found[1] == wanted[1] and found[2].device.type == "cpu" and torch.equal(found[3], wanted[3])


def test_latents_that_end_without_numbers_are_no_picture(pipeline):
    def last(pipe, step, timestep, values):
        return {"latents": values["latents"] * (torch.nan if step == 1 else 1)}

    with pytest.raises(FloatingPointError, match="after the last of 2 denoising steps are not finite: on_step_end"):
        pipeline(prompt="red", num_inference_steps=2, callback_on_step_end=last)


def test_a_folder_of_two_pipelines_is_none(pipeline, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            pipeline.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no saved pipeline"):
        TransfusionPipeline.from_pretrained(tmp_path)
    pipeline.save_pretrained(tmp_path)
    text = (tmp_path / "pipeline.toml").read_text()
    (tmp_path / "pipeline.toml").write_text(text.replace('"pixels"', '"vae"'))
    with pytest.raises(FileNotFoundError, match="has no vae/"):  # nor is a hub asked for one of that name
        TransfusionPipeline.from_pretrained(tmp_path)
    (tmp_path / "pipeline.toml").write_text(text)
    config = (tmp_path / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(config.replace("boi = 3", "boi = 9"))
    with pytest.raises(ValueError, match="the tokenizer's special tokens are"):
        TransfusionPipeline.from_pretrained(tmp_path)


def test_levels_of_16_bits_are_scaled(tmp_path):
    levels = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    pixels = to_pixels(Pil.fromarray(levels), (2, 2))
    assert torch.allclose((pixels[0] + 1) * 127.5, torch.tensor([[0.0, 100], [200, 255]]))
    (tmp_path / "grey.pgm").write_bytes(b"P5 2 2 65535\n" + levels.astype(">u2").tobytes())
    assert torch.equal(to_pixels(tmp_path / "grey.pgm", (2, 2)), pixels)


def test_no_images_are_a_tensor_of_none(pipeline):
    done = pipeline("red", output="text", max_new_tokens=1, output_type="pt")
    assert done.images.shape == (0, *SHAPE)


def test_scores_are_of_lists_and_of_documents_that_the_model_can_read(pipeline):
    picture = Pil.new("RGB", (8, 8))
    with pytest.raises(TypeError, match="texts='red' must be a list"):
        pipeline.score([picture] * 3, "red")
    with pytest.raises(ValueError, match=r"image 1 and its text have \d+ tokens, more than max_length=60"):
        pipeline.score([picture] * 2, ["red", "red " * 100])
    with pytest.raises(ValueError, match="image 1 is None"):
        pipeline.score([picture, None], ["red", "red"])
    with pytest.raises(TypeError, match="text 0=5 must be a str, got int"):
        pipeline.score([picture], [5])


@pytest.mark.parametrize("size", [(0, 0), (5, 0), (0, 5)])
def test_a_picture_of_no_pixels_is_refused(pipeline, size):
    with pytest.raises(ValueError, match=f"an image of {size[0]}×{size[1]} pixels is empty"):
        pipeline(image=Pil.new("RGB", size))


def test_a_pipeline_has_a_shape_that_its_model_reads(pipeline):
    with pytest.raises(ValueError, match=r"a latent of shape \(4, 4\) does not fit the model"):
        TransfusionPipeline(pipeline.model, pipeline.tokenizer, pipeline.autoencoder, (4, 4))


def test_another_autoencoder_is_not_saved_as_pixels(pipeline, tmp_path):
    class Inverted(PixelAutoencoder):
        pass

    class Mine:
        latent_channels, downscale = 3, 1

    with pytest.raises(TypeError, match="autoencoder of type Mine cannot be saved"):
        TransfusionPipeline(pipeline.model, pipeline.tokenizer, Mine(), SHAPE).save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(TypeError, match="autoencoder of type Inverted cannot be saved"):
        TransfusionPipeline(pipeline.model, pipeline.tokenizer, Inverted(), SHAPE).save_pretrained(tmp_path / "x")


def test_sides_of_any_whole_kind_are_saved(pipeline, tmp_path):
    sides = tuple(np.array(SHAPE))
    TransfusionPipeline(pipeline.model, pipeline.tokenizer, PixelAutoencoder(), sides).save_pretrained(tmp_path)
    assert TransfusionPipeline.from_pretrained(tmp_path).latent_shape == SHAPE


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"device": "foo"}, ValueError, "device 'foo' is unknown"),
        ({"device": "cuda:9"}, ValueError, "device 'cuda:9': torch finds"),
        ({"dtype": "float16"}, TypeError, r"dtype='float16' must be one of torch's"),
    ],
)
def test_a_device_or_dtype_is_not_taken_for_a_broken_file(pipeline, tmp_path, given, error, message):
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        TransfusionPipeline.from_pretrained(tmp_path, **given)
