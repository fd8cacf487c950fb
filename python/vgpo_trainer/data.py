"""Training data as people keep it: a jsonl file of images, prompts and answers, or a folder with one in it.

One JSON object a line::

    {"image": "kitchen.jpg", "prompt": "How many cups are on the table?", "answer": "3"}
    {"images": ["left.png", "right.png"], "prompt": "<image> and <image>: what changed?", "answer": "the clock"}

``image`` (or ``file_name``) is one path and ``images`` several, relative to the file. ``prompt`` is text or a list of
chat messages; ``<image>`` marks where an image stands, and without marks the images come first. ``question`` and
``problem`` are read as ``prompt``, ``solution`` as ``answer``. Other fields are handed to the reward functions. A
folder holds its lines in ``metadata.jsonl``.

Every line and every image header is checked before training starts; an error names the file, the line and the field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

if TYPE_CHECKING:
    from datasets import Dataset

METADATA = "metadata.jsonl"
IMAGE_MARK = "<image>"
PROMPT_NAMES = ("prompt", "question", "problem")
ANSWER_NAMES = ("answer", "solution")
IMAGE_NAMES = ("image", "file_name", "images")
# Arguments of reward functions that TRL fills in itself.
RESERVED_NAMES = (
    "prompts",
    "completion",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environment",
    "environments",
)
ROLES = ("system", "user", "assistant")

# What Pillow raises for files it cannot read: a broken PNG is a SyntaxError, a decompression bomb its own kind.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DatasetError(ValueError):
    """A dataset that cannot be trained on; the message names the row."""


@dataclass(frozen=True)
class Example:
    """One row of a dataset.

    Attributes:
        where: File and line, for messages.
        prompt: Chat messages, their contents lists of text and image parts.
        images: Paths of the images, in the order of the image parts.
        answer: The right answer.
        others: Further fields, for reward functions.

    """

    where: str
    prompt: list[dict[str, Any]]
    images: list[Path]
    answer: str
    others: dict[str, Any] = field(default_factory=dict)


def load_examples(path: str | Path, system: str | None = None) -> list[Example]:
    """Read and check every row of a folder or jsonl file.

    Args:
        path: A folder with ``metadata.jsonl``, or a jsonl file.
        system: System message to put before every prompt that has none.

    Raises:
        DatasetError: The file is missing or empty, or a row is malformed, incomplete or names an unreadable image.

    """
    source = Path(path)
    if source.is_dir():
        source = source / METADATA
        if not source.is_file():
            raise DatasetError(f"{path} is a folder without {METADATA}, whose lines name images, prompts and answers")
    if not source.is_file():
        raise DatasetError(f"{path} does not exist: expected a folder with {METADATA}, or a jsonl file")
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{source} is not UTF-8 text: {error}") from error
    examples = [
        _parse(line, f"{source}:{number}", source.parent, system)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not examples:
        raise DatasetError(f"{source} has no rows")
    return examples


def build_dataset(examples: Sequence[Example]) -> Dataset:
    """Return a dataset of TRL's rows (``prompt``, ``images``, ``answer``, further fields), decoding images when read.

    Fields that only some rows have are ``None`` in the others.
    """
    from datasets import Dataset

    names = sorted({name for example in examples for name in example.others})

    def rows(batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        chosen = [examples[index] for index in batch["index"]]
        columns: dict[str, list[Any]] = {
            "prompt": [example.prompt for example in chosen],
            "images": [[decode(path, example.where) for path in example.images] for example in chosen],
            "answer": [example.answer for example in chosen],
        }
        columns.update((name, [example.others.get(name) for example in chosen]) for name in names)
        return columns

    return Dataset.from_dict({"index": list(range(len(examples)))}).with_transform(rows)


def decode(path: Path, where: str) -> Image.Image:
    """Return an image as RGB, upright; a file that breaks off raises :class:`DatasetError`."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except IMAGE_ERRORS as error:
        raise DatasetError(f"{where}: cannot read image {path}: {error}") from error


def _parse(line: str, where: str, folder: Path, system: str | None) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise DatasetError(f"{where}: expected a JSON object, got {type(row).__name__}")
    images = _images(row, where, folder)
    answer_name = _one_of(row, ANSWER_NAMES, where, "answer")
    answer = row[answer_name]
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise DatasetError(f"{where}: {answer_name} must be text or a number, got {json.dumps(answer)}")
    prompt_name = _one_of(row, PROMPT_NAMES, where, "prompt")
    prompt = _messages(row[prompt_name], len(images), where, prompt_name)
    if system is not None and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": [{"type": "text", "text": system}]}, *prompt]
    used = {prompt_name, answer_name, *IMAGE_NAMES}
    reserved = sorted(set(row) & set(RESERVED_NAMES))
    if reserved:
        raise DatasetError(f"{where}: rename the field {reserved[0]}, which reward functions get from TRL")
    others = {name: value for name, value in row.items() if name not in used}
    return Example(where, prompt, images, str(answer), others)


def _one_of(row: Mapping[str, Any], names: tuple[str, ...], where: str, what: str) -> str:
    found = [name for name in names if row.get(name) is not None]
    if not found:
        listed = " or ".join(names)
        raise DatasetError(f"{where}: {what} is missing: no {listed} in {sorted(row)}")
    return found[0]


def _images(row: Mapping[str, Any], where: str, folder: Path) -> list[Path]:
    for name in ("video", "videos"):
        if row.get(name):
            raise DatasetError(f"{where}: {name} is not supported: give frames as images")
    found = [name for name in IMAGE_NAMES if row.get(name) is not None]
    if not found:
        raise DatasetError(f"{where}: image is missing: no {', '.join(IMAGE_NAMES)} in {sorted(row)}")
    if len(found) > 1:
        raise DatasetError(f"{where}: give one of {', '.join(found)}, not several")
    value = row[found[0]]
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, str) and item for item in values):
        raise DatasetError(f"{where}: {found[0]} must be a path or a list of paths, got {json.dumps(value)}")
    paths = [folder / item for item in values]
    for path in paths:
        if not path.is_file():
            raise DatasetError(f"{where}: image {path} does not exist")
        try:
            with Image.open(path) as image:
                image.verify()
        except IMAGE_ERRORS as error:
            raise DatasetError(f"{where}: cannot read image {path}: {error}") from error
    return paths


def _messages(prompt: Any, images: int, where: str, name: str) -> list[dict[str, Any]]:
    """Return chat messages with exactly ``images`` image parts."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise DatasetError(f"{where}: {name} must be text or a list of messages, got {json.dumps(prompt)}")
    messages = []
    for message in prompt:
        if not isinstance(message, dict) or message.get("role") not in ROLES or not message.get("content"):
            raise DatasetError(
                f"{where}: each message of {name} needs a role ({', '.join(ROLES)}) and content, "
                f"got {json.dumps(message)}"
            )
        messages.append({"role": message["role"], "content": _parts(message["content"], where, name)})
    if not any(message["role"] == "user" for message in messages):
        raise DatasetError(f"{where}: {name} has no user message")
    marked = sum(part["type"] == "image" for message in messages for part in message["content"])
    if marked == 0:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [*({"type": "image"} for _ in range(images)), *first["content"]]
    elif marked != images:
        raise DatasetError(f"{where}: {name} marks {marked} images, and the row has {images}")
    return messages


def _parts(content: Any, where: str, name: str) -> list[dict[str, Any]]:
    """Return a message's content as text and image parts, with ``<image>`` marks made into parts."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts: list[dict[str, Any]] = []
    for part in content if isinstance(content, list) else [None]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            before, *after = part["text"].split(IMAGE_MARK)
            parts.extend([{"type": "text", "text": before}] if before else [])
            for text in after:
                parts.append({"type": "image"})
                parts.extend([{"type": "text", "text": text}] if text else [])
        else:
            raise DatasetError(f"{where}: {name} may hold text and image parts, got {json.dumps(part)}")
    return parts
