"""The FLOPs formula against torch's own count of a whole training step."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from transfusion import Transfusion, presets
from transfusion.model import transformer
from transfusion.model import transfusion as module
from transfusion.model.flops import attention_flops, block_weights, codec_flops, training_flops
from transfusion.sequence import Image, SpecialTokens, Text, collate

UNET, batch_of = tiny.UNET, tiny.image_batch
FULL_WIDTH = {"vocab_size": 300, "dim": 64, "layers": 3}


def plain_loss(hidden, weight, target):
    return functional.cross_entropy(hidden @ weight.T, target)


def counted(config, batch, monkeypatch) -> int:
    """What torch counts: matrix products and convolutions. Attention as an op of ours is not among them; the
    text loss, which is one too, is written as the plain formula."""
    monkeypatch.setattr(module, "linear_cross_entropy", plain_loss)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        tiny.model(config)(batch, "reference").total.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("config", "batch"),
    [
        (replace(tiny.CONFIG, **FULL_WIDTH), tiny.Batches(rows=3).batch(1)),
        (replace(tiny.CONFIG, **FULL_WIDTH, kv_heads=1, heads=4, ffn_width=96), tiny.Batches().batch(2)),
        (replace(tiny.CONFIG, qk_norm=True, image_positions="grid"), tiny.Batches().batch(2)),
        (UNET, batch_of()),
        (replace(UNET, patch_size=4), batch_of(4, (8, 12))),
        (replace(UNET, unet=replace(UNET.unet, skips=False, attention=False, blocks=2)), batch_of()),
    ],
    ids=["linear", "gqa", "options", "unet", "unet-4x4", "unet-bare"],
)
def test_agrees_with_torch_within_one_percent(config, batch, monkeypatch) -> None:
    count = training_flops(config, batch)
    ours = float(count.total - count.attention)
    torchs = counted(config, batch, monkeypatch)
    assert abs(ours / torchs - 1) < 0.01, (ours, torchs)


def test_ragged_images_and_their_sizes(monkeypatch) -> None:
    documents = [(Text(torch.tensor([1])), Image(torch.randn(3, *sides))) for sides in ((4, 4), (4, 8))]
    ragged = collate([documents], 24, 2, SpecialTokens(), torch.Generator())
    count = training_flops(tiny.CONFIG, ragged)
    assert count.image == 12 * 6 * tiny.CONFIG.layers * block_weights(tiny.CONFIG)
    assert count.codec == codec_flops(tiny.CONFIG, (4, 4)) + codec_flops(tiny.CONFIG, (4, 8))
    ours, torchs = float(count.total - count.attention), counted(tiny.CONFIG, ragged, monkeypatch)
    assert abs(ours / torchs - 1) < 0.01, (ours, torchs)


def test_attention_is_that_of_torchs_own_under_a_full_mask() -> None:
    """torch counts its flash attention, forward and backward, as this does: 2 and 5 matrix products."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    config = replace(tiny.CONFIG, layers=1, heads=4, dim=64)
    shape = (2, 4, 8, 16)
    batch = collate([[(Image(torch.randn(3, 4, 4)),)]] * 2, 6, 2, SpecialTokens(), torch.Generator())
    image = replace(batch, mask=type(batch.mask).full(8, 8), token_ids=torch.zeros(2, 8, dtype=torch.int64))
    forward = sdpa_flop_count(shape, shape, shape)
    assert float(attention_flops(config, image.mask, 2)) == forward
    both = forward + sdpa_backward_flop_count(shape, shape, shape, shape)
    assert float(training_flops(config, image).attention) == both


def test_attention_counts_the_visible_pairs() -> None:
    batch = tiny.Batches().batch(3)
    pairs = int(batch.mask.to_dense().sum())
    expected = 4 * pairs * tiny.CONFIG.dim * tiny.CONFIG.layers
    assert float(attention_flops(tiny.CONFIG, batch.mask, 2)) == expected
    assert float(training_flops(tiny.CONFIG, batch).attention) == 3.5 * expected


@pytest.mark.parametrize("name", ["0.16b", "0.37b", "0.76b", "1.4b", "7b", "0.16b-unet"])
def test_the_papers_sizes_agree_with_torch_on_meta(name: str, monkeypatch) -> None:
    """Forward and backward of the whole model, as large as it is, on the meta device."""
    config = presets.get(name)
    document = (Text(torch.arange(5, 40)), Image(torch.randn(8, 32, 32)), Text(torch.tensor([7, 2])))
    batch = collate([[document]], 300, 2, config.special, torch.Generator())
    count = training_flops(config, batch)
    with torch.device("meta"):
        model = Transfusion(config)
    monkeypatch.setattr(transformer, "transfusion_attention", lambda q, k, v, mask, impl: q + k + v)
    monkeypatch.setattr(module, "linear_cross_entropy", plain_loss)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(batch.to("meta"), "reference").total.backward()
    assert abs(float(count.total - count.attention) / counter.get_total_flops() - 1) < 0.01
