"""What a sampler that truncates keeps of a distribution."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels.backends import wide_dtype


class Truncation(NamedTuple):
    """Settings of a sampler, applied one after the other: min-p, then top-k, then top-p on what is left.

    Attributes:
        top_k: How many of the likeliest tokens are kept, and all that are as likely as the last of them; 0: all.
        top_p: Of what is left, renormalised, the likeliest tokens are kept until their mass reaches this, the one that
            crosses it included; 1: all.
        min_p: Tokens are kept that have this share of the largest probability; 0: all.

    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def cuts(self) -> bool:
        """Whether anything may be left out."""
        return self != Truncation()

    def kept(self, logits: Tensor, columns: Tensor) -> Tensor:
        """Return of each row the log of the mass that is kept, and 1 where ``columns`` is kept, 0 elsewhere.

        Args:
            logits: ``[N, V]``, of the whole vocabulary.
            columns: The target of each row, ``[N]``.

        Returns:
            ``[2, N]`` in logits' dtype; the mass is NaN where a row has no distribution. Of tokens that are as likely
            as the least likely one kept, the mass has those that the sampler keeps; as a target each counts as kept.

        """
        logp = logits.log_softmax(-1)
        least = torch.full_like(logp[:, :1], -math.inf)
        if self.min_p > 0:
            least = logp.amax(-1, keepdim=True) + math.log(self.min_p)
        if 0 < self.top_k < logp.shape[1]:
            least = torch.maximum(least, logp.topk(self.top_k).values[:, -1:])
        if self.top_p < 1:
            ordered = logp.sort(-1, descending=True).values
            shares = torch.where(ordered >= least, ordered.exp().to(wide_dtype(logits.device)), 0.0)
            before = shares.cumsum(-1) - shares
            stays = (ordered >= least) & (before < self.top_p * shares.sum(-1, keepdim=True))
            stays[:, 0] = True
            mass = torch.where(stays, shares, 0.0).sum(-1).log().to(logits.dtype)
            least = torch.where(stays, ordered, math.inf).amin(-1, keepdim=True)
        else:
            mass = torch.where(logp >= least, logp, -math.inf).logsumexp(-1)
        mass = torch.where(logp.isnan().any(-1), math.nan, mass)
        target = logp.gather(-1, columns[:, None])
        return torch.stack([mass, (target >= least).squeeze(-1).to(logits.dtype)])
