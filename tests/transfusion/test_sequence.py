"""collate: every field of a batch against the documents, token by token."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields

import pytest
import torch

from transfusion.diffusion.times import TimeSampling
from transfusion.kernels import RaggedLatents
from transfusion.sequence import Document, Image, SpecialTokens, Text, collate, document_length, image_tokens

SPECIAL = SpecialTokens()
PATCH = 2


def random_document(rng: random.Random) -> Document:
    segments: list[Text | Image] = []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.5:
            segments.append(Text(torch.randint(5, 50, (rng.randint(1, 6),))))
        else:
            segments.append(Image(torch.randn(3, 4, 2), max_time=rng.choice([0.5, 1.0])))
    return tuple(segments)


def random_rows(rows: int = 3) -> list[list[Document]]:
    seed = random.randrange(2**32)
    print(f"documents seed {seed}")
    rng = random.Random(seed)
    return [[random_document(rng) for _ in range(rng.randint(1, 4))] for _ in range(rows)]


def expected_tokens(rows: list[list[Document]]) -> list[list[tuple[int, int, str]]]:
    """(token id, document number, kind) of each position, written plainly."""
    result = []
    for documents in rows:
        row: list[tuple[int, int, str]] = []
        for number, document in enumerate(documents):
            for segment in document:
                if isinstance(segment, Text):
                    row += [(int(t), number, "text") for t in segment.token_ids]
                else:
                    patches = image_tokens(segment.latent.shape, PATCH)
                    row += [(SPECIAL.boi, number, "boi"), *[(SPECIAL.pad, number, "image")] * patches]
                    row += [(SPECIAL.eoi, number, "text")]
        result.append(row)
    return result


def test_every_field_of_a_batch() -> None:
    rows = random_rows()
    length = max(sum(document_length(d, PATCH) for d in row) for row in rows) + 3
    batch = collate(rows, length, PATCH, SPECIAL, torch.Generator().manual_seed(0))
    tokens = expected_tokens(rows)
    image_rows, text_rows, targets = [], [], []
    for b, row in enumerate(tokens):
        assert batch.token_ids[b].tolist() == [t for t, _, _ in row] + [SPECIAL.pad] * (length - len(row))
        starts = {}
        for i, (_, document, kind) in enumerate(row):
            starts.setdefault(document, i)
            assert batch.positions[b, i] == i - starts[document]
            if kind == "image":
                image_rows.append(b * length + i)
            following = row[i + 1] if i + 1 < len(row) else (0, -1, "")
            if kind == "text" and following[1] == document and following[2] != "image":
                text_rows.append(b * length + i)
                targets.append(following[0])
    assert batch.image_rows.tolist() == image_rows
    assert batch.token_image.tolist() == [i // 2 for i in range(len(image_rows))]
    assert batch.text_rows.tolist() == text_rows
    assert batch.text_targets.tolist() == targets
    images = [s for row in rows for document in row for s in document if isinstance(s, Image)]
    assert batch.num_images == len(images)
    assert all(torch.equal(latent, image.latent) for latent, image in zip(batch.latents, images, strict=True))
    assert all(0 <= time < image.max_time for time, image in zip(batch.times.tolist(), images, strict=True))


def test_the_mask_keeps_documents_apart_and_images_whole() -> None:
    rows = random_rows()
    length = max(sum(document_length(d, PATCH) for d in row) for row in rows) + 2
    dense = collate(rows, length, PATCH, SPECIAL, torch.Generator()).mask.to_dense()
    for b, row in enumerate(expected_tokens(rows)):
        image, number = [], 0
        for position, (_, _, kind) in enumerate(row):
            number += kind == "boi"
            image.append((number, position) if kind != "image" else (number, -1))
        for i in range(length):
            for j in range(length):
                if i >= len(row) or j >= len(row):
                    assert dense[b, i, j] == (i == j)
                    continue
                together = image[i] == image[j] and image[i][1] == -1
                assert dense[b, i, j] == (row[i][1] == row[j][1] and (j <= i or together)), (b, i, j)


def test_times_are_spread_over_the_batch() -> None:
    images = [[(Image(torch.zeros(1, 2, 2)),) for _ in range(64)]]
    times = collate(images, 64 * 3, PATCH, SPECIAL, torch.Generator().manual_seed(1)).times
    assert (times * 64).floor().sort().values.tolist() == list(range(64))


def test_the_batch_is_a_function_of_its_arguments() -> None:
    rows = random_rows()
    one, two, other = (collate(rows, 300, PATCH, SPECIAL, torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert torch.equal(one.times, two.times)
    assert torch.equal(one.noise_seed, two.noise_seed)
    assert not torch.equal(one.noise_seed, other.noise_seed)


def test_a_batch_without_images_is_on_the_host_too(elsewhere: Callable[[], AbstractContextManager[None]]) -> None:
    words = [[(Text(torch.tensor([1, 9, 2])),)]]
    with elsewhere():
        torch.set_default_dtype(torch.float64)
        batch = collate(words, 4, PATCH, SPECIAL, torch.Generator())
    tensors = [getattr(batch, field.name) for field in fields(batch) if field.name != "mask"]
    assert {part.device.type for part in (*tensors, batch.mask.query_start)} == {"cpu"}
    assert batch.latents.dtype == batch.times.dtype == torch.float32


def test_text_only_and_empty_rows() -> None:
    batch = collate([[(Text(torch.tensor([1, 9, 2])),)], []], 4, PATCH, SPECIAL, torch.Generator())
    assert batch.num_images == 0
    assert batch.text_rows.tolist() == [0, 1]
    assert batch.text_targets.tolist() == [9, 2]


def test_bad_documents_are_named() -> None:
    generator = torch.Generator()
    with pytest.raises(ValueError, match="5x4 does not divide"):
        collate([[(Image(torch.zeros(3, 5, 4)),)]], 30, PATCH, SPECIAL, generator)
    with pytest.raises(ValueError, match="holds 6 tokens, more than the row length 5"):
        collate([[(Image(torch.zeros(3, 4, 4)),)]], 5, PATCH, SPECIAL, generator)
    with pytest.raises(ValueError, match=r"one number of channels, got \[\(1, 2, 2\), \(3, 4, 4\)\]"):
        collate([[(Image(torch.zeros(3, 4, 4)), Image(torch.zeros(1, 2, 2)))]], 30, PATCH, SPECIAL, generator)
    document = (Text(torch.tensor([1, 2])),)
    for rows, message in (
        ([document], r"a document must be a tuple of Text and Image segments, got Text; rows are lists of documents"),
        ([[(torch.zeros(3),)]], r"a segment must be a Text or an Image of a tensor, got tensor\("),
        ([[(Text([1, 2]),)]], r"a segment must be a Text or an Image of a tensor, got Text\(token_ids=\[1, 2\]\)"),
    ):
        with pytest.raises(TypeError, match=message):
            collate(rows, 30, PATCH, SPECIAL, generator)  # type: ignore[arg-type]


def test_images_of_different_sizes_are_ragged() -> None:
    """Tokens in the order of the packed rows, each with its image; equal sizes stay dense."""
    generator = torch.Generator().manual_seed(random.randrange(2**32))
    one, two, three = (torch.randn(3, *size) for size in ((4, 2), (2, 6), (4, 4)))
    text = Text(torch.tensor([7, 8]))
    rows = [[(text, Image(one), text, Image(two))], [(Image(three, max_time=0.5), text)]]
    batch = collate(rows, 16, PATCH, SPECIAL, generator)
    assert isinstance(batch.latents, RaggedLatents) and batch.num_images == 3
    assert all(torch.equal(a, b) for a, b in zip(batch.latents.images(), (one, two, three), strict=True))
    assert batch.token_image.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert batch.image_rows.tolist() == [3, 4, 9, 10, 11, 17, 18, 19, 20]
    moved = batch.to("meta")
    assert moved.latents.device.type == moved.latents.layout.tiles.device.type == "meta" and moved.num_images == 3
    dense = collate([[(Image(one), Image(one + 1))]], 16, PATCH, SPECIAL, generator)
    assert torch.equal(dense.latents, torch.stack([one, one + 1])) and dense.token_image.tolist() == [0, 0, 1, 1]


def test_times_are_drawn_as_the_sampling_says() -> None:
    rows = random_rows()
    sampling = TimeSampling("logit_normal", mean=0.3, spread="antithetic")
    batch = collate(rows, 300, PATCH, SPECIAL, torch.Generator().manual_seed(3), sampling)
    limits = [s.max_time for row in rows for document in row for s in document if isinstance(s, Image)]
    assert torch.equal(batch.times, sampling.draw(limits, torch.Generator().manual_seed(3)))
