"""Rollouts as a report reads them: the tokens of a response, and what the visual signal said about each."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PROMPT_FIELDS = ("prompt", "image", "images", "video", "videos")
# Digests stay below 2^53, so that they survive a trip through a float64 tensor or a JSON file.
_DIGEST_BITS = 53
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


@dataclass(frozen=True, repr=False)
class RolloutSample:
    """One response and its visual signal. Per-token lists have one entry for each token of ``tokens``.

    Attributes:
        step: Optimisation steps done when the response was generated.
        mode: ``"train"`` or ``"eval"``.
        prompt: Text of the prompt, with ``<image>`` where an image stands, and ``<video>`` where a video does.
        images: The prompt's images (PIL), in order.
        answer: The row's ``answer`` column, ``None`` without one.
        tokens: Text of each completion token, special tokens included.
        scored: Whether a token was sampled by the model (tool output was not, and takes no part in the loss).
        cos: Visual signal of each token: the cosine of its hidden state to the image prototype, or what the signal
            chosen in its place shows (a share of attention); NaN where no image was seen yet, 0 where not scored.
        psi: Intra-trajectory weight of each token.
        factors: What each token's advantage is multiplied by; all 1 where VGPO is off.
        phi: Inter-trajectory weight of the response.
        reward: Weighted sum of the rewards; NaN if no reward function scored the response.
        advantage: Group-relative advantage before the factors.
        late_early_ratio: Score of the second half over that of the first; NaN where a half has no token that has seen
            an image.
        correct: What a reward function reported with ``log_extra("correct", [...])``, else ``None``.

    """

    step: int
    mode: str
    prompt: str
    images: list[Any]
    answer: str | None
    tokens: list[str]
    scored: list[bool]
    cos: list[float]
    psi: list[float]
    factors: list[float]
    phi: float
    reward: float
    advantage: float
    late_early_ratio: float
    correct: bool | None

    def __repr__(self) -> str:
        """One line: where it comes from, how it begins, and what it earned."""
        response = shorten("".join(self.tokens), 60, placeholder=" …")
        verdict = {None: "", True: ", right", False: ", wrong"}[self.correct]
        numbers = f"reward {self.reward:.4g}, advantage {self.advantage:.4g}, phi {self.phi:.4g}{verdict}"
        return f"<RolloutSample: {self.mode}, step {self.step}, {response!r}, {len(self.tokens)} tokens, {numbers}>"


@dataclass(frozen=True)
class PendingRollout:
    """What is known of a response before its visual signal is: everything but the per-token lists."""

    step: int
    prompt: str
    images: list[Any]
    answer: str | None
    reward: float
    advantage: float
    correct: bool | None


def pending(
    rows: Sequence[Mapping[str, Any]],
    step: int,
    rewards: Tensor,  # [B]
    advantages: Tensor,  # [B]
    correct: Sequence[Any],
) -> list[PendingRollout]:
    """Return what is known of the responses to rows; ``correct`` counts where it has an entry for each."""
    right = correct if len(correct) == len(rows) else [None] * len(rows)
    return [
        PendingRollout(
            step=step,
            prompt=prompt_text(row.get("prompt", "")),
            images=row_images(row),
            answer=None if row.get("answer") is None else str(row["answer"]),
            reward=reward,
            advantage=advantage,
            correct=None if known is None else bool(known),
        )
        for row, reward, advantage, known in zip(rows, rewards.tolist(), advantages.tolist(), right, strict=True)
    ]


class RolloutRecorder:
    """Keeps the latest responses with their signal.

    Args:
        capacity: How many; 0 keeps none.
        decode: Text of one token id.

    """

    def __init__(self, capacity: int, decode: Callable[[int], str]) -> None:
        self.samples: deque[RolloutSample] = deque(maxlen=capacity)
        self._decode = decode
        # By mode: an evaluation may come between the micro-batches of a generation batch.
        self._pending: dict[str, list[PendingRollout]] = {}

    @property
    def enabled(self) -> bool:
        """Whether anything is kept."""
        return self.samples.maxlen != 0

    def begin(self, mode: str, pending: list[PendingRollout]) -> None:
        """Start a generation batch; :meth:`complete` refers to its responses by their index."""
        self._pending[mode] = pending

    def complete(
        self,
        mode: str,
        index: Tensor,  # [B]
        completion_ids: Tensor,  # [B, T]
        completion_mask: Tensor,  # [B, T]
        response_mask: Tensor,  # [B, T]
        cos: Tensor,  # [B, T]
        psi: Tensor,  # [B, T]
        factors: Tensor,  # [B, T]
        phi: Tensor,  # [B]
        late_early: Tensor,  # [B]
    ) -> None:
        """Record responses of the batch begun, now that their signal is known; at most as many as are kept."""
        kept = slice(0, self.samples.maxlen)
        masks = [mask[kept].bool().cpu() for mask in (completion_mask, response_mask)]
        values = [value[kept].float().cpu() for value in (cos, psi, factors)]
        ids = completion_ids[kept].cpu()
        rows = zip(index[kept].tolist(), phi[kept].tolist(), late_early[kept].tolist(), strict=True)
        for row, (pending_index, phi_of_row, ratio) in enumerate(rows):
            known = self._pending[mode][pending_index]
            shown = masks[0][row]
            per_token = [value[row][shown].tolist() for value in values]
            self.samples.append(
                RolloutSample(
                    step=known.step,
                    mode=mode,
                    prompt=known.prompt,
                    images=known.images,
                    answer=known.answer,
                    tokens=[self._decode(token) for token in ids[row][shown].tolist()],
                    scored=masks[1][row][shown].tolist(),
                    cos=per_token[0],
                    psi=per_token[1],
                    factors=per_token[2],
                    phi=phi_of_row,
                    reward=known.reward,
                    advantage=known.advantage,
                    late_early_ratio=ratio,
                    correct=known.correct,
                )
            )


def prompt_id(row: Mapping[str, Any]) -> int:
    """Number that two dataset rows share exactly when they show a model the same, for a loop of your own.

    Where the order in which responses were generated is known, it says which are a group; ``VGPOTrainer`` goes by it.
    Here a row's own ``prompt_id`` column is what is compared, if there is one; otherwise the prompt's messages and what
    its images show are. A row without a prompt, as environments have that own their prompts, is compared whole.

    Raises:
        TypeError: A value of a kind whose content cannot be compared.

    """
    return _prompt_id(row, {})


def prompt_ids(rows: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
    """Return :func:`prompt_id` of each row, int64 ``[B]``; an image that rows share is read once."""
    read: dict[int, bytes] = {}
    return torch.tensor([_prompt_id(row, read) for row in rows], dtype=torch.int64, device=device)


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Text of a plain or conversational prompt, with ``<image>`` where an image stands, ``<video>`` for a video."""
    if isinstance(prompt, str):
        return prompt
    parts: list[str] = []
    for message in prompt:
        content = message.get("content") or ""
        if isinstance(content, str):
            parts.append(content)
            continue
        shown = {"image": "<image>", "video": "<video>"}
        texts = (shown.get(part["type"]) or part.get("text") or "" for part in content)
        parts.append("".join(texts))
    return "\n".join(parts)


def column_images(row: Mapping[str, Any]) -> list[Any]:
    """Images of a row's ``images`` column, or else of its ``image`` column: rows of joined datasets have one empty."""
    return _column(row, "image")


def column_videos(row: Mapping[str, Any]) -> list[Any]:
    """Videos of a row's ``videos`` column, or else of its ``video`` column."""
    return _column(row, "video")


def _column(row: Mapping[str, Any], kind: str) -> list[Any]:
    several, one = row.get(f"{kind}s"), row.get(kind)
    if several is not None and len(several):
        return list(several)
    return [] if one is None else [one]


def has_video(row: Mapping[str, Any]) -> bool:
    """Whether a dataset row has a video, in a column or inside its messages."""
    prompt = row.get("prompt")
    contents = [] if prompt is None or isinstance(prompt, str) else [message.get("content") for message in prompt]
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return bool(column_videos(row)) or any(part.get("type") == "video" for part in parts)


def row_images(row: Mapping[str, Any]) -> list[Any]:
    """Images of a dataset row: those of its columns, or those inside its messages."""
    if found := column_images(row):
        return found
    prompt = row.get("prompt")
    if prompt is None or isinstance(prompt, str):
        return []
    contents = (message["content"] for message in prompt if isinstance(message.get("content"), list))
    parts = (part for content in contents for part in content)
    return [part["image"] for part in parts if part.get("type") == "image" and part.get("image") is not None]


def _prompt_id(row: Mapping[str, Any], read: dict[int, bytes]) -> int:
    """:func:`prompt_id`; ``read`` holds the digests of images by ``id`` while the rows keep those alive."""
    if row.get("prompt_id") is not None:
        names: Iterable[str] = ["prompt_id"]
    else:
        names = PROMPT_FIELDS if row.get("prompt") is not None else sorted(row)
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        _feed(digest, name, name, read)
        _feed(digest, row.get(name), name, read)
    return int.from_bytes(digest.digest(), "big") >> (64 - _DIGEST_BITS)


def _feed(digest: Any, value: Any, where: str, read: dict[int, bytes]) -> None:
    """Add a value to a digest, its kind and length first so that no two structures read alike."""
    if isinstance(value, Image.Image):
        if id(value) not in read:
            read[id(value)] = _image_digest(value)
        _feed_bytes(digest, "image", read[id(value)])
    elif isinstance(value, (np.ndarray, Tensor)):
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        _feed_bytes(digest, f"array {array.dtype} {array.shape}", np.ascontiguousarray(array).tobytes())
    elif isinstance(value, (bytes, bytearray)):
        _feed_bytes(digest, "bytes", bytes(value))
    elif isinstance(value, (str, Path)):
        _feed_bytes(digest, "text", str(value).encode())
    elif value is None or isinstance(value, (bool, int, float)):
        _feed_bytes(digest, type(value).__name__, repr(value).encode())
    elif isinstance(value, Mapping):
        # Tables pad messages with empty fields, so a missing field and an empty one are the same.
        present = {str(key): item for key, item in value.items() if item is not None}
        _feed_bytes(digest, f"mapping {len(present)}", b"")
        for key in sorted(present):
            _feed(digest, key, where, read)
            _feed(digest, present[key], f"{where}.{key}", read)
    elif isinstance(value, Sequence):
        _feed_bytes(digest, f"sequence {len(value)}", b"")
        for index, item in enumerate(value):
            _feed(digest, item, f"{where}[{index}]", read)
    else:
        raise TypeError(
            f"{where} is a {type(value).__name__}, whose content cannot be compared to tell prompts apart; add a "
            "`prompt_id` column to the dataset"
        )


def _feed_bytes(digest: Any, kind: str, content: bytes) -> None:
    digest.update(f"{kind} {len(content)}:".encode())
    digest.update(content)


def _image_digest(image: Image.Image) -> bytes:
    """Digest of what an image shows: the numbers of a palette image mean nothing without its palette."""
    # Numbers of more than 8 bits, and colour spaces of their own, are compared as they are.
    shown = image.convert("RGBA") if image.mode in _EIGHT_BITS else image
    digest = hashlib.blake2b(f"{shown.mode} {shown.size}:".encode(), digest_size=16)
    digest.update(shown.tobytes())
    return digest.digest()
