"""Compare expressions with math-verify, a pair a line of standard input; run by its path, without this package."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys

SECONDS = 2.0
MEMORY = 4 << 30


def main() -> None:
    """Answer each line ``given<TAB>right`` with ``equal`` or ``different``, until there is no further one."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError):  # macOS admits no limit below what is mapped, its shared libraries included
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most), most))
    from math_verify import LatexExtractionConfig, parse, verify

    configuration = [LatexExtractionConfig()]
    print("ready", flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # nobody reads it from here on
    for line in sys.stdin:
        # Of this process's computing time, so that a busy machine changes no reward. The signal ends the process, in
        # the middle of whatever it computes.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            given, right = (
                parse(
                    f"${side.strip()}$",
                    configuration,
                    fallback_mode="no_fallback",
                    extraction_mode="first_match",
                    parsing_timeout=None,
                )
                for side in line.split("\t")
            )
            same = bool(given and right) and verify(right, given, float_rounding=12, timeout_seconds=None)
        except Exception:  # whatever sympy makes of what a model wrote
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("equal" if same else "different", flush=True)


if __name__ == "__main__":
    main()
