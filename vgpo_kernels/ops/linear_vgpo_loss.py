"""Policy loss and all its gradients from hidden states and an LM head, without an ``[N, V]`` tensor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels import checks, head_checks, hints
from vgpo_kernels.config import PolicyLossOptions, VGPOConfig, Visibility
from vgpo_kernels.hints import explained
from vgpo_kernels.ops import registry
from vgpo_kernels.ops.lm_head import (
    Head,
    HeadKernels,
    chunk_elements,
    compiled_kernels,
    gradient_by_statistics,
    tile_columns,
    without_autocast,
)
from vgpo_kernels.ops.loss_terms import token_factors
from vgpo_kernels.ops.policy_loss import (
    POLICY_METRICS,
    SHARED_TENSORS,
    PolicyLoss,
    shared_arguments,
    unpack,
)
from vgpo_kernels.ops.visual_focus import visual_focus
from vgpo_kernels.ops.visual_weights import visual_weights
from vgpo_kernels.reference import linear_logprob as reference
from vgpo_kernels.reference.linear_logprob import first_tokens, logp_and_entropy, predicting_rows
from vgpo_kernels.reference.logits import LogitMap
from vgpo_kernels.reference.policy_loss import SEQUENCE_LEVEL


@explained
def linear_vgpo_loss(
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
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    prototype: Tensor | None = None,
    prototype_index: Tensor | None = None,
    visibility: Visibility = "all",
    chunk_bytes: int | None = None,
    recompute: bool = True,
    **policy_loss_options: Any,
) -> PolicyLoss:
    """Visual focus, factors, log-probabilities and policy loss of whole groups, from hidden states and an LM head
    (paper, Eq. 3-11).

    The same as :func:`visual_focus` and :func:`visual_weights` of ``hidden``, followed by :func:`linear_policy_loss`.
    The visual focus of a token comes from the hidden state at the token itself; its log-probability comes from the
    hidden state one position before. So ``hidden`` has all positions. The loss is differentiable in it through the
    log-probabilities only: the visual signal is detached. Every group must be whole. Where groups straddle
    micro-batches or ranks, compute the factors in two phases (:func:`group_weights`), and call
    :func:`linear_policy_loss`.

    Args:
        hidden: Last-layer hidden states after the final norm, ``[B, S, D]`` padded or ``[N, D]`` packed; float32,
            bfloat16 or float16. Padded, token (b, t) of the response arrays has row (b, S - T + t), and row
            (b, S - T + t - 1) predicts it. Packed, token n has row n, and row n - 1 predicts it. Differentiable: a
            decoder of transformers returns it, ``model.model(**inputs).last_hidden_state``. ``captured.hidden`` of
            ``capture_hidden_states`` is detached; with it the loss trains the head alone, and a UserWarning says so.
        weight: The LM head, ``[V, D]``.
        targets: Ids of the tokens, integer, in response_mask's shape. Values off the mask are not read.
        old_logp: As in :func:`linear_policy_loss`.
        advantages: Per response ``[B]`` or per token.
        visual_mask: True at image tokens, bool or 0 and 1, ``[B, S]`` or ``[N]``; may be ``None`` where ``prototype``
            is given.
        response_mask: True at scored response tokens, bool or 0 and 1, ``[B, T]`` with T <= S (the last T positions) or
            ``[N]``. False at the first token of a sequence, which no row predicts.
        group_ids: Responses to one prompt share an id, integer ``[B]``.
        config: The settings of the factors.
        bias: The head's bias ``[V]``.
        temperature: What logits are divided by, from 2**-126 to 2**126; or a tensor of one for each token, in
            response_mask's shape, detached. Those off the mask are not read.
        logit_scale: As in :func:`linear_logprob`.
        softcap: As in :func:`linear_logprob`.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        prototype: As in :func:`visual_focus`: ``[P, D]``, or one for each position.
        prototype_index: As in :func:`visual_focus`: a row for each response ``[B]``, or for each token.
        visibility: ``"all"``, or ``"causal"`` for images that arrive late, as in :func:`visual_focus`.
        chunk_bytes: Size of the workspace for logits, as in :func:`linear_logprob`; by default 1/8 of them (on a
            GPU 1/4) where the gradients take one sweep over the logits.
        recompute: As in :func:`linear_policy_loss`.
        **policy_loss_options: Every keyword of :func:`policy_loss` but ``factors``, ``entropy`` and ``views``.

    Returns:
        A :class:`PolicyLoss`, differentiable in hidden, weight and bias, with the metrics of :func:`vgpo_loss`.

    Raises:
        TypeError: An argument has the wrong type or dtype, or an option is unknown.
        ValueError: Shapes, devices, boundaries or options do not fit together, a target is no row of the weight, or a
            scored token has nothing that predicts it.

    """
    warn_of_detached(hidden, weight)
    return with_factors(
        linear_policy_loss,
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
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_bytes=chunk_bytes,
        recompute=recompute,
        **policy_loss_options,
    )


def with_factors(
    loss_of_head: Callable[..., PolicyLoss],
    hidden: Tensor,
    visual_mask: Tensor | None,
    response_mask: Tensor,
    group_ids: Tensor,
    config: VGPOConfig,
    *,
    cu_seqlens: Tensor | None,
    prototype: Tensor | None,
    prototype_index: Tensor | None,
    visibility: Visibility,
    **arguments: Any,
) -> PolicyLoss:
    """Return ``loss_of_head`` of hidden states with the factors that they have, and the metrics of both."""
    if "factors" in arguments:
        raise TypeError(f"a loss of VGPO has no 'factors': {hints.MISPLACED['factors']}")
    cos = visual_focus(
        hidden,
        visual_mask,
        response_mask,
        cu_seqlens=cu_seqlens,
        prototype=prototype,
        prototype_index=prototype_index,
        visibility=visibility,
    )
    weights = visual_weights(cos, response_mask, group_ids, config, cu_seqlens=cu_seqlens)
    loss, metrics = loss_of_head(
        hidden, response_mask=response_mask, factors=weights.factors, cu_seqlens=cu_seqlens, **arguments
    )
    return PolicyLoss(loss, metrics | weights.metrics)


@explained
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    factors: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_bytes: int | None = None,
    recompute: bool = True,
    **policy_loss_options: Any,
) -> PolicyLoss:
    """:func:`policy_loss` (paper, Eq. 11) of :func:`linear_logprob`, with every gradient computed in the forward pass.

    Only rows that predict a scored token are computed. For a loss of single tokens, the gradient w.r.t. a chunk's
    logits is known as soon as the chunk is computed, so three matrix products are enough instead of four. A loss of
    whole sequences (``"gspo"``, ``"gspo_token"``, ``"luspo"``, ``"vespo"``) goes over the vocabulary twice, and so does
    every loss where a Hopper GPU computes logits in tiles, which needs no fp32 gradient of the whole weight. The
    backward pass only scales the gradients, which are kept in the dtypes of hidden and weight (fp32 for fp16). Where no
    gradient is needed, as in ``torch.no_grad()``, there is one matrix product.

    On a GPU the host waits for the number of scored tokens, because shapes depend on it.

    Args:
        hidden: Last-layer hidden states after the final norm, ``[B, S, D]`` padded or ``[N, D]`` packed;
            differentiable: detached ones are warned of, as in :func:`linear_vgpo_loss`. A token is predicted by the row
            before its own, as there.
        weight: The LM head, ``[V, D]``; differentiable, as in :func:`linear_logprob`.
        targets: Ids of the tokens, integer, in response_mask's shape. Values off the mask are not read.
        old_logp: Log-probabilities under the policy that generated the tokens, in response_mask's shape. ``None``: the
            policy's own of this call, detached. Every ratio is 1 then, but the gradient is not zero.
        advantages: Per response ``[B]`` or per token.
        response_mask: True at scored tokens, ``[B, T]`` with T <= S (the last T positions) or ``[N]``; not at the first
            token of a sequence.
        factors: Factor of each token's advantage, in response_mask's shape, from :func:`visual_weights`.
        bias: The head's bias ``[V]``; differentiable.
        temperature: What logits are divided by, from 2**-126 to 2**126; or a tensor of one for each token, in
            response_mask's shape, detached. Those off the mask are not read.
        logit_scale: As in :func:`linear_logprob`.
        softcap: As in :func:`linear_logprob`.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        chunk_bytes: Size of the workspace for logits, as in :func:`linear_logprob`; by default 1/8 of them (on a
            GPU 1/4) where the gradients take one sweep over the logits.
        recompute: ``False``: hold the fp32 logits of all scored tokens at the same time. Then every loss takes three
            matrix products and no longer adds up its gradient by chunks, at four bytes a logit. (Of fp16 states it
            changes nothing.)
        **policy_loss_options: Every other keyword of :func:`policy_loss` but ``entropy`` and ``views``, which need
            log-probs beforehand. ``entropy_coef`` works: entropies are computed from the logits.

    Returns:
        A :class:`PolicyLoss`, differentiable in hidden, weight and bias.

    Raises:
        TypeError: An argument has the wrong type or dtype, or an option is unknown.
        ValueError: Shapes, devices, boundaries or options do not fit together, a target is no row of the weight, or a
            scored token has nothing that predicts it.

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
        whole=True,
        **policy_loss_options,
    )
    differentiable = torch.is_grad_enabled()
    arguments |= {
        "gradients": [
            tensor is not None and tensor.requires_grad and differentiable
            for tensor in (arguments["hidden"], arguments["weight"], arguments["bias"])
        ],
        "chunk_bytes": checks.chunk_bytes(chunk_bytes),
        "recompute": checks.flag("recompute", recompute),
    }
    dtype = checks.compute_dtype(*arguments.values())
    result = registry.call("linear_policy_loss", arguments["response_mask"].device, dtype, **arguments)
    loss, metrics = unpack(result, POLICY_METRICS, dtype, arguments)
    return PolicyLoss(loss, metrics | rates)


def checked_arguments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    factors: Tensor | None,
    bias: Tensor | None,
    mapping: tuple[object, object, object],
    cu_seqlens: Tensor | None,
    whole: bool,
    token_weights: Tensor | None = None,
    selected: Tensor | None = None,
    num_selected: int | float | Tensor | None = None,
    **policy_loss_options: Any,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Check what a policy loss of hidden states and a head takes.

    ``mapping`` is temperature, logit_scale and softcap; ``whole`` says that the weight has the whole vocabulary.

    Returns:
        The arguments by name, as operators take them, and the metrics of ``selected``.

    """
    states, rows, offsets = head_checks.head(hidden, weight, bias)
    mask, boundaries = checks.response_layout(response_mask, cu_seqlens, states.device)
    checks.hidden_states(states, boundaries)
    checks.response_rows(mask, states)
    ids = head_checks.targets(targets, mask.shape, "response_mask's", mask.device)
    head_checks.target_values(ids, mask, rows.shape[0] if whole else None)
    if checks.values_are_free(mask):
        checks.predicted_tokens(mask, first_tokens(mask, states, boundaries))
    shared, options = shared_arguments(mask, boundaries, advantages, **policy_loss_options)
    arguments = {
        "hidden": states,
        "weight": rows,
        "bias": offsets,
        "targets": ids,
        "old_logp": checks.optional_per_token("old_logp", old_logp, mask),
        **head_checks.logit_map(*mapping, states, mask, "response_mask's"),
        **shared,
    }
    arguments["factors"], rates = token_factors(arguments, options, factors, token_weights, selected, num_selected)
    return arguments, rates


def scored_rows(response_mask: Tensor, hidden: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return where scored tokens are in the flattened mask, ``[n]``, and the index of the rows that predict them.

    This waits for the device: shapes depend on the number of scored tokens.
    """
    checks.predicted_tokens(response_mask, first_tokens(response_mask, hidden, cu_seqlens))
    index = response_mask.reshape(-1).nonzero().squeeze(-1)
    rows = predicting_rows(response_mask, hidden)[index]
    return index, (rows,) if hidden.dim() == 2 else (rows // hidden.shape[1], rows % hidden.shape[1])


def warn_of_detached(hidden: object, weight: object) -> None:
    """Warn, once a process, of a loss that trains the head and nothing below it. Call it from a public function."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if getattr(weight, "requires_grad", False) and not getattr(hidden, "requires_grad", True):
        _warn_of_detached()


@cache
def _warn_of_detached() -> None:
    warnings.warn(
        "hidden has no gradient, so the loss trains the head alone: `captured.hidden` of capture_hidden_states is "
        "detached. A differentiable hidden is what the decoder returns, model.model(**inputs).last_hidden_state in "
        "transformers (docs/integrate.md, 'Without logits'). To train the head alone is legal: ignore this then",
        UserWarning,
        stacklevel=5,  # past the public function and what explains its arguments
    )


def compute(
    kernels: HeadKernels,
    *,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    old_logp: Tensor | None,
    response_mask: Tensor,
    cu_seqlens: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    logit_scale: float,
    softcap: float,
    options: list[float],
    gradients: list[bool],
    chunk_bytes: int,
    recompute: bool,
    **loss_arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implement the operator ``linear_policy_loss`` by a backend's kernels; the rest goes to ``policy_loss``."""
    index, place = scored_rows(response_mask, hidden, cu_seqlens)
    logp = torch.zeros(response_mask.shape, dtype=torch.float32, device=hidden.device)
    if old_logp is not None:
        # A token has a ratio of 1 until its chunk is computed.
        logp.copy_(old_logp)
    entropy = torch.zeros_like(logp)

    def loss(part: slice, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take in a chunk's log-probs; return loss, gradients w.r.t. log-probs and entropies, and metrics."""
        for values, of_chunk in zip((logp, entropy), logp_and_entropy(statistics), strict=True):
            values.view(-1)[index[part]] = of_chunk
        value, by_logp, by_entropy, metrics = kernels.policy_loss(
            logp=logp,
            old_logp=logp if old_logp is None else old_logp,
            response_mask=response_mask,
            cu_seqlens=cu_seqlens,
            entropy=entropy,
            options=options,
            **loss_arguments,
        )
        return value, by_logp, by_entropy, metrics

    result: Any = None

    def gradient(part: slice, statistics: Tensor) -> Tensor:
        nonlocal result
        result = loss(part, statistics)
        by_logp, by_entropy = (values.view(-1)[index[part]] for values in result[1:3])
        return gradient_by_statistics(statistics, by_logp, by_entropy)

    everything, states = slice(0, index.shape[0]), hidden[place]
    of_tokens = None if temperatures is None else temperatures.reshape(-1)[index]
    logit_map = LogitMap(temperature, of_tokens, logit_scale, softcap)
    one_sweep = any(gradients) and PolicyLossOptions.from_floats(options).loss_type not in SEQUENCE_LEVEL
    # fp16 gradients need a scale, or small ones become zero. It can only be chosen when all of them are known.
    one_sweep = one_sweep and hidden.dtype != torch.float16 and index.shape[0] > 0
    one_sweep = one_sweep and not (kernels.packs and hidden.dtype == torch.bfloat16)
    # Tiles compute logits twice in the time that a sweep takes to keep them and to add up the weight's gradient, and
    # need no fp32 gradient of the whole weight.
    one_sweep = one_sweep and not tile_columns(kernels, states, weight, bias, logit_map)
    elements = chunk_elements(chunk_bytes, index.shape[0], weight, sweep=one_sweep)
    if not recompute and any(gradients) and hidden.dtype != torch.float16:
        # All logits at the same time: the loss is that of every token, so that sequences may need each other's.
        one_sweep, elements = index.shape[0] > 0, max(index.shape[0] * weight.shape[0], 1)
    head = Head(kernels, states, weight, bias, targets.view(-1)[index], 0, logit_map, elements, whole_rows=one_sweep)
    found: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    with without_autocast(hidden):
        if one_sweep:
            found = head.sweep(gradient, gradients)
        else:
            statistics = head.statistics()
            grad_statistics = gradient(everything, statistics)
            if any(gradients):
                found = head.gradients(statistics, grad_statistics, gradients, saved_dtype(weight))
    by_rows, by_weight, by_bias = found
    value, _, _, metrics = result
    by_hidden = None
    if by_rows is not None:
        by_hidden = hidden.new_zeros(hidden.shape, dtype=saved_dtype(hidden))
        by_hidden[place] = by_rows.to(by_hidden.dtype)
    return (
        value,
        hidden.new_empty(0) if by_hidden is None else by_hidden,
        hidden.new_empty(0) if by_weight is None else by_weight.to(saved_dtype(weight)),
        hidden.new_empty(0) if by_bias is None else by_bias,
        metrics,
    )


def saved_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype in which a gradient is kept for the backward pass: fp16 is too narrow before the loss is scaled."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _compiled(hidden: Tensor, **arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return compute(compiled_kernels(hidden.device), hidden=hidden, **arguments)


def _chunked(**arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute log-probs in chunks, and a loss of them that autograd differentiates: fp32, in plain PyTorch."""
    statistics_of = partial(registry.run, "linear_logprob", "cpp")
    return reference.linear_policy_loss(dtype=torch.float32, statistics_of=statistics_of, **arguments)


def _fake(hidden: Tensor, weight: Tensor, gradients: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def gradient(tensor: Tensor, shape: torch.Size, needed: bool, dtype: torch.dtype) -> Tensor:
        return tensor.new_empty(shape, dtype=dtype) if needed else hidden.new_empty(0)

    return (
        hidden.new_empty((), dtype=torch.float32),
        gradient(hidden, hidden.shape, gradients[0], saved_dtype(hidden)),
        gradient(weight, weight.shape, gradients[1], saved_dtype(weight)),
        gradient(weight, weight.shape[:1], gradients[2], torch.float32),
        hidden.new_empty(len(POLICY_METRICS), dtype=torch.float32),
    )


def _save(ctx: Any, output: tuple[Tensor, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _, grad_hidden, grad_weight, grad_bias, metrics = output
    registry.keep(ctx, hidden=grad_hidden, weight=grad_weight, bias=grad_bias)
    ctx.dtypes = {"hidden": hidden.dtype, "weight": weight.dtype, "bias": None if bias is None else bias.dtype}
    ctx.mark_non_differentiable(grad_hidden, grad_weight, grad_bias, metrics)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, needed: set[str], grad_loss: Tensor | None, *_: Tensor | None) -> dict[str, Tensor]:
    if grad_loss is None:
        return {}
    # A gradient that no later backward pass will ask for again is scaled in place: a second one of the weight's size
    # would be the largest tensor of the step. (Compilers, which see no plain tensors, place memory. And a batch of
    # gradients has no room in the memory of one.)
    keeps = torch._C._autograd._get_current_graph_task_keep_graph()
    in_place = type(grad_loss) is Tensor and not keeps and not _is_batched(grad_loss)

    # Of one dimension: on a GPU, and under vmap, a factor of none would be rounded to the gradient's dtype.
    factor = grad_loss.reshape(1)

    def scaled(gradient: Tensor) -> Tensor:
        return gradient.mul_(factor) if in_place else gradient * factor

    return {name: scaled(kept).to(ctx.dtypes[name]) for name, kept in registry.kept(ctx).items() if name in needed}


def _is_batched(gradient: Tensor) -> bool:
    """Whether a gradient stands for several: those of ``is_grads_batched``, or of ``torch.func.vmap``."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(gradient) or functorch.is_functorch_wrapped_tensor(gradient)


registry.define(
    reference.linear_policy_loss,
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? old_logp, Tensor advantages, "
    f"Tensor response_mask, Tensor? factors, Tensor? cu_seqlens, Tensor? ref_logp, {SHARED_TENSORS}, "
    "float temperature, Tensor? temperatures, float logit_scale, float softcap, float[] options, "
    "bool[3] gradients, int chunk_bytes, bool recompute) "
    "-> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor metrics)",
    _fake,
    setup_context=_save,
    backward=_backward,
    implementation=_compiled,
    chunked=_chunked,
)
