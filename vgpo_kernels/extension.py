"""The compiled extension: found, compared with the sources beside the package, and only then loaded.

An extension registers its operators when it is imported, and Python defines their schemas. One that was built from
other sources (an older state of them, or those of another checkout, whose environment this one is run in) may take
other arguments than it is handed. The build leaves a digest of the sources in the extension, which is read here from
the file, before anything of it runs. An installed package has no sources beside it and nothing to compare.

``setup.py`` runs this file by its path, without torch: it imports only what Python itself brings.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import mmap
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

NAME = "vgpo_kernels._C"
SUFFIXES = (".cpp", ".h", ".cu", ".cuh")
DIGEST_BYTES = 16
# Stands in the extension before the digest. setup.py compiles it in, so that it cannot part from the code.
MARKER = "vgpo-source-digest:"


class Loaded(NamedTuple):
    """The extension, or why there is none.

    Attributes:
        module: The module, or ``None``.
        refused: Why the extension that was found is not used, or ``None``.
        failure: Why one that should be used did not load; empty where none was found.

    """

    module: ModuleType | None
    refused: str | None
    failure: str


def source_digest(root: Path) -> str | None:
    """Digest of what an extension is built from: every source and header below ``csrc``, and ``setup.py``.

    It depends on their names below ``root`` and on their content alone.

    Args:
        root: The folder of the checkout.

    Returns:
        Hexadecimal digits, or ``None`` if there are no sources.

    """
    if not (root / "csrc" / "library.cpp").is_file() or not (root / "setup.py").is_file():
        return None
    paths = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(root / "csrc")
        for name in names
        if name.endswith(SUFFIXES) and not name.startswith(".")  # an editor's own files
    ]
    paths.append(str(root / "setup.py"))
    contents = {Path(os.path.relpath(path, root)).as_posix(): path for path in paths}
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(contents):
        with open(contents[name], "rb") as file:
            content = file.read()
        digest.update(f"{name}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def built_digest(file: Path) -> str | None:
    """Digest of the sources that an extension was built from, read from its file without loading it.

    Args:
        file: The extension.

    Returns:
        Hexadecimal digits, or ``None`` if the file says nothing of its sources.

    """
    if file.stat().st_size == 0:
        return None
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        begin = content.find(MARKER.encode())
        if begin < 0:
            return None
        begin += len(MARKER)
        return content[begin : begin + 2 * DIGEST_BYTES].decode("ascii", "replace")


def why_refused(file: Path, root: Path) -> str | None:
    """Why an extension must not be used with a package, or ``None`` if it may.

    Args:
        file: The extension.
        root: The folder that the package lies in, with or without sources beside it.

    """
    expected = source_digest(root)
    if expected is None or built_digest(file) == expected:
        return None
    return (
        f"{file} was not built from the sources in {root / 'csrc'} as they are now, so it is not used. "
        f"`make build` or `pip install -e .` in {root} builds it from them."
    )


def load() -> Loaded:
    """Import the extension if it may be used; warn once if it may not."""
    spec = importlib.util.find_spec(NAME)
    if spec is None or spec.origin is None:
        return Loaded(None, None, "")
    refused = why_refused(Path(spec.origin), Path(__file__).resolve().parent.parent)
    if refused is not None:
        sys.modules[NAME] = None  # type: ignore[assignment]  # nobody else imports it either
        warning = f"{refused} Until then plain PyTorch computes instead, which is slower."
        warnings.warn(warning, RuntimeWarning, stacklevel=3)
        return Loaded(None, refused, "")
    try:
        return Loaded(importlib.import_module(NAME), None, "")
    except ImportError as error:  # built for another torch, say
        return Loaded(None, None, str(error))
