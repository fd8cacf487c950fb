"""The README's three lines run, and their gradient is there. Links and commands of all pages: test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
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
