"""The README's losses run and agree. Links and commands of all pages: test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def make_scope() -> dict[str, Any]:
    torch.manual_seed(0)
    batch, length = 2, 6
    visual_mask = torch.zeros(batch, length, dtype=torch.bool)
    visual_mask[:, :2] = True
    return {
        "torch": torch,
        "hidden": torch.randn(batch, length, 4),
        "visual_mask": visual_mask,
        "response_mask": torch.tensor([[True, True, True], [True, True, False]]),
        "group_ids": torch.zeros(batch, dtype=torch.int64),
        "logp": torch.randn(batch, 3, requires_grad=True),
        "old_logp": torch.randn(batch, 3),
        "advantages": torch.tensor([1.0, -1.0]),
    }


def test_the_three_lines_are_your_loss_with_factors() -> None:
    yours, three_lines, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (multiplied,) = re.findall(r"`(advantage = [^`]*factors)`", README)
    scope = make_scope()
    exec(three_lines, scope)
    loss, logp = scope["loss"], scope["logp"]
    (gradient,) = torch.autograd.grad(loss, logp)
    assert scope["factors"].ne(1).any()

    first_line, second_line, *rest = yours.splitlines()
    exec("\n".join([first_line, multiplied, *rest]), scope)
    torch.testing.assert_close(loss, scope["loss"])
    torch.testing.assert_close(gradient, torch.autograd.grad(scope["loss"], logp)[0])

    exec(three_lines.replace("factors=factors, ", ""), scope)
    without_factors = scope["loss"]
    exec(yours, scope)
    torch.testing.assert_close(without_factors, scope["loss"])
    assert second_line.startswith("advantage = advantages[:, None]")


def test_the_block_to_paste_runs_and_its_batch_is_right(capsys: Any) -> None:
    *_, pasted = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(pasted, scope)
    assert capsys.readouterr().out.startswith("nothing looks wrong\nVisualWeights")
    assert scope["hidden"].grad.abs().sum() > 0 and scope["weights"].factors.ne(1).any()
