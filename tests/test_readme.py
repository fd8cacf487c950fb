"""The README's promises that a machine can check: its code runs, its commands and its links exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_three_lines_run() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    batch, length = 2, 6
    visual_mask = torch.zeros(batch, length, dtype=torch.bool)
    visual_mask[:, :2] = True
    logp = torch.randn(batch, 3, requires_grad=True)
    scope = {
        "hidden": torch.randn(batch, length, 4),
        "visual_mask": visual_mask,
        "response_mask": torch.ones(batch, 3, dtype=torch.bool),
        "group_ids": torch.zeros(batch, dtype=torch.int64),
        "logp": logp,
        "old_logp": logp.detach(),
        "advantages": torch.tensor([1.0, -1.0]),
    }
    exec(code, scope)
    scope["loss"].backward()
    assert logp.grad is not None and logp.grad.ne(0).all()
    assert scope["factors"].shape == (scope["advantages"][:, None] * scope["factors"]).shape == (batch, 3)


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    pages = README + (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", pages, re.MULTILINE)) <= set(phony.split())


def test_every_link_into_the_repository_leads_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets and not [target for target in targets if not (ROOT / target).exists()]
