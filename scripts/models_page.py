"""Write docs/models.md: try every architecture with what the adapters do, and record what came out."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "python", ".")]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> int:
    """Run the checks; 1 if one found something wrong, and then the page stays as it is."""
    from architectures import table
    from architectures.checks import CHECKS
    from architectures.zoo import ARCHITECTURES, example

    rows: dict[str, dict[str, str]] = {}
    wrong = 0
    for name in ARCHITECTURES:
        rows[name] = {}
        for check, function in CHECKS.items():
            try:
                rows[name][check] = table.cell(function(example(name)))
            except Exception as error:  # each is worth knowing, so the others are tried too
                wrong += 1
                print(f"{name}, {check}: {type(error).__name__}: {error}", file=sys.stderr)
    if wrong:
        print(f"{wrong} wrong; {table.PAGE.name} is left as it was", file=sys.stderr)
        return 1
    packages = ("transformers", "trl", "peft", "torch")
    tried = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in packages)
    table.PAGE.write_text(table.page(rows, tried))
    print(f"{table.PAGE.relative_to(ROOT)}: {len(rows)} architectures")
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    raise SystemExit(main())
