"""Two processes on gloo: the step of one process to rounding, and what happens when one of the two is in trouble.

The rule: gold is one process in float64 on the same global batch; two ranks may err at most twice as much as one
process in the same precision, in any of several orders of its sums, plus one ulp.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import launch
import pytest
import scenarios
import torch
from rigged import in_several_orders

from transfusion.kernels.testing import judge
from transfusion.training import World

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def pair(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks gives, all scenarios in one start of the processes."""
    return launch.run("pair", folder, ranks=2)


@pytest.fixture(scope="module")
def sharded_alone(folder: Path) -> Any:
    """What one rank gives in bfloat16, on the batches of both."""
    return launch.run("sharded_alone", folder, ranks=1)[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """steps(...) of one process."""

    def run(**changes: Any) -> dict[str, torch.Tensor]:
        world = World(torch.device("cpu"))
        return scenarios.steps(scenarios.trainer(world, tmp_path_factory.mktemp("alone"), **changes))

    return run


def check(two: dict[str, torch.Tensor], one: list[dict[str, torch.Tensor]], gold: dict[str, torch.Tensor]) -> None:
    for name in ("losses", "weights", "average"):
        verdict = judge(two[name], [each[name] for each in one], gold[name])
        assert verdict.passed, (name, verdict)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two ranks tell of the same losses and hold, or put together, the same weights and averages."""
    return all(torch.equal(first[name], second[name]) for name in ("losses", "weights", "average"))


@pytest.mark.parametrize("case", scenarios.MATRIX, ids="-".join)
def test_a_step_is_that_of_one_process(pair: Any, alone: Any, case: tuple[str, str]) -> None:
    one, gold = in_several_orders(lambda: alone(accumulation=2)), alone(accumulation=2, dtype=torch.float64)
    check(pair[0]["matrix"][case], one, gold)
    assert same(pair[0]["matrix"][case], pair[1]["matrix"][case])


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("accumulation", {"accumulation": 4}),
        ("kept", {"accumulation": 2}),
        ("replicated", {"accumulation": 2}),
        ("mixed", {"accumulation": 2, "source": scenarios.Mixed}),
        *((name, {"accumulation": 2, **changes}) for name, changes in scenarios.INPUTS.items()),
    ],
)
def test_so_is_every_variant(pair: Any, alone: Any, case: str, changes: dict[str, Any]) -> None:
    gold = alone(**changes, dtype=torch.float64)
    check(pair[0]["variants"][case], in_several_orders(lambda: alone(**changes)), gold)
    assert same(pair[0]["variants"][case], pair[1]["variants"][case])


@pytest.mark.parametrize(("case", "changes"), scenarios.LOW.items(), ids=scenarios.LOW)
def test_so_is_one_in_bfloat16(pair: Any, sharded_alone: Any, alone: Any, case: str, changes: dict[str, Any]) -> None:
    two, sharded, autocast = pair[0]["variants"][case], sharded_alone[case], alone(accumulation=2, **changes)
    gold = alone(**{**changes, "precision": "float32"}, accumulation=2, dtype=torch.float64)
    check(two, [sharded], gold)
    assert same(two, pair[1]["variants"][case])
    # Autocast rounds other tensors, so its largest error is not that of the same weight: all weights are compared.
    ours, theirs = ((each["weights"] - gold["weights"]).square().mean().sqrt() for each in (two, autocast))
    assert ours <= 2 * theirs, (ours, theirs)


def test_gradients_in_bfloat16_are_averaged_in_float32(pair: Any) -> None:
    average = pair[0]["reduced"]
    assert torch.equal(average, pair[1]["reduced"])
    assert not torch.equal(average, average.bfloat16().float())  # the mean of two bfloat16 numbers is seldom one


def test_initial_weights_do_not_depend_on_the_ranks(pair: Any) -> None:
    one = torch.cat([p.detach().flatten() for p in scenarios.materialized().parameters()])
    assert torch.equal(pair[0]["initial"], one)


def test_ten_steps_are_five_and_five_bitwise(pair: Any) -> None:
    assert torch.equal(pair[0]["resumed"]["whole"], pair[0]["resumed"]["parts"])


def test_a_checkpoint_written_beside_the_training_is_of_its_step(pair: Any) -> None:
    result = pair[0]["beside"]
    assert torch.equal(result["then"], result["read"])
    assert (result["step"], result["path"]) == (2, "step-00000002")


def test_a_rank_may_hold_nothing_of_a_convolution(pair: Any, alone: Any, folder: Path) -> None:
    first, second = (rank["gray_unet"] for rank in pair)
    gold = alone(accumulation=2, dtype=torch.float64, **scenarios.GRAY)
    check(first, in_several_orders(lambda: alone(accumulation=2, **scenarios.GRAY)), gold)
    assert same(first, second)
    each = scenarios.trainer(World(torch.device("cpu")), folder / "gray_unet", **scenarios.GRAY)
    each.resume()
    assert each.step == 3
    assert torch.equal(scenarios.weights(each), first["saved"])


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(pair: Any) -> None:
    for rank in pair:
        first, second, third = rank["poisoned"]["after"]
        assert torch.equal(first, second)
        assert not torch.equal(second, third)
        assert rank["poisoned"]["skipped"] == 1
        assert rank["poisoned"]["average"].isfinite().all()


def test_a_stop_of_one_rank_saves_on_all(pair: Any) -> None:
    for rank in pair:
        assert rank["stopped"] == {"finished": False, "step": 3, "checkpoints": ["step-00000003"]}


def test_a_full_disk_on_one_rank_is_told_on_all_and_keeps_the_checkpoint(pair: Any) -> None:
    for rank in pair:
        assert "cannot write" in rank["full_disk"]["message"]
        assert "rank 1: [Errno 27] File too large" in rank["full_disk"]["message"]
        assert "last whole checkpoint is" in rank["full_disk"]["message"]
        assert rank["full_disk"]["left"] == ["step-00000001"]


def test_only_rank_0_writes_and_every_rank_s_errors_are_named(pair: Any, folder: Path) -> None:
    names = {path.name for path in (folder / "errors").iterdir()}
    assert names == {"checkpoints", "log.jsonl", "tensorboard", "data_errors.jsonl"}
    lines = [json.loads(line) for line in (folder / "errors" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[-1]["skipped_samples"] == 2
    found = [json.loads(line) for line in (folder / "errors" / "data_errors.jsonl").read_text().splitlines()]
    assert [(line["rank"], line["sample"]) for line in found] == [(0, "image 0"), (1, "image 1")]


def test_the_averaged_model_is_whole_on_rank_0(pair: Any) -> None:
    result = pair[0]["averaged"]
    assert all(torch.equal(result["model"][name], average) for name, average in result["ema"].items())
    assert pair[1]["averaged"]["model"] is None


@pytest.fixture
def at_five(pair: Any, folder: Path, tmp_path: Path) -> Path:
    """A run's folder with the checkpoint that two ranks wrote after five steps."""
    path = Path("checkpoints") / "step-00000005"
    shutil.copytree(folder / "resumed" / "parts" / path, tmp_path / path)
    return tmp_path


def goes_on(at_five: Path, count: int, **changes: Any) -> dict[str, torch.Tensor]:
    """Steps of one process from that checkpoint."""
    each = scenarios.trainer(World(torch.device("cpu")), at_five, steps=10, **changes)
    each.resume()
    assert (each.step, each.loader.state_dict()) == (5, {"position": 10})
    return scenarios.steps(each, count)


def test_a_checkpoint_of_two_ranks_goes_on_on_one(pair: Any, at_five: Path, folder: Path) -> None:
    each = scenarios.trainer(World(torch.device("cpu")), at_five, steps=10)
    each.resume()
    assert torch.equal(scenarios.weights(each), pair[0]["resumed"]["at five"])
    log = [json.loads(line) for line in (folder / "resumed" / "whole" / "log.jsonl").read_text().splitlines()][5:]
    two = torch.tensor([[line[key] for key in ("text_loss", "image_loss", "gradient_norm")] for line in log])
    one = in_several_orders(lambda: goes_on(at_five, 5, accumulation=2)["losses"])
    verdict = judge(two, one, goes_on(at_five, 5, accumulation=2, dtype=torch.float64)["losses"])
    assert verdict.passed, verdict


def test_a_checkpoint_of_two_ranks_goes_on_on_four_in_two_copies(pair: Any, at_five: Path) -> None:
    one = in_several_orders(lambda: goes_on(at_five, 3, accumulation=4))
    gold = goes_on(at_five, 3, accumulation=4, dtype=torch.float64)
    for rank in launch.run("four", at_five, ranks=4):
        assert torch.equal(rank["read"], pair[0]["resumed"]["at five"])
        assert (rank["step"], rank["position"]) == (5, {"position": 10})
        check(rank, one, gold)


def test_head_and_codec_may_be_sharded_apart(tmp_path: Path) -> None:
    configs = (scenarios.tiny.CONFIG, scenarios.UNET)
    one = {c.codec: in_several_orders(lambda c=c: scenarios.gradients(scenarios.materialized(c))) for c in configs}
    gold = {c.codec: scenarios.gradients(scenarios.materialized(c).double()) for c in configs}
    for rank in launch.run("apart", tmp_path, ranks=2):
        verdicts = {codec: judge(rank[codec], one[codec], gold[codec]) for codec in one}
        assert all(verdict.passed for verdict in verdicts.values()), verdicts


def test_a_mistake_is_told_by_one_rank_and_no_other_is_accused(tmp_path: Path) -> None:
    _, outputs = launch.end("mistaken", tmp_path, ranks=2, timeout=60)
    assert "ValueError: nothing to train on" in outputs[0]
    assert "rank 1: rank 0 cannot continue, and says why" in outputs[1] and "another rank died" not in outputs[1]


def test_the_others_end_when_a_rank_dies(tmp_path: Path) -> None:
    codes, outputs = launch.end("killed_in_a_step", tmp_path, ranks=2, timeout=60)
    assert codes[1] == -9
    assert codes[0] > 0, outputs[0]
    assert "another rank died or did not answer" in outputs[0]


def test_a_run_killed_in_the_middle_of_a_save_goes_on(tmp_path: Path) -> None:
    processes = launch.start("killed_in_a_save", tmp_path, ranks=2)
    try:
        assert [process.wait(timeout=60) for process in processes] == [-9, -9]
    finally:
        for process in processes:
            process.kill()
    left = {
        path.name: [file.stat().st_size for file in path.iterdir()] for path in (tmp_path / "checkpoints").iterdir()
    }
    assert sorted(left) == ["step-00000002", "step-00000004.tmp"]
    assert any(left["step-00000004.tmp"]), "nothing was written yet"
    each = scenarios.trainer(World(torch.device("cpu")), tmp_path, steps=6)
    each.resume()
    assert each.step == 2
    assert each.run()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000006"]
