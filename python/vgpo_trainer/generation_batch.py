"""A generation batch before TRL generates from it: which responses are a group, and which rows have no image."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from vgpo_trainer.rollouts import column_images, has_video, prompt_text, row_images

NAMED = 5  # as many groups as a warning names


class RowError(ValueError):
    """What is wrong with a row of a generation batch.

    Args:
        index: Its place in the batch of its process.
        message: What a sentence says that begins with the row's name and a colon.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def row_name(row: Mapping[str, Any], index: int, process: int | None = None) -> str:
    """Return how messages call a row: by its ``row`` column, else by its place and the begin of its prompt.

    Args:
        row: The row.
        index: Its place in the generation batch of its process.
        process: The process, where there are several.
    """
    if isinstance(row.get("row"), str):
        return str(row["row"])
    whose = "the generation batch" if process is None else f"process {process}'s generation batch"
    return f"row {index} of {whose}, {prompt_text(row.get('prompt') or '')[:80]!r}"


class RowFacts(NamedTuple):
    """What processes tell each other about a row.

    Attributes:
        prompt_id: Of the row's column; ``None`` without one.
        has_image: Whether it holds an image, in a column or inside its messages.
        has_video: The same of a video.
    """

    prompt_id: Hashable | None
    has_image: bool
    has_video: bool = False

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> RowFacts:
        """Read them from a row.

        Raises:
            TypeError: Its ``prompt_id`` is neither an integer nor a string.
        """
        given = row.get("prompt_id")
        name = given
        if getattr(given, "ndim", None) == 0:  # a scalar of numpy or torch
            name = given.item()
        if isinstance(name, float) and math.isnan(name):
            raise TypeError("prompt_id is NaN, as tables write a missing one: give None to a row that has none")
        if isinstance(name, bool) or not isinstance(name, (int, str, type(None))):
            raise TypeError(f"prompt_id must be an integer or a string, got a {type(given).__name__}: {given!r:.80}")
        return cls(name, bool(row_images(row)), has_video(row))


def group_ids(prompt_ids: Sequence[Hashable | None], num_generations: int) -> list[int]:
    """Return the group of each response of a generation batch.

    TRL's loader repeats each row ``num_generations`` times in order, over all processes, and its advantages compare
    responses by that order. So does this, whatever a row holds: a group is named by the place of its first response.

    Args:
        prompt_ids: Of all processes' rows, in the order of the processes; rows that share one that is not ``None`` are
            a group wherever they stand.
        num_generations: Responses to each row.
    """
    first: dict[tuple[str, Hashable], int] = {}
    keys = (
        ("place", place // num_generations) if name is None else ("id", name) for place, name in enumerate(prompt_ids)
    )
    return [first.setdefault(key, place) for place, key in enumerate(keys)]


def warn_of_sizes(
    groups: Sequence[int], prompt_ids: Sequence[Hashable | None], num_generations: int, warned: set[str]
) -> None:
    """Warn of groups of another size than ``num_generations``, once for those that are larger and once for smaller.

    Args:
        groups: Of all processes' responses, from :func:`group_ids`.
        prompt_ids: As for :func:`group_ids`.
        num_generations: Responses to each row.
        warned: The kinds that were warned of; those that are from now on are added.
    """
    sizes = Counter(groups)
    reasons = {
        "larger": "rows of one generation batch share a prompt_id, so their responses are compared with one another, "
        "which TRL's advantages do not do",
        "smaller": "a prompt_id must be the same each time its row is read",
    }
    for kind, reason in reasons.items():
        found = [
            f"{prompt_ids[group]!r} has {size}"
            for group, size in sizes.items()
            if size != num_generations and (size > num_generations) == (kind == "larger")
        ]
        if not found or kind in warned:
            continue
        warned.add(kind)
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        warnings.warn(
            f"groups of responses by prompt_id are {kind} than num_generations={num_generations}: prompt_id "
            f"{', '.join(found[:NAMED])}{more}; {reason}",
            stacklevel=2,
        )


class TRLRow(dict[str, Any]):
    """A row of the dataset in which TRL finds a list of its images, which may be empty.

    TRL asks a batch's first row whether it has ``images``, else ``image``, then takes them from every row by ``get``;
    a missing one becomes ``None``, and the processor takes lists alone. Those questions are answered here. The rest of
    the row is as it was: reward functions and environments are given its own columns, which TRL reads by ``items`` and
    ``[]``.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self._images = column_images(row)

    def __contains__(self, name: object) -> bool:
        """Whether the row has a column; all have images."""
        return name == "images" or super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a column; of images, the list."""
        return self._images if name == "images" else super().get(name, default)


def trl_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as TRL takes them; a batch without columns of images stays as it is."""
    return [TRLRow(row) for row in rows] if any("image" in row or "images" in row for row in rows) else rows


def refuse_mixed(rows: Sequence[Mapping[str, Any]], facts: Sequence[RowFacts], why: str) -> None:
    """Raise ValueError for a batch whose rows show different things: images, videos, or nothing.

    Args:
        rows: Of this process.
        facts: Of all processes' rows.
        why: Rows with and without images cannot be in one batch.
    """
    if len({(fact.has_image, fact.has_video) for fact in facts}) < 2:
        return
    if len({fact.has_image or fact.has_video for fact in facts}) < 2:
        raise ValueError(
            "some rows of a generation batch show videos and others images or both, which a vision tower takes in "
            f"passes of their own: {why}; train on each kind in a run of its own"
        )
    alone = next((index for index, row in enumerate(rows) if not row_images(row) and not has_video(row)), None)
    where = "a row of another process" if alone is None else f"{row_name(rows[alone], alone)},"
    raise ValueError(
        f"{where} has no image while other rows have: {why}; train on rows with images and on rows of text in runs of "
        "their own, or give every row an image"
    )
