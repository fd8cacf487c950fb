"""What a check of an architecture comes to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn


class Verdict(NamedTuple):
    """What a check found: ``works``, or ``refused`` by the adapter itself; with what there is to add."""

    outcome: str
    note: str = ""


def works(note: str = "") -> Verdict:
    return Verdict("works", note)


def refused(error: Exception) -> Verdict:
    return Verdict("refused", str(error))


def run(model: nn.Module, inputs: dict[str, Any], **more: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **more)
