"""Log-probabilities of an LM head, and losses made of them, in plain PyTorch: every logit at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.reference.logits import LogitMap
from vgpo_kernels.reference.policy_loss import policy_loss
from vgpo_kernels.reference.truncation import Truncation

IGNORED = -100  # the target of a row to skip, as in torch's cross-entropy

# Below this, exp() is zero in every precision. With a finite bound, zero times the distance is zero, not NaN.
FARTHEST = -1e4


def linear_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D], rows first .. first + V of the vocabulary
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N], ids in the whole vocabulary
    first: int,
    temperature: float,
    temperatures: Tensor | None,  # [N]
    logit_scale: float,
    softcap: float,
    ignore_index: int | None,
    chunk_bytes: int = 0,
    squares: bool = False,
    truncated: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the statistics that give log-probability and entropy, ``[4, N]``; 0 where the target is ``ignore_index``.

    With z the logits of a row and m the largest: m (a constant to autograd), log sum exp(z - m), z_target - m
    (-infinity if the target is not in these rows of the vocabulary), and the mean of z - m under softmax(z). Where
    every z is -infinity, so are the first three, and the mean is 0. ``chunk_bytes`` is not read.

    Behind them, constants to autograd: with ``squares`` the sum of softmax(z)^2; with ``truncated`` the two rows of
    :meth:`Truncation.kept`.
    """
    kept = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    # An ignored row may be NaN, and NaN times zero is NaN: replace it instead of multiplying by zero.
    rows = torch.where(kept[:, None], hidden.to(dtype), torch.zeros((), dtype=dtype, device=hidden.device))
    of_rows = None if temperatures is None else torch.where(kept, temperatures, 1.0)
    logits = LogitMap(temperature, of_rows, logit_scale, softcap).logits(rows @ weight.to(dtype).T, bias)
    maximum = logits.detach().amax(-1)
    # Of minus infinities alone there is nothing to measure distances from, and no probability to differentiate.
    nothing = maximum == -math.inf
    distance = logits - torch.where(nothing, 0.0, maximum)[:, None]
    log_sum = torch.where(nothing, 1.0, distance.exp().sum(-1)).log()
    mean = ((distance - log_sum[:, None]).exp() * distance.clamp(min=FARTHEST)).sum(-1)
    log_sum = torch.where(nothing, -math.inf, log_sum)
    column = columns_of(targets, first, weight.shape[0])
    own = column >= 0
    target = distance.gather(-1, column.clamp(min=0)[:, None]).squeeze(-1)
    target = torch.where(own, target, torch.full_like(target, -math.inf))
    statistics = torch.stack([maximum, log_sum, target, mean])
    constants = distance.detach()
    if squares:
        sum_squares = torch.where(nothing, 0.0, (2 * (constants - log_sum.detach()[:, None])).exp().sum(-1))
        statistics = torch.cat([statistics, sum_squares[None]])
    if truncated:
        kept_by_sampler = Truncation(top_k, top_p, min_p).kept(constants, column.clamp(min=0))
        statistics = torch.cat([statistics, kept_by_sampler])
    return torch.where(kept, statistics, torch.zeros_like(statistics))


def linear_logprob_keeping(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    first: int,
    temperature: float,
    temperatures: Tensor | None,  # [N]
    logit_scale: float,
    softcap: float,
    ignore_index: int | None,
    chunk_bytes: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return :func:`linear_logprob`'s statistics, and the products ``[N, V]``, constants to autograd.

    First come the products of rows that are not ignored; what lies behind them is not defined.
    """
    statistics = linear_logprob(
        hidden,
        weight,
        bias,
        targets,
        first,
        temperature,
        temperatures,
        logit_scale,
        softcap,
        ignore_index,
        chunk_bytes,
        dtype=dtype,
    )
    ignored = torch.zeros_like(targets, dtype=torch.bool) if ignore_index is None else targets == ignore_index
    # Those that are kept come first, and all in their order, whether or not a device sorts stably.
    place = torch.arange(len(ignored), device=ignored.device)
    rows = hidden.detach()[torch.where(ignored, place + len(ignored), place).argsort()]
    return statistics, (rows.to(dtype) @ weight.detach().to(dtype).T).to(hidden.dtype)


def columns_of(targets: Tensor, first: int, length: int) -> Tensor:
    """Place of each target among entries ``first .. first + length`` of the vocabulary, -1 outside them.

    No difference of two integers overflows, whatever they are.
    """
    column = torch.where(targets >= first, targets.clamp(min=0) - first, -1)
    return torch.where(column < length, column, -1)


def linear_logprob_backward(
    grad_statistics: Tensor,  # [4, N]
    statistics: Tensor,  # [4, N]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    first: int,
    temperature: float,
    temperatures: Tensor | None,  # [N]
    logit_scale: float,
    softcap: float,
    ignore_index: int | None,
    gradients: list[bool],
    chunk_bytes: int = 0,
    products: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`linear_logprob` w.r.t. hidden, weight and bias; empty where ``gradients`` is false.

    ``products`` are those of :func:`linear_logprob_keeping`, and not read here.
    """
    inputs = [
        None if tensor is None else tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight, bias)
    ]
    wide_hidden, wide_weight, wide_bias = inputs
    assert wide_hidden is not None and wide_weight is not None
    with torch.enable_grad():
        output = linear_logprob(
            wide_hidden,
            wide_weight,
            wide_bias,
            targets,
            first,
            *(temperature, temperatures, logit_scale, softcap),
            ignore_index,
            dtype=dtype,
        )
    wanted = [tensor for tensor, needed in zip(inputs, gradients, strict=True) if needed and tensor is not None]
    found = iter(torch.autograd.grad(output, wanted, grad_statistics.to(dtype)) if wanted else ())
    by_hidden, by_weight, by_bias = (next(found) if needed else hidden.new_empty(0) for needed in gradients)
    return by_hidden, by_weight, by_bias


def head_statistics(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    first: int,
    temperature: float,
    temperatures: Tensor | None,  # [N]
    logit_scale: float,
    softcap: float,
    statistics: Tensor,  # [4, N] or [5, N], updated
    logits: Tensor,  # [N, V], scratch
    keep: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Update the running statistics of a chunk with these rows of the vocabulary.

    They are the largest logit m so far, the sums of e and of e (z - m) with e = exp(z - m), and the target's logit.
    They start as minus infinity, 0, 0 and minus infinity. A fifth row, from 0, is the sum of e^2. With
    ``keep``, ``logits`` is hidden @ weight.T afterwards.
    """
    checks.require_separate_rows("statistics", statistics)
    checks.require_separate_rows("logits", logits)
    products = hidden.to(dtype) @ weight.to(dtype).T
    if keep:
        logits.copy_(products)
    scaled = LogitMap(temperature, temperatures, logit_scale, softcap).logits(products, bias)
    maximum, total, weighted, target, *squares = (row.to(dtype) for row in statistics)
    largest = torch.maximum(maximum, scaled.amax(-1))
    # Before the first entry of the vocabulary the sums are zero and the maximum is minus infinity: do not rescale.
    drop = torch.where(total > 0, maximum - largest, torch.zeros_like(largest))
    # A bias of minus infinity may have excluded every entry so far.
    nothing = largest == -math.inf
    distance = torch.where(nothing[:, None], scaled, scaled - largest[:, None])
    exponentials = distance.exp()
    weighted = (weighted + total * drop) * drop.exp()
    weighted = weighted + (exponentials * distance.clamp(min=FARTHEST)).sum(-1)
    total = total * drop.exp() + exponentials.sum(-1)
    column = columns_of(targets, first, weight.shape[0])
    target = torch.where(column >= 0, scaled.gather(-1, column.clamp(min=0)[:, None]).squeeze(-1), target)
    squares = [sum_squares * (2 * drop).exp() + exponentials.square().sum(-1) for sum_squares in squares]
    statistics.copy_(torch.stack([largest, total, weighted, target, *squares]))


def head_gradient(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    first: int,
    temperature: float,
    temperatures: Tensor | None,  # [N]
    logit_scale: float,
    softcap: float,
    coefficients: Tensor,  # [5, N]: maximum, log_sum, scale, slope, at_target
    logits: Tensor,  # [N, V]
    recompute: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Overwrite logits with their gradient, ``exp(x) (scale + slope x) + at_target [v = target]``.

    x is the log-probability of vocabulary entry v. With a cap, all of it is multiplied by the cap's slope. Without
    ``recompute``, ``logits`` holds hidden @ weight.T. The gradient has hidden's dtype and is written to the first V
    elements of each row.
    """
    checks.require_separate_rows("logits", logits)
    products = hidden.to(dtype) @ weight.to(dtype).T if recompute else logits.to(dtype)
    logit_map = LogitMap(temperature, temperatures, logit_scale, softcap)
    scaled = logit_map.logits(products, bias)
    maximum, log_sum, scale, slope, at_target = (row.to(dtype)[:, None] for row in coefficients)
    log_probability = scaled - maximum - log_sum
    gradient = log_probability.exp() * (scale + slope * log_probability.clamp(min=FARTHEST))
    columns = torch.arange(weight.shape[0], device=targets.device)
    own = columns_of(targets, first, weight.shape[0])[:, None] == columns
    gradient = (gradient + torch.where(own, at_target, 0.0)) * logit_map.slope_of_cap(products, bias)
    gradient_of(logits, hidden.dtype).copy_(gradient)


def gradient_of(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """View the part of fp32 ``logits [N, V]`` in which their gradient lies after :func:`head_gradient`."""
    return logits if dtype == logits.dtype else logits.view(dtype)[:, : logits.shape[1]]


def head_product(
    left: Tensor,  # [M, K]
    right: Tensor,  # [K, N]
    result: Tensor,  # [M, N]
    accumulate: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Write ``left @ right`` to ``result``, or add it."""
    checks.require_separate_rows("result", result)
    product = left.to(dtype) @ right.to(dtype)
    result.copy_(result.to(dtype) + product if accumulate else product)


def predicting_rows(response_mask: Tensor, hidden: Tensor) -> Tensor:
    """Index of the row that predicts each token: the one before its own. Rows and tokens are flattened.

    No row predicts the first token of a sequence: its index here is a row of another sequence, or -1.
    """
    token = torch.arange(response_mask.numel(), device=response_mask.device)
    if hidden.dim() == 2:
        return token - 1
    width = max(response_mask.shape[1], 1)
    return token + (token // width + 1) * (hidden.shape[1] - response_mask.shape[1]) - 1


def linear_policy_loss(
    *,
    hidden: Tensor,  # [B, S, D] or [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [B, T] or [N]
    old_logp: Tensor | None,  # targets' shape
    response_mask: Tensor,  # targets' shape
    temperature: float,
    temperatures: Tensor | None,  # targets' shape
    logit_scale: float,
    softcap: float,
    gradients: list[bool] | None = None,
    chunk_bytes: int = 0,
    recompute: bool = True,
    dtype: torch.dtype = torch.float64,
    statistics_of: Callable[..., Tensor] | None = None,
    **loss_arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the policy metrics. Without ``old_logp`` the log-probs are their own old ones.

    The rest are the other arguments of :func:`policy_loss`. ``gradients`` and ``recompute`` are not read: autograd
    differentiates this. ``statistics_of`` stands for :func:`linear_logprob`, and reads ``chunk_bytes``.
    """
    valid = response_mask.reshape(-1)
    # A token off the mask may have no row (-1). Its result is not used.
    rows = hidden.reshape(-1, hidden.shape[-1])[predicting_rows(response_mask, hidden).clamp(min=0)]
    scored = torch.where(valid, targets.reshape(-1), IGNORED)
    of_rows = None if temperatures is None else temperatures.reshape(-1)
    settings = (0, temperature, of_rows, logit_scale, softcap, IGNORED, chunk_bytes, False, False, 0, 1.0, 0.0)
    statistics_of = statistics_of or partial(linear_logprob, dtype=dtype)
    statistics = statistics_of(rows, weight, bias, scored, *settings)
    logp, entropy = (values.reshape(response_mask.shape) for values in logp_and_entropy(statistics))
    return policy_loss(
        logp=logp,
        old_logp=logp.detach() if old_logp is None else old_logp,
        response_mask=response_mask,
        entropy=entropy,
        dtype=dtype,
        **loss_arguments,
    )


def logp_and_entropy(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the target and entropy, ``[N]`` each, from :func:`linear_logprob`'s ``[4, N]``.

    The statistics are those of the whole vocabulary: where every logit is minus infinity, both are NaN.
    """
    _, log_sum, target, mean = statistics[:4]
    defined = is_distribution(statistics)
    return (target - log_sum) * defined, (log_sum - mean) * defined


def is_distribution(statistics: Tensor) -> Tensor:
    """1 where a row of :func:`linear_logprob`'s ``[4, N]`` has a logit above minus infinity, and NaN elsewhere."""
    log_sum = statistics[1].detach()
    return torch.where(log_sum == -math.inf, math.nan, torch.ones_like(log_sum))


def first_tokens(response_mask: Tensor, hidden: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Whether a token of ``response_mask`` is the first of its sequence, so that no row predicts it."""
    if cu_seqlens is None:
        column = torch.arange(response_mask.shape[1], device=response_mask.device)
        return (column == 0).expand(response_mask.shape) & (response_mask.shape[1] == hidden.shape[1])
    # An empty sequence begins where the next one does. That token is a first token, too.
    return torch.isin(torch.arange(response_mask.shape[0], device=response_mask.device), cu_seqlens[:-1])
