"""The demo's problems as a dataset of parquet files, to try ``vgpo train`` on a laptop without a network.

``python examples/digits.py FOLDER`` writes ``train.parquet`` and ``test.parquet``; README.md trains on them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import Dataset
from vgpo_trainer.demo.digits import make_problems

SPLITS = {"train": ("train", 2048), "test": ("held_out", 64)}


def write(folder: Path) -> None:
    """Write both splits: a prompt, an image and an answer a row."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (source, number) in SPLITS.items():
        rows = [problem.row() for problem in make_problems(number, source, seed=0)]
        Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
