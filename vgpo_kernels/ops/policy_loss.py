"""The policy losses of the field, with per-token advantages: loss, gradient and metrics in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.config import PolicyLossOptions
from vgpo_kernels.hints import explained
from vgpo_kernels.ops import registry
from vgpo_kernels.ops.loss_terms import ViewTerm, checked_views, kernel_view, of_view, token_factors, view_call
from vgpo_kernels.ops.visual_weights import name_metrics
from vgpo_kernels.reference import policy_loss as reference
from vgpo_kernels.summaries import summary

POLICY_METRICS = (
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "dual_clip_fraction",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "approx_kl",
    "ref_kl",
    "entropy",
    "factor_mean",
    "factor_min",
    "factor_max",
    "factor_std",
    "num_tokens",
    "nonfinite_advantages",
)
# Metrics that need a tensor of the caller's. Without it they are left out.
NEEDS = {"ref_kl": "ref_logp", "entropy": "entropy"}


class PolicyLoss(NamedTuple):
    """A loss and its metrics.

    Attributes:
        loss: 0-dimensional, differentiable in ``logp`` (and ``entropy``).
        metrics: 0-dimensional tensors on the loss's device; reading one is the only thing that synchronises. One that
            was not computed is absent: ``"ref_kl"`` without ``ref_logp``, ``"entropy"`` without entropies.
            ``"nonfinite_advantages"`` is the number of scored tokens whose advantage, times its factor, is NaN or
            infinite. ``"factor_std"`` of equal factors is exactly 0. A smallest and a largest value are NaN where the
            mean is. Factors are all that multiplies advantages: token weights too, and with ``selected`` 0 or, where
            the aggregation divides by tokens, the number of all over that of the selected ones (in ``"token-mean"``
            their mean is that of the selected tokens). ``"selected_rate"`` is the share of scored tokens that are
            selected, ``"view_kl"`` the mean estimate of one view; those of several are ``"view_kl/0"`` and so on.

    """

    loss: Tensor
    metrics: dict[str, Tensor]

    def __repr__(self) -> str:
        """A few lines; ``tuple(...)`` shows every number."""
        return summary(self)


@explained
def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    factors: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    importance_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    selected: Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    num_sequences: int | float | Tensor | None = None,
    num_selected: int | float | Tensor | None = None,
    views: Sequence[ViewTerm] = (),
    **options: Any,
) -> PolicyLoss:
    """Clipped policy-gradient loss with the advantage ``advantages * factors`` (paper, Eq. 11).

    The token loss is ``importance * surrogate + kl_coef * KL - entropy_coef * entropy``, aggregated over the
    response tokens. Its gradient is computed in the same pass; backward only scales it.

    Other methods weight tokens (``token_weights``), learn from some (``selected``), or compare the policy with itself
    under another image (``views``). The first two change the surrogate alone: KL terms, the bonus, and the ratio of a
    response stay those of all its tokens.

    What is multiplied by zero is off: where ``kl_coef``, ``entropy_coef``, an advantage (times its factor) or an
    importance weight is 0, the KL term, the bonus or the surrogate adds nothing to loss or gradient, even if it is
    infinite or NaN; metrics still say what it is. A token that is not finite makes the loss so, but the gradients of
    other responses stay what they are. Ratios whose clamp or clip is active have no gradient, infinite ones included.

    Advantages per token work in every loss, also where a ratio is the whole response's: ``"gspo"`` and ``"luspo"``
    multiply it by each token's own advantage. Two losses are those of TRL:

    - ``"luspo"`` (arXiv 2602.05261) is ``"gspo"``, whose default aggregation multiplies each response's loss by its
      length.
    - ``"vespo"`` (arXiv 2602.10693): ``-phi(w) * advantage * logp`` with ``w = exp(sum_t log-ratio_t)`` and the
      detached weight ``phi(w) = w^k exp(lambda * (1 - w))``; k and lambda are chosen by the sign of a token's
      advantage. Log-ratios are bounded by +-20, ``log w`` by ``[log 1e-8, 20]``. Importance weights multiply w, not the
      surrogate: per token the product over the scored ones, per response the one given, each bounded as w is.
      ``ratio_clamp`` and the metrics of ratios are about token ratios, which ``kl_bias_correction`` multiplies by.

    Args:
        logp: Log-probabilities (natural logarithm) of the tokens under the policy, ``[B, T]`` or packed ``[N]``.
            float32, bfloat16 or float16; differentiable.
        old_logp: The same under the policy that generated the tokens, in ``logp``'s shape. Detached, like all other
            arguments but ``logp`` and ``entropy``. ``None``: the tokens are the policy's own, ``logp.detach()``. Every
            ratio is 1 then, but the gradient is not zero.
        advantages: Per response ``[B]``, or per token in ``logp``'s shape. (``[B]`` and ``[N]`` are the same shape in
            a packed batch with N = B: then the values are per response.)
        response_mask: True at scored response tokens, bool or 0 and 1, in ``logp``'s shape. Values of any
            argument off the mask are not read.
        factors: Factor of each token's advantage, in ``logp``'s shape, from :func:`visual_weights`.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        ref_logp: Log-probabilities under the reference policy, in ``logp``'s shape, for the KL term.
        entropy: Entropy of each token's distribution in nats, in ``logp``'s shape, for the bonus; differentiable.
        importance_weights: Off-policy correction of the surrogate, ``[B]`` or per token.
        token_weights: What multiplies each token's surrogate, finite and not negative, ``[B]`` or per token. (Values
            are not looked at: one below 0 would turn an advantage round.)
        selected: Tokens whose surrogate counts, bool or 0 and 1, in response_mask's shape; others are off, whatever
            their ratios, factors and weights are. The surrogate is then divided by the selected tokens: all of them in
            ``"token-mean"``, the response's own in ``"seq-mean-token-mean"``. The other aggregations divide by no
            number of tokens. Where none is selected, the surrogate is 0.
        num_tokens: Denominator of ``"token-mean"``, a number or a 0-dimensional tensor; default: the number of valid
            tokens in this call. With the number of the whole batch, the losses of its micro-batches or ranks add up to
            the loss of the whole batch. In float32's range; 0 counts as 1.
        num_sequences: Denominator of the other aggregations, a number or a 0-dimensional tensor; default: the number
            of responses B in this call. 0 counts as 1; a response's length or ``max_length`` still divides.
        num_selected: Denominator of the surrogate in ``"token-mean"`` where tokens are ``selected``, as ``num_tokens``
            is of the rest, a number or a 0-dimensional tensor; default: the number of selected tokens in this call.
            Needed beside ``num_tokens`` there: losses of micro-batches do not add up otherwise.
        views: Terms ``coef * KL(policy || view)``, each a :class:`ViewTerm`, aggregated over all response tokens.
            ``ratio_clamp`` and ``kl_bias_correction`` apply to them as to the reference's; importance weights, token
            weights and ``selected`` do not.
        **options: Fields of :class:`PolicyLossOptions`: ``loss_type="dapo"``, ``aggregation=None``,
            ``epsilon_low=0.2``, ``epsilon_high=0.28``, ``dual_clip=None``, ``kl_coef=0.0``, ``kl_estimator="k3"``,
            ``entropy_coef=0.0``, ``max_length=None`` (default: T of a padded batch), ...

    Returns:
        A :class:`PolicyLoss`. A fully masked response contributes nothing.

    Raises:
        TypeError: An argument has the wrong type or dtype, or an option is unknown.
        ValueError: Shapes, devices, boundaries or options do not fit together.

    """
    mask, boundaries = checks.response_layout(response_mask, cu_seqlens)
    arguments, chosen = loss_arguments(
        mask,
        boundaries,
        logp,
        old_logp,
        advantages,
        ref_logp=ref_logp,
        entropy=entropy,
        importance_weights=importance_weights,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        **options,
    )
    arguments["factors"], rates = token_factors(arguments, chosen, factors, token_weights, selected, num_selected)
    loss, metrics = call_with_views("policy_loss", POLICY_METRICS, arguments, chosen, views)
    return PolicyLoss(loss, metrics | rates)


def call_with_views(
    operator: str,
    names: tuple[str, ...],
    arguments: Mapping[str, Any],
    options: PolicyLossOptions,
    views: Sequence[ViewTerm],
) -> PolicyLoss:
    """Call a loss operator that is given log-probs, with checked arguments, and add the terms of views.

    ``names`` are those of the operator's metrics.
    """
    terms = checked_views(views, arguments, options)
    metric_of = ["view_kl"] if len(terms) == 1 else [f"view_kl/{index}" for index in range(len(terms))]
    free = kernel_view(terms, arguments)
    given = arguments if free is None else {**arguments, **of_view(terms[free], options)}
    device = arguments["response_mask"].device
    dtype = checks.compute_dtype(*arguments.values(), *(view.logp for view in terms))
    loss, metrics = unpack(registry.call(operator, device, dtype, **given), names, dtype, given)
    for index, view in enumerate(terms):
        if index == free:
            metrics[metric_of[index]] = metrics.pop("ref_kl")
            continue
        given = view_call(view, arguments, options)
        term = unpack(registry.call("policy_loss", device, dtype, **given), POLICY_METRICS, dtype, given)
        loss, metrics[metric_of[index]] = loss + term.loss, term.metrics["ref_kl"]
    return PolicyLoss(loss, metrics)


def loss_arguments(
    mask: Tensor,
    boundaries: Tensor | None,
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    /,
    *,
    entropy: Tensor | None = None,
    **shared: Any,
) -> tuple[dict[str, Any], PolicyLossOptions]:
    """Check the arguments of :func:`policy_loss` but those of :mod:`vgpo_kernels.ops.loss_terms`, and ``factors``.

    Returns:
        The arguments by name, as operators take them, and the options among them.

    """
    arguments, options = shared_arguments(mask, boundaries, advantages, **shared)
    if options.entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy_coef={options.entropy_coef} needs entropy, which is None")
    current = checks.per_token("logp", logp, mask, detach=False)
    arguments["logp"] = current
    # On-policy both are the same memory, which kernels read once or find in a cache.
    arguments["old_logp"] = current.detach() if old_logp is None else checks.per_token("old_logp", old_logp, mask)
    arguments["entropy"] = checks.optional_per_token("entropy", entropy, mask, detach=False)
    return arguments, options


def shared_arguments(
    mask: Tensor,
    boundaries: Tensor | None,
    advantages: Tensor,
    /,
    *,
    ref_logp: Tensor | None = None,
    importance_weights: Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    num_sequences: int | float | Tensor | None = None,
    **options: Any,
) -> tuple[dict[str, Any], PolicyLossOptions]:
    """Check the arguments that do not depend on where log-probs come from.

    Returns:
        The arguments by name, as operators take them, and the options among them.

    """
    batch = checks.batch_size(mask, boundaries)
    chosen = PolicyLossOptions(**options)
    if chosen.aggregation == "seq-mean-token-sum-norm" and chosen.max_length is None:
        if boundaries is not None:
            raise ValueError("max_length is needed by 'seq-mean-token-sum-norm' on a packed batch")
        chosen = replace(chosen, max_length=max(mask.shape[1], 1))
    if chosen.kl_coef != 0 and ref_logp is None:
        raise ValueError(f"kl_coef={chosen.kl_coef} needs ref_logp, which is None")
    arguments = {
        "advantages": checks.per_response_or_token("advantages", advantages, mask, batch),
        "response_mask": mask,
        "cu_seqlens": boundaries,
        "ref_logp": checks.optional_per_token("ref_logp", ref_logp, mask),
        "importance_weights": checks.optional_per_response_or_token(
            "importance_weights", importance_weights, mask, batch
        ),
        "num_tokens": checks.count("num_tokens", num_tokens, mask.device),
        "num_sequences": checks.count("num_sequences", num_sequences, mask.device),
        "options": chosen.as_floats(),
    }
    return arguments, chosen


def unpack(result: Any, names: tuple[str, ...], dtype: torch.dtype, arguments: Mapping[str, Any]) -> PolicyLoss:
    """Make a :class:`PolicyLoss` of what an operator (or the reference implementation) returned for ``arguments``.

    An operator that takes no entropies computes them itself.
    """
    loss, metrics = result[0], result[-1]
    if metrics.dtype != dtype:  # of the reference implementation, which computes in fp64
        loss, metrics = loss.to(dtype), metrics.to(dtype)
    named = name_metrics(names, metrics)
    for metric, tensor in NEEDS.items():
        if tensor in arguments and arguments[tensor] is None:
            del named[metric]
    return PolicyLoss(loss, named)


def fake_loss(logp: Tensor, entropy: Tensor | None, *, num_metrics: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes of a loss operator's result."""
    return (
        logp.new_empty(()),
        logp.new_empty(logp.shape),
        logp.new_empty((0,) if entropy is None else entropy.shape),
        logp.new_empty((num_metrics,)),
    )


def keep_gradients(ctx: Any, output: tuple[Tensor, ...], logp: Tensor) -> None:
    """Keep the gradients that the forward pass computed, and ``logp`` for the graph of a gradient's gradient."""
    _, grad_logp, grad_entropy, metrics = output
    ctx.save_for_backward(grad_logp, grad_entropy, logp)
    ctx.mark_non_differentiable(grad_logp, grad_entropy, metrics)
    ctx.set_materialize_grads(False)


def scaled_gradients(ctx: Any, needed: set[str], grad_loss: Tensor | None, *_: Tensor | None) -> dict[str, Tensor]:
    """Gradients w.r.t. log-probs and entropies: what the forward pass computed, times the loss's own gradient."""
    if grad_loss is None:
        return {}
    grad_logp, grad_entropy, _ = ctx.saved_tensors
    found = {"logp": grad_loss * grad_logp}
    if "entropy" in needed:
        found["entropy"] = grad_loss * grad_entropy
    return found


# Optional tensors that every loss operator takes, in the schemas' order. Another one also goes into LossArguments and
# shared_arguments, and into the signature of policy_loss; the functions that read it get it by name.
SHARED_TENSORS = "Tensor? importance_weights, Tensor? num_tokens, Tensor? num_sequences"
LOSS_TENSORS = f"Tensor? ref_logp, Tensor? entropy, {SHARED_TENSORS}"
LOSS_RESULT = "(Tensor loss, Tensor grad_logp, Tensor grad_entropy, Tensor metrics)"

registry.define(
    reference.policy_loss,
    "(Tensor logp, Tensor old_logp, Tensor advantages, Tensor response_mask, Tensor? factors, Tensor? cu_seqlens, "
    f"{LOSS_TENSORS}, float[] options) -> {LOSS_RESULT}",
    partial(fake_loss, num_metrics=len(POLICY_METRICS)),
    setup_context=keep_gradients,
    backward=scaled_gradients,
)
