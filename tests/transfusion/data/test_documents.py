import random

import pytest
import torch

from transfusion.data.documents import caption_image_document, evaluation_batch, mismatched, text_documents
from transfusion.sequence import Image, SpecialTokens, Text, collate, document_length

SPECIAL = SpecialTokens()


def _described(document):
    return [s.token_ids.tolist() if isinstance(s, Text) else ("image", s.max_time) for s in document]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[1, 10, 11], ("image", 1.0), [2]]),
        ({"image_first": True}, [[1], ("image", 0.5), [10, 11, 2]]),
        ({"image_first": True, "max_time_image_first": 0.3}, [[1], ("image", 0.3), [10, 11, 2]]),
        ({"drop_caption": True}, [[1], ("image", 1.0)]),
        ({"drop_caption": True, "image_first": True}, [[1], ("image", 1.0)]),
        ({"before": torch.ones(3, 4, 4)}, [[1], ("image", 0.5), [10, 11], ("image", 1.0), [2]]),
        ({"before": torch.ones(3, 4, 4), "image_first": True}, [[1], ("image", 0.5), [10, 11], ("image", 1.0), [2]]),
        ({"before": torch.ones(3, 4, 4), "drop_caption": True}, [[1], ("image", 1.0)]),
    ],
)
def test_caption_image_orders(options, expected):
    latent = torch.randn(3, 4, 4)
    document = caption_image_document(torch.tensor([10, 11]), latent, **options)
    assert _described(document) == expected
    *before, last = [s.latent for s in document if isinstance(s, Image)]
    assert torch.equal(last, latent) and all(torch.equal(first, options["before"]) for first in before)


def test_special_tokens_are_those_given():
    special = SpecialTokens(pad=9, bos=7, eos=8, boi=5, eoi=6)
    assert _described(caption_image_document(torch.tensor([3]), torch.zeros(1, 2, 2), special=special))[::2] == [
        [7, 3],
        [8],
    ]


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 13, 14, 15, 100])
def test_text_windows_lose_and_repeat_nothing(count):
    ids = torch.randint(5, 99, (count,))
    windows = [document[0].token_ids.tolist() for document in text_documents(ids, 8)]
    assert all(2 <= len(window) <= 8 and window[0] == SPECIAL.bos for window in windows)
    assert [token for window in windows for token in window[1:]] == [*ids.tolist(), SPECIAL.eos]
    assert sum(window.count(SPECIAL.eos) for window in windows) == 1


def test_a_window_without_room_is_refused():
    with pytest.raises(ValueError, match="window of 1 token"):
        text_documents(torch.tensor([5]), 1)


@pytest.mark.parametrize("trial", range(20))
def test_mismatched_gives_every_image_another_caption(trial):
    seed = random.getrandbits(32)
    rng = random.Random(seed)
    captions = [torch.tensor([rng.randrange(5, 9)]) for _ in range(rng.randrange(2, 30))]
    largest = max([c.item() for c in captions].count(c.item()) for c in captions)
    generator = torch.Generator().manual_seed(seed)
    if 2 * largest > len(captions):
        with pytest.raises(ValueError, match="are the same"):
            mismatched(captions, generator)
        return
    partner = mismatched(captions, generator)
    assert sorted(partner) == list(range(len(captions))), f"seed {seed}"
    assert all(captions[i].item() != captions[j].item() for i, j in enumerate(partner)), f"seed {seed}"


def test_mismatched_is_drawn_from_the_generator():
    captions = [torch.tensor([i]) for i in range(50)]
    first, again, other = (mismatched(captions, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert first == again != other
    assert mismatched([], torch.Generator()) == []


def _pairs(count=6):
    captions = [torch.randint(5, 99, (n,)) for n in range(1, count + 1)]
    return captions, torch.randn(count, 3, 4, 4), torch.rand(count)


def test_evaluation_batch_is_what_was_given():
    captions, latents, times = _pairs()
    batch, judged = evaluation_batch(captions, latents, times, noise_seed=5, patch_size=2)
    assert judged.tolist() == list(range(len(captions)))
    assert torch.equal(batch.latents, latents) and torch.equal(batch.times, times) and batch.noise_seed.item() == 5
    for row, caption in zip(batch.token_ids, captions, strict=True):
        head = [SPECIAL.bos, *caption.tolist(), SPECIAL.boi, 0, 0, 0, 0, SPECIAL.eoi, SPECIAL.eos]
        assert row.tolist() == head + [0] * (len(row) - len(head))
    documents = [caption_image_document(c, i) for c, i in zip(captions, latents, strict=True)]
    assert batch.token_ids.shape[1] == max(document_length(d, 2) for d in documents)
    reference = collate([[d] for d in documents], batch.token_ids.shape[1], 2, SPECIAL, torch.Generator())
    assert torch.equal(batch.mask.to_dense(), reference.mask.to_dense())


def test_the_shuffled_twin_has_each_image_of_its_own_size():
    captions, _, times = _pairs()
    latents = [torch.randn(3, *random.choice([(4, 4), (2, 8), (6, 4)])) for _ in captions[1:]] + [torch.randn(3, 8, 8)]
    partner = mismatched(captions, torch.Generator().manual_seed(random.getrandbits(32)))
    twins = [evaluation_batch(each, latents, times, 5, 2) for each in (captions, [captions[i] for i in partner])]
    (right, judged), (wrong, _) = twins
    for batch, _ in twins:
        assert all(map(torch.equal, batch.latents.images(), latents)) and torch.equal(batch.times[judged], times)
        assert batch.token_image.bincount().tolist() == [latent[0].numel() // 4 for latent in latents]
    assert right.token_ids.shape == wrong.token_ids.shape == (6, 6 + 16 + 4) and right.noise_seed == wrong.noise_seed


@pytest.mark.parametrize("edited", [0.0, 0.5, 1.0])
def test_the_shuffled_twin_differs_in_captions_only(edited):
    captions, latents, times = _pairs()
    partner = mismatched(captions, torch.Generator().manual_seed(random.getrandbits(32)))
    before = [torch.randn(3, 4, 4) if random.random() < edited else None for _ in captions]
    right, judged = evaluation_batch(captions, latents, times, 5, 2, before=before)
    wrong, same = evaluation_batch([captions[i] for i in partner], latents, times, 5, 2, before=before)
    assert torch.equal(judged, same) and torch.equal(right.latents[judged], latents)
    firsts = torch.ones(right.num_images).index_fill(0, judged, 0).bool()
    assert torch.equal(right.times[judged], times) and not right.times[firsts].any()
    assert [first.tolist() for first in before if first is not None] == right.latents[firsts].tolist()
    for name in ("latents", "times", "noise_seed"):
        assert torch.equal(getattr(right, name), getattr(wrong, name))
    assert right.token_ids.shape == wrong.token_ids.shape
    for b, i in enumerate(partner):
        start = 1 + 6 * (before[b] is not None)
        assert wrong.token_ids[b, start : start + len(captions[i])].tolist() == captions[i].tolist()


def test_evaluation_batch_refuses_what_does_not_pair_up():
    captions, latents, times = _pairs()
    with pytest.raises(ValueError, match="5 captions, 6 latents, 6 times"):
        evaluation_batch(captions[:5], latents, times, 0, 2)
    with pytest.raises(ValueError, match="at least one"):
        evaluation_batch([], latents[:0], times[:0], 0, 2)
