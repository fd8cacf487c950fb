"""A generation batch before TRL generates from it: which responses are a group, and which rows have no image."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from vgpo_trainer.rollouts import prompt_text, row_images

NAMED = 5  # as many groups as a warning names


class RowFacts(NamedTuple):
    """What processes tell each other about a row.

    Attributes:
        prompt_id: Of the row's column; ``None`` without one.
        has_image: Whether it holds an image, in a column or inside its messages.
    """

    prompt_id: Hashable | None
    has_image: bool

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> RowFacts:
        """Read them from a row.

        Raises:
            TypeError: Its ``prompt_id`` is neither an integer nor a string.
        """
        name = row.get("prompt_id")
        name = name.item() if hasattr(name, "item") else name  # a scalar of numpy or torch
        if name is not None and not isinstance(name, (int, float, str, bytes)):
            raise TypeError(f"prompt_id must be an integer or a string, got a {type(name).__name__}")
        return cls(name, bool(row_images(row)))


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


def listed_images(row: Mapping[str, Any]) -> list[Any]:
    """Images of a row's ``images`` or ``image`` column, the one of the two that TRL reads; none where it is empty."""
    if "images" in row:
        return [] if row["images"] is None else list(row["images"])
    return [] if row.get("image") is None else [row["image"]]


def with_image_lists(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as TRL takes them where the image of some is missing: each with a list, which may be empty.

    TRL makes ``None`` of a missing image and hands it to the processor, which takes lists alone.
    """
    missing = [row for row in rows if row.get("images", row.get("image", ())) is None]
    return [{**row, "images": listed_images(row)} for row in rows] if missing else rows


def refuse_mixed(rows: Sequence[Mapping[str, Any]], facts: Sequence[RowFacts], why: str) -> None:
    """Raise ValueError for a batch in which some rows have an image and others none.

    Args:
        rows: Of this process.
        facts: Of all processes' rows.
        why: Rows with and without images cannot be in one batch.
    """
    if len({fact.has_image for fact in facts}) < 2:
        return
    alone = next((index for index, row in enumerate(rows) if not row_images(row)), None)
    where = "a row of another process"
    if alone is not None:
        where = f"row {alone} of the generation batch, {prompt_text(rows[alone].get('prompt', ''))[:80]!r},"
    raise ValueError(
        f"{where} has no image while other rows have: {why}; train on rows with images and on rows of text in runs of "
        "their own, or give every row an image"
    )
