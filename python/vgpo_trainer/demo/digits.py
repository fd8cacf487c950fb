"""The demo task: read handwritten digits from an image and add them up, one at a time.

An image is a 3 x 3 grid of 16-pixel cells. Two to four cells hold a digit from scikit-learn's ``load_digits`` (8 x 8
scans of real handwriting); the rest are empty. In reading order the digits 3, 8, 4 call for the response
``0+3=3, 3+8=11, 11+4=15. 15``, and the reward is 1 when the number after the full stop is the right one. Every step of
the response has to look at the image again, which is what a visually-guided objective is about.

Training and evaluation never share a scan: one fixed third of the scans of each digit is held out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from PIL import Image

from vgpo_trainer.rewards import completion_text

GRID = 3  # cells a side
CELL = 16  # pixels a side of a cell: one patch of the vision tower
IMAGE_SIZE = GRID * CELL
MIN_DIGITS, MAX_DIGITS = 2, 4
PROMPT = "Add the digits."
HELD_OUT_SHARE = 1 / 3
MAX_RESPONSE_TOKENS = 40  # the longest solution has 35 characters and an end

Split = Literal["train", "held_out"]

_FINAL_ANSWER = re.compile(r"\.\s*(\d+)\s*$")


@dataclass(frozen=True)
class Problem:
    """One image and what is written on it.

    Attributes:
        image: RGB, ``IMAGE_SIZE`` pixels a side.
        digits: the digits in reading order.
        cells: the cell of each digit, counted from the top left; increasing.
        scans: the row of each digit in ``load_digits``.
    """

    image: Image.Image
    digits: tuple[int, ...]
    cells: tuple[int, ...]
    scans: tuple[int, ...]

    @property
    def answer(self) -> str:
        """The sum of the digits, as the response has to write it."""
        return str(sum(self.digits))

    @property
    def solution(self) -> str:
        """The response that the warm start teaches: every partial sum, then the answer."""
        return solution_text(self.digits)

    def row(self) -> dict[str, Any]:
        """The problem as a dataset row: a conversational prompt, the image, and the answer for the reward.

        The prompt is what TRL and a processor's chat template take, with a part where the image stands::

            text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
            inputs = processor(text=text, images=row["image"], return_tensors="pt")
        """
        content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        return {"prompt": [{"role": "user", "content": content}], "image": self.image, "answer": self.answer}


def solution_text(digits: Sequence[int]) -> str:
    """Spell out a sum: ``(3, 8, 4)`` gives ``0+3=3, 3+8=11, 11+4=15. 15``."""
    steps, total = [], 0
    for digit in digits:
        steps.append(f"{total}+{digit}={total + digit}")
        total += digit
    return f"{', '.join(steps)}. {total}"


def final_answer(response: str) -> str | None:
    """The number that a response ends with, after its last full stop; None when it does not end that way."""
    match = _FINAL_ANSWER.search(response)
    return match.group(1) if match else None


def exact_answer_reward(
    completions: Sequence[Any],
    answer: Sequence[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> list[float]:
    """Reward for TRL: 1.0 where the final number of a completion equals the answer, else 0.0.

    Args:
        completions: Texts, or lists of chat messages whose last is the completion.
        answer: The expected number of each completion.
        log_extra: TRL's; told which completions are ``correct``.
        log_metric: TRL's; told the ``accuracy``.
    """
    correct = [
        final_answer(completion_text(completion)) == expected
        for completion, expected in zip(completions, answer, strict=True)
    ]
    if log_extra is not None:
        log_extra("correct", correct)
    if log_metric is not None and correct:
        log_metric("accuracy", sum(correct) / len(correct))
    return [float(right) for right in correct]


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans, upsampled to the size of a cell (uint8 ``[n, CELL, CELL]``, ink bright), and their digits ``[n]``."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    ink = (bunch.images * (255.0 / 16.0)).astype(np.uint8)
    cells = np.stack([np.asarray(Image.fromarray(scan).resize((CELL, CELL), Image.Resampling.BICUBIC)) for scan in ink])
    return cells, bunch.target.astype(np.int64)


@cache
def scan_indices(split: Split) -> tuple[tuple[int, ...], ...]:
    """The rows of ``load_digits`` that a split may use, for each digit 0 to 9. The splits are disjoint and fixed."""
    _, labels = _scans()
    rng = np.random.default_rng(0)
    chosen = []
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(labels == digit))
        held_out = int(len(rows) * HELD_OUT_SHARE)
        chosen.append(tuple(int(row) for row in (rows[:held_out] if split == "held_out" else rows[held_out:])))
    return tuple(chosen)


def make_problem(rng: np.random.Generator, split: Split) -> Problem:
    """Draw one problem: how many digits, which digits, which cells, and whose handwriting."""
    scans, _ = _scans()
    count = int(rng.integers(MIN_DIGITS, MAX_DIGITS + 1))
    cells = np.sort(rng.choice(GRID * GRID, size=count, replace=False))
    digits = rng.integers(0, 10, size=count)
    rows = scan_indices(split)
    chosen = [int(rng.choice(rows[digit])) for digit in digits]

    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    for cell, scan in zip(cells, chosen, strict=True):
        top, left = CELL * (cell // GRID), CELL * (cell % GRID)
        canvas[top : top + CELL, left : left + CELL] = scans[scan]
    image = Image.fromarray(255 - canvas).convert("RGB")  # dark ink on white paper
    return Problem(image, tuple(map(int, digits)), tuple(map(int, cells)), tuple(chosen))


def make_problems(count: int, split: Split, seed: int) -> list[Problem]:
    """``count`` problems of a split; the same seed gives the same problems."""
    rng = np.random.default_rng([seed, 0 if split == "train" else 1])
    return [make_problem(rng, split) for _ in range(count)]
