"""Small datasets, made on the spot."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from PIL import Image
from vgpo_trainer.data import DataSource, LoadedRows, load_rows

GOOD = {"image": "a.png", "prompt": "?", "answer": "x"}


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(color: str = "red", size: tuple[int, int] = (4, 4)) -> bytes:
    """The bytes of a PNG of one colour."""
    return encoded(Image.new("RGB", size, color))


def noise(size: int = 64) -> Image.Image:
    """An image whose JPEG has no short end."""
    return Image.effect_noise((size, size), 50).convert("RGB")


def write_images(folder: Path) -> Path:
    """A folder with ``a.png``, 4 x 4, and ``b.jpg``, 6 x 4."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.png").write_bytes(plain())
    Image.new("L", (6, 4), 128).save(folder / "b.jpg")
    return folder


def write_lines(path: Path, *rows: Any) -> Path:
    """A file of JSON lines; a text is a line as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path: Path | str, **options: Any) -> LoadedRows:
    """Load a dataset."""
    return load_rows(DataSource(str(path), **options))


def rows_of(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    """All rows of a dataset, images decoded."""
    return list(load(path, **options).dataset)


def parts_of(row: dict[str, Any]) -> list[str]:
    """The parts of a prompt in one list: texts, and kinds of media."""
    return [part.get("text", f"<{part['type']}>") for message in row["prompt"] for part in message["content"]]
