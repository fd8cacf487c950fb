"""Visual focus and log-probabilities of sequences that are split over the ranks of a process group.

For context parallelism of any layout (Ulysses, ring attention): every rank knows the tokens and masks of the whole
batch, and has the hidden states of some positions. What moves is one row of D numbers for each image and rank, and one
number a token; never a hidden state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from vgpo_kernels import backends, checks
from vgpo_kernels.config import Visibility
from vgpo_kernels.hints import explained
from vgpo_kernels.ops.linear_logprob import linear_logprob
from vgpo_kernels.ops.visual_focus import visual_focus, visual_prototype
from vgpo_kernels.reference.layout import responses_of
from vgpo_kernels.reference.linear_logprob import IGNORED, first_tokens
from vgpo_kernels.reference.visual_focus import totals_before


@explained
def parallel_focus(
    hidden: Tensor,
    visual_mask: Tensor,
    response_mask: Tensor,
    *,
    positions: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,
    visibility: Visibility = "all",
) -> Tensor:
    """:func:`vgpo_kernels.visual_focus` where each rank has the hidden states of some positions.

    Every rank calls it with the same masks and gets the same bits. A rank sums the image tokens that it has; the ranks
    gather these sums, ``[B, D]`` from each, and add them in the order of ranks, so that the result does not depend on
    how a collective reduces. Counts need no exchange, since every rank has the masks. Cosines are computed where the
    hidden states are, and exchanged as one number a token.

    With ``"causal"`` the sums are of image tokens that the same scored tokens see: one for each image that arrives
    before a scored token, ``[P, D]``. To learn P the host waits for a GPU once.

    Args:
        hidden: This rank's rows, packed ``[n, D]`` or padded ``[B, s, D]``; float32, bfloat16 or float16. Detached.
            Rows off both masks and padding rows are never read.
        visual_mask: As in :func:`vgpo_kernels.visual_focus`, of the whole batch: ``[N]`` or ``[B, S]``.
        response_mask: Likewise, ``[N]``, or ``[B, T]`` for the last T of S positions.
        positions: Where this rank's rows stand in the N or S positions, int64 ``[n]`` or ``[s]``, increasing. Rows at N
            or S and beyond are padding. Each position is on one rank. Default: equal parts in the order of ranks.
        group: The ranks; default: all.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``, in the N positions.
        visibility: As in :func:`vgpo_kernels.visual_focus`.

    Returns:
        Cosines in response_mask's shape, float32, as :func:`vgpo_kernels.visual_focus` returns them.

    Raises:
        TypeError: An argument is not a tensor or has the wrong dtype.
        ValueError: Shapes, devices, boundaries or positions do not fit together, or ``visibility`` is unknown.

    """
    causal = checks.visibility(visibility)
    scored, boundaries = checks.response_layout(response_mask, cu_seqlens)
    states = _states(hidden, boundaries)
    visible = _whole_mask(visual_mask, scored, boundaries)
    checks.require_device("response_mask", scored, states.device, "hidden")
    if boundaries is None:
        checks.require_shape("hidden", states, (len(scored), *states.shape[1:]), "a row for each of response_mask")
    places = _places(positions, states, visible.shape[-1], group)
    if not scored.numel():
        return scored.new_zeros(scored.shape, dtype=checks.compute_dtype(states))

    first = visible.shape[-1] - scored.shape[-1]
    spans = _spans(visible, pad(scored, (first, 0)), boundaries, causal)
    rows = states.reshape(-1, states.shape[-1])
    begin = torch.searchsorted(places, spans.begin)
    if boundaries is None:
        begin = begin + spans.sequence * len(places)
    own = pad(begin, (0, 1), value=len(rows))
    span = torch.searchsorted(own[1:].contiguous(), torch.arange(len(rows), device=rows.device), right=True)

    # A kernel's mean over packed spans is their sum, read once and written once, but for a factor.
    image = _at(visible, places, False).reshape(-1)
    running = pad(image.cumsum(0), (1, 0))
    means = visual_prototype(rows, image, cu_seqlens=own)
    sums = _total((means * running[own].diff()[:, None])[spans.summed], group)
    totals = sums.new_zeros(means.shape).index_copy(0, spans.summed, sums)
    if causal:
        totals = totals_before(totals, spans.place)
    prototype = (totals / spans.seen.clamp(min=1)[:, None]).to(means.dtype)

    # A given prototype of zeros means no image, but the mean of an image may be zero: then finite cosines are.
    zero = (prototype == 0).all(-1)
    cos = visual_focus(
        rows,
        None,
        _at(scored, places - first, False).reshape(-1),
        cu_seqlens=own,
        prototype=torch.where(zero[:, None], 1, prototype),
        prototype_index=torch.where(spans.seen > 0, torch.arange(len(zero), device=rows.device), -1),
    )
    cos = torch.where(zero[span] & cos.isfinite(), 0, cos).view(states.shape[:-1])
    return gather_tokens(cos, places - first, scored.shape[-1], group)


@explained
def parallel_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    input_ids: Tensor,
    response_mask: Tensor,
    *,
    positions: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
    recompute: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of response tokens where each rank has the hidden states of some positions.

    A rank computes those that its hidden states predict, by :func:`vgpo_kernels.linear_logprob`, and
    :func:`gather_tokens` brings them to every rank, at the tokens themselves.

    Args:
        hidden: This rank's rows, packed ``[n, D]`` or padded ``[B, s, D]``; float32, bfloat16 or float16. Only rows
            before a response token are read.
        weight: The whole LM head, ``[V, D]``.
        input_ids: Token ids of the whole batch, integer ``[N]`` or ``[B, S]``.
        response_mask: As in :func:`parallel_focus`. False at the first token of a sequence, which nothing predicts.
        positions: As in :func:`parallel_focus`.
        group: The ranks; default: all.
        cu_seqlens: As in :func:`parallel_focus`.
        bias: As in :func:`vgpo_kernels.linear_logprob`.
        temperature: Likewise; a tensor has one for each of this rank's rows, ``[n]`` or ``[B, s]``.
        logit_scale: Likewise.
        softcap: Likewise.
        return_entropy: Return the entropies as well.
        chunk_bytes: As in :func:`vgpo_kernels.linear_logprob`.
        recompute: Likewise.

    Returns:
        Log-probabilities in response_mask's shape, float32, 0 off the mask; the same on every rank. With
        ``return_entropy`` a pair, with the entropies in nats. Gradients are as :func:`gather_tokens` says.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices, boundaries, positions or settings do not fit together.

    """
    scored, boundaries = checks.response_layout(response_mask, cu_seqlens)
    tokens = _tokens(input_ids, boundaries)
    states = _states(hidden, boundaries)
    checks.require_device("response_mask", scored, states.device, "hidden")
    places = _places(positions, states, tokens.shape[-1], group)
    targets = next_tokens(tokens, places, boundaries, response_mask=scored)
    checks.predicted_tokens(scored, first_tokens(scored, tokens, boundaries))
    found = linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        return_entropy=checks.flag("return_entropy", return_entropy),
        chunk_bytes=chunk_bytes,
        recompute=recompute,
    )
    # The token that a row predicts stands after it.
    after = places + 1 - (tokens.shape[-1] - scored.shape[-1])
    if isinstance(found, Tensor):
        return gather_tokens(found, after, scored.shape[-1], group)
    logp, entropy = gather_tokens(torch.stack(found), after, scored.shape[-1], group)
    return logp, entropy


def next_tokens(
    input_ids: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    response_mask: Tensor | None = None,
    ignore_index: int = IGNORED,
) -> Tensor:
    """Return the token that each of this rank's rows predicts: the targets of :func:`vgpo_kernels.linear_logprob`.

    Args:
        input_ids: Token ids of the whole batch, integer ``[N]`` or ``[B, S]``.
        positions: As in :func:`parallel_focus`, int64 ``[n]`` or ``[s]``.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        response_mask: Tokens that are targets, ``[N]``, or ``[B, T]`` for the last T of S positions; default: all.
        ignore_index: What rows without a target get: last ones of a sequence, padding, those before other tokens.

    Returns:
        Token ids, int64 ``[n]`` or ``[B, s]``.

    Raises:
        TypeError: An argument is not a tensor or has the wrong dtype.
        ValueError: Shapes, devices, boundaries or positions do not fit together.

    """
    tokens = _tokens(input_ids, cu_seqlens)
    places = _increasing(positions, tokens, "input_ids")
    if response_mask is not None:
        if cu_seqlens is None:
            wanted = checks.last_positions(response_mask, tokens, "input_ids")
        else:
            wanted = checks.mask("response_mask", response_mask, tokens.shape, "input_ids'", tokens.device, "input_ids")
        wanted = pad(wanted, (tokens.shape[-1] - wanted.shape[-1], 0))
        tokens = torch.where(wanted, tokens, ignore_index)
    following = pad(tokens[..., 1:], (0, 1), value=ignore_index)
    if cu_seqlens is not None and len(tokens):
        # The end before an empty first sequence is entry -1: the end of the last.
        ends = checks.cu_seqlens(cu_seqlens, tokens, "input_ids")[1:] - 1
        following = following.index_fill(0, ends, ignore_index)
    return _at(following, places, ignore_index)


def gather_tokens(values: Tensor, positions: Tensor, length: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Bring values of this rank's tokens to every rank, with a gradient.

    Backward hands each rank the gradient of its own values, without an exchange. So if every rank computes the same
    loss of the result, gradients by parameters are each rank's share, and their sum over ranks is that of one process.
    Where they are averaged over ranks instead (as DDP and FSDP do), multiply the loss by the number of ranks first.

    Args:
        values: ``[..., s]`` of this rank's rows, of any floating dtype; differentiable.
        positions: Where they go, int64 ``[s]``. Those below 0, and at ``length`` and beyond, are left out.
        length: Number of positions in the result.
        group: The ranks; default: all.

    Returns:
        ``[..., length]`` in values' dtype, the same bits on every rank; 0 at positions that no rank has.

    Raises:
        TypeError: ``values`` or ``positions`` is not a tensor or has the wrong dtype, or ``length`` is no integer.
        ValueError: Shapes or devices do not fit together, or ``length`` is negative.

    """
    own = checks.require_floating("values", values)
    checks.not_negative_integer("length", length)
    places = checks.integers("positions", positions)
    checks.require_shape("positions", places, own.shape[-1:], f"an entry per token of values {checks.describe(own)}")
    checks.require_device("positions", places, own.device, "values")
    return _Gathered.apply(own, places, length, group)  # type: ignore[no-untyped-call, no-any-return]


def zigzag_positions(length: int, ranks: int, rank: int, *, device: torch.device | None = None) -> Tensor:
    """Return the positions of a rank where attention's work is balanced: parts ``rank`` and ``2 ranks - 1 - rank``.

    Args:
        length: Number of positions, S or N.
        ranks: Number of ranks R. The positions are cut into 2 R equal parts, the last ones beyond ``length``.
        rank: This rank.
        device: Where the result is.

    Returns:
        int64 ``[2 ceil(length / 2 R)]``, increasing.

    Raises:
        TypeError: A number is no integer.
        ValueError: A number is out of range.

    """
    part = -(-checks.not_negative_integer("length", length) // (2 * checks.positive_integer("ranks", ranks)))
    if checks.not_negative_integer("rank", rank) >= ranks:
        raise ValueError(f"rank must be below ranks, {ranks}, got {rank}")
    within = torch.arange(part, device=device)
    return torch.cat([rank * part + within, (2 * ranks - 1 - rank) * part + within])


class _Gathered(torch.autograd.Function):
    """Values of every rank at their positions. Other ranks add zeros, which changes no bit of a number."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, length: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.save_for_backward(places)
        inside = (places >= 0) & (places < length)
        whole = values.new_zeros(*values.shape[:-1], length)
        if whole.numel():
            whole.index_add_(-1, places.clamp(0, length - 1), torch.where(inside, values, 0))
            dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return _at(gradients[0], places, 0), None, None, None


class _Spans(NamedTuple):
    """Cuts of the whole batch between which all scored tokens see the same image tokens.

    Attributes:
        sequence: The sequence that a span is of, int64 ``[P]``.
        place: Its place among the spans of the sequence, int64 ``[P]``.
        begin: Its first position, of N or of S, int64 ``[P]``.
        seen: Image tokens that its scored tokens see, int64 ``[P]``.
        summed: The spans whose image tokens are seen by any scored token, int64.

    """

    sequence: Tensor
    place: Tensor
    begin: Tensor
    seen: Tensor
    summed: Tensor


def _spans(visible: Tensor, scored: Tensor, boundaries: Tensor | None, causal: bool) -> _Spans:
    """Cut a batch, ``[B, S]`` or ``[N]`` with boundaries, at sequences; causal: where a scored token sees more, too."""
    batch = checks.batch_size(visible, boundaries)
    sequence, first = responses_of(visible.numel(), batch, boundaries, visible.device)
    every = torch.arange(batch, device=visible.device)
    running = pad(visible.reshape(-1).cumsum(0), (1, 0))
    origin = torch.zeros_like(every) if boundaries is not None else first
    if not causal:
        last = pad(first[1:], (0, 1), value=visible.numel())
        return _Spans(every, torch.zeros_like(every), first - origin, running[last] - running[first], every)
    before, asked = running[:-1], scored.reshape(-1)
    seen = pad(torch.where(asked, before, 0).cummax(0).values[:-1], (1, 0))
    rises = (asked & (before > torch.maximum(seen, running[first][sequence]))).nonzero()[:, 0]
    # A rise is past the first position of its sequence, so no two cuts of which the order matters are equal.
    begin, order = torch.cat([first, rises]).sort(stable=True)
    owner = torch.cat([every, sequence[rises]])[order]
    rank = order.argsort()
    return _Spans(
        owner,
        torch.arange(len(owner), device=owner.device) - rank[:batch][owner],
        begin - origin[owner],
        running[begin] - running[first][owner],
        rank[batch:] - 1,
    )


def _total(sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Add up the sums of all ranks in the order of ranks, in the widest dtype that their device has.

    An all-reduce would move less from 3 ranks on, 2 (R - 1) / R of a rank's sums instead of R - 1, but adds in an order
    that may depend on where a number stands among the others: other sequences of the batch would change bits. What
    moves is small either way: 3.7 MB to each of 8 ranks for 32 images and D = 4096.
    """
    wide = backends.wide_dtype(sums.device)
    if not sums.numel():
        return sums.to(wide)
    parts = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, sums, group=group)
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part
    return total


def _at(whole: Tensor, places: Tensor, fill: float) -> Tensor:
    """Return entries of the last dimension of ``whole``, ``fill`` where a place is outside."""
    length = whole.shape[-1]
    if not length:
        return whole.new_full((*whole.shape[:-1], len(places)), fill)
    inside = (places >= 0) & (places < length)
    return torch.where(inside, whole.index_select(-1, places.clamp(0, length - 1)), fill)


def _states(hidden: object, boundaries: Tensor | None) -> Tensor:
    """Check a rank's rows, ``[B, s, D]`` or ``[n, D]`` with boundaries, and detach them."""
    states = checks.require_floating("hidden", hidden).detach()
    if states.dim() != (3 if boundaries is None else 2) or not states.shape[-1]:
        layout = "[B, s, D] without cu_seqlens" if boundaries is None else "[n, D] with cu_seqlens"
        raise ValueError(f"hidden must have shape {layout}, D > 0, got {checks.describe(states)}")
    return states


def _tokens(input_ids: object, boundaries: object) -> Tensor:
    """Check the token ids of the whole batch, ``[B, S]`` or ``[N]`` with boundaries."""
    tokens = checks.integers("input_ids", input_ids)
    if tokens.dim() != (2 if boundaries is None else 1):
        layout = "[B, S] without cu_seqlens" if boundaries is None else "[N] with cu_seqlens"
        raise ValueError(f"input_ids must have shape {layout}, got {checks.describe(tokens)}")
    return tokens.to(torch.int64)


def _whole_mask(visual_mask: object, scored: Tensor, boundaries: Tensor | None) -> Tensor:
    """Check the image tokens of the whole batch against the scored ones."""
    tensor = checks.require_tensor("visual_mask", visual_mask)
    if boundaries is not None:
        return checks.mask("visual_mask", tensor, scored.shape, "response_mask's", scored.device, "response_mask")
    if tensor.dim() != 2:
        raise ValueError(f"visual_mask must have shape [B, S] without cu_seqlens, got {checks.describe(tensor)}")
    checks.last_positions(scored, tensor, "visual_mask")
    return checks.mask("visual_mask", tensor, tensor.shape, "", scored.device, "response_mask")


def _places(positions: object, hidden: Tensor, length: int, group: dist.ProcessGroup | None) -> Tensor:
    """Return where a rank's rows stand among ``length`` positions."""
    rows = hidden.shape[-2]
    if positions is None:
        ranks = dist.get_world_size(group)
        if rows * ranks < length:
            raise ValueError(
                f"hidden must have at least {-(-length // ranks)} rows, an equal part of {length} positions on "
                f"{ranks} ranks, or positions be given, got {checks.describe(hidden)}"
            )
        return torch.arange(rows, device=hidden.device) + rows * dist.get_rank(group)
    places = _increasing(positions, hidden, "hidden")
    checks.require_shape("positions", places, (rows,), f"an entry per row of hidden {checks.describe(hidden)}")
    return places


def _increasing(positions: object, of: Tensor, name: str) -> Tensor:
    """Check positions of a rank's rows of the argument ``name``."""
    places = checks.integers("positions", positions)
    if places.dim() != 1:
        raise ValueError(f"positions must have shape [n] or [s], got {checks.describe(places)}")
    checks.require_device("positions", places, of.device, name)
    if checks.values_are_free(places) and len(places) and (places[0] < 0 or bool((places.diff() < 0).any())):
        raise ValueError(f"positions must increase from 0 or more, got {checks.summarise(places)}")
    return places.to(torch.int64).contiguous()
