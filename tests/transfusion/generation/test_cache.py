"""Every cached evaluation is the full forward over the whole document, to rounding; and the cache is what it says."""

import random
import weakref

import pytest
import torch
from einops import rearrange
from rigged import (
    BOI,
    BOS,
    EOI,
    PATCH,
    SHAPE,
    VOCABULARY,
    chain,
    contexts,
    in_several_orders,
    options_of,
    paint,
    random_model,
    rig_image,
    rows_by_hand,
    text,
    write,
)

from transfusion.config import UNetConfig
from transfusion.generation import Guidance, generate
from transfusion.generation.cache import KVCache
from transfusion.generation.rows import Denoiser, Rows, inference
from transfusion.kernels import IntervalMask
from transfusion.kernels.testing import judge
from transfusion.sequence import Image, document_length

IMAGE_TOKENS = SHAPE[1] * SHAPE[2] // PATCH**2
CHANGES = {
    "full": {},
    "grouped": {"heads": 4, "kv_heads": 2},
    "one key head": {"heads": 2, "kv_heads": 1},
    "grid": {"image_positions": "grid", "qk_norm": True},
    "unet": {"codec": "unet", "unet": UNetConfig(width=8, deep_width=16, blocks=1, head_dim=8)},
}


def full_logits(model, document, impl="auto"):
    """What follows the document, from the whole of it."""
    batch, hidden = rows_by_hand(model, document, impl)
    latents = batch.latents.to(model.head.weight.dtype)
    return model.head(hidden(latents, torch.zeros(batch.num_images, dtype=torch.int64))[0, -1])


def full_prediction(model, document, timestep, impl="auto"):
    """For the document's last image, which is at `timestep`, from the whole document."""
    batch, hidden = rows_by_hand(model, document, impl)
    times = torch.zeros(batch.num_images, dtype=torch.int64)
    times[-1] = timestep
    states = hidden(batch.latents.to(model.head.weight.dtype), times).flatten(0, 1)
    window = model.config.codec_window
    last = rearrange(batch.latents[-1:], "i c (y p) (x q) -> i (y x) (p q c)", p=window, q=window)
    _, skips = model.encode_images(last.to(model.head.weight.dtype), times[-1:], SHAPE[1:])
    decoded = model.decode_images(states[batch.image_rows.view(batch.num_images, -1)[-1:]], skips)
    return rearrange(decoded, "i (y x) (p q c) -> i c (y p) (x q)", p=window, q=window, y=SHAPE[1] // window)[0]


def stories(seed):
    """(document so far, tokens, noisy image, its timestep, clean image, tokens) of four rows, of unequal lengths, or of
    an even seed of one length."""
    torch.manual_seed(seed)
    tokens = torch.randint(5, VOCABULARY, (4, 2, 3))
    return (
        contexts() if seed % 2 else contexts()[seed // 2 % 4 :][:1] * 4,
        tokens[:, 0],
        torch.randn(4, *SHAPE),
        torch.randint(1000, (4,)),
        torch.randn(4, *SHAPE),
        tokens[:, 1],
    )


def cached_story(model, seed, impl="auto"):
    """Start, three tokens, BOI, one denoising step, the clean image, three tokens -> what each evaluation gives."""
    prompts, before, noisy, timestep, clean, after = stories(seed)
    rows, logits = Rows.start(model, prompts, 40, impl)
    results = [logits, *(rows.next(before[:, i]) for i in range(3))]
    rows.next(torch.full((4,), BOI))
    denoiser = Denoiser(rows, SHAPE)
    denoiser(torch.randn(4, *SHAPE), torch.full((4,), 999))  # a step before it leaves nothing behind
    results.append(denoiser(noisy, timestep))
    return [*results, rows.commit(clean), *(rows.next(after[:, i]) for i in range(3))]


def full_story(model, seed, impl="auto"):
    prompts, before, noisy, timestep, clean, after = stories(seed)
    columns = []
    for row, prompt in enumerate(prompts):
        so_far = [(*prompt, text(*before[row, :count].tolist())) for count in range(4)]
        shown = (*so_far[3], Image(clean[row]))
        columns.append(
            [
                *(full_logits(model, document, impl) for document in so_far),
                full_prediction(model, (*so_far[3], Image(noisy[row])), timestep[row], impl),
                *(full_logits(model, (*shown, text(*after[row, :count].tolist())), impl) for count in range(4)),
            ]
        )
    return [torch.stack(results) for results in zip(*columns, strict=True)]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("shape", CHANGES)
@torch.no_grad()
def test_cached_evaluations_are_the_full_forward(shape, impl, seed):
    model, seeds = random_model(seed, std=0.1, **CHANGES[shape]), [seed, seed + 1]

    def together(story):  # all evaluations together say what float32 costs
        return torch.cat([each.flatten() for own in seeds for each in story(own)])

    cached = together(lambda own: cached_story(model, own, impl))
    eager = [together(lambda own: full_story(model, own, "reference"))]
    eager += in_several_orders(lambda: together(lambda own: full_story(model, own)))
    model.double()
    gold = full_story(model, seed)
    verdict = judge(cached, eager, together(lambda own: full_story(model, own)))
    assert verdict.passed, (seed, verdict)
    wrong = max((a - b).abs().max().item() for a, b in zip(gold[1:4], gold[:3], strict=True))
    assert verdict.bound < wrong / 100  # tight enough to tell one token's logits from the next one's


@torch.no_grad()
def test_a_committed_image_leaves_the_keys_and_values_of_its_clean_latent(seed):
    """Not those of the last noisy evaluation."""
    model = random_model(seed, std=0.1)
    clean, noisy = torch.randn(2, *SHAPE)

    def cache(document, impl="auto"):
        return Rows.start(model, [document], 30, impl)[0].cache

    def denoised(document, clean, noisy):
        rows, _ = Rows.start(model, [document], 30)
        rows.next(torch.tensor([BOI]))
        denoiser = Denoiser(rows, SHAPE)
        before = [rows.cache.keys.clone(), rows.cache.lengths.clone()]
        denoiser(noisy[None], torch.tensor([500]))
        used = rows.cache.used[0]
        assert torch.equal(rows.cache.keys[:, :, :, :used], before[0][:, :, :, :used])
        assert torch.equal(rows.cache.lengths, before[1]) and not torch.equal(rows.cache.keys, before[0])
        rows.commit(clean[None])
        return rows.cache

    document = (text(BOS, 7, 8),)
    ours, shown = denoised(document, clean, noisy), (*document, Image(clean))
    eager = [cache(shown, "reference"), *in_several_orders(lambda: cache(shown))]
    assert ours.used == eager[0].used == [3 + IMAGE_TOKENS + 2]
    model.double()
    gold, wrong = cache(shown), cache((*document, Image(noisy)))
    for name in ("keys", "values"):
        verdict = judge(getattr(ours, name), [getattr(each, name) for each in eager], getattr(gold, name))
        assert verdict.passed, (seed, name, verdict)
        assert verdict.bound < (getattr(gold, name) - getattr(wrong, name)).abs().max() / 100


@pytest.mark.parametrize("shape", CHANGES)
@torch.no_grad()
def test_twins_in_one_forward_are_the_unconditional_rows(shape, seed):
    model = random_model(seed, std=0.1, **CHANGES[shape])
    prompts, noisy, timestep = contexts(), torch.randn(4, *SHAPE), torch.randint(1000, (4,))

    def both(model):
        rows, _ = Rows.start(model, prompts, 40)
        rows.next(torch.full((4,), BOI))
        single, _ = Rows.start(model, [(text(BOS),)], IMAGE_TOKENS + 2)
        single.next(torch.tensor([BOI]))
        return torch.cat(Denoiser(rows, SHAPE, single.take([0] * 4)).both(noisy, timestep))

    def full(model, impl="auto"):
        documents = [*prompts, *[(text(BOS),)] * 4]
        shown = zip(documents, noisy.repeat(2, 1, 1, 1), timestep.repeat(2), strict=True)
        return torch.stack([full_prediction(model, (*d, Image(latent)), t, impl) for d, latent, t in shown])

    ours, eager = both(model), [full(model, "reference"), *in_several_orders(lambda: full(model))]
    gold = full(model.double())
    verdict = judge(ours, eager, gold)
    assert verdict.passed, (seed, verdict)
    assert verdict.bound < (gold[:4] - gold[4:]).abs().max() / 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_arithmetic_says(dtype, seed):
    rng = random.Random(seed)
    layers, heads, rows, capacity = (rng.randint(1, 5) for _ in range(4))
    model = random_model(seed, layers=layers, heads=2 * heads, kv_heads=heads, dim=8 * heads).to(dtype)
    cache = KVCache.of(model, rows, capacity)
    expected = 2 * layers * rows * heads * capacity * 4 * dtype.itemsize
    held = sum(buffer.untyped_storage().nbytes() for buffer in (cache.keys, cache.values))
    assert cache.nbytes == held == expected, seed


@pytest.mark.parametrize("guided", [False, True])
def test_a_call_holds_at_most_twice_its_rows(monkeypatch, seed, guided):
    """Rows of every kind, which part and meet: what is done with goes at once. Of guidance there are the twins too."""
    rng, model = random.Random(seed), random_model(seed)
    chain(model, monkeypatch, {10: BOI, **{token: token - 1 for token in range(11, 17)}, EOI: 10})
    rig_image(model, monkeypatch)
    held = peak = 0
    init = KVCache.__init__

    def changed(nbytes):
        nonlocal held, peak
        held += nbytes
        peak = max(peak, held)

    def counted(cache, *sizes, **kind):
        init(cache, *sizes, **kind)
        changed(cache.nbytes)
        weakref.finalize(cache, changed, -cache.nbytes)

    monkeypatch.setattr(KVCache, "__init__", counted)
    stories = [text(BOS, *[5] * rng.randint(60, 90), rng.randint(10, 16)) for _ in range(7)]
    options = {"tokens": 20, "images": 3}
    requests = [(write if rng.random() < 0.7 else paint)(story, **options) for story in stories]
    generate(model, requests, **options_of(model, guidance=Guidance(3.0 if guided else 1.0)))
    reach = max(document_length(each.context, PATCH) for each in requests) + 20 + 3 * (IMAGE_TOKENS + 2)
    token = 2 * model.config.layers * model.config.num_kv_heads * model.config.head_dim * 4
    rows, twins = len(requests) * reach, (len(requests) + 1) * (IMAGE_TOKENS + 2)
    assert rows * token <= peak <= (2 * rows + guided * twins) * token, f"seed {seed}"


def test_autocast_decides_the_dtype(seed):
    with torch.autocast("cpu", torch.bfloat16):
        assert KVCache.of(random_model(seed), 1, 4).keys.dtype == torch.bfloat16
    assert KVCache.of(random_model(seed), 1, 4).keys.dtype == torch.float32


@torch.no_grad()
def test_generation_works_under_autocast(seed):
    with torch.autocast("cpu", torch.bfloat16):
        for result in cached_story(random_model(seed), seed):
            assert result.isfinite().all() and result.dtype == torch.float32


def filled(seed, used, capacity=12):
    torch.manual_seed(seed)
    cache = KVCache(2, len(used), 1, capacity, 4, dtype=torch.float32, device="cpu")
    cache.keys.normal_()
    cache.values.normal_()
    cache.advance(used)
    return cache


def test_take_and_stack_keep_rows_as_they_are(seed):
    cache = filled(seed, [3, 9, 5])

    def same(one, i, other, j):
        used = one.used[i]
        assert used == other.used[j] == one.lengths[i] == other.lengths[j]
        for a, b in ((one.keys, other.keys), (one.values, other.values)):
            assert torch.equal(a[:, i, :, :used], b[:, j, :, :used])

    chosen = [2, 0]
    part = cache.take(chosen)
    assert part.capacity == 12 and len(part.used) == 2
    for place, row in enumerate(chosen):
        same(cache, row, part, place)
    part.keys.zero_()
    assert cache.keys.all()  # a copy
    repeated = cache.take([1, 1, 0])
    for place, row in enumerate([1, 1, 0]):
        same(cache, row, repeated, place)
    other = filled(seed + 1, [1], capacity=20)
    whole = KVCache.stack([cache, other])
    assert whole.capacity == 20 and whole.used == [3, 9, 5, 1]
    for row in range(3):
        same(cache, row, whole, row)
    same(other, 0, whole, 3)
    assert not whole.keys[:, 0, :, 9:].any()  # nothing is left of what lies beyond a row


def test_room_is_checked_for_the_fullest_row(seed):
    cache = filled(seed, [3, 9, 5])
    cache.window(IntervalMask.causal(3))
    with pytest.raises(ValueError, match=r"the cache is full: row 1 holds 9 tokens, and 4 more .* capacity of 12"):
        cache.window(IntervalMask.causal(4))
    model = random_model(seed)
    with inference(model):
        with pytest.raises(ValueError, match="row 0 holds 0 tokens, and 19 more do not fit its capacity of 18"):
            Rows.start(model, contexts(), 18)
        rows, _ = Rows.start(model, contexts(), 19)
        with pytest.raises(ValueError, match="row 3 holds 19 tokens, and 1 more"):
            rows.next(torch.full((4,), EOI))
        assert rows.cache.used[3] == 19


def test_attention_is_cut_at_the_used_part_on_a_cpu(seed):
    """So that the cost follows the length, not the capacity; a kernel on CUDA skips the rest by itself."""
    cache = filled(seed, [3, 70], capacity=1000)
    assert cache.window(IntervalMask.causal(2)).mask.num_keys == 72
    assert replace_used(cache, [3, 127]).window(IntervalMask.causal(2)).mask.num_keys == 129
    assert filled(seed, [3, 9]).window(IntervalMask.causal(2)).mask.num_keys == 11


def replace_used(cache, used):
    other = cache.take([0, 1])
    other.used = used
    return other
