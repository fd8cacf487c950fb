"""Log-probabilities of an LM head whose vocabulary is split over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.ops.linear_logprob import combine_slices, linear_logprob_slice
from vgpo_kernels.reference.linear_logprob import IGNORED


def parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    first: int,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    ignore_index: int | None = IGNORED,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`vgpo_kernels.linear_logprob` where each rank holds some rows of the weight.

    Every rank calls it with the same hidden states and targets, gets the same results, and has to compute the same loss
    from them. The ranks exchange four numbers per target; no logit leaves its rank. The gradient w.r.t. this rank's
    rows of the weight is complete, and the one w.r.t. hidden is summed over ranks: both are those of one process with
    the whole weight.

    Args:
        hidden: As in :func:`vgpo_kernels.linear_logprob`, ``[..., D]``, the same on every rank.
        weight: This rank's rows of the LM head, ``[v, D]``. Ranks may hold different numbers of rows.
        targets: Token ids in the whole vocabulary, ``[...]``, the same on every rank.
        first: Where this rank's rows begin in the vocabulary. Together the ranks cover each row once.
        group: The ranks; default: all.
        bias: The bias of these rows, ``[v]``.
        temperature: As in :func:`vgpo_kernels.linear_logprob`; a tensor is the same on every rank.
        logit_scale: As in :func:`vgpo_kernels.linear_logprob`.
        softcap: As in :func:`vgpo_kernels.linear_logprob`.
        return_entropy: Return the entropies as well.
        ignore_index: As in :func:`vgpo_kernels.linear_logprob`.
        chunk_bytes: As in :func:`vgpo_kernels.linear_logprob`.

    Returns:
        Log-probabilities in targets' shape, float32; with ``return_entropy`` a pair, with the entropies in nats.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or settings do not fit together.

    """
    both = checks.flag("return_entropy", return_entropy)
    own = linear_logprob_slice(
        _Replicated.apply(checks.require_floating("hidden", hidden), group),  # type: ignore[no-untyped-call]
        weight,
        targets,
        first=first,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        chunk_bytes=chunk_bytes,
    )
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own.detach(), group=group)
    # The other ranks' slices are constants here: each rank differentiates its own.
    gathered[dist.get_rank(group)] = own
    logp, entropy = combine_slices(torch.stack(gathered), targets, ignore_index=ignore_index)
    return (logp, entropy) if both else logp


class _Replicated(torch.autograd.Function):
    """Marks a tensor that is the same on every rank: backward sums its gradient over ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
