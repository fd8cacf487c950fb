"""Divergences between the distributions of an LM head at two hidden states, in plain PyTorch: every logit at once."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.reference.linear_logprob import FARTHEST, columns_of, gradient_of
from vgpo_kernels.reference.logits import LogitMap

# Results of the operator, one row each. p is the distribution of hidden, q that of other; z are logits of a slice of
# the vocabulary and m the largest of them, which is a constant to autograd.
STATISTICS = (
    "maximum",  # m of p
    "log_sum",  # log sum exp(z - m) of p
    "target",  # z - m of the target under p; -infinity if it is not in the slice
    "mean",  # mean of z - m under p
    "other_maximum",  # the same of q
    "other_log_sum",
    "other_target",
    "other_mean",
    "distance",  # mean under p of (z - m of p) - (z - m of q)
    "other_distance",  # mean under q of (z - m of q) - (z - m of p)
    "affinity",  # sum of sqrt(p q)
    # Shares of the slice in sums over the whole vocabulary, zeros unless they are asked for.
    "js",  # js_beta KL(p || m) + (1 - js_beta) KL(q || m), where m = js_beta p + (1 - js_beta) q
    "tv",  # half of the sum of |p - q|
    "js_p",  # KL(p || m); a constant to autograd
    "sign_p",  # sum of p where p > q, less that of p where p < q; a constant to autograd
)
ROW = {name: row for row, name in enumerate(STATISTICS)}
SHARES = ROW["js"]  # the first of the shares
SHARE_SUMS = 4
# What pair_statistics sums over the vocabulary, and what pair_gradient multiplies with.
SUMS, COEFFICIENTS = 11, 20
MEASURES = ("kl", "reverse_kl", "js", "tv", "hellinger", "entropy", "other_entropy")


class View(NamedTuple):
    """The logits of one view before a slice of the vocabulary, relative to their maximum.

    Attributes:
        maximum: Largest logit m, ``[N]``, a constant to autograd.
        log_sum: log sum exp(z - m), ``[N]``; -infinity without a logit above -infinity.
        distance: z - m, ``[N, V]``.

    """

    maximum: Tensor
    log_sum: Tensor
    distance: Tensor

    def log_probability(self, maximum: Tensor | None = None, log_sum: Tensor | None = None) -> Tensor:
        """Log-probabilities ``[N, V]`` within the slice, or where maximum and log-sum of the vocabulary are these."""
        if maximum is None or log_sum is None:
            maximum, log_sum = self.maximum, self.log_sum
        # Of minus infinities alone there is nothing to measure distances from, and no probability.
        shift = torch.where(self.maximum == -math.inf, 0.0, self.maximum - maximum)
        return self.distance + (shift - torch.where(log_sum == -math.inf, 0.0, log_sum))[:, None]


def view_of(logits: Tensor) -> View:
    """Return logits ``[N, V]`` relative to their maximum."""
    maximum = logits.detach().amax(-1)
    nothing = maximum == -math.inf
    distance = logits - torch.where(nothing, 0.0, maximum)[:, None]
    total = torch.where(nothing, 1.0, distance.exp().sum(-1))
    return View(maximum, torch.where(nothing, -math.inf, total.log()), distance)


def linear_divergence(
    hidden: Tensor,  # [N, D]
    other: Tensor,  # [N, E]
    weight: Tensor,  # [V, D], rows first .. first + V of the vocabulary
    other_weight: Tensor | None,  # [V, E]; None: weight, and E = D
    bias: Tensor | None,  # [V]
    other_bias: Tensor | None,  # [V], of other_weight; without one, bias is of both views
    targets: Tensor,  # [N], ids in the whole vocabulary
    first: int,
    temperature: float,
    temperatures: Tensor | None,  # [N]
    logit_scale: float,
    softcap: float,
    totals: Tensor | None,  # [4, N]: maximum and log-sum of both views over the whole vocabulary
    shares: bool,
    js_beta: float,
    ignore_index: int | None,
    chunk_bytes: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return :data:`STATISTICS` of each row, ``[15, N]``; 0 where the target is ``ignore_index``.

    With ``totals`` only the shares are computed, relative to these and differentiable in them; without them, relative
    to the slice's own normalisers. ``chunk_bytes`` is not read.
    """
    kept = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    of_rows = None if temperatures is None else torch.where(kept, temperatures, 1.0)
    logit_map = LogitMap(temperature, of_rows, logit_scale, softcap)

    def logits(states: Tensor, head: Tensor, offsets: Tensor | None) -> Tensor:
        # An ignored row may be NaN, and NaN times zero is NaN: replace it instead of multiplying by zero.
        rows = torch.where(kept[:, None], states.to(dtype), torch.zeros((), dtype=dtype, device=states.device))
        return logit_map.logits(rows @ head.to(dtype).T, None if offsets is None else offsets.to(dtype))

    p = view_of(logits(hidden, weight, bias))
    q = view_of(logits(other, *((weight, bias) if other_weight is None else (other_weight, other_bias))))
    column = columns_of(targets, first, weight.shape[0])
    zero = torch.zeros_like(p.maximum)
    found = [zero] * SHARES
    if totals is None:
        x, y = p.log_probability(), q.log_probability()
        affinity = ((x + y) / 2).exp().sum(-1)
        found = [*of_one_view(p, column), *of_one_view(q, column), mean_distance(p, q), mean_distance(q, p), affinity]
    else:
        x, y = p.log_probability(*totals[:2].to(dtype)), q.log_probability(*totals[2:].to(dtype))
    statistics = torch.stack([*found, *(shares_of(x, y, js_beta) if shares else [zero] * SHARE_SUMS)])
    return torch.where(kept, statistics, torch.zeros_like(statistics))


def of_one_view(view: View, column: Tensor) -> list[Tensor]:
    """Return the statistics of ``linear_logprob``: maximum, log-sum, target and mean, ``[N]`` each."""
    mean = (view.log_probability().exp() * view.distance.clamp(min=FARTHEST)).sum(-1)
    target = view.distance.gather(-1, column.clamp(min=0)[:, None]).squeeze(-1)
    return [view.maximum, view.log_sum, torch.where(column >= 0, target, -math.inf), mean]


def mean_distance(p: View, q: View) -> Tensor:
    """Mean under p of what p's logits are more than q's, each relative to its maximum, ``[N]``.

    Infinite, without a gradient, where p has probability and q none.
    """
    probability = p.log_probability().exp()
    infinite = (probability > 0) & (q.distance == -math.inf)
    difference = torch.where((probability == 0) | infinite, 0.0, p.distance - q.distance)
    return torch.where(infinite.any(-1), math.inf, (probability * difference).sum(-1))


def shares_of(x: Tensor, y: Tensor, js_beta: float) -> list[Tensor]:
    """Return js, tv, js_p and sign_p, ``[N]`` each, of log-probabilities ``[N, V]``."""
    x, y = x.clamp(min=FARTHEST), y.clamp(min=FARTHEST)
    p, q = x.exp(), y.exp()
    mixture = torch.logaddexp(x + math.log(js_beta), y + math.log1p(-js_beta))
    js_p, js_q = (p * (x - mixture)).sum(-1), (q * (y - mixture)).sum(-1)
    sign_p = (p * (p - q).sign()).sum(-1)
    return [js_beta * js_p + (1 - js_beta) * js_q, (p - q).abs().sum(-1) / 2, js_p.detach(), sign_p.detach()]


def linear_divergence_backward(
    grad_statistics: Tensor,  # [15, N]
    statistics: Tensor,  # [15, N]
    hidden: Tensor,
    other: Tensor,
    weight: Tensor,
    other_weight: Tensor | None,
    bias: Tensor | None,
    other_bias: Tensor | None,
    targets: Tensor,
    first: int,
    temperature: float,
    temperatures: Tensor | None,
    logit_scale: float,
    softcap: float,
    totals: Tensor | None,
    shares: bool,
    js_beta: float,
    ignore_index: int | None,
    gradients: list[bool],
    chunk_bytes: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`linear_divergence` w.r.t. hidden, other, the weights and the biases.

    Empty where ``gradients`` is false.
    """
    inputs = [
        None if tensor is None else tensor.detach().to(dtype).requires_grad_()
        for tensor in (hidden, other, weight, other_weight, bias, other_bias)
    ]
    states, others, head, other_head, offsets, other_offsets = inputs
    assert states is not None and others is not None and head is not None
    with torch.enable_grad():
        output = linear_divergence(
            states,
            others,
            head,
            other_head,
            offsets,
            other_offsets,
            targets,
            first,
            temperature,
            temperatures,
            logit_scale,
            softcap,
            totals,
            shares,
            js_beta,
            ignore_index,
            dtype=dtype,
        )
    wanted = [tensor for tensor, needed in zip(inputs, gradients, strict=True) if needed and tensor is not None]
    found = iter(torch.autograd.grad(output, wanted, grad_statistics.to(dtype)) if wanted else ())
    results = [next(found) if needed else hidden.new_empty(0) for needed in gradients]
    return tuple(results)  # type: ignore[return-value]


def pair_products(rows: Tensor, weight: Tensor, logits: Tensor, recompute: bool, dtype: torch.dtype) -> Tensor:
    """Return the products ``[2n, V]`` of a chunk as the operators below take them: computed, or those in ``logits``."""
    return rows.to(dtype) @ weight.to(dtype).T if recompute else logits.to(dtype)


def pair_statistics(
    rows: Tensor,  # [2n, D], hidden and other in turn
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    other_bias: Tensor | None,  # [V]
    targets: Tensor,  # [n]
    first: int,
    temperature: float,
    temperatures: Tensor | None,  # [n]
    logit_scale: float,
    softcap: float,
    sums: Tensor,  # [11, n], updated
    logits: Tensor,  # [2n, V], scratch
    recompute: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Update the running sums of a chunk of pairs with these rows of the vocabulary.

    They are, of each view, what ``head_statistics`` keeps: the largest logit m so far, the sums of e and e (z - m) with
    e = exp(z - m), and the target's logit. Then, with a = z - m of hidden's view and b of other's: the sums of
    exp(a) (a - b), exp(b) (b - a) and exp((a + b) / 2). Without ``recompute``, ``logits`` holds the products of both
    views in turn, and of ``rows`` and ``weight`` only shapes and dtypes count.
    """
    checks.require_separate_rows("sums", sums)
    checks.require_separate_rows("logits", logits)
    logit_map = LogitMap(temperature, temperatures, logit_scale, softcap)
    products = pair_products(rows, weight, logits, recompute, dtype)
    both = logit_map.logits(products[0::2], bias), logit_map.logits(products[1::2], other_bias)
    column = columns_of(targets, first, weight.shape[0])
    running = sums.to(dtype)
    maxima = [torch.maximum(running[4 * i], z.amax(-1)) for i, z in enumerate(both)]
    # Before the first entry of the vocabulary there is nothing to rescale.
    drops = [torch.where(running[4 * i + 1] > 0, running[4 * i] - maximum, 0.0) for i, maximum in enumerate(maxima)]
    a, b = (
        torch.where((maximum == -math.inf)[:, None], z, z - maximum[:, None])
        for z, maximum in zip(both, maxima, strict=True)
    )
    updated: list[Tensor] = []
    crossed: list[Tensor] = []
    for i, (own, off) in enumerate([(a, b), (b, a)]):
        _, total, weighted, target = running[4 * i : 4 * i + 4]
        exponentials, scale = own.exp(), drops[i].exp()
        logit = both[i].gather(-1, column.clamp(min=0)[:, None]).squeeze(-1)
        updated += [
            maxima[i],
            total * scale + exponentials.sum(-1),
            (weighted + total * drops[i]) * scale + (exponentials * own.clamp(min=FARTHEST)).sum(-1),
            torch.where(column >= 0, logit, target),
        ]
        # What has no weight any more may have been infinitely far apart.
        earlier = (running[8 + i] + total * (drops[i] - drops[1 - i])) * scale
        difference = torch.where(exponentials > 0, own - off, 0.0)
        crossed.append(torch.where(scale > 0, earlier, 0.0) + (exponentials * difference).sum(-1))
    root = running[10] * (sum(drops) / 2).exp() + ((a + b) / 2).exp().sum(-1)  # type: ignore[union-attr]
    sums.copy_(torch.stack([*updated, *crossed, root]))


def pair_shares(
    rows: Tensor,  # [2n, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,
    other_bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    logit_scale: float,
    softcap: float,
    totals: Tensor,  # [4, n]: maximum and log-sum of both views
    js_beta: float,
    sums: Tensor,  # [4, n], updated
    logits: Tensor,  # [2n, V], scratch
    recompute: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Add the shares of these rows of the vocabulary in js, tv, js_p and sign_p; otherwise as pair_statistics."""
    checks.require_separate_rows("sums", sums)
    checks.require_separate_rows("logits", logits)
    logit_map = LogitMap(temperature, temperatures, logit_scale, softcap)
    products = pair_products(rows, weight, logits, recompute, dtype)
    p, q = logit_map.logits(products[0::2], bias), logit_map.logits(products[1::2], other_bias)
    x, y = _log_probabilities(p, q, totals.to(dtype))
    sums.add_(torch.stack(shares_of(x, y, js_beta)).to(sums.dtype))


def pair_gradient(
    rows: Tensor,  # [2n, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,
    other_bias: Tensor | None,
    targets: Tensor,  # [n]
    first: int,
    temperature: float,
    temperatures: Tensor | None,
    logit_scale: float,
    softcap: float,
    coefficients: Tensor,  # [20, n]
    js_beta: float,
    logits: Tensor,  # [2n, V]
    recompute: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Overwrite the logits of both views with gradients, as ``head_gradient`` does.

    Coefficients are maximum and log-sum of both views, then eight numbers c for hidden's view and as many for other's.
    With x and y the own and the other log-probability, p and q their exponentials, the gradient of a view is
    ``p (c0 + c1 x + c2 (x - y) + c5 (x - log m) + c6 s) + c3 q + c4 sqrt(p q) + c7 [v = target]``, where log m is that
    of the mixture of ``js_beta`` and s is the sign of hidden's probability less other's.
    """
    checks.require_separate_rows("logits", logits)
    logit_map = LogitMap(temperature, temperatures, logit_scale, softcap)
    products = pair_products(rows, weight, logits, recompute, dtype)
    both = logit_map.logits(products[0::2], bias), logit_map.logits(products[1::2], other_bias)
    values = coefficients.to(dtype)
    x, y = (one.clamp(min=FARTHEST) for one in _log_probabilities(*both, values[:4]))
    mixture = torch.logaddexp(x + math.log(js_beta), y + math.log1p(-js_beta))
    sign = (x - y).sign()
    columns = torch.arange(weight.shape[0], device=targets.device)
    at_target = columns_of(targets, first, weight.shape[0])[:, None] == columns
    out = gradient_of(logits, rows.dtype)
    for view, (own, off) in enumerate([(x, y), (y, x)]):
        c = values[4 + 8 * view : 12 + 8 * view, :, None]
        inner = c[0] + c[1] * own + c[2] * (own - off) + c[5] * (own - mixture) + c[6] * sign
        gradient = own.exp() * inner + c[3] * off.exp() + c[4] * ((own + off) / 2).exp()
        gradient = gradient + torch.where(at_target, c[7], 0.0)
        gradient = gradient * logit_map.slope_of_cap(products[view::2], (bias, other_bias)[view])
        out[view::2] = gradient.to(out.dtype)


def _log_probabilities(p: Tensor, q: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both views' logits ``[n, V]`` under maximum and log-sum, ``[4, n]``."""
    x, y = (z - maximum[:, None] - log_sum[:, None] for z, (maximum, log_sum) in ((p, totals[:2]), (q, totals[2:])))
    return x, y
