"""Rows of any dataset as rows of TRL: which fields are read, and what becomes of the others."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from vgpo_trainer.data.errors import DatasetError, Unusable, shown
from vgpo_trainer.data.images import decode, image_of, images_of, is_null
from vgpo_trainer.data.messages import Conversation, read_prompt, text_part
from vgpo_trainer.data.videos import read_video, video_of, videos_of

# Where each role is looked for, in this order: the first field of a row that is not null.
NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "problem", "query", "instruction", "messages", "conversations"),
    "images": ("image", "images", "file_name", "file_names"),
    "videos": ("video", "videos"),
    "answer": ("answer", "solution", "ground_truth", "label", "reward_model.ground_truth"),
}
# Fields of webdataset's samples are endings of files.
ENDINGS: dict[str, tuple[str, ...]] = {
    "images": ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"),
    "videos": ("mp4", "webm", "mov", "mkv", "avi"),
}
# Arguments of reward functions that TRL fills in itself, or that rows have for its trainer.
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
ROW_NAMES = ("prompt", "image", "images", "video", "videos", "answer", "row")
# Where an error says how to name another field.
FLAGS = {
    "prompt": "--prompt-column",
    "images": "--image-column",
    "videos": "--video-column",
    "answer": "--answer-column",
}
RENAMED = "data_"  # what a field by one of these names is called behind
# Helper columns of what is read from disk: the name of a row, and its text in JSON, where rows come from lines.
ROW, LINE = "_vgpo_row", "_vgpo_line"


@dataclass
class Row:
    """A row that was read, with media that are not decoded yet.

    Attributes:
        prompt: Chat messages, their contents lists of text, image and video parts.
        images: Paths, bytes, images of Pillow or arrays, in the order of the image parts.
        videos: Paths, bytes or lists of frames, likewise.
        answer: The right answer, if the row has one.
        fields: Everything the row holds, by the data's names.
    """

    prompt: list[dict[str, Any]]
    images: list[Any]
    videos: list[Any]
    answer: str | None
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class RowReader:
    """Turns a batch of a dataset's columns into a batch of TRL's, images decoded: a dataset's transform.

    Attributes:
        columns: By role, the field that is read in place of :data:`NAMES`.
        system: System message put before every prompt that has none.
        needs_answer: Whether a row without an answer is an error.
        max_pixels: Images with more are made smaller.
        prefix: What stands before a row's name in messages: the dataset.
        folders: Where relative paths are looked for.
        classes: Names of the classes of columns that hold their numbers.
        samples: Whether rows are webdataset's samples.
        handed_on: Fields that rows of TRL have, too.
        videos: Whether rows of TRL have ``videos``.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    needs_answer: bool = True
    max_pixels: int | None = None
    prefix: str = ""
    folders: tuple[str, ...] = ()
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    samples: bool = False
    handed_on: tuple[str, ...] = ()
    videos: bool = False

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return ``prompt``, ``images``, ``answer``, ``row`` and what is handed on, for rows of a batch of columns.

        Raises:
            DatasetError: A row cannot be used, or its image not be read.
        """
        decoded: dict[str, tuple[list[Any], list[Any]]] = {}  # TRL asks for a row once for each of its responses
        rows = []
        for place, name in enumerate(batch[ROW]):
            row = self.read({column: values[place] for column, values in batch.items()})
            if name not in decoded:
                decoded[name] = self.decode(row, name)
            rows.append(self._trl_row(row, name, *decoded[name]))
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}

    def read(self, raw: Mapping[str, Any]) -> Row:
        """Read a row of the dataset without decoding its images.

        Raises:
            DatasetError: It cannot be used; the message names it.
        """
        try:
            return self._row(self._fields(raw), self._folders(raw))
        except Unusable as error:
            raise DatasetError(f"{self.prefix}{raw[ROW]}: {error}") from error

    def decode(self, row: Row, name: str) -> tuple[list[Any], list[Any]]:
        """Return a row's images and videos as processors take them.

        Raises:
            DatasetError: One cannot be read.
        """
        try:
            return [decode(image, self.max_pixels) for image in row.images], [read_video(video) for video in row.videos]
        except Unusable as error:
            raise DatasetError(f"{self.prefix}{name}: {error}") from error

    def handing_on(self, names: Iterable[str], *, videos: bool) -> RowReader:
        """Return a reader whose rows have the fields of the data, and perhaps videos.

        Media and messages are not handed on. A text that was read is: reward functions know it by the data's own name,
        ``solution`` say.
        """
        used = {ROW, LINE, *self.names("images"), *self.names("videos")}
        used |= {self.columns["prompt"]} if "prompt" in self.columns else {"prompt", "messages", "conversations"}
        used |= {"answer"} if self.needs_answer and "answer" not in self.columns else set()
        used |= {"json"} if self.samples else set()
        return replace(self, handed_on=tuple(sorted(set(names) - used)), videos=videos)

    @property
    def row_names(self) -> list[str]:
        """Names of the columns of TRL's rows."""
        return list(self._trl_row(Row([], [], [], None, {}), "", [], []))

    def _trl_row(self, row: Row, name: str, images: list[Any], videos: list[Any]) -> dict[str, Any]:
        read = {"prompt": row.prompt, "images": list(images), "answer": row.answer, "row": name}
        read.update({"videos": list(videos)} if self.videos else {})
        taken = {*RESERVED_NAMES, *ROW_NAMES}
        others = {RENAMED + field if field in taken else field: row.fields.get(field) for field in self.handed_on}
        return {**others, **read}

    def names(self, role: str) -> tuple[str, ...]:
        """Fields that a role is looked for in, in this order."""
        if role in self.columns:
            return (self.columns[role],)
        return NAMES[role] + (ENDINGS.get(role, ()) if self.samples else ())

    def _fields(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of a row by the data's names."""
        if LINE in raw:
            return parse_line(raw[LINE])
        fields = {name: value for name, value in raw.items() if name != ROW}
        if self.samples:
            inside = fields.get("json")
            fields = {**(inside if isinstance(inside, dict) else {}), **fields}
            # 7.question.txt is the field "question.txt" of sample 7.
            fields.update({name.partition(".")[0]: fields.pop(name) for name in list(fields) if "." in name})
        for name, classes in self.classes.items():
            if isinstance(fields.get(name), int) and 0 <= fields[name] < len(classes):
                fields[name] = classes[fields[name]]
        return fields

    def _folders(self, raw: Mapping[str, Any]) -> tuple[str, ...]:
        """Where relative paths are looked for: beside its file, for a row of lines, which is named by that."""
        if LINE not in raw:
            return self.folders
        beside = [os.path.normpath(os.path.join(folder, os.path.dirname(raw[ROW]))) for folder in self.folders]
        return tuple(dict.fromkeys([*beside, *self.folders]))

    def _row(self, fields: dict[str, Any], folders: Sequence[str]) -> Row:
        prompt_name, prompt = self._first(fields, "prompt")
        if prompt is None:
            raise Unusable(f"prompt is missing: {self._nothing('prompt', fields)}")
        media = {
            "image": partial(image_of, name=f"an image of {prompt_name}", folders=folders),
            "video": partial(video_of, name=f"a video of {prompt_name}", folders=folders),
        }
        found = read_prompt(prompt, prompt_name, media)
        image_name, value = self._media(fields, "images")
        images = found.place("image", images_of(value, image_name, folders), prompt_name, image_name)
        video_name, value = self._media(fields, "videos")
        own = videos_of(value, video_name, folders, several=video_name == "videos")
        videos = found.place("video", own, prompt_name, video_name)
        messages = found.messages
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": [text_part(self.system)]}, *messages]
        return Row(messages, images, videos, self._answer(fields, found), fields)

    def _media(self, fields: Mapping[str, Any], role: str) -> tuple[str, Any]:
        """Name and value of the one field that holds a row's images or videos."""
        found = [name for name in self.names(role) if not is_null(_lookup(fields, name))]
        if len(found) > 1:  # beside an image, the name of a file says where that was
            found = [name for name in found if not name.startswith("file_name")] or found
        if len(found) > 1:
            raise Unusable(f"give one of {', '.join(found)}, not several, or say by {FLAGS[role]} which is meant")
        return (found[0], _lookup(fields, found[0])) if found else (self.names(role)[0], None)

    def _answer(self, fields: Mapping[str, Any], found: Conversation) -> str | None:
        name, value = self._first(fields, "answer")
        if value is None:
            name, value = "the last message", found.answer
        if isinstance(value, (list, tuple)) and len(value) == 1:
            (value,) = value
        text = isinstance(value, str) and bool(value.strip())
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if text or number:
            return str(value)
        if not self.needs_answer:
            return None
        if value is None:
            raise Unusable(f"answer is missing: {self._nothing('answer', fields)}")
        raise Unusable(f"{name} must be text or a number, or a list of one, got {shown(value)}")

    def _first(self, fields: Mapping[str, Any], role: str) -> tuple[str, Any]:
        for name in self.names(role):
            value = _lookup(fields, name)
            if value is not None:
                return name, value
        return role, None

    def _nothing(self, role: str, fields: Mapping[str, Any]) -> str:
        held = ", ".join(sorted(name for name, value in fields.items() if value is not None)) or "nothing"
        return f"no {' or '.join(self.names(role))} in {held} ({FLAGS[role]} names another)"


def parse_line(line: str) -> dict[str, Any]:
    """Read a line of JSON.

    Raises:
        Unusable: It is no JSON object.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise Unusable(f"not JSON: {error.msg} at column {error.colno}; expected an object a line") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise Unusable(f"not JSON that can be read: {str(error).partition(';')[0]}") from error
    if not isinstance(row, dict):
        raise Unusable(f"expected a JSON object, got {type(row).__name__}: {shown(row)}")
    return row


def _lookup(fields: Mapping[str, Any], name: str) -> Any:
    """A field's value; ``reward_model.ground_truth`` is one inside another, as in verl's data."""
    if name in fields or "." not in name:
        return fields.get(name)
    value: Any = fields
    for step in name.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value
