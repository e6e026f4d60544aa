"""What holds the warp-specialised kernels together, left out: each wait, arrival, count and fence is missed."""

import importlib
import os
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from playing import playing
from ptx_machine import Fault
from test_warp_specialised import MODULES, make_case, run

from transfusion.kernels import IntervalMask
from transfusion.kernels.attention.kernel import specialised_blocks
from transfusion.kernels.tuning import SPECIALISED

Changes = list[tuple[str, str]]
FENCE = "fence_async_shared()  # the copies signal what these instructions wrote\n    "
VALUES_AWAITED = "next_scores, acc = warpgroup_mma_wait(0, deps=[next_scores, acc])\n    "
VALUES_FREED = "mbarrier.arrive(v_bars.index(STAGES + n % STAGES))\n    "
FORWARD: dict[str, Changes] = {
    "no fence": [(FENCE + "rings", "rings")],
    "keys are overwritten": [("mbarrier.wait(k_bars.index(STAGES + at), free)", "pass")],
    "values are overwritten": [("mbarrier.wait(v_bars.index(STAGES + at), free)", "pass")],
    "queries are overwritten": [("mbarrier.wait(q_bars.index(1), count & 1 ^ 1)", "pass")],
    "keys are read early": [("mbarrier.wait(k_bars.index(n % STAGES), n // STAGES & 1)", "pass")],
    "values are read early": [("mbarrier.wait(v_bars.index(n % STAGES), n // STAGES & 1)", "pass")],
    "queries are read early": [("mbarrier.wait(q_bars.index(0), count & 1)", "pass")],
    "a step uses products early": [(VALUES_AWAITED, VALUES_AWAITED.replace("(0", "(1"))],
    "the first scores are used early": [("wait(0, deps=[_scores", "wait(1, deps=[_scores")],
    "the last acc is used early": [("mma_wait(0, deps=[acc])", "mma_wait(1, deps=[acc])")],
    "keys are never freed": [("mbarrier.arrive(k_bars.index(STAGES + n % STAGES))", "pass")],
    "queries are never freed": [("mbarrier.arrive(q_bars.index(1))", "pass")],
    "queries are freed early": [
        ("mbarrier.arrive(q_bars.index(1))", "pass"),
        ("q = q_tile.slice", "mbarrier.arrive(q_bars.index(1))\n        q = q_tile.slice"),
    ],
    "values are never freed": [(VALUES_FREED + "return acc, l, m, next", "return acc, l, m, next")],
    "the last values are never freed": [(VALUES_FREED + "return acc, l, m\n", "return acc, l, m\n")],
    "values are freed early": [(VALUES_AWAITED + VALUES_FREED, VALUES_FREED + VALUES_AWAITED)],
    "one consumer frees for both": [("k_bars.index(STAGES + at), count=2", "k_bars.index(STAGES + at), count=1")],
    "the parity is wrong": [("n // STAGES & 1 ^ 1", "n // STAGES & 1")],
    "too few bytes": [("V_BYTES + 8 * BLOCK_K", "V_BYTES")],
    "n is not counted on": [("n += tiles", "n += tiles - 1")],
}
BOTH: dict[str, Changes] = {
    "no fence": [(FENCE + "return", "return")],
    "places are overwritten": [("mbarrier.wait(bars.index(STAGES + at), n // STAGES & 1 ^ 1)", "pass")],
    "owned tiles are overwritten": [
        ("mbarrier.wait(block_bars.index(PLACES + held), count // PLACES & 1 ^ 1)", "pass")
    ],
    "one consumer frees a place for both": [("bars.index(STAGES + at), count=2", "bars.index(STAGES + at), count=1")],
    "one consumer frees owned tiles for both": [
        ("block_bars.index(PLACES + at), count=2", "block_bars.index(PLACES + at), count=1")
    ],
    "the parity is wrong": [("n // STAGES & 1 ^ 1", "n // STAGES & 1")],
    "too few bytes": [("4 * STREAMED * BLOCK_D + 8 * STREAMED", "4 * STREAMED * BLOCK_D")],
    "too few bytes owned": [("4 * OWNED * BLOCK_D", "2 * OWNED * BLOCK_D")],
}
QUERY_FREED = "mbarrier.arrive(bars.index(STAGES + n % STAGES))\n    return dq, next"
QUERY_LAST_FREED = "mbarrier.arrive(bars.index(STAGES + n % STAGES))\n    return dq\n"
QUERY_AWAITED = "dq, next_scores, next_dp = warpgroup_mma_wait(0, deps=[dq, next_scores, next_dp])\n    "
QUERY: dict[str, Changes] = BOTH | {
    "keys are read early": [("mbarrier.wait(bars.index(n % STAGES), n // STAGES & 1)", "pass")],
    "queries are read early": [("mbarrier.wait(block_bars.index(held), count // PLACES & 1)", "pass")],
    "a step uses products early": [(QUERY_AWAITED, QUERY_AWAITED.replace("(0", "(1"))],
    "the first scores are used early": [("wait(0, deps=[scores, dp])", "wait(1, deps=[scores, dp])")],
    "the last dq is used early": [("wait(0, deps=[_weighted", "wait(1, deps=[_weighted")],
    "keys are never freed": [(QUERY_FREED, "return dq, next")],
    "the last keys are never freed": [(QUERY_LAST_FREED, "return dq\n")],
    "keys are freed early": [
        (QUERY_AWAITED + QUERY_FREED, "FREED"),
        ("FREED", QUERY_FREED.partition("\n")[0] + "\n    " + QUERY_AWAITED + "return dq, next"),
    ],
    "queries are never freed": [("    mbarrier.arrive(done)\n    dq =", "    dq =")],
    "queries are freed early": [
        ("    mbarrier.arrive(done)\n    dq =", "    dq ="),
        ("pairs = (tile_count - 1) // 2", "pairs = (tile_count - 1) // 2\n    mbarrier.arrive(done)"),
    ],
    "n is not counted on": [("n += tile_count", "n += tile_count - 1")],
}
KEY_AWAITED = "dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])\n    "
KEYS_FREED = "mbarrier.arrive(block_bars.index(PLACES + held))"
KEY_FREED = "mbarrier.arrive(bars.index(STAGES + at))\n    return dk"
KEY: dict[str, Changes] = BOTH | {
    "queries are read early": [("mbarrier.wait(bars.index(at), n // STAGES & 1)", "pass")],
    "keys are read early": [("mbarrier.wait(block_bars.index(held), count // PLACES & 1)", "pass")],
    "scores are used early": [("wait(1, deps=[scores])", "wait(2, deps=[scores])")],
    "dp is used early": [("wait(1, deps=[dp])", "wait(2, deps=[dp])")],
    "dk is used early": [(KEY_AWAITED, KEY_AWAITED.replace("(0", "(1"))],
    "queries are never freed": [(KEY_FREED, "return dk")],
    "queries are freed early": [
        (KEY_AWAITED + KEY_FREED, "FREED"),
        ("FREED", KEY_FREED.partition("\n")[0] + "\n    " + KEY_AWAITED + "return dk"),
    ],
    "keys are never freed": [(KEYS_FREED, "pass")],
    "keys are freed early": [
        (KEYS_FREED, "pass"),
        ("for _ in range(group):", KEYS_FREED + "\n            for _ in range(group):"),
    ],
}  # fmt: skip
FEED: dict[str, Changes] = {  # in what all three share
    "an item is told before the last was read": [("mbarrier.wait(bars.index(1), count & 1 ^ 1)", "pass")],
    "an item is read before it is told": [("mbarrier.wait(bars.index(0), count & 1)", "pass")],
    "nobody says what was read": [("mbarrier.arrive(bars.index(1))", "pass")],
    "one consumer reads for both": [("mbarrier.init(bars.index(1), count=2)", "mbarrier.init(bars.index(1), count=1)")],
    "an item is left out": [("gl.atomic_add(p_next, 1", "gl.atomic_add(p_next, 2")],
}
# Noticed where owned tiles have one place: of two, one is written again when both consumers have read of the block
# between, after which they read nothing of it.
OWNED = {
    ("backward_query", "owned tiles are overwritten"),
    ("backward_query", "queries are freed early"),
    ("backward_key", "owned tiles are overwritten"),
    ("backward_key", "keys are freed early"),
}
BREAKS = {"forward": FORWARD | FEED, "backward_query": QUERY | FEED, "backward_key": KEY | FEED}
# Each is compiled: one of each kernel, unless the environment asks for every one.
EVERY = [(stage, what) for stage, breaks in BREAKS.items() for what in breaks]
CHOSEN = EVERY if os.environ.get("PTX_ALL") == "1" else [(stage, None) for stage in BREAKS]


def changed(modules: list[ModuleType], changes: Changes, folder: Path) -> ModuleType:
    """The last of the modules, which may import the others, with each `before` in their sources an `after`."""
    renamed = {module.__name__: f"changed_{module.__name__.rpartition('.')[2]}" for module in modules}
    sources = {module.__name__: Path(module.__file__ or "").read_text() for module in modules}
    for before, after in changes:
        assert sum(before in source for source in sources.values()) == 1, before
        sources = {name: source.replace(before, after) for name, source in sources.items()}
    for name, source in sources.items():
        for old, new in renamed.items():
            source = source.replace(f"from {old} import", f"from {new} import")
        (folder / f"{renamed[name]}.py").write_text(source)
        sys.modules.pop(renamed[name], None)
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        return importlib.import_module(renamed[modules[-1].__name__])
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize(("stage", "what"), CHOSEN)
def test_a_broken_kernel_is_noticed(stage: str, what: str | None, tmp_path: Path, seed: int) -> None:
    """By a wrong number or a fault, in one of twenty orders of events."""
    what = what or random.Random(seed).choice(list(BREAKS[stage]))
    print(what)
    alone = stage == "forward" and what in FORWARD
    modules = [MODULES[stage]] if alone else [specialised_blocks, MODULES[stage]]
    module = changed(modules, BREAKS[stage][what], tmp_path)
    head_dim = 128 if (stage, what) in OWNED else 64
    launch = SPECIALISED[stage][head_dim][0]
    # the last block, which comes first, has one masked tile; the one with a document's end has nothing else
    mask, heads = IntervalMask.from_spans(896, images=[(100, 356)], documents=[600, 40, 256]), (2, 1)
    if what in FEED:  # blocks of so few tiles that the producer is done with them at once
        mask, heads = IntervalMask.from_spans(896, documents=[64] * 14), (2, 2)
    case = make_case(mask, 0, torch.bfloat16, heads=heads, head_dim=head_dim)
    with playing(90, seed, processors=2):
        right = run(stage, case, launch)
    for order in range(20):
        try:
            with playing(90, order, processors=2):
                if not all(map(torch.equal, run(stage, case, launch, module), right)):
                    return
        except Fault:
            return
    pytest.fail(f"nobody noticed in 20 orders of events: {what}")
