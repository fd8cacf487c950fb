"""The measures that statistics of two views give, of the whole vocabulary or of its slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import checks, head_checks
from vgpo_kernels.hints import explained
from vgpo_kernels.ops.linear_logprob import of_one_slice
from vgpo_kernels.ops.paired_head import VIEWS
from vgpo_kernels.reference.linear_divergence import MEASURES, ROW, STATISTICS
from vgpo_kernels.reference.linear_logprob import FARTHEST, IGNORED
from vgpo_kernels.summaries import summary


class LinearDivergence(NamedTuple):
    """What :func:`linear_divergence` computes of each row, float32 in targets' shape; ``None`` where not asked for.

    With p the distribution of ``hidden``, q that of ``other``, in nats:

    Attributes:
        kl: ``KL(p || q)``; infinite, and without a gradient, where q forbids what p does not.
        reverse_kl: ``KL(q || p)``.
        js: ``js_beta KL(p || m) + (1 - js_beta) KL(q || m)`` with ``m = js_beta p + (1 - js_beta) q``.
        tv: Total variation, half of the sum of ``|p - q|``.
        hellinger: Squared Hellinger distance, 1 less the sum of ``sqrt(p q)``.
        entropy: Entropy of p.
        other_entropy: Entropy of q.
        logp: Log-probability of the target under p; with ``targets``.
        other_logp: Log-probability of the target under q; with ``targets``.

    """

    kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    js: Tensor | None = None
    tv: Tensor | None = None
    hellinger: Tensor | None = None
    entropy: Tensor | None = None
    other_entropy: Tensor | None = None
    logp: Tensor | None = None
    other_logp: Tensor | None = None

    def __repr__(self) -> str:
        """A few lines; ``tuple(...)`` shows every number."""
        return summary(self)


@explained
def divergence_totals(slices: Tensor) -> Tensor:
    """Compute both views' normalisers from the results of :func:`linear_divergence_slice` for every slice.

    Args:
        slices: Results of all slices of the vocabulary, ``[R, 15, ...]``, in any order. Differentiable.

    Returns:
        float32 ``[4, ...]``: largest logit, and log of the sum of exp(z - largest), of each view.

    Raises:
        TypeError: Not a floating-point tensor.
        ValueError: Not in this shape.

    """
    slices = head_checks.vocabulary_slices(slices, len(STATISTICS))
    found = [_totals_of(slices[:, row], slices[:, row + 1]) for row in (ROW["maximum"], ROW["other_maximum"])]
    return torch.stack([value for maximum, log_sum, _ in found for value in (maximum, log_sum)])


@explained
def combine_divergences(
    slices: Tensor,
    targets: Tensor | None = None,
    *,
    measures: Sequence[str] = ("kl",),
    ignore_index: int | None = IGNORED,
) -> LinearDivergence:
    """Compute measures from the results of :func:`linear_divergence_slice` for every slice.

    Args:
        slices: Results of all slices of the vocabulary, ``[R, 15, ...]``, in any order. Differentiable. For ``js`` and
            ``tv`` with the shares of the second call added.
        targets: The targets, ``[...]``, where the slices were computed with them.
        measures: As in :func:`linear_divergence`.
        ignore_index: As given for the slices.

    Returns:
        A :class:`LinearDivergence`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit together, or a measure is unknown.

    """
    names = checks.choices("measures", measures, MEASURES)
    slices = head_checks.vocabulary_slices(slices, len(STATISTICS))
    ids = None if targets is None else head_checks.slice_targets(targets, slices)
    skipped = None if ids is None else checks.ignore_index(ignore_index)
    return measures_of(slices, ids, skipped, names, ids is not None)


def _totals_of(maxima: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return maximum and log-sum over slices ``[R, ...]``, and the logs of the slices' shares in the sum."""
    # The maxima are constants to autograd: what depends on them cancels.
    maximum = maxima.amax(0).detach()
    shift = torch.where(maximum == -torch.inf, 0.0, maxima.detach() - maximum)
    parts = shift + log_sums
    log_sum = parts.logsumexp(0)
    return maximum, log_sum, parts - log_sum


def measures_of(
    slices: Tensor, targets: Tensor | None, ignore_index: int | None, names: Sequence[str], with_targets: bool
) -> LinearDivergence:
    """Compute measures of slices ``[R, 15, ...]``, 0 where the target is ``ignore_index``."""
    kept = None if targets is None or ignore_index is None else targets != ignore_index
    if kept is not None:  # what is not read has no part in a gradient, where zero times NaN is NaN
        slices = torch.where(kept, slices, 0.0)
    rows = {name: slices[:, row] for name, row in ROW.items()}
    _, log_sums, shares = zip(
        *(_totals_of(rows[f"{view}maximum"], rows[f"{view}log_sum"]) for view in VIEWS), strict=True
    )
    defined = torch.ones_like(log_sums[0]).masked_fill(
        (log_sums[0] == -torch.inf) | (log_sums[1] == -torch.inf), torch.nan
    )
    shifts = [rows[f"{view}maximum"].detach() for view in VIEWS]
    shifts = [torch.where(one == -torch.inf, one, one - one.amax(0)) for one in shifts]

    def of(view: int) -> dict[str, Tensor]:
        """Compute what is asked of one view: its entropy, its divergence from the other, the target's logit."""
        prefix, away = VIEWS[view], 1 - view
        share = shares[view].exp()
        found = {}
        if f"{prefix}entropy" in names:
            # A slice of minus infinities is infinitely far away, and zero times infinity is NaN.
            mean = shifts[view].clamp(min=FARTHEST) + rows[f"{prefix}mean"]
            found[f"{prefix}entropy"] = log_sums[view] - (share * mean).sum(0)
        if with_targets:
            target = rows[f"{prefix}target"] + shifts[view]
            found[f"{prefix}logp"] = of_one_slice(target) - log_sums[view]
        divergence = ("kl", "reverse_kl")[view]
        if divergence in names:
            apart = rows[f"{prefix}distance"] + shifts[view] - shifts[away]
            infinite = (share > 0) & (apart == torch.inf)
            # Neither infinity nor what has no probability has a part in a gradient.
            apart = torch.where((share == 0) | infinite, 0.0, apart)
            mean = (share * apart).sum(0) - log_sums[view] + log_sums[away]
            found[divergence] = torch.where(infinite.any(0), torch.inf, mean)
        return found

    found = of(0) | of(1)
    if "hellinger" in names:
        found["hellinger"] = 1 - (rows["affinity"] * ((shares[0] + shares[1]) / 2).exp()).sum(0)
    for name in ("js", "tv"):
        if name in names:
            found[name] = rows[name].sum(0)
    for name, value in found.items():
        if name not in ("logp", "other_logp"):  # rounding may leave a little less than nothing
            value = value.clamp(min=0.0)
        value = value * defined
        found[name] = value if kept is None else torch.where(kept, value, 0.0)
    return LinearDivergence(**found)
