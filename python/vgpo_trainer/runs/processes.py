"""What one of a run's processes says for all of them."""

from __future__ import annotations

import os
import sys


def complain(message: str, about: str = "the end") -> None:
    """Print to standard error, once for all processes of a run that have the same to say.

    The first to come prints, whichever it is: a run may break off on one process, or on each. Before processes know of
    each other, the first on each machine prints: what is wrong by then is wrong for its neighbours too.

    Args:
        message: A line, or several.
        about: Of messages about the same thing only the first is printed.

    """
    if _speaks(about):
        print(message, file=sys.stderr, flush=True)


def is_first() -> bool:
    """Whether this is the first process of its machine, which speaks before processes know of each other."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _speaks(about: str) -> bool:
    distributed = sys.modules.get("torch.distributed")  # `vgpo --help` should not wait for torch
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return is_first()
    try:
        store = distributed.distributed_c10d._get_default_store()
        return bool(store.add(f"vgpo_trainer/{about}", 1) == 1)
    except Exception:  # the process that keeps the store may be gone: better twice than not at all
        return True
