"""Activation checkpointing and compilation change what a step keeps and costs, never what it computes."""

from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion.kernels import registry
from transfusion.kernels.attention import reference
from transfusion.kernels.testing import judge
from transfusion.training import ParallelConfig, TrainConfig, Trainer, World, distribute
from transfusion.training.activations import Checkpointing

ALONE = World(torch.device("cpu"))


def steps(folder: Path, parallel: ParallelConfig, dtype: torch.dtype = torch.float32, impl: str = "reference") -> dict:
    """Losses of three steps and the weights after them."""
    model = tiny.model(seed=7).to(dtype)
    distribute(model, parallel, "float32", ALONE)
    config = TrainConfig(
        learning_rate=1e-2,
        warmup_steps=2,
        eps=1e-2,  # AdamW's own divides gradients near zero, which are all rounding, by next to nothing
        impl=impl,
        parallel=parallel,
    )
    trainer = Trainer(model, tiny.Batches(), config, folder)
    batches, losses = trainer.loader.iterate(), []
    for _ in range(3):
        trainer.train_step(batches)
        trainer.step += 1
        values = trainer.losses_seen.read()
        losses.append([values["text_loss"], values["image_loss"]])
    return {"losses": torch.tensor(losses), "weights": torch.cat([p.detach().flatten() for p in model.parameters()])}


@pytest.mark.parametrize("backend", ["none", "aot_eager"])
@pytest.mark.parametrize(("mode", "again"), [("none", 0), ("selective", 0), ("full", 1)])
def test_only_full_computes_attention_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Checkpointing, again: int, backend: str
) -> None:
    calls = Counter()
    for name in ("forward", "backward"):
        genuine = getattr(reference, name)

        def counting(*args, name=name, genuine=genuine):
            calls[name] += 1
            return genuine(*args)

        monkeypatch.setattr(reference, name, counting)
    plain = steps(tmp_path / "plain", ParallelConfig(compile=backend))  # type: ignore[arg-type]
    calls.clear()
    other = steps(tmp_path / "other", ParallelConfig(checkpointing=mode, compile=backend))  # type: ignore[arg-type]
    assert calls == {"forward": 3 * tiny.CONFIG.layers * (1 + again), "backward": 3 * tiny.CONFIG.layers}
    assert torch.equal(plain["losses"], other["losses"])
    assert torch.equal(plain["weights"], other["weights"])


class Calls(TorchDispatchMode):
    """How often each of PyTorch's operations runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "again"), [("none", 0), ("selective", 0), ("full", 1)])
def test_only_full_computes_what_auto_takes_on_a_cpu_again(tmp_path: Path, mode: Checkpointing, again: int) -> None:
    """PyTorch's own attention, whose outputs "selective" keeps as it does ours."""
    with Calls() as calls:
        steps(tmp_path, ParallelConfig(checkpointing=mode), impl="auto")
    found = {name: count for name, count in calls.counts.items() if "_scaled_dot_product_" in name}
    backward = sum(count for name, count in found.items() if name.endswith("_backward"))
    assert backward == 3 * tiny.CONFIG.layers
    assert sum(found.values()) - backward == 3 * tiny.CONFIG.layers * (1 + again), found


def test_selective_keeps_every_other_product(tmp_path: Path) -> None:
    """Matrix products of a block: its own 4 forward and 8 backward, and those that are computed again."""

    def products(mode: Checkpointing) -> int:
        with Calls() as calls:
            steps(tmp_path / mode, ParallelConfig(checkpointing=mode))
        return calls.counts["aten::mm"]

    whole = products("none")
    # What is computed again in full: all but the block's last product, which no gradient needs.
    assert products("full") - whole == 3 * tiny.CONFIG.layers * 3
    assert products("selective") - whole == 3 * tiny.CONFIG.layers * 1


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_later_steps_compile_nothing(tmp_path: Path, impl: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counters = torch._dynamo.utils.counters["stats"]
    parallel = ParallelConfig(compile="aot_eager")
    model = tiny.model()
    distribute(model, parallel, "float32", ALONE)
    trainer = Trainer(model, tiny.Batches(), TrainConfig(impl=impl, parallel=parallel), tmp_path)
    batches = trainer.loader.iterate()
    trainer.train_step(batches)
    first = counters["unique_graphs"]
    for _ in range(3):
        trainer.train_step(batches)
    assert first == 1
    assert counters["unique_graphs"] == first


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_compiled_and_checkpointed_blocks_leave_the_mask_alone(tmp_path: Path, mode: Checkpointing, impl: str) -> None:
    """torch.compile takes no change of the mask from inside a checkpoint: what it keeps is made before."""
    if impl == "triton" and not (torch.cuda.is_available() or registry.TRITON_INTERPRET):
        pytest.skip("Triton runs on a GPU or in its interpreter")
    plain = steps(tmp_path / "plain", ParallelConfig(compile="aot_eager"), impl=impl)
    other = steps(tmp_path / "other", ParallelConfig(checkpointing=mode, compile="aot_eager"), impl=impl)
    assert torch.equal(plain["losses"], other["losses"])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps_round_no_worse(tmp_path: Path, backend: str) -> None:
    eager, gold = (steps(tmp_path / str(d), ParallelConfig(), d) for d in (torch.float32, torch.float64))
    parallel = ParallelConfig(checkpointing="selective", compile=backend)  # type: ignore[arg-type]
    compiled = steps(tmp_path / "compiled", parallel)
    for name in ("losses", "weights"):
        verdict = judge(compiled[name], eager[name], gold[name])
        assert verdict.passed, (name, verdict)
