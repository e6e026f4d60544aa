"""`generate` on networks rigged to emit a known document, and on random ones against the plain loops."""

import pytest
import torch
from rigged import (
    BOI,
    BOS,
    EOI,
    EOS,
    GOOD,
    SHAPE,
    chain,
    contexts,
    image_noise,
    options_of,
    paint,
    plain_denoise,
    plain_text,
    random_model,
    rig_image,
    scheduler_of,
    shape_of,
    text,
    write,
)

from transfusion.diffusion.sampler import Known
from transfusion.generation import Guidance, Request, TextSampling, generate
from transfusion.kernels.testing import judge
from transfusion.sequence import Image


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_text_image_text(scale, seed, monkeypatch):
    model = random_model(seed)
    seen = chain(model, monkeypatch, {10: 11, 11: BOI, EOI: 12, 12: 13, 13: EOS})
    rig_image(model, monkeypatch)
    (result,) = generate(model, [write(text(BOS, 10), images=3)], **options_of(model, guidance=Guidance(scale)))
    assert shape_of(result.new) == [[11], "image", [12, 13, EOS]]
    assert result.token_ids.tolist() == [11, BOI, 12, 13, EOS] and result.finish_reason == "eos"
    assert len(result.logprobs) == 5 and result.images[0] is result.new[1].latent
    # BOI; then the image alone, at its timesteps; then clean, with EOI; and each token once, at its own position
    own = [(x[0].tolist(), positions[0].tolist()) for x, positions in seen]
    image = list(range(4, 10))
    drawn = [([-1000.0] * 6, image), ([-500.0] * 6, image)]
    twin = [([float(BOS)], [0]), ([float(BOI)], [1])] if scale != 1 else []
    after = [([-1.0] * 6 + [float(EOI)], [*image, 10]), ([12.0], [11]), ([13.0], [12])]
    assert own == [([1.0, 10.0], [0, 1]), ([11.0], [2]), ([float(BOI)], [3]), *twin, *drawn, *after]


def test_every_token_of_text_is_told(seed, monkeypatch):
    model, told = random_model(seed), []
    chain(model, monkeypatch, {10: 11, 11: BOI, EOI: 12, 12: 13, 13: EOS, 14: 15, 15: 16, 16: EOS, 17: BOI})
    rig_image(model, monkeypatch)
    requests = [write(text(BOS, 10), images=3), write(text(BOS, 17)), write(text(BOS, 14), images=2)]

    def on_token(index, tokens):
        told.append((index, list(tokens)))
        tokens.clear()  # its own

    results = generate(model, requests, **options_of(model, on_token=on_token))
    assert [each.finish_reason for each in results] == ["eos", "images", "eos"]
    assert [tokens for index, tokens in told if index == 0] == [[11], [12], [12, 13], [12, 13, EOS]]
    assert [tokens for index, tokens in told if index == 2] == [[15], [15, 16], [15, 16, EOS]]
    assert {index for index, _ in told} == {0, 2}  # BOI is no text


def test_what_is_raised_on_a_token_or_step_ends_the_call(seed, monkeypatch):
    class Enough(Exception):
        pass

    model, calls = random_model(seed).train(), []
    chain(model, monkeypatch, {10: 11, 11: BOI, EOI: 12, 12: 13, 13: EOS})
    rig_image(model, monkeypatch)

    def third(*told):
        calls.append(told)
        if len(calls) == 3:
            raise Enough
        return told[-1]

    for name in ("on_token", "on_step_end"):
        calls.clear()
        with pytest.raises(Enough):
            generate(model, [write(text(BOS, 10), images=3)], **options_of(model, steps=4, **{name: third}))
        assert len(calls) == 3 and model.training
    (result,) = generate(model, [write(text(BOS, 10), images=3)], **options_of(model))
    assert result.finish_reason == "eos"


def test_images_side_by_side_and_the_limit_of_images(seed, monkeypatch):
    model = random_model(seed)
    chain(model, monkeypatch, {BOS: BOI, EOI: BOI})
    rig_image(model, monkeypatch)
    options = options_of(model)
    results = generate(model, [write(text(BOS), images=count, seed=seed) for count in (2, 0, 1)], **options)
    assert [shape_of(each.new) for each in results] == [["image", "image"], [], ["image"]]
    assert {each.finish_reason for each in results} == {"images"}
    first, second = results[0].images
    assert not torch.equal(first, second) and torch.equal(first, results[2].images[0])


def test_the_limit_of_tokens_holds_for_the_document(seed, monkeypatch):
    model = random_model(seed)
    chain(model, monkeypatch, {BOS: 10, 10: 11, 11: BOI, EOI: 12, 12: 12})
    rig_image(model, monkeypatch)
    limits = [2, 3, 5]
    results = generate(model, [write(text(BOS), tokens=each, images=3) for each in limits], **options_of(model))
    assert [shape_of(each.new) for each in results] == [[[10, 11]], [[10, 11], "image"], [[10, 11], "image", [12, 12]]]
    assert {each.finish_reason for each in results} == {"length"}


def test_an_image_that_does_not_fit_the_models_length_is_not_begun(seed, monkeypatch):
    model = random_model(seed)
    chain(model, monkeypatch, {BOS: 10, 10: BOI, EOI: 10})
    rig_image(model, monkeypatch)
    (result,) = generate(model, [write(text(BOS), images=3)], **options_of(model, max_length=17))
    assert shape_of(result.new) == [[10], "image", [10]] and result.finish_reason == "length"
    (result,) = generate(model, [paint(text(BOS), tokens=5)], **options_of(model, max_length=9))
    assert shape_of(result.new) == ["image"] and result.finish_reason == "length"
    (result,) = generate(model, [paint(text(BOS))], **options_of(model, max_length=9))
    assert shape_of(result.new) == ["image"] and result.finish_reason == "done"  # nothing else was asked for


@torch.no_grad()
def test_every_kind_of_request_in_one_call(seed):
    """Text to image, image to text, continuation, editing, interleaved: each as it is alone, and as written plainly."""
    model = random_model(seed).double()
    prompts, instruction = contexts(), (text(BOS), Image(torch.randn(SHAPE)), text(9, 8))
    requests = [
        paint(*prompts[0], seed=seed),
        write(text(BOS), Image(torch.randn(SHAPE)), tokens=5),
        write(*prompts[2], tokens=6),
        paint(*instruction, seed=seed + 1),
        paint(*prompts[3], tokens=9, images=2, seed=seed + 2),
    ]
    options = options_of(model, steps=4)
    together = generate(model, requests, **options)
    drawn, captioned, continued, edited, mixed = together
    assert captioned.token_ids.tolist() == plain_text(model, requests[1].context, 5)[0], seed
    assert continued.token_ids.tolist() == plain_text(model, requests[2].context, 6)[0], seed
    assert mixed.token_ids.tolist()[:1] == plain_text(model, (*prompts[3], Image(mixed.images[0])), 1)[0], seed
    alone = [generate(model, [request], **options)[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist() and shape_of(one.new)[:1] == shape_of(other.new)[:1]
    drawings = [(drawn, requests[0]), (edited, requests[3]), (mixed, requests[4])]
    gold = [plain_denoise(model, r.context, r.seed, scheduler_of(model)).double() for _, r in drawings]
    model.float()
    eager = [plain_denoise(model, r.context, r.seed, scheduler_of(model)) for _, r in drawings]
    verdict = judge(
        torch.stack([each.images[0] for each, _ in drawings]), torch.stack(eager), torch.stack(gold), factor=1.0
    )
    assert verdict.passed and verdict.bound < 1e-2, (seed, verdict)


def always_boi(model, monkeypatch):
    """Rigs the text side alone: an image follows whatever came before."""
    head = model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda states: head(states).index_fill(1, torch.tensor([BOI]), 1e4))


@torch.no_grad()
def test_the_second_image_follows_the_first_ones_clean_latent(seed, monkeypatch):
    """Not its last noisy evaluation: against the plain loop over the document that holds the first image."""
    model = random_model(seed).double()
    always_boi(model, monkeypatch)
    (result,) = generate(model, [paint(text(BOS, 7), tokens=1, images=2, seed=seed)], **options_of(model, steps=4))
    assert shape_of(result.new) == ["image", "image"]
    before = (text(BOS, 7), Image(result.images[0]))
    gold = plain_denoise(model, before, seed, scheduler_of(model), number=1)
    noisy, _ = image_noise(seed)
    wrong = plain_denoise(model, (text(BOS, 7), Image(noisy)), seed, scheduler_of(model), number=1)
    eager = plain_denoise(model.float(), before, seed, scheduler_of(model), number=1)
    verdict = judge(result.images[1], eager, gold.double(), factor=1.0)
    assert verdict.passed and verdict.bound < (wrong - gold).abs().max() / 100, (seed, verdict)


def later_images(model, request, result, scale=1.0):
    """The second image and those after it, each by the plain loop after the images before it."""
    before, drawn = [*request.context], []
    for number, latent in enumerate(result.images):
        if number:
            options = {"number": number, "scale": scale}
            drawn.append(plain_denoise(model, before, request.seed, scheduler_of(model), **options))
        before.append(Image(latent))
    return torch.stack(drawn)


@torch.no_grad()
def test_every_image_of_a_row_is_guided(seed, monkeypatch):
    """The later ones too, beside a row that draws its first; twins know of no image before."""
    model, scale = random_model(seed, std=0.15).double(), 3.0
    always_boi(model, monkeypatch)
    requests = [paint(text(BOS, 7), tokens=2, images=3, seed=seed), paint(text(BOS, 8), seed=seed + 1)]
    result, _ = generate(model, requests, **options_of(model, steps=4, guidance=Guidance(scale)))
    assert shape_of(result.new) == ["image"] * 3
    gold, unguided = (later_images(model, requests[0], result, each) for each in (scale, 1.0))
    eager = later_images(model.float(), requests[0], result, scale)
    verdict = judge(torch.stack(result.images[1:]), eager, gold.double(), factor=1.0)
    difference = min(float((a - b).abs().max()) for a, b in zip(gold, unguided, strict=True))
    assert verdict.passed and verdict.bound < difference / 100, (seed, verdict)


@torch.no_grad()
def test_what_is_known_is_of_the_first_image_alone(seed, monkeypatch):
    model = random_model(seed, std=0.15).double()
    always_boi(model, monkeypatch)
    known = Known(torch.randn(SHAPE), torch.rand(1, *SHAPE[1:]) > 0.5)
    request = paint(text(BOS, 7), tokens=2, images=3, seed=seed, known=known)
    (result,) = generate(model, [request], **options_of(model, steps=4))
    kept = ~known.unknown.expand(SHAPE)
    assert torch.equal(result.images[0][kept], known.latents[kept])
    gold = later_images(model, request, result)
    eager = later_images(model.float(), request, result)
    verdict = judge(torch.stack(result.images[1:]), eager, gold.double(), factor=1.0)
    difference = min(float((each - known.latents)[kept].abs().max()) for each in gold)
    assert verdict.passed and verdict.bound < difference / 100, (seed, verdict)


def test_rows_that_draw_wait_for_each_other(seed, monkeypatch):
    """Rows write until each wants an image or is finished; then all images are denoised in one batch."""
    model = random_model(seed)
    seen = chain(model, monkeypatch, {10: BOI, 11: 12, 12: 10, 13: EOS, EOI: EOS})
    rig_image(model, monkeypatch)
    starts = [10, 11, 13]
    results = generate(model, [write(text(BOS, start), images=1) for start in starts], **options_of(model))
    assert [shape_of(each.new) for each in results] == [["image", [EOS]], [[12, 10], "image", [EOS]], [[EOS]]]
    assert [tuple(x.shape) for x, _ in seen] == [(3, 2), (1, 1), (1, 1), (2, 1), (2, 6), (2, 6), (2, 7)]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"max_images": 1}, "asks for nothing"),
        ({"image_next": True}, "image_next=True needs max_images"),
        ({"max_new_tokens": 1, "known": (1, 2)}, "needs image_next=True"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        Request(GOOD, **request_)


def test_an_error_names_its_request_and_leaves_the_model_as_it_was(seed):
    model = random_model(seed).train()
    good = write(*GOOD)
    for bad, message in [
        (write(), "context 1 must begin with a Text"),
        (write(text(BOS), Image(torch.zeros(3, 4, 5))), r"latent of shape \(3, 4, 5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(model, [good, bad], **options_of(model))
    assert model.training
    assert len(generate(model, [good], **options_of(model, sampling=TextSampling(1.0)))) == 1
