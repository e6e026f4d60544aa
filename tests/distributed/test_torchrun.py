"""torchrun -m transfusion train: two processes through the command line, and one that goes on with what they left."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from transfusion import cli
from transfusion.run import Run
from transfusion.training.metrics import read_log

pytestmark = pytest.mark.xdist_group("distributed")

SMALL = tiny.run_options(
    data__loader__rows=2, data__loader__image_size=16, train__checkpoint_every=2, train__preview_every=2
)


def test_two_processes_train_and_one_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tiny.data_folder(tmp_path / "data"), tmp_path / "run"
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
