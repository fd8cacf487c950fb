"""The policy losses of the field, with per-token advantages: loss, gradient and metrics in one pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.config import PolicyLossOptions
from vgpo_kernels.ops import registry
from vgpo_kernels.ops.visual_weights import name_metrics
from vgpo_kernels.reference import policy_loss as reference

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
)


class PolicyLoss(NamedTuple):
    """A loss and what it was made of.

    Attributes:
        loss: 0-dimensional, differentiable in ``logp`` (and ``entropy``).
        metrics: 0-dimensional tensors on the loss's device; reading one is the only thing that synchronises.

    """

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    factors: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    importance_weights: Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    num_sequences: int | float | Tensor | None = None,
    **options: Any,
) -> PolicyLoss:
    """Clipped policy-gradient loss with the advantage ``advantages * factors`` (paper, Eq. 11).

    The token loss is ``importance * surrogate + kl_coef * KL - entropy_coef * entropy``, aggregated over the
    response tokens. Its gradient is computed in the same pass; backward only scales it.

    Args:
        logp: Log-probabilities (natural logarithm) of the tokens under the policy, ``[B, T]`` or packed ``[N]``.
            float32, bfloat16 or float16; differentiable.
        old_logp: The same under the policy that generated them, in ``logp``'s shape. Detached, as all that follow but
            ``entropy``.
        advantages: Per response ``[B]``, or per token in ``logp``'s shape. (A packed batch with N = B takes a
            vector as per response.)
        response_mask: True at scored response tokens, bool or integer, in ``logp``'s shape. Values of any
            argument off the mask are not read.
        factors: Factor of each token's advantage, in ``logp``'s shape, from :func:`visual_weights`.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        ref_logp: Log-probabilities under the reference policy, in ``logp``'s shape, for the KL term.
        entropy: Entropy of each token's distribution in nats, in ``logp``'s shape, for the bonus; differentiable.
        importance_weights: Off-policy correction of the surrogate, ``[B]`` or per token.
        num_tokens: Denominator of ``"token-mean"``, a number or a 0-dimensional tensor; default: the valid tokens of
            this call. Pass the count of the whole batch to reproduce its loss from micro-batches or ranks.
        num_sequences: Denominator over responses of the other aggregations, likewise; default: B.
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
    current = checks.per_token("logp", logp, mask, detach=False)
    scale = checks.optional_per_token("factors", factors, mask)
    arguments, floats = loss_arguments(
        mask,
        boundaries,
        old_logp,
        advantages,
        ref_logp=ref_logp,
        entropy=entropy,
        importance_weights=importance_weights,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        **options,
    )
    dtype = checks.compute_dtype(current, scale, *arguments)
    old, advantage, *optional = arguments
    result = registry.call(
        "policy_loss",
        mask.device,
        dtype,
        current,
        old,
        advantage,
        mask,
        scale,
        boundaries,
        *optional,
        floats,
    )
    return unpack(result, POLICY_METRICS, dtype)


class LossArguments(NamedTuple):
    """The checked tensors that every loss shares, in the schemas' order."""

    old_logp: Tensor
    advantages: Tensor
    ref_logp: Tensor | None
    entropy: Tensor | None
    importance_weights: Tensor | None
    num_tokens: Tensor | None
    num_sequences: Tensor | None


def loss_arguments(
    mask: Tensor,
    boundaries: Tensor | None,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    importance_weights: Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    num_sequences: int | float | Tensor | None = None,
    **options: Any,
) -> tuple[LossArguments, list[float]]:
    """Check the arguments of :func:`policy_loss` that do not depend on where the log-probs come from.

    Returns:
        The tensors and the options as kernels take them.

    """
    batch = checks.batch_size(mask, boundaries)
    weights = importance_weights
    if weights is not None:
        weights = checks.per_response_or_token("importance_weights", weights, mask, batch)
    arguments = LossArguments(
        checks.per_token("old_logp", old_logp, mask),
        checks.per_response_or_token("advantages", advantages, mask, batch),
        checks.optional_per_token("ref_logp", ref_logp, mask),
        checks.optional_per_token("entropy", entropy, mask, detach=False),
        weights,
        checks.count("num_tokens", num_tokens, mask.device),
        checks.count("num_sequences", num_sequences, mask.device),
    )
    chosen = PolicyLossOptions(**options)
    if chosen.kl_coef != 0 and arguments.ref_logp is None:
        raise ValueError(f"kl_coef={chosen.kl_coef} needs ref_logp, which is None")
    if chosen.entropy_coef != 0 and arguments.entropy is None:
        raise ValueError(f"entropy_coef={chosen.entropy_coef} needs entropy, which is None")
    if chosen.aggregation == "seq-mean-token-sum-norm" and chosen.max_length is None:
        if boundaries is not None:
            raise ValueError("max_length is needed by 'seq-mean-token-sum-norm' on a packed batch")
        chosen = replace(chosen, max_length=max(mask.shape[1], 1))
    return arguments, chosen.as_floats()


def unpack(result: Any, names: tuple[str, ...], dtype: torch.dtype) -> PolicyLoss:
    """Make a :class:`PolicyLoss` of what an operator (or the reference) returned."""
    loss, *_, metrics = result
    return PolicyLoss(loss.to(dtype), name_metrics(names, metrics.to(dtype)))


def fake_loss(logp: Tensor, entropy: Tensor | None, metrics: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes of a loss operator's result: loss, its gradients by logp and entropy, metrics."""
    return (
        logp.new_empty(()),
        logp.new_empty(logp.shape),
        logp.new_empty((0,) if entropy is None else entropy.shape),
        logp.new_empty((metrics,)),
    )


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients that the forward pass computed."""
    _, grad_logp, grad_entropy, metrics = output
    ctx.save_for_backward(grad_logp, grad_entropy)
    ctx.mark_non_differentiable(grad_logp, grad_entropy, metrics)
    ctx.set_materialize_grads(False)


def scaled_gradients(ctx: Any, grad_loss: Tensor | None, entropy: int) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by logp and entropy, the argument of that index: the saved ones times the loss's."""
    if grad_loss is None:
        return None, None
    grad_logp, grad_entropy = ctx.saved_tensors
    return grad_loss * grad_logp, grad_loss * grad_entropy if ctx.needs_input_grad[entropy] else None


def _fake_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    factors: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logp: Tensor | None,
    entropy: Tensor | None,
    importance_weights: Tensor | None,
    num_tokens: Tensor | None,
    num_sequences: Tensor | None,
    options: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_loss(logp, entropy, len(POLICY_METRICS))


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logp, grad_entropy = scaled_gradients(ctx, grad_loss, entropy=7)
    # One gradient an argument: logp is the first, entropy the eighth of twelve.
    return grad_logp, *(None,) * 6, grad_entropy, *(None,) * 4


registry.define(
    reference.policy_loss,
    "(Tensor logp, Tensor old_logp, Tensor advantages, Tensor response_mask, Tensor? factors, Tensor? cu_seqlens, "
    "Tensor? ref_logp, Tensor? entropy, Tensor? importance_weights, Tensor? num_tokens, Tensor? num_sequences, "
    "float[] options) -> (Tensor loss, Tensor grad_logp, Tensor grad_entropy, Tensor metrics)",
    _fake_policy_loss,
    setup_context=save_gradients,
    backward=_backward,
)
