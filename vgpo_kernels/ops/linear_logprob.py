"""Log-probabilities and entropies from hidden states and an LM head, without an ``[N, V]`` tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import checks, head_checks
from vgpo_kernels.hints import explained
from vgpo_kernels.ops import liger_head, registry
from vgpo_kernels.ops.lm_head import (
    TRUNCATION_COPIES,
    Head,
    HeadKernels,
    at_rows,
    chunk_elements,
    compiled_kernels,
    in_fp32,
    kept_rows,
    without_autocast,
)
from vgpo_kernels.reference import linear_logprob as reference
from vgpo_kernels.reference.linear_logprob import FARTHEST, IGNORED, is_distribution, logp_and_entropy
from vgpo_kernels.reference.logits import LogitMap
from vgpo_kernels.reference.truncation import Truncation
from vgpo_kernels.summaries import summary

# Bytes of products that a call keeps for its backward pass without being asked to.
KEPT = 32 * 2**20


class LinearLogprob(NamedTuple):
    """What :func:`linear_logprob` returns where more than log-probabilities and entropies is asked for.

    All are fp32 in targets' shape, but for ``kept``; ``None`` where not asked for. Only the first two are
    differentiable.

    Attributes:
        logp: Log-probabilities of the targets.
        entropy: Entropies in nats.
        sum_squares: Sum over the vocabulary of squared probabilities: the probability that two draws agree.
        log_mass: Log of the probability of all tokens that the sampler keeps. ``logp - log_mass`` is the
            log-probability of a kept token under the renormalised distribution that the sampler draws from.
        kept: Whether the target is one of them, bool. Where it is not, the sampler, by these logits, cannot have drawn
            it: its log-probability is minus infinity, and ``logp - log_mass`` has no meaning. Between a rollout and the
            same tokens scored again that happens to tokens at the edge, whose logits differ by rounding.

    """

    logp: Tensor
    entropy: Tensor | None = None
    sum_squares: Tensor | None = None
    log_mass: Tensor | None = None
    kept: Tensor | None = None

    def __repr__(self) -> str:
        """A few lines; ``tuple(...)`` shows every number."""
        return summary(self)


@explained
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    return_sum_squares: bool = False,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    ignore_index: int | None = IGNORED,
    chunk_bytes: int | None = None,
    recompute: bool | None = None,
) -> Tensor | tuple[Any, ...]:
    """Log-probabilities of targets under ``softmax((hidden @ weight.T + bias) / temperature)``, and their entropies.

    Models that do more to their logits have ``cap(logit_scale * (hidden @ weight.T + bias)) / temperature``, where
    ``cap(x) = softcap * tanh(x / softcap)``.

    The logits are computed in chunks and not kept (but see ``recompute``): the backward pass computes each chunk again,
    and overwrites it with its gradient. Logits, log-sum-exp and entropy are fp32 for every dtype of the inputs, and so
    is the sum over tokens in the weight's gradient. Differentiable in hidden, weight and bias, through both results; no
    time is spent on the gradient of an input that needs none.

    :func:`vgpo_kernels.backends.liger_head` lets Liger's kernel compute it on an NVIDIA Hopper GPU, with more rounding.

    Matrix products use hidden's dtype (under autocast, autocast's; on CPUs fp32 instead of fp16). The weight is
    converted to it slice by slice, so an fp32 weight needs no bf16 copy. A weight that is tied to an embedding is
    passed as it is. For a head with LoRA (without dropout) pass the weight ``base + scale * B @ A``: autograd carries
    the gradient on to A and B.

    Args:
        hidden: The hidden state that predicts each target, ``[N, D]`` or ``[..., D]``: that of the token **before** it.
            float32, bfloat16 or float16.
        weight: The LM head, ``[V, D]``, in any of these dtypes.
        targets: Token ids, integer ``[N]`` or ``[...]``.
        bias: The head's bias ``[V]``.
        temperature: What logits are divided by, from 2**-126 to 2**126; or a tensor of one for each row,
            in targets' shape, detached. Those of skipped rows are not read.
        logit_scale: What products are multiplied by before they are capped (Cohere's ``logit_scale``; one over
            Granite's ``logits_scaling``), in the same range.
        softcap: Cap of the logits (Gemma's ``final_logit_softcapping``), above 0; ``None``: none. It makes a finite
            logit, ``-softcap``, of a bias of minus infinity.
        return_entropy: Return the entropies as well.
        return_sum_squares: Return the sums of squared probabilities as well, detached.
        top_k: Return what a sampler keeps that draws from so many of the likeliest tokens, and from all that are as
            likely as the last of them (as transformers and vLLM do). At least 1; ``None``: it does not cut.
        top_p: The sampler keeps the likeliest of the tokens that top-k leaves until their renormalised probabilities
            reach this, the token that crosses it included. Above 0, at most 1. With it rows are sorted, which takes
            longer than everything else.
        min_p: The sampler first leaves out tokens with less than this share of the largest probability, in [0, 1].
            (vLLM does this first, transformers after top-p, which differs only where both cut.)
        ignore_index: Targets of this value are skipped: their rows are not read, and give zeros without a gradient. On
            a GPU the host waits for their number. ``None``: no row is skipped, and the host does not wait.
        chunk_bytes: Size of the workspace for the fp32 logits of a chunk; by default 1/24 of all logits, on a GPU 1/16,
            within bounds. More is faster only where a chunk has few tokens.

        recompute: ``False``: keep what the backward pass would compute again, the logits of all rows in hidden's dtype.
            It takes three matrix products then instead of four, with the precision of that dtype. ``True``: do not.
            ``None``: keep at most 32 MiB, of fp32 on a CPU. Calls that return more than entropies keep nothing. Liger's
            kernel does not serve ``False``.

    Returns:
        Log-probabilities (natural logarithm) in targets' shape, float32; with ``return_entropy`` a pair, with the
        entropies in nats; with more a :class:`LinearLogprob`. Zeros (and False) where the target is ``ignore_index``.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or settings do not fit together, or a target is no row of the weight.

    """
    both = checks.flag("return_entropy", return_entropy)
    squares = checks.flag("return_sum_squares", return_sum_squares)
    settings = head_checks.truncation(top_k, top_p, min_p)
    truncation = None if settings is None else Truncation(*settings)
    head = _checked(
        hidden, weight, targets, bias, 0, (temperature, logit_scale, softcap), ignore_index, chunk_bytes, whole=True
    )
    again = None if recompute is None else checks.flag("recompute", recompute)
    if squares or truncation is not None:
        return _more(head, both, squares, truncation)
    if again is not False and liger_head.serves(head["hidden"], head["weight"], head["bias"], _logit_map(head)):
        divisor = head["temperature"] / head["logit_scale"]
        names = ("hidden", "weight", "targets", "ignore_index")
        found = liger_head.logp_and_entropy(**{name: head[name] for name in names}, temperature=divisor, entropy=both)
        return found if both else found[0]
    logp, entropy = logp_and_entropy(_statistics(head, keep=_keeps(head, again)))
    return (logp, entropy) if both else logp


def _more(head: dict[str, Any], entropy: bool, squares: bool, truncation: Truncation | None) -> LinearLogprob:
    """Return what checked arguments give, with more than log-probabilities and entropies."""
    cuts = truncation is not None and truncation.cuts()
    statistics = _statistics(head, squares=squares, truncation=truncation if cuts else None)
    constants = iter(statistics[4:].detach())
    logp, entropies = logp_and_entropy(statistics)
    found = LinearLogprob(logp, entropies if entropy else None)
    if squares:
        found = found._replace(sum_squares=next(constants) * is_distribution(statistics))
    if cuts:
        return found._replace(log_mass=next(constants), kept=next(constants) > 0)
    if truncation is None:
        return found
    # Everything is kept.
    skipped = head["ignore_index"]
    kept = torch.ones_like(head["targets"], dtype=torch.bool) if skipped is None else head["targets"] != skipped
    return found._replace(log_mass=torch.zeros_like(logp, requires_grad=False), kept=kept)


@explained
def linear_logprob_slice(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    first: int,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_sum_squares: bool = False,
    ignore_index: int | None = IGNORED,
    chunk_bytes: int | None = None,
    recompute: bool | None = None,
) -> Tensor:
    """Return the part of log-probabilities and entropies that a slice of the vocabulary gives, for tensor parallelism.

    Each rank calls this with its rows of the weight, all ranks gather the results, and :func:`combine_slices` computes
    log-probabilities and entropies from them. Differentiable like :func:`linear_logprob`: the gradient w.r.t. the
    weight's rows is complete; that w.r.t. hidden is this slice's share, and ranks have to add up theirs.
    :func:`vgpo_kernels.integrations.tensor_parallel.parallel_logprob` does all of this in a process group.

    Args:
        hidden: As in :func:`linear_logprob`, the same on every rank.
        weight: Rows ``first`` to ``first + v`` of the head's weight, ``[v, D]``.
        targets: Token ids in the whole vocabulary, integer ``[...]``.
        first: Where the slice begins in the vocabulary.
        bias: The bias of these rows, ``[v]``.
        temperature: As in :func:`linear_logprob`.
        logit_scale: As in :func:`linear_logprob`.
        softcap: As in :func:`linear_logprob`.
        return_sum_squares: Return the slice's part of the sum of squared probabilities as well, detached.
        ignore_index: As in :func:`linear_logprob`.
        chunk_bytes: As in :func:`linear_logprob`.
        recompute: As in :func:`linear_logprob`, of the logits of this slice.

    Returns:
        float32 ``[4, ...]`` for targets ``[...]``: largest logit of the slice m, log of the sum of exp(z - m), z - m of
        the target (-infinity if it is not in the slice), and the mean of z - m under the slice's softmax. Where every
        logit of the slice is -infinity: -infinity thrice, and 0. Such a slice counts as nothing. With
        ``return_sum_squares`` ``[5, ...]``: the sum of squares of the slice's softmax, too. What a sampler keeps is not
        known of slices: it takes :func:`linear_logprob` and the whole vocabulary.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or settings do not fit together.

    """
    squares = checks.flag("return_sum_squares", return_sum_squares)
    head = _checked(
        hidden,
        weight,
        targets,
        bias,
        first,
        (temperature, logit_scale, softcap),
        ignore_index,
        chunk_bytes,
        whole=False,
    )
    again = None if recompute is None else checks.flag("recompute", recompute)
    return _statistics(head, squares=squares, keep=not squares and _keeps(head, again))


@explained
def combine_slices(slices: Tensor, targets: Tensor, *, ignore_index: int | None = IGNORED) -> tuple[Any, ...]:
    """Compute log-probabilities and entropies from the results of :func:`linear_logprob_slice` for every slice.

    Args:
        slices: Results of all slices of the vocabulary, ``[R, 4, ...]`` or, with sums of squares, ``[R, 5, ...]``, in
            any order. Differentiable.
        targets: The targets, ``[...]``.
        ignore_index: As given for the slices.

    Returns:
        Log-probabilities and entropies, float32 in targets' shape; 0 where the target is ``ignore_index``, NaN where
        every slice is all -infinity. With sums of squares a :class:`LinearLogprob`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit together.

    """
    slices = head_checks.vocabulary_slices(slices, 4, 5)
    targets = head_checks.slice_targets(targets, slices)
    skipped = checks.ignore_index(ignore_index)
    kept = None if skipped is None else targets != skipped
    if kept is not None:  # what is not read has no part in a gradient, where zero times NaN is NaN
        slices = torch.where(kept, slices, 0.0)
    maximum, log_sum, target, mean, *squares = slices.unbind(1)
    # The maxima are constants to autograd: what depends on them cancels.
    shift = (maximum - maximum.amax(0)).detach()
    total = (shift + log_sum).logsumexp(0)
    share = (shift + log_sum - total).exp()
    logp = of_one_slice(target + shift) - total
    # A slice of minus infinities is infinitely far away, and zero times infinity is NaN.
    entropy = total - (share * (shift.clamp(min=FARTHEST) + mean)).sum(0)
    if kept is not None:
        logp, entropy = torch.where(kept, logp, 0.0), torch.where(kept, entropy, 0.0)
    if not squares:
        return logp, entropy
    sum_squares = (share.square() * squares[0]).sum(0).detach()
    return LinearLogprob(logp, entropy, sum_squares if kept is None else torch.where(kept, sum_squares, 0.0))


def of_one_slice(target: Tensor) -> Tensor:
    """Return the target's logit, of the slices ``[R, ...]`` the one that is not minus infinity.

    If none is, the logit is minus infinity, and values do not tell whose it is. The gradient goes to every slice then:
    the others, by its index, have no column for it.
    """
    largest = target.amax(0)
    return torch.where(largest == -torch.inf, target.sum(0), largest)


def _checked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    first: int,
    mapping: tuple[object, object, object],
    ignore_index: int | None,
    chunk_bytes: int | None,
    *,
    whole: bool,
) -> dict[str, Any]:
    """Return the operator's arguments by name, checked; hidden and targets keep their leading dimensions."""
    hidden, weight, bias = head_checks.head(hidden, weight, bias)
    begin = checks.not_negative_integer("first", first)
    skipped = checks.ignore_index(ignore_index)
    ids = head_checks.targets(targets, hidden.shape[:-1], "hidden's without its last dimension", hidden.device)
    read = torch.ones_like(ids, dtype=torch.bool) if skipped is None else ids != skipped
    head_checks.target_values(ids, read, weight.shape[0] if whole else None)
    logit_map = head_checks.logit_map(*mapping, hidden, read, "targets'")
    size = checks.chunk_bytes(chunk_bytes)
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "targets": ids,
        "first": begin,
        **logit_map,
        "ignore_index": skipped,
        "chunk_bytes": size,
    }


def _logit_map(head: dict[str, Any]) -> LogitMap:
    return LogitMap(**{name: head[name] for name in LogitMap._fields})


def _keeps(head: dict[str, Any], recompute: bool | None) -> bool:
    """Return whether a call keeps its products for the backward pass: as it says, or by their size."""
    inputs = (head["hidden"], head["weight"], head["bias"])
    if not torch.is_grad_enabled() or not any(one is not None and one.requires_grad for one in inputs):
        return False
    if recompute is not None or torch.compiler.is_compiling():
        return recompute is False
    hidden: Tensor = head["hidden"]
    small = 4 * head["targets"].numel() * head["weight"].shape[0] <= KEPT
    return bool(small) and hidden.device.type == "cpu" and hidden.dtype == torch.float32


def _statistics(
    head: dict[str, Any], *, squares: bool = False, truncation: Truncation | None = None, keep: bool = False
) -> Tensor:
    """Compute the statistics ``[4, ...]`` of checked arguments, and what else is asked for, in targets' shape."""
    hidden, ids = head["hidden"], head["targets"]
    dtype = checks.compute_dtype(hidden, head["weight"], head["bias"])
    flat = {"hidden": hidden.reshape(-1, hidden.shape[-1]), "targets": ids.reshape(-1)}
    if head["temperatures"] is not None:
        flat["temperatures"] = head["temperatures"].reshape(-1)
    if keep:
        statistics, _ = registry.call("linear_logprob_keeping", hidden.device, dtype, **(head | flat))
        return statistics.to(dtype).reshape(4, *ids.shape)  # type: ignore[no-any-return]
    more = {"squares": squares, "truncated": truncation is not None, **(truncation or Truncation())._asdict()}
    statistics = registry.call("linear_logprob", hidden.device, dtype, **(head | flat | more))
    return statistics.to(dtype).reshape(statistics.shape[0], *ids.shape)  # type: ignore[no-any-return]


def compute(
    kernels: HeadKernels,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    first: int,
    temperature: float,
    temperatures: Tensor | None,
    logit_scale: float,
    softcap: float,
    ignore_index: int | None,
    chunk_bytes: int,
    squares: bool = False,
    truncated: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    products: Tensor | None = None,
) -> Tensor:
    """Implement the operator ``linear_logprob`` by kernels, which write ``products`` where these are kept."""
    index = kept_rows(targets, ignore_index)
    rows, ids = (hidden, targets) if index is None else (hidden[index], targets[index])
    elements = chunk_elements(chunk_bytes, rows.shape[0], weight)
    logit_map = LogitMap(temperature, temperatures, logit_scale, softcap).of_rows(index)
    with without_autocast(hidden):
        if truncated:
            elements = max(elements // TRUNCATION_COPIES, 1)
            head = Head(kernels, rows, weight, bias, ids, first, logit_map, elements, whole_rows=True)
            statistics = head.truncated(Truncation(top_k, top_p, min_p), squares=squares)
        else:
            head = Head(kernels, rows, weight, bias, ids, first, logit_map, elements)
            statistics = head.statistics(squares=squares, products=products)
    return at_rows(statistics, index, targets.shape[0])


def compute_keeping(kernels: HeadKernels, hidden: Tensor, weight: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Implement the operator ``linear_logprob_keeping`` by a backend's kernels."""
    products = hidden.new_empty((hidden.shape[0], weight.shape[0]))
    return compute(kernels, hidden=hidden, weight=weight, products=products, **arguments), products


def compute_backward(
    kernels: HeadKernels,
    grad_statistics: Tensor,
    statistics: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    first: int,
    temperature: float,
    temperatures: Tensor | None,
    logit_scale: float,
    softcap: float,
    ignore_index: int | None,
    gradients: list[bool],
    chunk_bytes: int,
    products: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement the operator ``linear_logprob_backward`` by a backend's kernels."""
    index = kept_rows(targets, ignore_index)
    rows = hidden if index is None else hidden[index]
    if index is not None:
        targets, statistics, grad_statistics = targets[index], statistics[:, index], grad_statistics[:, index]
    elements = chunk_elements(chunk_bytes, rows.shape[0], weight)
    logit_map = LogitMap(temperature, temperatures, logit_scale, softcap).of_rows(index)
    head = Head(kernels, rows, weight, bias, targets, first, logit_map, elements)
    with without_autocast(hidden):
        by_hidden, by_weight, by_bias = head.gradients(statistics, grad_statistics, gradients, weight.dtype, products)
    if by_hidden is not None:
        by_hidden = by_hidden.to(hidden.dtype)
        if index is not None:
            by_hidden = torch.zeros_like(hidden).index_copy_(0, index, by_hidden)
    by_hidden, by_weight, by_bias = (
        hidden.new_empty(0) if gradient is None else gradient for gradient in (by_hidden, by_weight, by_bias)
    )
    return by_hidden, by_weight, by_bias


def _compiled(hidden: Tensor, **arguments: Any) -> Tensor:
    return compute(compiled_kernels(hidden.device), hidden=hidden, **arguments)


def _compiled_keeping(hidden: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    return compute_keeping(compiled_kernels(hidden.device), hidden=hidden, **arguments)


def _compiled_backward(hidden: Tensor, **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return compute_backward(compiled_kernels(hidden.device), hidden=hidden, **arguments)


def _fake(hidden: Tensor, squares: bool, truncated: bool) -> Tensor:
    return hidden.new_empty((4 + squares + 2 * truncated, hidden.shape[0]), dtype=torch.float32)


def _fake_keeping(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _fake(hidden, False, False), hidden.new_empty((hidden.shape[0], weight.shape[0]))


def _fake_backward(hidden: Tensor, weight: Tensor, gradients: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if gradients[0] else 0),
        weight.new_empty(weight.shape) if gradients[1] else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0], dtype=torch.float32) if gradients[2] else hidden.new_empty(0),
    )


def _save(
    ctx: Any,
    output: Tensor,
    squares: bool,
    truncated: bool,
    top_k: int,
    top_p: float,
    min_p: float,
    **arguments: Any,
) -> None:
    registry.keep(ctx, statistics=output, products=None, **arguments)


def _save_keeping(ctx: Any, output: tuple[Tensor, Tensor], **arguments: Any) -> None:
    ctx.set_materialize_grads(False)  # nobody differentiates the products, and theirs would be as large
    registry.keep(ctx, statistics=output[0], products=output[1], **arguments)


def _backward_keeping(ctx: Any, needed: set[str], grad_statistics: Tensor, _: None) -> dict[str, Tensor]:
    return _backward(ctx, needed, grad_statistics)


def _backward(ctx: Any, needed: set[str], grad_statistics: Tensor) -> dict[str, Tensor]:
    arguments = registry.kept(ctx)
    arguments["statistics"] = arguments["statistics"][:4]  # the others are constants
    inputs = {name: arguments[name] for name in ("hidden", "weight", "bias")}
    found = registry.call(
        "linear_logprob_backward",
        grad_statistics.device,
        checks.compute_dtype(arguments["hidden"], arguments["weight"]),
        grad_statistics=grad_statistics[:4],
        gradients=[name in needed for name in inputs],
        **arguments,
    )
    return {
        name: gradient.to(inputs[name].dtype) for name, gradient in zip(inputs, found, strict=True) if name in needed
    }


_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int first, float temperature, Tensor? temperatures, "
    "float logit_scale, float softcap"
)

registry.define(
    reference.linear_logprob,
    f"({_HEAD}, int? ignore_index, int chunk_bytes, bool squares, bool truncated, int top_k, float top_p, "
    "float min_p) -> Tensor",
    _fake,
    setup_context=_save,
    backward=_backward,
    implementation=_compiled,
)
registry.define(
    reference.linear_logprob_keeping,
    f"({_HEAD}, int? ignore_index, int chunk_bytes) -> (Tensor statistics, Tensor products)",
    _fake_keeping,
    setup_context=_save_keeping,
    backward=_backward_keeping,
    implementation=_compiled_keeping,
)
registry.define(
    reference.linear_logprob_backward,
    f"(Tensor grad_statistics, Tensor statistics, {_HEAD}, int? ignore_index, bool[3] gradients, int chunk_bytes, "
    "Tensor? products) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _fake_backward,
    implementation=_compiled_backward,
)
# The arithmetic of one chunk, which every backend implements.
registry.define(
    reference.head_statistics,
    f"({_HEAD}, Tensor(a!) statistics, Tensor(b!) logits, bool keep) -> ()",
    registry.fake_nothing,
    implementation=in_fp32(reference.head_statistics),
)
registry.define(
    reference.head_gradient,
    f"({_HEAD}, Tensor coefficients, Tensor(a!) logits, bool recompute) -> ()",
    registry.fake_nothing,
    implementation=in_fp32(reference.head_gradient),
)
registry.define(
    reference.head_product,
    "(Tensor left, Tensor right, Tensor(a!) result, bool accumulate) -> ()",
    registry.fake_nothing,
    implementation=in_fp32(reference.head_product),
)
