"""IntervalMask: the two vectors against the mask spelled out token by token, its tiles, its interop, its errors."""

import copy
import pickle
import random

import pytest
import torch

from transfusion.kernels import IntervalMask, RaggedLatents, interval_mask, transfusion_attention
from transfusion.kernels.testing import LAYOUTS, Layout, random_layout


def spelled_out(layout: Layout) -> torch.Tensor:
    """The mask from its definition in words: same document, and earlier or in the same image; hidden ones closed."""
    lengths = [layout.length] if layout.documents is None else list(layout.documents)
    document = [d for d, size in enumerate(lengths) for _ in range(size)]
    image = [-1] * layout.length
    for index, (first, last) in enumerate(layout.images):
        image[first:last] = [index] * (last - first)
    visible = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for i in range(layout.length):
        for j in range(layout.length):
            same_image = image[i] >= 0 and image[i] == image[j]
            closed = image[j] in layout.hidden and not same_image
            visible[i, j] = document[i] == document[j] and (j <= i or same_image) and not closed
    return visible


def layouts() -> list[Layout]:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"layout seed {seed}")
    return [*LAYOUTS.values(), *(random_layout(rng, rng.randint(1, 90)) for _ in range(40))]


def test_from_spans_is_the_definition() -> None:
    for layout in layouts():
        assert torch.equal(layout.mask().to_dense()[0], spelled_out(layout)), layout


def test_from_ids_equals_from_spans() -> None:
    for layout in layouts():
        image_ids = torch.full((1, layout.length), -1)
        hidden = torch.zeros(1, layout.length, dtype=torch.bool)
        for index, (first, last) in enumerate(layout.images):
            image_ids[:, first:last] = index
            hidden[:, first:last] = index in layout.hidden
        lengths = torch.tensor([layout.length] if layout.documents is None else list(layout.documents))
        documents = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
        mask, expected = IntervalMask.from_ids(image_ids, documents, hidden), layout.mask()
        assert torch.equal(mask.query_start, expected.query_start), layout
        assert torch.equal(mask.query_end, expected.query_end), layout


def test_named_masks() -> None:
    n = random.randint(2, 60)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    window, prefix = random.randint(1, n), random.randint(0, n)
    assert torch.equal(IntervalMask.causal(n).to_dense()[0], j <= i)
    assert IntervalMask.full(n, n + 3).to_dense().all()
    assert torch.equal(IntervalMask.sliding_window(n, window).to_dense()[0], (j <= i) & (i - j < window))
    assert torch.equal(IntervalMask.prefix_lm(n, prefix).to_dense()[0], (j <= i) | (j < prefix) & (i < prefix))


def test_continuation_is_the_bottom_of_the_whole_mask() -> None:
    prefix, new = torch.tensor([5, 0, 17]), Layout(12, [(3, 9)])
    mask = IntervalMask.continuation(new.mask(), prefix, num_keys=40)
    for row, length in enumerate(prefix.tolist()):
        whole = Layout(length + 12, [(length + 3, length + 9)]).mask().to_dense()[0]
        assert torch.equal(mask.to_dense()[row, :, : length + 12], whole[length:])
        assert not mask.to_dense()[row, :, length + 12 :].any()


def test_block_mask_is_the_same_mask() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    masks = [layout.mask() for layout in layouts()] + [
        IntervalMask.stack([random_layout(random.Random(s), 300).mask() for s in range(3)])
    ]
    for mask in masks:
        block_mask = mask.to_block_mask()
        size = (mask.batch_size, 1, mask.num_queries, mask.num_keys)
        expected = create_block_mask(block_mask.mask_mod, *size, device="cpu")
        index = torch.meshgrid(*[torch.arange(n) for n in size], indexing="ij")
        assert torch.equal(block_mask.mask_mod(*index)[:, 0], mask.to_dense())
        # Bounds from tile extremes may keep a tile that is empty; they may drop none, and full ones are full.
        ours, theirs = block_mask.to_dense().bool(), expected.to_dense().bool()
        assert (ours | ~theirs).all()


def test_area_counts_pairs() -> None:
    for layout in layouts():
        assert layout.mask().area().tolist() == [int(layout.mask().to_dense().sum())]


def test_nothing_is_built_twice_and_to_keeps_the_mask() -> None:
    mask = IntervalMask.causal(50)
    assert mask.query_tiles(16, 16) is mask.query_tiles(16, 16)
    assert mask.key_tiles(16, 32) is mask.key_tiles(16, 32)
    assert mask.to("cpu") is mask


def test_what_a_user_writes_to_is_not_what_the_mask_keeps() -> None:
    mask, (q, k, v) = IntervalMask.causal(50), torch.randn(3, 1, 2, 50, 16)
    wanted = transfusion_attention(q, k, v, mask)
    mask.to_dense().fill_(True)
    assert torch.equal(transfusion_attention(q, k, v, mask), wanted)


def test_a_mask_that_was_moved_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU `to` gives the mask itself; here it copies, as it does to a GPU."""
    monkeypatch.setattr(interval_mask, "moved", lambda tensor, *to: tensor.clone())
    mask, (q, k, v) = IntervalMask.from_spans(50, [(4, 30)]), torch.randn(3, 1, 2, 50, 16)
    for other in (mask.to("cpu"), copy.deepcopy(mask.to("cpu")), pickle.loads(pickle.dumps(mask.to("cpu")))):
        assert other is not mask and vars(other).keys() == vars(mask).keys()
        assert torch.equal(other.to_dense(), mask.to_dense())
        for impl in ("sdpa", "reference", "triton"):
            wanted = transfusion_attention(q, k, v, mask, impl=impl)
            assert torch.equal(transfusion_attention(q, k, v, other, impl=impl), wanted)
    monkeypatch.undo()
    assert mask.to("meta").query_tiles(16, 16).is_meta


def test_what_moves_keeps_its_dtype() -> None:
    latents = RaggedLatents(torch.zeros(60), 3, [(4, 5)])
    for target in (torch.bfloat16, torch.zeros(1)):
        for what in (IntervalMask.causal(5), latents):
            with pytest.raises(TypeError, match=r"to\(\) takes a device, got"):
                what.to(target)  # type: ignore[arg-type]
    assert latents.with_values(latents.values.bfloat16()).values.dtype == torch.bfloat16


def test_iterators_are_read_once() -> None:
    wanted = IntervalMask.from_spans(10, [(2, 6)], hidden_images=[0])
    found = IntervalMask.from_spans(10, zip([2], [6], strict=True), hidden_images=iter([0]))
    assert torch.equal(found.intervals, wanted.intervals)
    assert torch.equal(
        IntervalMask.from_spans(10, torch.tensor([[2, 6]]), hidden_images=[0]).intervals, wanted.intervals
    )
    assert IntervalMask.stack(IntervalMask.causal(4) for _ in range(3)).batch_size == 3
    assert len(RaggedLatents.pack(torch.zeros(3, 4, 4) for _ in range(2))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, [(2, 5), (4, 8)]), r"\(2, 5\) and \(4, 8\) overlap"),
        ((10, [(3, 3)]), r"\(3, 3\) is empty"),
        ((10, [(8, 11)]), r"\(8, 11\) is out of range"),
        ((10, [(-1, 2)]), r"\(-1, 2\) is out of range"),
        ((10, [(3, 7)], [5, 5]), r"\(3, 7\) crosses the end of its document at 5"),
        ((10, [], [4, 4]), "add up to 8"),
        ((10, [], [10, 0]), "document 1 has length 0"),
        ((0,), "length=0 must be at least 1"),
        ((10, [(5, 2)]), r"\(5, 2\) is empty: give \(first, one past the last\)"),
        ((10, [(0, 2)], None, [1]), "hidden_images: 1"),
        ((10, [(0, 2), (4, 6)], None, [True, False]), "hidden_images: True"),
    ],
)
def test_malformed_spans_are_named(arguments: tuple, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        IntervalMask.from_spans(*arguments)


def test_hidden_images_are_indices() -> None:
    with pytest.raises(TypeError, match=r"an index in hidden_images=\(0, 2\) must be a whole number, got tuple"):
        IntervalMask.from_spans(10, [(0, 2)], hidden_images=[(0, 2)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="stack needs at least one mask, got none"):
        IntervalMask.stack([])


def test_bad_vectors_are_refused() -> None:
    index = torch.arange(4)[None]
    with pytest.raises(ValueError, match=r"\(B, M\)"):
        IntervalMask(index, index[:, :3], 4)
    with pytest.raises(TypeError, match="float32"):
        IntervalMask(index.float(), index, 4)
    with pytest.raises(ValueError, match="at least one query"):
        IntervalMask(index, index, 0)
    with pytest.raises(TypeError, match="query_start must be a tensor"):
        IntervalMask([[0, 1]], index, 4)  # type: ignore[arg-type]
    for lengths, got in (([3, 5], "list"), (torch.tensor([3.0]), "float32")):
        with pytest.raises(TypeError, match=f"prefix_lengths must be .*, got .*{got}"):
            IntervalMask.continuation(IntervalMask.causal(1), lengths, num_keys=8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"image_ids must be .* of integers, got torch\.bool"):
        IntervalMask.from_ids(torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="image_ids must be a tensor"):
        IntervalMask.from_ids([[0, 1]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image_ids"):
        IntervalMask.from_ids(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[\(3, 3\), \(4, 4\)\]"):
        IntervalMask.stack([IntervalMask.causal(3), IntervalMask.causal(4)])
