"""Starts N processes that form one world, runs a scenario of `scenarios.py` in all of them, and collects what it gives.

python launch.py NAME FOLDER      one of them; rank, size and address are in the environment, as torchrun puts them
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def start(scenario: str, folder: Path, ranks: int) -> list["subprocess.Popen[str]"]:
    """The processes, still running; each writes its result to FOLDER/SCENARIO-RANK.pt."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    # says what was running where a process dies of a signal, as one has, without a word
    command = [sys.executable, "-X", "faulthandler", str(HERE / "launch.py"), scenario, str(folder)]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def end(scenario: str, folder: Path, ranks: int, timeout: float) -> tuple[list[int], list[str]]:
    """The exit code and the output of each rank."""
    processes = start(scenario, folder, ranks)
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def run(scenario: str, folder: Path, ranks: int, timeout: float = 240) -> list[Any]:
    """What the scenario gave on each rank. Fails with the output of all ranks where one of them fails."""
    codes, outputs = end(scenario, folder, ranks, timeout)
    assert codes == [0] * ranks, f"{scenario}: exit codes {codes}\n" + "\n=====\n".join(outputs)
    return [torch.load(folder / f"{scenario}-{rank}.pt", weights_only=False) for rank in range(ranks)]


def main(name: str, folder: Path) -> None:
    sys.path[:0] = [str(HERE), str(HERE.parent / "transfusion")]
    import scenarios

    from transfusion.training import join

    with join("cpu", timeout_seconds=30.0) as world:
        result = getattr(scenarios, name)(world, folder)
        torch.save(result, folder / f"{name}-{world.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
