"""Speed of policy_loss: loss, metrics and gradient in one pass over the tokens.

Bytes a token: logp, old_logp and the factor (12) and the mask (1) in, the gradient (4) out; backward reads that and
writes it scaled (8). Flops: two exponentials and some sixty other operations a token.

Prediction for the CPU: arithmetic and not memory decides; an order faster than a chain of torch's operations, which
reads and writes an array each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from tolerance import assert_close
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import (
    GPU_TOKENS,
    Case,
    Op,
    Peer,
    Tokens,
    by_reference,
    compare,
    copy_ceiling,
    normals,
    with_gradient,
)
from vgpo_kernels import policy_loss


def loss_case(size: Tokens, dtype: torch.dtype, device: torch.device, seed: int) -> Case:
    """Forward and backward on drawn log-probs, beside the same in torch, eager and compiled."""
    normal = normals(seed, device)
    logp = -normal(*size).abs()
    old_logp = logp + 0.2 * normal(*size)
    advantages, factors = normal(size.batch), 1 + 0.1 * normal(*size)
    mask = torch.ones(size, dtype=torch.bool, device=device)
    compiled = torch.compile(peers.loss, dynamic=False)

    def ours() -> tuple[Tensor, Tensor]:
        return with_gradient(lambda leaf: policy_loss(leaf, old_logp, advantages, mask, factors=factors).loss, logp)

    def theirs(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        return with_gradient(lambda leaf: function(leaf, old_logp, advantages, mask, factors), logp)

    exact = cache(lambda: by_reference(ours))

    def check(found: tuple[Tensor, Tensor], bound: float) -> None:
        assert_close(found[0], exact()[0], name="loss", floor=bound)
        compare("gradient", found[1], exact()[1], bound)

    moved = 25 * size.batch * size.length
    return Case(
        run=ours,
        check=check,
        ceiling=copy_ceiling(moved),
        bytes=moved,
        peers={
            "PyTorch, no metrics": Peer(lambda: theirs(peers.loss)),
            "torch.compile, no metrics": Peer(lambda: theirs(compiled)),
        },
    )


OPS = (
    Op(
        name="policy_loss",
        make=loss_case,
        cpu=(Tokens(8, 2048), Tokens(64, 4096)),
        gpu=GPU_TOKENS,
        small=Tokens(8, 256),
        dtypes=(torch.float32,),
    ),
)


def test_policy_loss(speed, setting) -> None:
    speed(setting)
