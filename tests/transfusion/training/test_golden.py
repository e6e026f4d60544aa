"""A loss curve on file: 50 steps of the tiny model, computed once in float64.

    python tests/transfusion/training/test_golden.py      writes it anew, after a change meant to change training

The rule: today's float64 curve may differ from the one on file by no more than float32 rounding moves the curve today.
Another library or processor rounds float64 differently, far below that; another recipe moves the curve far above.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `import tiny`

import tiny
import torch

from transfusion.training import TrainConfig, Trainer

FILE = Path(__file__).with_name("golden_curve.json")
CONFIG = TrainConfig(
    steps=50,
    learning_rate=3e-3,
    min_learning_rate=3e-4,
    warmup_steps=5,
    ema_decay=0.7,
    log_every=1,
    accumulation=2,
    impl="reference",
)


def curve(folder: Path, dtype: torch.dtype, config: TrainConfig = CONFIG) -> torch.Tensor:
    """(50, 3): text loss, image loss, gradient norm of each step, and (1, 3) of them for the averaged model."""
    trainer = Trainer(tiny.model(seed=11).to(dtype), tiny.Batches(), config, folder)
    batches, lines = trainer.loader.iterate(), []
    for _ in range(config.steps):
        trainer.train_step(batches)
        trainer.step += 1
        values = trainer.losses_seen.read()
        lines.append([values["text_loss"], values["image_loss"], values["gradient_norm"]])
    averaged = trainer.averaged("cpu")
    assert averaged is not None
    losses = averaged(tiny.Batches().batch(10_000), "reference")
    return torch.tensor([*lines, [losses.text.item(), losses.image.item(), 0.0]], dtype=torch.float64)


def test_the_golden_curve(tmp_path: Path) -> None:
    golden = torch.tensor(json.loads(FILE.read_text()), dtype=torch.float64)
    double, single = curve(tmp_path / "double", torch.float64), curve(tmp_path / "single", torch.float32)
    rounding = (single - double).abs().amax(0)
    assert ((double - golden).abs().amax(0) <= rounding).all(), (double - golden).abs().amax(0) / rounding


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps(curve(Path(folder), torch.float64).tolist()) + "\n")
