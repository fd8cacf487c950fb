"""A loss type reaches every adapter and every page, or stands here with the reason why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vgpo_kernels.config import CHOICES
from vgpo_kernels.integrations import easyr1
from vgpo_kernels.integrations.verl.losses import LOSS_MODES

ROOT = Path(__file__).resolve().parents[2]
LOSS_TYPES = set(CHOICES["loss_type"])
TOKEN_LOSS = "grpo with another aggregation, which the framework names by itself"
NOT_OFFERED = {
    "trl": {
        "gspo": "importance_sampling_level='sequence' chooses it",
        "gspo_token": "TRL has no such loss",
    },
    "verl": {
        "luspo": "verl has no such loss",
        "vespo": "verl has no such loss",
        "bnpo": TOKEN_LOSS,
        "dapo": TOKEN_LOSS,
        "dr_grpo": TOKEN_LOSS,
        "gspo": "verl's gspo is gspo_token",
    },
    "easyr1": {
        "bnpo": TOKEN_LOSS,
        "dapo": TOKEN_LOSS,
        "dr_grpo": TOKEN_LOSS,
        "luspo": "EasyR1 has no such loss",
        "vespo": "EasyR1 has no such loss",
    },
}


def offered(framework: str) -> set[str]:
    """Return the loss types that an adapter says it offers, by our names."""
    if framework == "trl":
        pytest.importorskip("trl")
        from vgpo_trainer import trl_surface

        return set(trl_surface.LOSS_TYPES)
    if framework == "verl":
        return {str(options["loss_type"]) for options in LOSS_MODES.values()}
    (listed,) = re.findall(r"loss_type: (.*)\.\n", easyr1.compute_policy_loss.__doc__ or "")
    return {{"default": "grpo"}.get(name, name) for name in re.findall(r'"(\w+)"', listed)}


@pytest.mark.parametrize("framework", NOT_OFFERED)
def test_an_adapter_offers_every_loss_type_or_says_why_not(framework: str) -> None:
    assert not offered(framework) & NOT_OFFERED[framework].keys()
    assert offered(framework) | NOT_OFFERED[framework].keys() == LOSS_TYPES


def test_pages_list_every_loss_type() -> None:
    (listed,) = re.findall(r"^\| `policy_loss` .* loss \((.*?)\)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert tuple(listed.split(", ")) == CHOICES["loss_type"]
    (modes,) = re.findall(r"^`loss_mode` (.*?) are this", (ROOT / "docs" / "verl.md").read_text(), re.MULTILINE)
    assert re.findall(r"`(\w+)`", modes) == list(LOSS_MODES)
