"""An LM head before two views of every token, in chunks: see lm_head.py, whose chunks these are.

The rows of both views lie side by side, hidden's and other's in turn. So one product with a slice of the weight gives
the logits of both, the two rows that a kernel needs together are neighbours, and one product with their gradients gives
the weight's. Where the other view has a head of its own, its products go to the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels.ops import lm_head
from vgpo_kernels.ops.lm_head import GradientSums, Head, HeadKernels, finished, scaled, slices
from vgpo_kernels.reference.linear_divergence import SHARE_SUMS, SHARES, STATISTICS, SUMS
from vgpo_kernels.reference.linear_logprob import columns_of, gradient_of
from vgpo_kernels.reference.logits import LogitMap

VIEWS = ("", "other_")  # what the statistics' names of each view begin with


class PairKernels(NamedTuple):
    """The arithmetic of a chunk of pairs, as a backend implements the operators of the same names.

    Attributes:
        head: That of one view, of which ``product`` is used.
        statistics: ``pair_statistics``.
        shares: ``pair_shares``.
        gradient: ``pair_gradient``.

    """

    head: HeadKernels
    statistics: Callable[..., None]
    shares: Callable[..., None]
    gradient: Callable[..., None]


def compiled_kernels(device: torch.device) -> PairKernels:
    """Return the kernels of the extension: C++ on the CPU, CUDA on a GPU."""
    ops = torch.ops.vgpo_kernels
    return PairKernels(
        lm_head.compiled_kernels(device),
        ops.pair_statistics.default,
        ops.pair_shares.default,
        ops.pair_gradient.default,
    )


class Chunk(NamedTuple):
    """Some pairs before some entries of the vocabulary.

    Attributes:
        pairs: Which pairs.
        columns: Which rows of the weight.
        weights: Those rows, of every head.
        arguments: What every operator of a chunk takes, in order, up to its targets.
        logits: The workspace, ``[2 n, v]``.
        fused: Whether the operator computes the products; otherwise they are in the workspace.

    """

    pairs: slice
    columns: slice
    weights: tuple[Tensor, ...]
    arguments: tuple[Tensor | None, ...]
    logits: Tensor
    fused: bool


class PairedHead:
    """The pairs of one call before an LM head, and the workspace that their logits pass through.

    Args:
        kernels: The backend's arithmetic.
        hidden: One view's rows, ``[N, D]``.
        other: The other's, ``[N, E]``, in hidden's dtype.
        weight: The head, ``[V, D]``, in any floating dtype.
        other_weight: The other view's, ``[V, E]``, or ``None``: the same.
        bias: ``[V]`` fp32 or ``None``.
        other_bias: That of ``other_weight``.
        targets: Ids in the whole vocabulary, int64 ``[N]``.
        first: Where the weights' rows begin in the vocabulary.
        logit_map: How products become logits.
        elements: fp32 numbers that the workspace may hold.
        most: As many where products are kept for a second pass.

    """

    def __init__(
        self,
        kernels: PairKernels,
        hidden: Tensor,
        other: Tensor,
        weight: Tensor,
        other_weight: Tensor | None,
        bias: Tensor | None,
        other_bias: Tensor | None,
        targets: Tensor,
        first: int,
        logit_map: LogitMap,
        elements: int,
        most: int,
    ) -> None:
        self.kernels = kernels
        self.logit_map = logit_map
        self.shared = other_weight is None
        if other_weight is None:
            rows, both = torch.stack([hidden, other], 1).flatten(0, 1), targets.repeat_interleave(2)
            heads = [Head(kernels.head, rows, weight, bias, both, first, logit_map, max(elements, 2))]
            self.pairs, self.biases = max(heads[0].rows // 2, 1), (bias, bias)
        else:
            half = max(elements // 2, 1)
            heads = [
                Head(kernels.head, states, head, offsets, targets, first, logit_map, half)
                for states, head, offsets in ((hidden, weight, bias), (other, other_weight, other_bias))
            ]
            columns = min(head.columns for head in heads)
            self.pairs, self.biases = min(head.rows for head in heads), (bias, other_bias)
            for head in heads:
                head.columns = columns
        self.heads = heads
        self.most = most
        self.kept: Tensor | None = None
        self.targets = columns_of(targets, first, weight.shape[0])
        self.number = hidden.shape[0]

    @cached_property
    def workspace(self) -> Tensor:
        head = self.heads[0]
        return head.hidden.new_empty(2 * self.pairs * head.columns, dtype=torch.float32)

    def chunks(self) -> Iterator[Chunk]:
        """Yield every chunk, by slices of the vocabulary."""
        for parts in zip(*(head.weight_slices() for head in self.heads), strict=True):
            columns, weights = parts[0][0], tuple(weight for _, weight, _ in parts)
            biases = tuple(None if bias is None else bias[columns] for bias in self.biases)
            for pairs in slices(self.number, self.pairs):
                number, width = pairs.stop - pairs.start, columns.stop - columns.start
                if self.kept is not None:
                    logits = self.kept[2 * pairs.start : 2 * pairs.stop, columns]
                else:
                    logits = self.workspace[: 2 * number * width].view(2 * number, width)
                fused = self.shared and self.kept is None
                rows = self.rows(pairs)
                if self.kept is None and not fused:
                    self.multiply(rows, weights, logits)
                yield Chunk(pairs, columns, weights, (rows[0], weights[0], *biases), logits, fused)

    def rows(self, pairs: slice) -> tuple[Tensor, ...]:
        """Return the hidden states of some pairs, of every head."""
        views = 2 if self.shared else 1
        return tuple(head.hidden[views * pairs.start : views * pairs.stop] for head in self.heads)

    def multiply(self, rows: tuple[Tensor, ...], weights: tuple[Tensor, ...], logits: Tensor) -> None:
        """Write the products of every head to ``logits [2 n, v]``."""
        for view, (states, weight) in enumerate(zip(rows, weights, strict=True)):
            part = logits if self.shared else logits[view::2]
            self.kernels.head.product(states, weight.T, part, False)

    @property
    def keeps(self) -> bool:
        """Whether a second pass finds the products of the first one: it is not faster to compute them again.

        A CPU's matrix units would have to pack the whole weight for every few pairs, and so would a conversion.
        """
        head = self.heads[0]
        converted = any(one.weight.dtype != one.hidden.dtype for one in self.heads)
        return not converted and not (head.kernels.packs and head.hidden.dtype == torch.bfloat16)

    def everything(self, js_beta: float) -> Tensor:
        """Return ``STATISTICS`` of the whole vocabulary, ``[15, N]``."""
        found = self.heads[0].hidden.new_empty((len(STATISTICS), self.number), dtype=torch.float32)
        vocabulary = self.heads[0].weight.shape[0]
        together = max(self.most // (2 * vocabulary), 1)
        kept = found.new_empty((2 * min(together, self.number), vocabulary)) if self.keeps else None
        for pairs in slices(self.number, max(self.number, 1) if kept is None else together):
            part = self if kept is None else self._with_products(pairs, kept)
            found[:SHARES, pairs] = part.statistics()
            found[SHARES:, pairs] = part.shares(totals_of(found[:, pairs]), js_beta)
        return found

    def _with_products(self, pairs: slice, kept: Tensor) -> PairedHead:
        """Return the head of some pairs, whose products over the whole vocabulary are in ``kept``."""
        part = copy(self)
        part.number = pairs.stop - pairs.start
        part.kept = kept[: 2 * part.number]
        part.targets = self.targets[pairs]
        part.logit_map = self.logit_map.of_rows(pairs)
        part.heads = [copy(head) for head in self.heads]
        for head, rows in zip(part.heads, self.rows(pairs), strict=True):
            head.hidden = rows
        for chunk_columns in slices(kept.shape[1], self.heads[0].columns):
            weights = tuple(head.weight[chunk_columns] for head in self.heads)
            self.multiply(self.rows(pairs), weights, part.kept[:, chunk_columns])
        return part

    def statistics(self) -> Tensor:
        """Return the first rows of ``STATISTICS``: all but the shares, ``[11, N]``."""
        sums = self.heads[0].hidden.new_zeros((SUMS, self.number), dtype=torch.float32)
        for row in (0, 3, 4, 7):  # maxima, and logits of targets in other slices
            sums[row] = -torch.inf
        for chunk in self.chunks():
            self.kernels.statistics(
                *chunk.arguments,
                self.targets[chunk.pairs],
                chunk.columns.start,
                *self.logit_map.of_rows(chunk.pairs),
                sums[:, chunk.pairs],
                chunk.logits,
                chunk.fused,
            )
        p, q = sums[1], sums[5]
        # Without a logit above minus infinity there is no distance. (A NaN among them makes the total NaN.)
        apart = [torch.where(total == 0, 0.0, sums[8 + view] / total) for view, total in enumerate((p, q))]
        affinity = torch.where((p == 0) | (q == 0), 0.0, sums[10] / (p.sqrt() * q.sqrt()))
        return torch.cat([finished(sums[:4]), finished(sums[4:8]), torch.stack([*apart, affinity])])

    def shares(self, totals: Tensor, js_beta: float) -> Tensor:
        """Return the last rows of ``STATISTICS``, ``[4, N]``, relative to maximum and log-sum of both views."""
        sums = self.heads[0].hidden.new_zeros((SHARE_SUMS, self.number), dtype=torch.float32)
        totals = anchored(totals)
        for chunk in self.chunks():
            self.kernels.shares(
                *chunk.arguments,
                *self.logit_map.of_rows(chunk.pairs),
                totals[:, chunk.pairs],
                js_beta,
                sums[:, chunk.pairs],
                chunk.logits,
                chunk.fused,
            )
        return sums

    def gradients(
        self, coefficients: Tensor, js_beta: float, gradients: list[bool], weight_dtypes: list[torch.dtype]
    ) -> list[Tensor | None]:
        """Gradients w.r.t. hidden and other (fp32), the weights (``weight_dtypes``) and the biases (fp32).

        Args:
            coefficients: ``pair_gradient``'s, ``[20, N]``.
            js_beta: Weight of hidden's view in the mixture.
            gradients: Whether each of the six is asked for.
            weight_dtypes: Those of the weights' gradients.

        """
        coefficients, factor = scaled(coefficients, 4, self.heads[0].hidden.dtype)
        views = [gradients[:2]] if self.shared else [gradients[:1], gradients[1:2]]
        sums = [
            GradientSums(head, asked, gradients[2 + i], gradients[4 + i], weight_dtypes[i], factor)
            for i, (head, asked) in enumerate(zip(self.heads, views, strict=True))
        ]
        for chunk in self.chunks():
            self.kernels.gradient(
                *chunk.arguments,
                self.targets[chunk.pairs],
                chunk.columns.start,
                *self.logit_map.of_rows(chunk.pairs),
                coefficients[:, chunk.pairs],
                js_beta,
                chunk.logits,
                chunk.fused,
            )
            gradient = gradient_of(chunk.logits, self.heads[0].hidden.dtype)
            for view, (own, weight) in enumerate(zip(sums, chunk.weights, strict=True)):
                own.add(gradient if self.shared else gradient[view::2], chunk.pairs, chunk.columns, weight)
        by_view = [gradient for own in sums for gradient in own.finished()]
        by_weight, by_bias = ([*(getattr(own, name) for own in sums), None][:2] for name in ("by_weight", "by_bias"))
        return [*by_view, *by_weight, *by_bias]


def totals_of(statistics: Tensor) -> Tensor:
    """Return maximum and log-sum of both views, ``[4, N]``, where ``STATISTICS`` are of the whole vocabulary."""
    return statistics[[STATISTICS.index(f"{view}{name}") for view in VIEWS for name in ("maximum", "log_sum")]]


def anchored(totals: Tensor) -> Tensor:
    """Return maximum and log-sum of both views, ``[4, N]``, such that without a logit every probability is zero."""
    nothing = (totals[1::2] == -torch.inf).repeat_interleave(2, 0)
    return torch.where(nothing, 0.0, totals)


def pair_coefficients(
    statistics: Tensor,  # [15, N]
    grad_statistics: Tensor,  # [15, N]
    totals: Tensor | None,  # [4, N]
    own: Tensor,  # [N], whether the target is in this slice of the vocabulary
    logit_map: LogitMap,
    js_beta: float,
) -> Tensor:
    """Return ``pair_gradient``'s coefficients ``[20, N]`` from the gradient w.r.t. ``STATISTICS``.

    With x the log-probability in the slice and a the logit less its maximum, so that ``a = x + log_sum``, the gradients
    w.r.t. a logit of hidden's view are p of log_sum, ``p (1 + a - mean)`` of mean, ``p (1 + a - b - distance)`` of
    distance, -q of other_distance, ``(sqrt(p q) - p affinity) / 2`` of affinity, ``js_beta p (x - log m - js_p)`` of js
    and ``p (s - sign_p) / 2`` of tv; other's are their mirror images. With ``totals``, shares do not change them.
    """
    value = dict(zip(STATISTICS, statistics.unbind(), strict=True))
    grad = dict(zip(STATISTICS, grad_statistics.unbind(), strict=True))
    for view in VIEWS:  # what is infinitely far away has no gradient
        infinite = value[f"{view}distance"] == torch.inf
        for one in (value, grad):
            one[f"{view}distance"] = one[f"{view}distance"].masked_fill(infinite, 0.0)
    normalisers = anchored(torch.stack([value[f"{view}{name}"] for view in VIEWS for name in ("maximum", "log_sum")]))
    log_sums = normalisers[1::2]
    zero = torch.zeros_like(log_sums[0])
    js_of = (value["js_p"], (value["js"] - js_beta * value["js_p"]) / (1 - js_beta))
    sign_of = (value["sign_p"], 2 * value["tv"] - value["sign_p"])
    found = []
    for i, view in enumerate(VIEWS):
        away = VIEWS[1 - i]
        js = grad["js"] * (1 - js_beta if i else js_beta)
        tv = grad["tv"] / 2
        constant = (
            grad[f"{view}log_sum"]
            + grad[f"{view}mean"] * (1 + log_sums[i] - value[f"{view}mean"])
            + grad[f"{view}distance"] * (1 + log_sums[i] - log_sums[1 - i] - value[f"{view}distance"])
            - grad["affinity"] * value["affinity"] / 2
        )
        if totals is None:
            constant = constant - js * js_of[i] - tv * sign_of[i]
        found += [
            constant,
            grad[f"{view}mean"],
            grad[f"{view}distance"],
            -grad[f"{away}distance"],
            grad["affinity"] / 2,
            js,
            -tv if i else tv,
            # A target in another slice of the vocabulary has no column here, and its gradient may be anything.
            torch.where(own, grad[f"{view}target"], zero),
        ]
    return torch.cat([normalisers if totals is None else anchored(totals), torch.stack(found) / logit_map.divisor()])
