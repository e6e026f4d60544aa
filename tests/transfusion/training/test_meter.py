"""What the log says: counts of a batch, means over steps and ranks, rates, and nothing that is not known."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from transfusion import presets
from transfusion.model.flops import training_flops
from transfusion.training import TrainConfig, Trainer, World
from transfusion.training.memory import block_activations, step_memory, table
from transfusion.training.meter import Counts, LossMeter, SpeedMeter, peak_tflops
from transfusion.training.metrics import WeightsAndBiases, read_log

ALONE = World(torch.device("cpu"))


def test_counts_of_a_batch() -> None:
    batch = tiny.Batches().batch(3)
    counts = Counts.of(batch, tiny.CONFIG, count_flops=True)
    visible = batch.mask.to_dense().diagonal(dim1=1, dim2=2).sum()  # every token sees itself, pads included
    padding = sum(int(row.sum()) == 1 and int(column.sum()) == 1 for row, column in _rows_and_columns(batch))
    assert counts.positions == visible == batch.token_ids.numel()
    assert counts.tokens == counts.positions - padding
    assert (counts.images, counts.image_tokens) == (2, 2 * 4)
    flops = training_flops(tiny.CONFIG, batch)
    total = counts.text_flops + counts.image_flops + counts.attention_flops
    assert 0 <= float(flops.total) - total < 3  # whole numbers each
    assert Counts.of(batch, tiny.CONFIG, count_flops=False).attention_flops == 0


def _rows_and_columns(batch):
    dense = batch.mask.to_dense()
    return [(dense[b, i], dense[b, :, i]) for b in range(len(dense)) for i in range(dense.shape[1])]


def test_losses_are_means_over_targets_and_images() -> None:
    model, meter = tiny.model(), LossMeter(ALONE, bins=3)
    nats = targets = 0.0
    errors, times = [], []
    for step in range(4):
        batch = tiny.Batches(rows=step + 1).batch(step)
        losses = model(batch)
        meter.add(losses, batch)
        assert not meter.close(torch.ones(()))
        nats, targets = nats + losses.text.item() * len(batch.text_targets), targets + len(batch.text_targets)
        errors.append(losses.per_image.detach().double())
        times.append(batch.times)
    values, error, time = meter.read(), torch.cat(errors), torch.cat(times)
    assert values["text_loss"] == nats / targets
    assert values["image_loss"] == pytest.approx(error.mean().item(), rel=len(error) * sys.float_info.epsilon)
    for index, name in enumerate(("0.00_0.33", "0.33_0.67", "0.67_1.00")):
        part = error[(time * 3).long() == index]
        assert values[f"image_loss_time_{name}"] == pytest.approx(
            part.mean().item(), rel=len(part) * sys.float_info.epsilon
        )
    assert math.isnan(meter.read()["text_loss"])  # nothing since


def test_skipped_steps_count_in_no_mean() -> None:
    model, meter, batch = tiny.model(), LossMeter(ALONE, bins=2), tiny.Batches().batch(0)
    losses = model(batch)
    meter.add(losses, batch)
    assert not meter.close(torch.ones(()))
    once = meter.read()
    meter.add(losses, batch)
    meter.close(torch.ones(()))
    for bad in (losses._replace(text=losses.text * math.nan), losses._replace(per_image=losses.per_image * math.inf)):
        meter.add(bad, batch)
        assert meter.close(torch.ones(()))
    meter.add(losses, batch)
    assert meter.close(torch.tensor(math.inf))
    twice = meter.read()
    assert twice["text_loss"] == once["text_loss"]
    assert (twice["skipped_steps"], twice["bad_steps_in_a_row"]) == (3, 3)


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("transfusion.training.meter.time.monotonic", lambda: clock[0])
    speed = SpeedMeter(replace(ALONE, size=2), peak=1.0)
    clock[0] += 4.0
    speed.add(Counts(10, 6, 80, 24, 100, 10**12, 2 * 10**12, 10**12), waited=1.0)
    values = speed.read()
    assert values["tokens_per_second"] == 20
    assert values["images_per_second"] == 1.5
    assert values["steps_per_second"] == 0.25
    assert values["data_wait_percent"] == 25
    assert (values["packing_fill"], values["image_token_share"]) == (0.8, 0.3)
    assert (values["tflops_per_second"], values["mfu_percent"]) == (1.0, 50.0)
    assert [values[f"mfu_percent_{name}"] for name in ("text", "image", "attention")] == [12.5, 25.0, 12.5]
    assert values["peak_memory_gib"] > 0
    clock[0] += 1.0
    assert "mfu_percent" not in SpeedMeter(ALONE, peak=None).read()
    assert speed.read()["tokens_per_second"] == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", None),
        ("some other device", None),
    ],
)
def test_peaks_are_known_or_none(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_the_log_of_a_run(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, warmup_steps=1, log_every=2, peak_tflops=0.5, timestep_bins=2, impl="reference")
    Trainer(tiny.model(), tiny.Batches(), config, tmp_path).run()
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    named = {"text_loss", "image_loss", "gradient_norm", "learning_rate", "tokens_per_second", "images_per_second"}
    named |= {"mfu_percent", "mfu_percent_attention", "data_wait_percent", "packing_fill", "peak_memory_gib"}
    named |= {"image_loss_time_0.00_0.50", "skipped_steps", "skipped_samples", "image_token_share"}
    assert named <= set(lines[0])


def test_a_missing_logger_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        WeightsAndBiases("project", tmp_path)


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []

    class Stand:
        Image = staticmethod(lambda pixels: ("image", pixels))

        def init(self, **options):
            calls.append(("init", (options["project"], options["id"], options["resume"])))
            return self

        def log(self, values, step):
            calls.append(("log", (sorted(values), step)))

        def finish(self):
            calls.append(("finish", None))

    monkeypatch.setitem(sys.modules, "wandb", Stand())
    folder = tmp_path / "mine"
    config = TrainConfig(steps=1, warmup_steps=1, wandb_project="some", impl="reference")
    Trainer(tiny.model(), tiny.Batches(), config, folder).run()
    assert calls[0] == ("init", ("some", "mine", "allow"))
    assert "text_loss" in calls[1][1][0]  # type: ignore[index]
    assert [name for name, _ in calls] == ["init", "log", "finish"]


# ---------------------------------------------------------------- memory on paper


def test_the_readme_has_the_plan() -> None:
    import transfusion.training

    readme = Path(transfusion.training.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert table() in readme


def test_planned_activations_are_those_that_autograd_keeps() -> None:
    """What a real block saves, by storage, weights and rotary angles apart."""
    from transfusion.kernels import IntervalMask
    from transfusion.model.transformer import Block

    config, rows, length = replace(tiny.CONFIG, dim=64), 2, 48
    block = Block(config).to(torch.bfloat16)
    x = torch.randn(rows, length, config.dim, dtype=torch.bfloat16, requires_grad=True)
    cos, sin = torch.randn(2, rows, length, 1, config.head_dim // 2)
    mask = IntervalMask.causal(length)
    outside = {t.untyped_storage().data_ptr() for t in (*block.parameters(), cos, mask.query_start, mask.query_end)}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(x, cos, sin, mask, "reference")
    assert out.requires_grad
    assert block_activations(config, rows, length, "none") == sum(saved.values())
    assert block_activations(config, rows, length, "full") == x.untyped_storage().nbytes()
    kept = {mode: block_activations(config, rows, length, mode) for mode in ("none", "selective", "full")}  # type: ignore[arg-type]
    assert kept["full"] < kept["selective"] < kept["none"]


def test_states_are_what_a_trainer_holds(tmp_path: Path) -> None:
    model = tiny.model()
    trainer = Trainer(model, tiny.Batches(), TrainConfig(), tmp_path)
    held = [*model.parameters(), *trainer.ema.values()]
    held += [v for state in trainer.optimizer.state.values() for v in state.values() if v.ndim]
    gradients = sum(p.nbytes for p in model.parameters())
    planned = step_memory(tiny.CONFIG, ranks=1, rows=1, row_length=40, mode="full")
    assert planned.states == sum(t.nbytes for t in held) + gradients
    quarter = step_memory(presets.get("tiny"), ranks=4, rows=1, row_length=40, mode="full")
    assert quarter.states == 5 * presets_parameters("tiny")


def presets_parameters(name: str) -> int:
    with torch.device("meta"):
        return tiny.Transfusion(presets.get(name)).num_parameters()
