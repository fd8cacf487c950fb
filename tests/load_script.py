"""Scripts and examples of this project as modules.

Other packages install a top-level ``scripts``; and with ``examples`` on the path its folder ``verl`` would be verl.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS, EXAMPLES = ROOT / "scripts", ROOT / "examples"


def load_script(name: str, folder: Path = SCRIPTS) -> ModuleType:
    """Return a file as the module of its name, which others may import from then on."""
    path = folder / f"{name}.py"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module
