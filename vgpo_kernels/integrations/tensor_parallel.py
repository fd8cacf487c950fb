"""Log-probabilities and divergences of an LM head whose vocabulary is split over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.ops.divergence_measures import LinearDivergence, combine_divergences, divergence_totals
from vgpo_kernels.ops.linear_divergence import by_totals, linear_divergence_slice
from vgpo_kernels.ops.linear_logprob import LinearLogprob, combine_slices, linear_logprob_slice
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
    return_sum_squares: bool = False,
    ignore_index: int | None = IGNORED,
    chunk_bytes: int | None = None,
) -> Tensor | tuple[Any, ...]:
    """:func:`vgpo_kernels.linear_logprob` where each rank holds some rows of the weight.

    Every rank calls it with the same hidden states and targets, gets the same results, and has to compute the same loss
    from them. The ranks exchange four numbers per target, five with sums of squares; no logit leaves its rank. The
    gradient w.r.t. this rank's rows of the weight is complete, and the one w.r.t. hidden is summed over ranks: both are
    those of one process with the whole weight.

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
        return_sum_squares: Return the sums of squared probabilities as well, detached. (What a sampler keeps is not
            known of slices.)
        ignore_index: As in :func:`vgpo_kernels.linear_logprob`.
        chunk_bytes: As in :func:`vgpo_kernels.linear_logprob`.

    Returns:
        Log-probabilities in targets' shape, float32; with ``return_entropy`` a pair, with the entropies in nats;
        with ``return_sum_squares`` a :class:`vgpo_kernels.LinearLogprob`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or settings do not fit together.

    """
    both = checks.flag("return_entropy", return_entropy)
    squares = checks.flag("return_sum_squares", return_sum_squares)
    own = linear_logprob_slice(
        _Replicated.apply(checks.require_floating("hidden", hidden), group),  # type: ignore[no-untyped-call]
        weight,
        targets,
        first=first,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        return_sum_squares=squares,
        ignore_index=ignore_index,
        chunk_bytes=chunk_bytes,
    )
    found = combine_slices(_of_every_rank(own, group), targets, ignore_index=ignore_index)
    if isinstance(found, LinearLogprob):
        return found if both else found._replace(entropy=None)
    return found if both else found[0]


def parallel_divergence(
    hidden: Tensor,
    other: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    first: int,
    group: dist.ProcessGroup | None = None,
    other_weight: Tensor | None = None,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    measures: Sequence[str] = ("kl",),
    js_beta: float = 0.5,
    ignore_index: int | None = IGNORED,
    chunk_bytes: int | None = None,
) -> LinearDivergence:
    """:func:`vgpo_kernels.linear_divergence` where each rank holds some rows of the weights.

    As in :func:`parallel_logprob`, every rank gets the same results, and the gradients are those of one process with
    the whole weights. The ranks exchange fifteen numbers per row, and as many again for ``js`` and ``tv``, which take a
    second pass.

    Args:
        hidden: As in :func:`vgpo_kernels.linear_divergence`, ``[..., D]``, the same on every rank.
        other: As in :func:`vgpo_kernels.linear_divergence`, the same on every rank.
        weight: This rank's rows of the LM head, ``[v, D]``. Ranks may hold different numbers of rows.
        targets: Token ids in the whole vocabulary, ``[...]``, the same on every rank, or ``None``.
        first: Where this rank's rows begin in the vocabulary. Together the ranks cover each row once.
        group: The ranks; default: all.
        other_weight: The same rows of the other view's head, ``[v, E]``.
        bias: The bias of these rows, ``[v]``.
        other_bias: The bias of the other head's rows, ``[v]``.
        temperature: As in :func:`vgpo_kernels.linear_divergence`; a tensor is the same on every rank.
        logit_scale: As in :func:`vgpo_kernels.linear_divergence`.
        softcap: Likewise.
        measures: Likewise.
        js_beta: Likewise.
        ignore_index: Likewise.
        chunk_bytes: Likewise.

    Returns:
        A :class:`vgpo_kernels.LinearDivergence`, float32 in targets' shape.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or settings do not fit together, or a measure is unknown.

    """
    states, others = (
        _Replicated.apply(checks.require_floating(name, tensor), group)  # type: ignore[no-untyped-call]
        for name, tensor in (("hidden", hidden), ("other", other))
    )

    def of_every_rank(totals: Tensor | None) -> Tensor:
        own = linear_divergence_slice(
            states,
            others,
            weight,
            targets,
            first=first,
            other_weight=other_weight,
            bias=bias,
            other_bias=other_bias,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            totals=totals,
            js_beta=js_beta,
            ignore_index=ignore_index,
            chunk_bytes=chunk_bytes,
        )
        return _of_every_rank(own, group)

    slices = of_every_rank(None)
    if "js" in measures or "tv" in measures:
        totals = divergence_totals(slices)
        shares = of_every_rank(totals)
        # Every rank's shares depend on this rank's logits, by the normalisers.
        others = torch.arange(len(shares), device=shares.device) != dist.get_rank(group)
        through_totals = _ByTotals.apply(shares.detach(), totals, js_beta)  # type: ignore[no-untyped-call]
        slices = slices + torch.where(others.view(-1, *[1] * (shares.dim() - 1)), through_totals, shares)
    return combine_divergences(slices, targets, measures=measures, ignore_index=ignore_index)


def _of_every_rank(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather what each rank has of a slice of the vocabulary, ``[R, ...]``; the others' are constants to autograd."""
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own.detach().contiguous(), group=group)
    # Each rank differentiates its own slice.
    gathered[dist.get_rank(group)] = own
    return torch.stack(gathered)


class _ByTotals(torch.autograd.Function):
    """Marks shares of slices of the vocabulary as functions of the normalisers, and of nothing else."""

    @staticmethod
    def forward(ctx: Any, shares: Tensor, totals: Tensor, js_beta: float) -> Tensor:
        ctx.save_for_backward(shares)
        ctx.js_beta = js_beta
        return shares.view_as(shares)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (shares,) = ctx.saved_tensors
        of_slices = [by_totals(*pair, ctx.js_beta) for pair in zip(shares, gradients[0], strict=True)]
        return None, torch.stack(of_slices).sum(0), None


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
