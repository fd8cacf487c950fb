"""Run the ranks of a process group, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def run_ranks(script: str, world: int, folder: Path, *, timeout: int = 180) -> None:
    """Run ``script RANK WORLD FOLDER``, a file beside this one, for each rank of a group; all have to end well.

    What a rank prints is passed over; what it writes as an error is shown if one fails.
    """
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), str(rank), str(world), str(folder)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        complaints = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:  # one may wait for another that failed
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(complaints)
