"""Which launch a call takes where the table names a warp-specialised one: it, or the plain kernel of the same tile."""

import copy

import pytest
import torch

from transfusion.kernels import tuning
from transfusion.kernels.attention.plan import plan_backward, plan_forward
from transfusion.kernels.tuning import Launch

CPU = torch.device("cpu")
FORWARD, QUERY, KEY = Launch(128, 128, 12, 2), Launch(128, 64, 12, 3), Launch(64, 128, 12, 2)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's, which serves CPU tensors, with warp-specialised launches in this test."""
    monkeypatch.setattr(tuning, "_TABLES", copy.deepcopy(tuning._TABLES))
    for stage, launch in (("forward", FORWARD), ("backward_query", QUERY), ("backward_key", KEY)):
        for dtype in (torch.bfloat16, torch.float32):
            tuning.set_launch("attention", stage, "interpret", dtype, 64, launch)


@pytest.mark.parametrize(
    ("sizes", "specialised", "packed", "split"),
    [
        ((4, 4, 4, 512, 512, 64), True, False, False),
        ((4, 4, 2, 100, 512, 64), False, True, False),
        ((1, 1, 1, 128, 4096, 64), False, False, True),
        ((4, 4, 4, 512, 512, 60), False, False, False),  # rows that are not multiples of 16 bytes
        ((4, 4, 4, 512, 0, 64), False, False, False),
    ],
)
def test_forward(sizes: tuple[int, ...], specialised: bool, packed: bool, split: bool) -> None:
    plan = plan_forward(CPU, torch.bfloat16, *sizes)
    assert plan.launch == (FORWARD if specialised else FORWARD.plain)
    assert (plan.packed > 1, plan.splits > 1) == (packed, split)
    assert plan_forward(CPU, torch.float32, *sizes).launch == FORWARD.plain


@pytest.mark.parametrize(
    ("batch", "splits"),
    [(1, 16), (3, 5), (4, 4), (5, 3), (6, 2), (8, 2), (9, 3), (10, 3), (16, 1), (17, 4), (20, 4), (24, 2), (160, 1)],
)
def test_few_queries_leave_little_of_the_device_idle(batch: int, splits: int) -> None:
    """Of 16 places, two on each processor of the interpreter: turns of the device, times the share of one program."""
    plan = plan_forward(CPU, torch.float32, batch, 1, 1, 1, 2**20, 32)
    assert plan.splits == splits
    turns = -(-batch * splits // 16) / splits
    assert turns <= min(-(-batch * other // 16) / other for other in range(1, 5)) / 0.95
    assert batch / 16 <= turns <= max(1.34 * batch / 16, 1 / 16)


def test_splits_keep_to_the_keys_and_to_a_bounded_workspace() -> None:
    tile = plan_forward(CPU, torch.float32, 1, 1, 1, 1, 2**20, 32).launch.block_k
    for tiles, splits in ((1, 1), (4, 1), (6, 3), (8, 3)):  # 9 programs in 16 places: split by 2 they need as long
        assert plan_forward(CPU, torch.float32, 9, 1, 1, 1, tiles * tile, 32).splits == splits
    assert plan_forward(CPU, torch.float32, 66, 1, 1, 1, 2**20, 32).splits == 1


@pytest.mark.parametrize(("stage", "launch"), [("query", QUERY), ("key", KEY)])
def test_backward(stage: str, launch: Launch) -> None:
    def plan(queries: int, keys: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Launch:
        return plan_backward(CPU, dtype, stage, queries, keys, dim)

    assert plan(1, 1, 40) == plan(512, 3, 64) == plan(512, 4096, 56) == launch
    plain = Launch(*launch[:2], 8, 3)
    assert plan(512, 512, 60) == plan(512, 0, 64) == plan(0, 512, 64) == plan(512, 512, 64, torch.float32) == plain


def test_a_plain_launch_stays_as_it_is() -> None:
    """Whatever the sizes: none of them is asked for, which would guard compiled graphs."""
    for stage in ("query", "key"):
        shipped = tuning.launch("attention", f"backward_{stage}", "interpret", torch.bfloat16, 32)
        for dim in (24, 25):
            assert plan_backward(CPU, torch.bfloat16, stage, 512, 0, dim) == shipped
