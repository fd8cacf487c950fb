"""Bad input: every argument of every public function refuses what it cannot use, by name and before any work."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from bad_input import Subject, subjects

import vgpo_kernels
from vgpo_kernels import backends

BUILT = backends.describe()["built"]
SUBJECTS = subjects()
ARGUMENTS = [
    pytest.param(made, name, id=f"{label}: {name}") for label, made in SUBJECTS.items() for name in sorted(made.bad)
]
# Results, what a loss looks at, and the module of backends, whose one function that takes an argument is public by
# itself.
RESULTS = {"BatchError", "BatchFindings", "Finding", "LinearDivergence", "LinearLogprob", "PolicyLoss", "TokenShaping"}
RESULTS |= {"VisualWeights"}
NOT_CALLED = RESULTS | {"backends", "ViewTerm"}


def test_the_table_has_every_public_function() -> None:
    listed = {label.split(", ")[0] for label in SUBJECTS}
    assert set(vgpo_kernels.__all__) - NOT_CALLED - listed == set()


@pytest.mark.parametrize("label", SUBJECTS)
def test_the_table_has_every_argument(label: str) -> None:
    made = SUBJECTS[label]
    unlisted = made.arguments() - {name for name, values in made.bad.items() if values}
    if "padded" in label:
        unlisted = {name for name in unlisted if not name.startswith("cu_seqlens")}
    assert unlisted == set()


@pytest.mark.parametrize("label", SUBJECTS)
def test_what_is_good_is_accepted(backend_name: str, device: torch.device, label: str) -> None:
    good = SUBJECTS[label].good
    good = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in good.items()}
    SUBJECTS[label].function(**good)


def error_of(made: Subject, changed: dict[str, Any]) -> Exception | None:
    try:
        made.function(**(made.good | changed))
    except Exception as error:
        return error
    return None


# Nothing is launched for what is refused, so that one backend with kernels stands for all of them.
@pytest.mark.parametrize("backend_name", ["reference", *(["cpp"] if BUILT["cpp"] else [])], indirect=True)
@pytest.mark.parametrize(("made", "name"), ARGUMENTS)
def test_what_is_bad_is_refused_by_name(backend_name: str, made: Subject, name: str) -> None:
    for why, value, error, says in made.refusals()[name]:
        raised = error_of(made, {name: value})
        message = str(raised)
        assert isinstance(raised, error), f"{name} {why}: {raised!r}"
        assert re.search(rf"\b{name}\b", message), f"{name} {why}, but the message names others: {message}"
        assert re.search(says, message), f"{name} {why}, but the message does not say so: {message}"
