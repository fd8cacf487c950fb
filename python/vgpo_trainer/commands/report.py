"""``vgpo report``: the report of a run again, from the files in its folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DESCRIPTION = "Make report.html of a run again from the files in its folder."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``vgpo report`` to a parser."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")


def run(arguments: argparse.Namespace) -> int:
    """Make the report: 0 when done, 2 for a folder that holds no run."""
    from vgpo_trainer.reports.run import write_report
    from vgpo_trainer.runs.folder import RunFolder, RunFolderError

    try:
        print(write_report(RunFolder(arguments.folder)))
    except RunFolderError as error:
        print(f"vgpo report: {error}", file=sys.stderr)
        return 2
    return 0
