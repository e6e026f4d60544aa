"""The launch tables: complete, sane, and the right one for each device."""

from types import SimpleNamespace

import pytest
import torch

from transfusion.kernels import gpus, registry, tuning
from transfusion.training.parallel import uses_bfloat16

STAGES = ("forward", "decode", "backward_query", "backward_key")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TABLES = ("default", "gfx942", "interpret", "sm_90")


def test_tables_are_found() -> None:
    assert set(tuning._TABLES) == set(TABLES)


@pytest.mark.parametrize("table", TABLES)
def test_every_head_dim_has_a_launch(table: str) -> None:
    for stage in STAGES:
        for dtype in DTYPES:
            assert {tuning.launch("attention", stage, table, dtype, head_dim) for head_dim in range(16, 257)}
    rows = tuning.launches(table, "attention")
    keys = {(stage, size, dim) for stage, size, dim, _ in rows}
    assert len(rows) == len(keys) == len(STAGES) * 2 * 5


@pytest.mark.parametrize("table", TABLES)
def test_launches_are_what_triton_takes(table: str) -> None:
    for _, _, _, launch in tuning.launches(table, "attention"):
        powers = (launch.block_q, launch.block_k, launch.num_warps)
        assert all(value & (value - 1) == 0 for value in powers), launch
        assert min(launch.block_q, launch.block_k) >= 16, "tl.dot needs sides of at least 16"
        assert 1 <= launch.num_warps <= 16 and 1 <= launch.num_stages <= 4, launch


def test_launch_reads_the_table() -> None:
    (row,) = (row for *key, row in tuning.launches("sm_90", "attention") if key == ["forward", 2, 128])
    assert tuning.launch("attention", "forward", "sm_90", torch.bfloat16, 80) == row


@pytest.mark.parametrize(("head_dim", "padded"), [(1, 16), (16, 16), (17, 32), (80, 128), (128, 128), (129, 256)])
def test_padded_head_dim(head_dim: int, padded: int) -> None:
    assert tuning.padded_head_dim(head_dim) == padded


@pytest.mark.parametrize(("capability", "table"), [((9, 0), "sm_90"), ((8, 0), "default"), ((10, 0), "default")])
def test_table_of_a_cuda_device(capability: tuple[int, int], table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TRITON_INTERPRET", False)
    monkeypatch.setattr(torch.version, "hip", None)
    properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132)
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or properties)
    monkeypatch.setattr(gpus, "_KNOWN", {})
    assert tuning.table_name(torch.device("cuda")) == table
    numbered = torch.device("cuda", 1)
    assert {tuning.table_name(numbered) for _ in range(3)} == {table} and tuning.processors(numbered) == 132
    assert asked == [torch.device("cuda"), numbered], "a numbered GPU is asked about once"


@pytest.mark.parametrize(("architecture", "table"), [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx1100", "default")])
def test_table_of_a_hip_device(architecture: str, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TRITON_INTERPRET", False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = SimpleNamespace(gcnArchName=architecture, multi_processor_count=304)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert tuning.table_name(torch.device("cuda")) == table


@pytest.mark.parametrize(("capability", "able"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_gpus_without_the_instructions_are_left_to_torch(
    capability: tuple[int, int], able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (tuning, registry):
        monkeypatch.setattr(module, "TRITON_INTERPRET", False)
    monkeypatch.setattr(torch.version, "hip", None)
    properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    reasons = registry.triton_reasons(device=torch.device("cuda"), dtype=torch.float16)
    assert (not reasons) == able and (able or "sm_75 is older than sm_80" in reasons[0])
    assert uses_bfloat16("auto", torch.device("cuda")) == able
    assert uses_bfloat16("bfloat16", torch.device("cuda")) and not uses_bfloat16("auto", torch.device("cpu"))


def test_table_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.table_name(torch.device("cpu")) == "interpret"
    monkeypatch.setattr(tuning, "TRITON_INTERPRET", True)
    assert tuning.table_name(torch.device("cuda")) == "interpret"
