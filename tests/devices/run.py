"""Register the device of accelerator.py in this process, and run the checks of a module on it.

    python tests/devices/run.py MODULE FUNCTION [NAME]

FUNCTION takes the device and yields checks; one that fails is told, and the others run. NAME is what the device is
called. Times are the processor's.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

from _pytest.outcomes import Failed

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "python", "tests", "tests/devices", "scripts")]


def main(module: str, function: str, name: str = "nodouble") -> int:
    """Run the checks; the number of those that fail."""
    import accelerator

    device = accelerator.register(name)
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    failed = 0
    for check in getattr(import_module(module), function)(device):
        start = time.process_time()
        label = f"{check.func.__name__}{check.args[1:]}"
        try:
            check()
            print(f"{time.process_time() - start:6.2f} s {label}", flush=True)
        except (Exception, Failed):
            failed += 1
            print(f"FAILED {label}\n{traceback.format_exc()}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
