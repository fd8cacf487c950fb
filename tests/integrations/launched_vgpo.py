"""``vgpo`` on processes without GPUs, of which accelerate takes these for owners of one.

``launched_vgpo.py COMMANDS.json``, run under a launcher: the arguments of one command after another. Exits with the
largest of their statuses.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from vgpo_trainer.cli import main


def run(commands: list[list[str]]) -> int:
    with ExitStack() as pretences:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            from integrations.deepspeed_case import processors_taken_for_gpus

            pretences.enter_context(processors_taken_for_gpus())
        elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
            from trainer.distributed_cases import processes_taken_for_gpus

            pretences.enter_context(processes_taken_for_gpus())
        return max(map(main, commands))


if __name__ == "__main__":
    sys.exit(run(json.loads(Path(sys.argv[1]).read_text())))
