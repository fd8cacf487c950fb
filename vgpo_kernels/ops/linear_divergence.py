"""Divergences between the distributions of an LM head at two hidden states, without an ``[N, V]`` tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels import checks, head_checks
from vgpo_kernels.hints import explained
from vgpo_kernels.ops import registry
from vgpo_kernels.ops.divergence_measures import LinearDivergence, measures_of
from vgpo_kernels.ops.lm_head import at_rows, chunk_elements, in_fp32, kept_rows, without_autocast
from vgpo_kernels.ops.paired_head import PairedHead, PairKernels, compiled_kernels, pair_coefficients
from vgpo_kernels.reference import linear_divergence as reference
from vgpo_kernels.reference.linear_divergence import MEASURES, SHARES, STATISTICS
from vgpo_kernels.reference.linear_logprob import IGNORED
from vgpo_kernels.reference.logits import LogitMap


@explained
def linear_divergence(
    hidden: Tensor,
    other: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
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
    """Exact divergences between what two views of a token predict, over the whole vocabulary.

    The views are two hidden states before one LM head: of a response with its image and with the image spoilt, where
    the divergence is how much the next token needs the image; or those of a policy and a reference, or of a student and
    a teacher with a head of its own (``other_weight``).

    The logits are computed in chunks and not kept. Those of both views come from one product with the weight, and one
    pass gives every measure but ``js`` and ``tv``, which need both normalisers first and take a second one.
    Differentiable in hidden, other, the weights and the biases, through every result; the logits are computed once more
    for it. No time is spent on the gradient of an input that needs none.

    Matrix products use hidden's dtype for both views; logits and their sums are fp32, and so is the sum over tokens in
    the weight's gradient.

    Args:
        hidden: The hidden states that predict each token, ``[N, D]`` or ``[..., D]``: those of the token **before** it.
            float32, bfloat16 or float16.
        other: Those of the other view, in hidden's shape; with ``other_weight`` the last dimension may be another.
        weight: The LM head, ``[V, D]``.
        targets: Token ids, integer ``[N]`` or ``[...]``, for ``logp`` and ``other_logp``.
        other_weight: The head of the other view, ``[V, E]``; ``None``: the same.
        bias: The head's bias ``[V]``.
        other_bias: The bias of ``other_weight``, ``[V]``.
        temperature: What logits are divided by, from 2**-126 to 2**126; or a tensor of one for each row,
            in targets' shape, detached. Those of skipped rows are not read.
        logit_scale: What the products are multiplied by before.
        softcap: Logits are capped to ``softcap tanh(logits / softcap)`` before they are divided by the temperature.
        measures: Any of ``"kl"``, ``"reverse_kl"``, ``"js"``, ``"tv"``, ``"hellinger"``, ``"entropy"`` and
            ``"other_entropy"``.
        js_beta: Weight of p in the mixture of ``js``, between 0 and 1.
        ignore_index: Rows with this target are not read, and give zeros without a gradient. On a GPU the host waits for
            their number. ``None``, or without targets: no row is skipped.
        chunk_bytes: Size of the workspace for the fp32 logits of a chunk, as in :func:`linear_logprob`.

    Returns:
        A :class:`LinearDivergence`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or settings do not fit together, a measure is unknown, or a target is no row of the
            weight.

    """
    names = checks.choices("measures", measures, MEASURES)
    arguments = _checked(
        hidden,
        other,
        weight,
        targets,
        first=0,
        other_weight=other_weight,
        bias=bias,
        other_bias=other_bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        totals=None,
        shares="js" in names or "tv" in names,
        js_beta=js_beta,
        ignore_index=ignore_index if targets is not None else None,
        chunk_bytes=chunk_bytes,
        whole=True,
    )
    statistics = _statistics(arguments)
    return measures_of(statistics[None], arguments["targets"], arguments["ignore_index"], names, targets is not None)


@explained
def linear_divergence_slice(
    hidden: Tensor,
    other: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    first: int,
    other_weight: Tensor | None = None,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    totals: Tensor | None = None,
    js_beta: float = 0.5,
    ignore_index: int | None = IGNORED,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Return the part of divergences that a slice of the vocabulary gives, for tensor parallelism.

    Each rank calls this with its rows of the weights, all ranks gather the results, and
    :func:`vgpo_kernels.combine_divergences`
    computes the measures. For ``js`` and ``tv`` each rank calls it once more with ``totals``, which
    :func:`vgpo_kernels.divergence_totals` computes of the gathered results, and adds the second result to its first.
    Differentiable like :func:`linear_divergence`; the gradients w.r.t. hidden and other are this slice's share.
    :func:`vgpo_kernels.integrations.tensor_parallel.parallel_divergence` does all of this in a process group.

    Args:
        hidden: As in :func:`linear_divergence`, the same on every rank.
        other: As in :func:`linear_divergence`, the same on every rank.
        weight: Rows ``first`` to ``first + v`` of the head's weight, ``[v, D]``.
        targets: Token ids in the whole vocabulary, integer ``[...]``, or ``None``.
        first: Where the slice begins in the vocabulary.
        other_weight: These rows of the other view's head, ``[v, E]``.
        bias: The bias of these rows, ``[v]``.
        other_bias: The bias of the other head's rows, ``[v]``.
        temperature: As in :func:`linear_divergence`.
        logit_scale: Likewise.
        softcap: Likewise.
        totals: fp32 ``[4, ...]``. With it the result has the slice's shares in ``js`` and ``tv``, and nothing else.
        js_beta: As in :func:`linear_divergence`.
        ignore_index: Likewise.
        chunk_bytes: Likewise.

    Returns:
        float32 ``[15, ...]`` for targets ``[...]``.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or settings do not fit together.

    """
    arguments = _checked(
        hidden,
        other,
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
        shares=totals is not None,
        js_beta=js_beta,
        ignore_index=ignore_index if targets is not None else None,
        chunk_bytes=chunk_bytes,
        whole=False,
    )
    return _statistics(arguments)


def _checked(
    hidden: Tensor,
    other: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    first: int,
    other_weight: Tensor | None,
    bias: Tensor | None,
    other_bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    totals: Tensor | None,
    shares: bool,
    js_beta: float,
    ignore_index: int | None,
    chunk_bytes: int | None,
    whole: bool,
) -> dict[str, Any]:
    """Return the operator's arguments by name, checked; tensors of rows keep their leading dimensions."""
    states, rows, offsets = head_checks.head(hidden, weight, bias)
    others, other_rows, other_offsets = head_checks.other_view(other, other_weight, other_bias, states, rows)
    skipped = checks.ignore_index(ignore_index)
    shape, meaning = states.shape[:-1], "hidden's without its last dimension"
    if targets is None:
        ids = torch.full(shape, -1, dtype=torch.int64, device=states.device)
    else:
        ids = head_checks.targets(targets, shape, meaning, states.device)
    read = torch.ones_like(ids, dtype=torch.bool) if skipped is None else ids != skipped
    if targets is not None:
        head_checks.target_values(ids, read, rows.shape[0] if whole else None)
    return {
        "hidden": states,
        "other": others,
        "weight": rows,
        "other_weight": other_rows,
        "bias": offsets,
        "other_bias": other_offsets,
        "targets": ids,
        "first": checks.not_negative_integer("first", first),
        **head_checks.logit_map(temperature, logit_scale, softcap, states, read, meaning),
        "totals": None if totals is None else head_checks.vocabulary_totals(totals, shape, states.device),
        "shares": shares,
        "js_beta": checks.fraction("js_beta", js_beta),
        "ignore_index": skipped,
        "chunk_bytes": checks.chunk_bytes(chunk_bytes),
    }


def _statistics(arguments: dict[str, Any]) -> Tensor:
    """Compute the statistics ``[15, ...]`` of checked arguments, in targets' shape."""
    ids = arguments["targets"]
    dtype = checks.compute_dtype(*arguments.values())
    flat = {name: arguments[name].reshape(-1, arguments[name].shape[-1]) for name in ("hidden", "other")}
    flat["targets"] = ids.reshape(-1)
    for name, leading in (("temperatures", ()), ("totals", (4,))):
        if arguments[name] is not None:
            flat[name] = arguments[name].reshape(*leading, -1)
    statistics = registry.call("linear_divergence", ids.device, dtype, **(arguments | flat))
    return statistics.to(dtype).reshape(len(STATISTICS), *ids.shape)  # type: ignore[no-any-return]


def _kept(index: Tensor | None, **rows: Any) -> dict[str, Any]:
    """Return those entries of tensors ``[..., N]`` (and ``[N, D]``) that are computed."""
    if index is None:
        return rows
    along_rows = ("hidden", "other")
    return {
        name: None if value is None else value[index] if name in along_rows else value[..., index]
        for name, value in rows.items()
    }


def _paired(
    kernels: PairKernels,
    *,
    hidden: Tensor,
    other: Tensor,
    weight: Tensor,
    other_weight: Tensor | None,
    bias: Tensor | None,
    other_bias: Tensor | None,
    targets: Tensor,
    first: int,
    logit_map: LogitMap,
    chunk_bytes: int,
) -> PairedHead:
    elements, most = (chunk_elements(chunk_bytes, hidden.shape[0], weight, sweep=sweep) for sweep in (False, True))
    return PairedHead(
        kernels, hidden, other, weight, other_weight, bias, other_bias, targets, first, logit_map, elements, most
    )


def compute(
    kernels: PairKernels,
    *,
    hidden: Tensor,
    other: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    logit_scale: float,
    softcap: float,
    totals: Tensor | None,
    shares: bool,
    js_beta: float,
    ignore_index: int | None,
    **head: Any,
) -> Tensor:
    """Implement the operator ``linear_divergence`` by a backend's kernels."""
    index = kept_rows(targets, ignore_index)
    rows = _kept(index, hidden=hidden, other=other, targets=targets, temperatures=temperatures, totals=totals)
    logit_map = LogitMap(temperature, rows.pop("temperatures"), logit_scale, softcap)
    given = rows.pop("totals")
    with without_autocast(hidden):
        paired = _paired(kernels, **rows, **head, logit_map=logit_map)
        if given is None and shares:
            found = paired.everything(js_beta)
        else:
            found = hidden.new_zeros((len(STATISTICS), paired.number), dtype=torch.float32)
            if given is None:
                found[:SHARES] = paired.statistics()
            else:
                found[SHARES:] = paired.shares(given, js_beta)
    return at_rows(found, index, targets.shape[0])


def compute_backward(
    kernels: PairKernels,
    *,
    grad_statistics: Tensor,
    statistics: Tensor,
    hidden: Tensor,
    other: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    logit_scale: float,
    softcap: float,
    totals: Tensor | None,
    shares: bool,
    js_beta: float,
    ignore_index: int | None,
    gradients: list[bool],
    **head: Any,
) -> tuple[Tensor, ...]:
    """Implement the operator ``linear_divergence_backward`` by a backend's kernels."""
    index = kept_rows(targets, ignore_index)
    rows = _kept(
        index,
        hidden=hidden,
        other=other,
        targets=targets,
        temperatures=temperatures,
        totals=totals,
        statistics=statistics,
        grad_statistics=grad_statistics,
    )
    logit_map = LogitMap(temperature, rows.pop("temperatures"), logit_scale, softcap)
    given, values, incoming = (rows.pop(name) for name in ("totals", "statistics", "grad_statistics"))
    incoming = incoming.clone()  # results that were not computed are constant zeros
    if given is not None:
        incoming[:SHARES] = 0.0
    elif not shares:
        incoming[SHARES:] = 0.0
    weights = [head["weight"], head["other_weight"]]
    with without_autocast(hidden):
        paired = _paired(kernels, **rows, **head, logit_map=logit_map)
        coefficients = pair_coefficients(values, incoming, given, paired.targets >= 0, logit_map, js_beta)
        dtypes = [weights[0].dtype if one is None else one.dtype for one in weights]
        found = paired.gradients(coefficients, js_beta, gradients, dtypes)
    for place, states in enumerate((hidden, other)):
        by_rows = found[place]
        if by_rows is not None:
            # Copied, since both views' may lie in one tensor, and results do not share memory.
            by_rows = by_rows.to(states.dtype, copy=True)
            found[place] = by_rows if index is None else torch.zeros_like(states).index_copy_(0, index, by_rows)
    return tuple(hidden.new_empty(0) if one is None else one.contiguous() for one in found)


def _compiled(hidden: Tensor, **arguments: Any) -> Tensor:
    return compute(compiled_kernels(hidden.device), hidden=hidden, **arguments)


def _compiled_backward(hidden: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    return compute_backward(compiled_kernels(hidden.device), hidden=hidden, **arguments)


def _fake(hidden: Tensor) -> Tensor:
    return hidden.new_empty((len(STATISTICS), hidden.shape[0]), dtype=torch.float32)


def _fake_backward(
    hidden: Tensor, other: Tensor, weight: Tensor, other_weight: Tensor | None, gradients: list[bool]
) -> tuple[Tensor, ...]:
    heads = (weight, weight if other_weight is None else other_weight)
    shapes = [
        *((states.shape, states.dtype) for states in (hidden, other)),
        *((head.shape, head.dtype) for head in heads),
        *((head.shape[:1], torch.float32) for head in heads),
    ]
    return tuple(
        hidden.new_empty(shape, dtype=dtype) if asked else hidden.new_empty(0)
        for asked, (shape, dtype) in zip(gradients, shapes, strict=True)
    )


def _save(ctx: Any, output: Tensor, **arguments: Any) -> None:
    registry.keep(ctx, statistics=output, **arguments)


_DIFFERENTIABLE = ("hidden", "other", "weight", "other_weight", "bias", "other_bias")


def _backward(ctx: Any, needed: set[str], grad_statistics: Tensor) -> dict[str, Tensor]:
    arguments = registry.kept(ctx)
    found = {}
    if needed & {*_DIFFERENTIABLE}:
        results = registry.call(
            "linear_divergence_backward",
            grad_statistics.device,
            checks.compute_dtype(*(arguments[name] for name in _DIFFERENTIABLE)),
            grad_statistics=grad_statistics,
            gradients=[name in needed for name in _DIFFERENTIABLE],
            **arguments,
        )
        found = {
            name: gradient.to(arguments[name].dtype)
            for name, gradient in zip(_DIFFERENTIABLE, results, strict=True)
            if name in needed
        }
    if "totals" in needed:
        found["totals"] = by_totals(arguments["statistics"], grad_statistics, arguments["js_beta"])
    return found


def by_totals(statistics: Tensor, grad_statistics: Tensor, js_beta: float) -> Tensor:
    """Gradient w.r.t. totals, ``[4, N]``: probabilities of the shares are ``exp(z - maximum - log_sum)``.

    The maxima are constants to autograd, like those of the statistics.
    """
    js, tv, js_p, sign_p = statistics[SHARES:]
    by_js, by_tv = grad_statistics[SHARES : SHARES + 2]
    of_p = -by_js * js_beta * js_p - by_tv * sign_p / 2
    of_q = -by_js * (js - js_beta * js_p) + by_tv * (sign_p - 2 * tv) / 2
    zero = torch.zeros_like(of_p)
    return torch.stack([zero, of_p, zero, of_q])


_LOGITS = "float temperature, Tensor? temperatures, float logit_scale, float softcap"
_HEADS = (
    "Tensor hidden, Tensor other, Tensor weight, Tensor? other_weight, Tensor? bias, Tensor? other_bias, "
    f"Tensor targets, int first, {_LOGITS}, Tensor? totals"
)
_PAIRS = "Tensor rows, Tensor weight, Tensor? bias, Tensor? other_bias"

registry.define(
    reference.linear_divergence,
    f"({_HEADS}, bool shares, float js_beta, int? ignore_index, int chunk_bytes) -> Tensor",
    _fake,
    setup_context=_save,
    backward=_backward,
    implementation=_compiled,
)
registry.define(
    reference.linear_divergence_backward,
    f"(Tensor grad_statistics, Tensor statistics, {_HEADS}, bool shares, float js_beta, int? ignore_index, "
    "bool[6] gradients, int chunk_bytes) -> (Tensor grad_hidden, Tensor grad_other, Tensor grad_weight, "
    "Tensor grad_other_weight, Tensor grad_bias, Tensor grad_other_bias)",
    _fake_backward,
    implementation=_compiled_backward,
)
# The arithmetic of one chunk, which every backend implements.
registry.define(
    reference.pair_statistics,
    f"({_PAIRS}, Tensor targets, int first, {_LOGITS}, Tensor(a!) sums, Tensor(b!) logits, bool recompute) -> ()",
    registry.fake_nothing,
    implementation=in_fp32(reference.pair_statistics),
)
registry.define(
    reference.pair_shares,
    f"({_PAIRS}, {_LOGITS}, Tensor totals, float js_beta, Tensor(a!) sums, Tensor(b!) logits, bool recompute) -> ()",
    registry.fake_nothing,
    implementation=in_fp32(reference.pair_shares),
)
registry.define(
    reference.pair_gradient,
    f"({_PAIRS}, Tensor targets, int first, {_LOGITS}, Tensor coefficients, float js_beta, Tensor(a!) logits, "
    "bool recompute) -> ()",
    registry.fake_nothing,
    implementation=in_fp32(reference.pair_gradient),
)
