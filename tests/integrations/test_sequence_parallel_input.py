"""Bad input to sequence parallelism: refused before a process group is asked for anything, and without one."""

from __future__ import annotations

import re

import pytest
import torch
from bad_input import (
    OTHERS,
    Bad,
    Subject,
    boundaries,
    flags,
    floating,
    integers,
    mask,
    temperatures,
    whole_numbers,
    without,
)

from vgpo_kernels.integrations.sequence_parallel import (
    gather_tokens,
    next_tokens,
    parallel_focus,
    parallel_token_logprob,
    zigzag_positions,
)

IDS = torch.arange(36).view(4, 9) % 7
POSITIONS = torch.tensor([0, 1, 2, 7, 8])
BOUNDARIES = torch.tensor([0, 4, 15, 30, 36])
NO_PLACE = [
    Bad("falling", torch.tensor([0, 1, 7, 2, 8]), ValueError, r"positions must increase.*\[0, 1, 7, 2, 8\]"),
    Bad("negative", POSITIONS - 1, ValueError, r"positions must increase from 0.*\[-1, 0, 1, 6, 7\]"),
]


def split(packed: bool) -> tuple[Subject, Subject, Subject]:
    """Return the functions of masks or tokens of a whole batch, and of a rank's rows."""
    ids, scored = (IDS.view(-1), IDS.view(-1) > 3) if packed else (IDS, IDS[:, 3:] > 3)
    scored = scored & ~torch.isin(torch.arange(36), BOUNDARIES) if packed else scored
    hidden = torch.rand(5, 8) if packed else torch.rand(4, 5, 8)
    layout = {"cu_seqlens": BOUNDARIES} if packed else {}
    places = [*integers(POSITIONS), *NO_PLACE]
    # Other numbers of features, scored positions, or positions in all are another batch.
    features = {"7 of dimension 2", "1 of dimension 2"} if not packed else {"7 of dimension 1", "1 of dimension 1"}
    masks = mask(scored) if packed else without(mask(scored), "1 of dimension 1", "5 of dimension 1")
    whole = mask(ids > 3) if packed else without(mask(ids > 3), "8 of dimension 1")
    tokens = integers(ids) if packed else without(integers(ids), "8 of dimension 1")
    weight, bias = torch.rand(7, 8), torch.rand(7)
    given = {"hidden": hidden, "response_mask": scored, "positions": POSITIONS} | layout
    first = scored.clone()
    first[15 if packed else 0] = True
    unpredicted = [Bad("at a first token", first, ValueError, "True at 1 of them")] if packed else []
    cut = {"cu_seqlens": boundaries(BOUNDARIES)} if packed else {}
    targets = {"input_ids": ids, "positions": POSITIONS, "response_mask": scored} | layout
    return (
        Subject(
            parallel_focus,
            given | {"visual_mask": ids == 2},
            {
                "hidden": without(floating(hidden), *features),
                "visual_mask": whole,
                "response_mask": masks,
                "positions": places,
                "visibility": [Bad("another", "some", ValueError, "visibility must be one of all, causal, got 'some'")],
                **cut,
            },
        ),
        Subject(
            parallel_token_logprob,
            given | {"input_ids": ids, "weight": weight, "bias": bias},
            {
                "hidden": without(floating(hidden), *features),
                "weight": without(floating(weight), "1 of dimension 0", "6 of dimension 0"),
                "input_ids": tokens,
                "response_mask": [*masks, *unpredicted],
                "positions": places,
                "bias": floating(bias),
                **{name: OTHERS[name] for name in ("logit_scale", "softcap", "chunk_bytes", "recompute")},
                "temperature": temperatures(),
                "return_entropy": flags(),
                **cut,
            },
        ),
        Subject(
            next_tokens,
            targets,
            {
                "input_ids": tokens,
                "positions": [one for one in places if "dimension 0" not in one.why],
                "response_mask": masks,
                **cut,
            },
        ),
    )


SUBJECTS = {
    f"{made.function.__name__}, {'packed' if packed else 'padded'}": made
    for packed in (False, True)
    for made in split(packed)
} | {
    "gather_tokens": Subject(
        gather_tokens,
        {"values": torch.rand(4, 5), "positions": POSITIONS, "length": 9},
        {
            "values": without(floating(torch.rand(4, 5)), "1 of dimension 0", "3 of dimension 0", "one dimension more"),
            "positions": integers(POSITIONS),
            "length": whole_numbers(-1),
        },
    ),
    "zigzag_positions": Subject(
        zigzag_positions,
        {"length": 9, "ranks": 2, "rank": 1},
        {
            "length": whole_numbers(-1),
            "ranks": whole_numbers(0, -1),
            "rank": [*whole_numbers(-1), Bad("too large", 2, ValueError, "rank must be below ranks, 2, got 2")],
        },
    ),
}
CASES = [pytest.param(made, name, id=f"{label}: {name}") for label, made in SUBJECTS.items() for name in made.bad]


@pytest.mark.parametrize(("made", "name"), CASES)
def test_what_is_bad_is_refused(made: Subject, name: str) -> None:
    for why, value, error, says in made.refusals()[name]:
        with pytest.raises(error) as caught:
            made.function(**(made.good | {name: value}))
        assert re.search(says, str(caught.value), re.DOTALL), f"{name} {why}: {caught.value}"


@pytest.mark.parametrize("label", SUBJECTS)
def test_what_is_good_asks_for_the_process_group(label: str) -> None:
    made = SUBJECTS[label]
    if label.startswith(("next_tokens", "zigzag")):
        made.function(**made.good)
        return
    with pytest.raises(ValueError, match="process group has not been initialized"):
        made.function(**made.good)
