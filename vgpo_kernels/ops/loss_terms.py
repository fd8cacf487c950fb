"""What a policy loss takes on top of its kernel: weights of tokens, a choice of tokens, terms of other views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.config import KLEstimator, PolicyLossOptions, type_name
from vgpo_kernels.ops.visual_weights import spread_to_tokens
from vgpo_kernels.reference.policy_loss import SEQUENCE_RATIO
from vgpo_kernels.summaries import summary

NEEDS_SELECTED = "num_selected needs selected, which is None"
NEEDS_COUNT = (
    "num_tokens beside selected needs num_selected: both are counts of the whole batch, so that losses of its parts "
    "add up"
)


class ViewTerm(NamedTuple):
    """A term ``coef * KL(policy || view)`` of :func:`policy_loss`, estimated at each token as its reference term is.

    A view is another look at the same tokens: the policy without the image or with a masked one, a teacher. A negative
    ``coef`` pushes the policy away from it: PAPO's term is ``ViewTerm(masked_logp, -gamma, "k3_clamped")``. With a
    ``logp`` of zeros, ``"k1"`` and ``coef=-c``, it is ``c`` times the sampled tokens' negative log-probability.

    Attributes:
        logp: Log-probabilities (natural logarithm) of the tokens under the view, in response_mask's shape; float32,
            bfloat16 or float16. Detached: a gradient goes through the policy's own alone. (:func:`linear_divergence`
            is differentiable in both views.) Values off either mask are not read.
        coef: Weight of the term, finite. Where it is 0, the term is off, and its metric is computed.
        estimator: As ``kl_estimator`` of :class:`PolicyLossOptions`.
        mask: Tokens at which the term counts, bool or 0 and 1, in response_mask's shape; ``None``: all. Elsewhere it
            is 0 and has no gradient, and the denominators stay those of all response tokens. (Not beside
            ``kl_bias_correction`` in ``"gspo"``, ``"gspo_token"`` and ``"luspo"``: ValueError.)

    """

    logp: Tensor
    coef: float
    estimator: KLEstimator = "k3"
    mask: Tensor | None = None

    def __repr__(self) -> str:
        """A few lines; ``tuple(...)`` shows every number."""
        return summary(self)


def token_factors(
    arguments: Mapping[str, Any],
    options: PolicyLossOptions,
    factors: Tensor | None,
    token_weights: Tensor | None,
    selected: Tensor | None,
    num_selected: int | float | Tensor | None,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Check what weights the tokens of a loss, and multiply it: a surrogate grows with its advantage.

    Args:
        arguments: The operator's, checked: response_mask, cu_seqlens, num_tokens, and those that decide the precision.
        options: The settings among them.
        factors: As in :func:`policy_loss`, as all that follows.
        token_weights: Of responses or tokens.
        selected: The tokens whose surrogate counts. The kernel divides by all tokens, so it is multiplied by them, and
            divided by those that are selected.
        num_selected: Their number in the whole batch.

    Returns:
        The factor of each token's advantage, or ``None`` for 1 everywhere; and the metrics of ``selected``.

    """
    mask, boundaries = arguments["response_mask"], arguments["cu_seqlens"]
    batch = checks.batch_size(mask, boundaries)
    product = checks.optional_per_token("factors", factors, mask)
    weights = checks.optional_per_response_or_token("token_weights", token_weights, mask, batch)
    dtype = checks.compute_dtype(*arguments.values(), product, weights)
    if weights is not None:
        if weights.dim() == 1 and weights.shape[0] == batch:
            weights = spread_to_tokens(weights, mask, boundaries)
        product = weights.expand(mask.shape).contiguous() if product is None else product.to(dtype) * weights
    count = checks.count("num_selected", num_selected, mask.device)
    if selected is None:
        if count is not None:
            raise ValueError(NEEDS_SELECTED)
        return product, {}
    chosen = checks.mask("selected", selected, mask.shape, "response_mask's", mask.device, "response_mask") & mask
    # What stands at other tokens is not read.
    product = chosen.to(dtype) if product is None else torch.where(chosen, product.to(dtype), 0.0)
    own, every = chosen.sum().to(dtype), mask.sum().to(dtype)
    if options.aggregation == "token-mean":
        given = arguments["num_tokens"]
        if given is not None and count is None:
            raise ValueError(NEEDS_COUNT)
        product = product * _ratio(every if given is None else given, own if count is None else count)
    elif options.aggregation == "seq-mean-token-mean":
        numbers = [_counts(valid, boundaries).to(dtype) for valid in (mask, chosen)]
        product = product * spread_to_tokens(_ratio(*numbers), mask, boundaries)
    return product, {"selected_rate": own / every.clamp(min=1)}


def _nonzero(count: Tensor) -> Tensor:
    return torch.where(count == 0, 1.0, count)


def _ratio(count: Tensor, other: Tensor) -> Tensor:
    """Return ``count / other``, exactly 1 where they are equal. A denominator of 0 counts as 1."""
    return _nonzero(count) / _nonzero(other)


def _counts(valid: Tensor, boundaries: Tensor | None) -> Tensor:
    """Count the valid tokens of each response, int64 ``[B]``."""
    if boundaries is None:
        return valid.sum(-1)
    running = torch.cat([valid.new_zeros(1, dtype=torch.int64), valid.cumsum(0)])
    return running[boundaries.clamp(0, valid.shape[0])].diff()


def checked_views(views: object, arguments: Mapping[str, Any], options: PolicyLossOptions) -> tuple[ViewTerm, ...]:
    """Check the views of a loss whose other ``arguments`` are checked, and return them with their tensors as it reads.

    Raises:
        TypeError: No list or tuple of :class:`ViewTerm`, or a field has the wrong type.
        ValueError: A shape, a device or a number does not fit, or a mask stands beside a KL term that is multiplied
            by the ratio of the whole response.

    """
    if isinstance(views, ViewTerm) or not isinstance(views, (list, tuple)):
        hint = "; use views=[view]" if isinstance(views, ViewTerm) else ""
        raise TypeError(f"views must be a list or tuple of ViewTerm, got {type_name(views)}{hint}")
    return tuple(_checked_view(f"views[{index}]", view, arguments, options) for index, view in enumerate(views))


def _checked_view(name: str, view: object, arguments: Mapping[str, Any], options: PolicyLossOptions) -> ViewTerm:
    if not isinstance(view, ViewTerm):
        hint = "; use ViewTerm(logp, coef)" if isinstance(view, Tensor) else ""
        raise TypeError(f"{name} must be a ViewTerm, got {type_name(view)}{hint}")
    mask = arguments["response_mask"]
    logp = checks.per_token(f"{name}.logp", view.logp, mask)
    for field, option in (("coef", "kl_coef"), ("estimator", "kl_estimator")):
        PolicyLossOptions.kinds[option].check(f"{name}.{field}", getattr(view, field))
    if view.mask is None:
        return ViewTerm(logp, view.coef, view.estimator)
    if options.kl_bias_correction and options.loss_type in SEQUENCE_RATIO:
        raise ValueError(
            f"{name}.mask does not go with kl_bias_correction=True and loss_type={options.loss_type!r}, where every "
            "token has a part in the ratio that a KL term is multiplied by"
        )
    counted = checks.mask(f"{name}.mask", view.mask, mask.shape, "response_mask's", mask.device, "response_mask")
    return ViewTerm(logp, view.coef, view.estimator, counted)


def kernel_view(views: tuple[ViewTerm, ...], arguments: Mapping[str, Any]) -> int | None:
    """Return which of the views the loss's own kernel computes, in the place of a reference that is not given."""
    if arguments["ref_logp"] is not None:
        return None
    return next((index for index, view in enumerate(views) if view.mask is None), None)


def of_view(view: ViewTerm, options: PolicyLossOptions) -> dict[str, Any]:
    """Return what makes the KL term of an operator that of a view."""
    settings = replace(options, kl_coef=view.coef, kl_estimator=view.estimator)
    return {"ref_logp": view.logp, "options": settings.as_floats()}


def view_call(view: ViewTerm, arguments: Mapping[str, Any], options: PolicyLossOptions) -> dict[str, Any]:
    """Return the arguments of a call of the operator ``policy_loss`` whose loss is the term of a view.

    Args:
        view: Of :func:`checked_views`.
        arguments: The loss's, checked, logp and old_logp among them.
        options: The settings among them.

    """
    settings = replace(options, entropy_coef=0.0)
    policies = {"logp": arguments["logp"]}
    if options.kl_bias_correction:
        policies["old_logp"] = arguments["old_logp"]
    else:  # nothing reads a ratio
        settings = replace(settings, loss_type="grpo")
    if view.mask is not None:
        # Equal log-probs have a divergence of 0. The slope that k1 has there ends here.
        off = ~view.mask  # a tensor of its own, which autograd may keep: the mask may come from inference mode
        policies = {name: values.masked_fill(off, 0.0) for name, values in policies.items()}
        view = view._replace(logp=view.logp.masked_fill(off, 0.0))
    policies.setdefault("old_logp", policies["logp"].detach())
    shared = {name: arguments[name] for name in ("response_mask", "cu_seqlens", "num_tokens", "num_sequences")}
    # Advantages of 0 turn the surrogate off.
    nothing = {
        "advantages": view.logp.new_zeros(checks.batch_size(shared["response_mask"], shared["cu_seqlens"])),
        "factors": None,
        "entropy": None,
        "importance_weights": None,
    }
    return shared | nothing | policies | of_view(view, settings)
