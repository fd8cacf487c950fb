"""Log-probabilities, losses and divergences of an LM head whose vocabulary is split over the ranks of a process group.

Every function here is called by every rank with the same hidden states, and with this rank's rows of the weight.

**The gradient w.r.t. hidden** is that of one process with the whole weight, the same on every rank: the backward pass
sums it over ranks, D numbers a row in hidden's dtype. Layers that every rank has whole need no more. What comes before
must not sum it again:

- Megatron, tensor parallelism: hidden states are the same on every rank after the decoder. Pass them as they are, not
  through ``copy_to_tensor_model_parallel_region``.
- Megatron, sequence parallelism: each rank has a part of the rows. Gather them by
  ``gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)``, whose backward pass takes this
  rank's part of the gradient. With its default, ``True``, it would sum equal gradients, and be too large by the number
  of ranks. Megatron's states are ``[S, B, D]``: these functions take ``[B, S, D]``.
- A replicated DTensor: ``hidden.to_local(grad_placements=[Replicate()])``.

**A padded vocabulary**, as Megatron pads it to a multiple of 128 times the ranks: rows past the real vocabulary must
not count. Pass ``weight[: vocabulary - first]`` (and the bias alike) on the ranks that have such rows; autograd gives
the others a gradient of zero. A rank with nothing but padding passes all its rows, and a bias of minus infinity. (Not
with a ``softcap``, which makes that bias finite.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.config import VGPOConfig, Visibility
from vgpo_kernels.hints import explained
from vgpo_kernels.ops import registry
from vgpo_kernels.ops.divergence_measures import LinearDivergence, combine_divergences, divergence_totals
from vgpo_kernels.ops.linear_divergence import by_totals, linear_divergence_slice
from vgpo_kernels.ops.linear_logprob import LinearLogprob, combine_slices, linear_logprob_slice
from vgpo_kernels.ops.linear_vgpo_loss import checked_arguments, scored_rows, warn_of_detached, with_factors
from vgpo_kernels.ops.policy_loss import POLICY_METRICS, PolicyLoss, unpack
from vgpo_kernels.reference.linear_logprob import IGNORED
from vgpo_kernels.reference.logits import LogitMap


@explained
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
    recompute: bool | None = None,
) -> Tensor | tuple[Any, ...]:
    """:func:`vgpo_kernels.linear_logprob` where each rank holds some rows of the weight.

    Every rank calls it with the same hidden states and targets, gets the same results, and has to compute the same loss
    from them. A rank sends four numbers per target, fp32, five with sums of squares; no logit leaves its rank. The
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
        recompute: As in :func:`vgpo_kernels.linear_logprob`, of the logits of this rank's rows.

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
        recompute=recompute,
    )
    found = combine_slices(_of_every_rank(own, group), targets, ignore_index=ignore_index)
    if isinstance(found, LinearLogprob):
        return found if both else found._replace(entropy=None)
    return found if both else found[0]


@explained
def parallel_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    first: int,
    group: dist.ProcessGroup | None = None,
    factors: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_bytes: int | None = None,
    recompute: bool | None = None,
    **policy_loss_options: Any,
) -> PolicyLoss:
    """:func:`vgpo_kernels.linear_policy_loss` where each rank holds some rows of the weight.

    Every rank gets the same loss and metrics, bit by bit, and calls ``backward`` on it. The gradients are those of one
    process with the whole weight: this rank's rows of the weight have theirs complete, and hidden's is summed over
    ranks. (The head of this module says what that means for layers that are parallel themselves.)

    Only rows that predict a scored token are computed and sent. For each of them a rank sends four numbers, fp32, and
    in the backward pass, where hidden needs a gradient, D numbers in hidden's dtype. The loss itself is computed by
    every rank, from one log-probability and one entropy a token.

    The backward pass computes the logits again, four matrix products in all: a loss is known when every rank's share
    of the normalisers is, so nothing can be done in one sweep, as :func:`vgpo_kernels.linear_policy_loss` does.

    Args:
        hidden: As in :func:`vgpo_kernels.linear_policy_loss`, ``[B, S, D]`` or ``[N, D]``, the same on every rank.
        weight: This rank's rows of the LM head, ``[v, D]``. Ranks may hold different numbers of rows.
        targets: Token ids in the whole vocabulary, in response_mask's shape. One that no rank has is not noticed: its
            log-probability is minus infinity.
        old_logp: As in :func:`vgpo_kernels.linear_policy_loss`, as all that follows: the same on every rank.
        advantages: Per response ``[B]`` or per token.
        response_mask: True at scored tokens, ``[B, T]`` with T <= S or ``[N]``.
        first: Where this rank's rows begin in the vocabulary. Together the ranks cover each row once.
        group: The ranks that share the vocabulary; default: all.
        factors: Factor of each token's advantage, in response_mask's shape.
        bias: The bias of these rows, ``[v]``.
        temperature: As in :func:`vgpo_kernels.linear_policy_loss`; a tensor is the same on every rank.
        logit_scale: As in :func:`vgpo_kernels.linear_logprob`.
        softcap: As in :func:`vgpo_kernels.linear_logprob`.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        chunk_bytes: As in :func:`vgpo_kernels.linear_logprob`.
        recompute: ``False``: keep the logits of this rank's rows in hidden's dtype, and save a matrix product, as in
            :func:`vgpo_kernels.linear_logprob`.
        **policy_loss_options: Every other keyword of :func:`vgpo_kernels.policy_loss` but ``entropy`` and ``views``.

    Returns:
        A :class:`vgpo_kernels.PolicyLoss`, differentiable in hidden, weight and bias.

    Raises:
        TypeError: An argument has the wrong type or dtype, or an option is unknown.
        ValueError: Shapes, devices, boundaries or options do not fit together, or a scored token has nothing that
            predicts it.

    """
    warn_of_detached(hidden, weight)
    arguments, rates = checked_arguments(
        hidden,
        weight,
        targets,
        old_logp,
        advantages,
        response_mask,
        factors=factors,
        bias=bias,
        mapping=(temperature, logit_scale, softcap),
        cu_seqlens=cu_seqlens,
        whole=False,
        **policy_loss_options,
    )
    states, rows, offsets, ids = (arguments.pop(name) for name in ("hidden", "weight", "bias", "targets"))
    temperatures = {name: arguments.pop(name) for name in LogitMap._fields}["temperatures"]
    mask: Tensor = arguments["response_mask"]
    index, place = scored_rows(mask, states, arguments["cu_seqlens"])
    found = parallel_logprob(
        states[place],
        rows,
        ids.view(-1)[index],
        first=first,
        group=group,
        bias=offsets,
        temperature=temperature if temperatures is None else temperatures.view(-1)[index],
        logit_scale=logit_scale,
        softcap=softcap,
        return_entropy=True,
        ignore_index=None,
        chunk_bytes=chunk_bytes,
        recompute=recompute,
    )
    logp, entropy = (values.new_zeros(mask.numel()).index_copy(0, index, values).view_as(mask) for values in found)
    arguments |= {"logp": logp, "entropy": entropy}
    if old_logp is None:
        arguments["old_logp"] = logp.detach()
    dtype = checks.compute_dtype(*arguments.values())
    result = registry.call("policy_loss", mask.device, dtype, **arguments)
    loss, metrics = unpack(result, POLICY_METRICS, dtype, arguments)
    return PolicyLoss(loss, metrics | rates)


@explained
def parallel_vgpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    visual_mask: Tensor | None,
    response_mask: Tensor,
    group_ids: Tensor,
    config: VGPOConfig,
    *,
    first: int,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    prototype: Tensor | None = None,
    prototype_index: Tensor | None = None,
    visibility: Visibility = "all",
    chunk_bytes: int | None = None,
    recompute: bool | None = None,
    **policy_loss_options: Any,
) -> PolicyLoss:
    """:func:`vgpo_kernels.linear_vgpo_loss` where each rank holds some rows of the weight (paper, Eq. 3-11).

    :func:`parallel_policy_loss` with the factors that the hidden states give. Every rank has all of the states, so each
    computes focus and factors by itself, with the same bits, and nothing of them is sent. What is sent, and what the
    gradients are, stands there. Every group must be whole, as in :func:`vgpo_kernels.linear_vgpo_loss`.

    Args:
        hidden: As in :func:`vgpo_kernels.linear_vgpo_loss`, ``[B, S, D]`` or ``[N, D]``, the same on every rank.
        weight: This rank's rows of the LM head, ``[v, D]``. Ranks may hold different numbers of rows.
        targets: Token ids in the whole vocabulary, in response_mask's shape.
        old_logp: As in :func:`vgpo_kernels.linear_policy_loss`, as all that follows: the same on every rank.
        advantages: Per response ``[B]`` or per token.
        visual_mask: True at image tokens, ``[B, S]`` or ``[N]``; may be ``None`` where ``prototype`` is given.
        response_mask: True at scored tokens, ``[B, T]`` with T <= S or ``[N]``.
        group_ids: Responses to one prompt share an id, integer ``[B]``.
        config: The settings of the factors.
        first: Where this rank's rows begin in the vocabulary. Together the ranks cover each row once.
        group: The ranks that share the vocabulary; default: all.
        bias: The bias of these rows, ``[v]``.
        temperature: As in :func:`vgpo_kernels.linear_policy_loss`; a tensor is the same on every rank.
        logit_scale: As in :func:`vgpo_kernels.linear_logprob`.
        softcap: As in :func:`vgpo_kernels.linear_logprob`.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        prototype: As in :func:`vgpo_kernels.visual_focus`.
        prototype_index: As in :func:`vgpo_kernels.visual_focus`.
        visibility: As in :func:`vgpo_kernels.visual_focus`.
        chunk_bytes: As in :func:`vgpo_kernels.linear_logprob`.
        recompute: As in :func:`parallel_policy_loss`.
        **policy_loss_options: Every keyword of :func:`vgpo_kernels.policy_loss` but ``factors``, ``entropy`` and
            ``views``.

    Returns:
        A :class:`vgpo_kernels.PolicyLoss`, differentiable in hidden, weight and bias, with the metrics of
        :func:`vgpo_kernels.vgpo_loss`.

    Raises:
        TypeError: An argument has the wrong type or dtype, or an option is unknown.
        ValueError: Shapes, devices, boundaries or options do not fit together, or a scored token has nothing that
            predicts it.

    """
    warn_of_detached(hidden, weight)
    return with_factors(
        parallel_policy_loss,
        hidden,
        visual_mask,
        response_mask,
        group_ids,
        config,
        cu_seqlens=cu_seqlens,
        prototype=prototype,
        prototype_index=prototype_index,
        visibility=visibility,
        weight=weight,
        targets=targets,
        old_logp=old_logp,
        advantages=advantages,
        first=first,
        group=group,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_bytes=chunk_bytes,
        recompute=recompute,
        **policy_loss_options,
    )


@explained
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
    the whole weights. A rank sends fifteen numbers per row, fp32, and as many again for ``js`` and ``tv``, which take a
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
