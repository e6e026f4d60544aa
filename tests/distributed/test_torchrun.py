"""torchrun -m transfusion train: two processes through the command line, and one that goes on with what they left."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from transfusion import cli
from transfusion.run import Run
from transfusion.training.metrics import read_log

pytestmark = pytest.mark.xdist_group("distributed")

SIZES = {
    "model.dim": 32,
    "model.layers": 1,
    "model.heads": 2,
    "model.vocab-size": 300,
    "data.loader.rows": 2,
    "data.loader.row-length": 48,
    "data.loader.image-size": 16,
    "train.steps": 4,
    "train.warmup-steps": 1,
    "train.log-every": 1,
    "train.checkpoint-every": 2,
}
SMALL = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six plain images with captions, and a text."""
    path = tmp_path / "data"
    path.mkdir()
    lines = []
    for color in ("red", "green", "blue", "black", "orange", "navy"):
        Image.new("RGB", (20, 24), color).save(path / f"{color}.png")
        lines.append(json.dumps({"image": f"{color}.png", "caption": f"{color} square"}))
    (path / "captions.jsonl").write_text("\n".join(lines))
    (path / "one.txt").write_text("this is a text, about squares and colors. " * 40)
    return path


def test_two_processes_train_and_one_goes_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--out", str(out), "--device", "cpu", "--data.images", str(folder), "--data.texts", str(folder), *SMALL]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, "-m", "transfusion", "train", *options], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("finished") == 1
    whole = read_log(out / "log.jsonl")
    assert [line["step"] for line in whole] == [1, 2, 3, 4]
    assert Run.open(out).model().num_parameters() > 0
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    assert cli.main(["train", "--out", str(out), "--device", "cpu", "--train.accumulation", "2"]) == 0
    assert "continuing at step 2" in capsys.readouterr().out
    again = read_log(out / "log.jsonl")
    assert [line["step"] for line in again] == [1, 2, 3, 4]
    for key in ("packing_fill", "image_token_share"):  # the same rows in the same step
        assert again[3][key] == whole[3][key]
    for key in ("text_loss", "image_loss"):
        assert abs(again[3][key] - whole[3][key]) < abs(again[3][key] - whole[2][key])
