"""Prompts of rows: text, chat messages and LLaVA's conversations become messages of text, image and video parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vgpo_trainer.data.errors import Unusable, shown

ROLES = ("system", "user", "assistant")
# "from" of LLaVA's and ShareGPT's conversations.
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
SPEAKERS["system"] = "system"
MARKS = {"<image>": "image", "<video>": "video"}
_MARK = re.compile("(" + "|".join(MARKS) + ")")


@dataclass
class Conversation:
    """A prompt as messages.

    Attributes:
        messages: Their contents lists of parts ``{"type": "text", "text": ...}``, ``{"type": "image"}`` and ``{"type":
            "video"}``.
        held: By kind, what each part of that kind holds itself, in order; ``None`` for one that is a mark.
        answer: Text of an assistant's turn at the end, which is no part of the prompt.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    held: dict[str, list[Any]] = field(default_factory=lambda: {"image": [], "video": []})
    answer: str | None = None

    def place(self, kind: str, own: list[Any], name: str, where: str) -> list[Any]:
        """Return the prompt's images or videos in the order of its parts, those of the row's field among them.

        Args:
            kind: ``"image"`` or ``"video"``.
            own: What the row's field holds.
            name: The prompt's field, for messages.
            where: The row's field, likewise.

        Raises:
            Unusable: As many marks as things to put there are expected, or none.
        """
        held = self.held[kind]
        if not held:
            first = next(message for message in self.messages if message["role"] == "user")
            first["content"] = [*({"type": kind} for _ in own), *first["content"]]
            return own
        marks = sum(item is None for item in held)
        if own and not marks:
            held_too = f"the messages of {name} hold {_count(len(held), kind)}, and {where} {len(own)} more"
            raise Unusable(f"{held_too}: give one or the other")
        if marks != len(own):
            raise Unusable(f"{name} marks {_count(marks, kind)}, and the row has {len(own)}")
        rest = iter(own)
        return [next(rest) if item is None else item for item in held]


def read_prompt(value: Any, name: str, media: Mapping[str, Callable[[Any], Any]]) -> Conversation:
    """Read a prompt.

    Args:
        value: Text, or a list of messages ``{"role", "content"}`` or ``{"from", "value"}``.
        name: Its field, for messages.
        media: By kind (``"image"``, ``"video"``), what reads a part that holds one.

    Raises:
        Unusable: It is neither, or has no user's turn.
    """
    if isinstance(value, str):
        if not value.strip():
            raise Unusable(f"{name} is empty")
        value = [{"role": "user", "content": value}]
    if isinstance(value, dict) and value and all(isinstance(item, list) for item in value.values()):
        # datasets' Sequence of a struct is a struct of lists.
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        raise Unusable(f"{name} must be text or a list of messages, got {shown(value)}")
    found = Conversation()
    while len(value) > 1 and isinstance(value[-1], dict) and _role(value[-1]) == "assistant":
        *value, last = value
        found.answer = _text(last) if found.answer is None else found.answer
    for message in value:
        role = _role(message) if isinstance(message, dict) else None
        if role is None:
            raise Unusable(
                f"each message of {name} needs a role ({', '.join(ROLES)}) and content, or from and value, "
                f"got {shown(message)}"
            )
        parts = _parts(_content(message), name, media, found.held)
        if not parts:
            raise Unusable(f"{name} has a message without content: {shown(message)}")
        found.messages.append({"role": role, "content": parts})
    if not any(message["role"] == "user" for message in found.messages):
        raise Unusable(f"{name} has no user message")
    return found


def text_part(text: str) -> dict[str, Any]:
    """A part of text."""
    return {"type": "text", "text": text}


def _count(number: int, kind: str) -> str:
    return f"{number} {kind}{'' if number == 1 else 's'}"


def _role(message: Mapping[str, Any]) -> str | None:
    role = message.get("role")
    if isinstance(role, str):
        return role if role in ROLES else None
    speaker = message.get("from")
    return SPEAKERS.get(speaker) if isinstance(speaker, str) else None


def _content(message: Mapping[str, Any]) -> Any:
    """A message's content; an empty list where it has none."""
    content = message.get("content") if message.get("content") is not None else message.get("value")
    return [] if content is None else content


def _text(message: Mapping[str, Any]) -> str | None:
    content = _content(message)
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    return "".join(part.get("text") or "" if isinstance(part, dict) else str(part) for part in content)


def _parts(
    content: Any, name: str, media: Mapping[str, Callable[[Any], Any]], held: dict[str, list[Any]]
) -> list[dict[str, Any]]:
    """Return a message's content as parts, with marks made into parts; what parts hold is added to ``held``."""
    parts: list[dict[str, Any]] = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            part = text_part(part)
        # Columns of tables hold every field of any part: None is none.
        given = {key: item for key, item in part.items() if item is not None} if isinstance(part, dict) else {}
        kind = given.get("type") or next((kind for kind in ("text", "image", "video") if kind in given), None)
        if kind == "text" and isinstance(given.get("text", ""), str):
            for piece in filter(None, _MARK.split(given.get("text", ""))):
                parts.append({"type": MARKS[piece]} if piece in MARKS else text_part(_writable(piece, name)))
                if piece in MARKS:
                    held[MARKS[piece]].append(None)
        elif kind in ("image", "image_url", "video", "video_url"):
            kind = kind.removesuffix("_url")
            inside = _inside(given, kind)
            held[kind].append(None if inside is None else media[kind](inside))
            parts.append({"type": kind})
        else:
            raise Unusable(f"{name} may hold text, image and video parts, got {shown(part)}")
    return parts


def _inside(part: Mapping[str, Any], kind: str) -> Any:
    """What an image or video part holds itself, by any of the names in use; ``None`` for a mark."""
    for key in (kind, f"{kind}_url", "url", "path", "base64", "bytes"):
        inside = part.get(key)
        if isinstance(inside, dict) and "url" in inside:
            inside = inside["url"]
        if inside is not None:
            return inside
    return None


def _writable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"{name} holds {text[error.start]!r}, half of a character, which no tokenizer reads") from error
    return text
