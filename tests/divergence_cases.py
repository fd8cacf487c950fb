"""Two views of some tokens before an LM head, and their divergences as a training loop writes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from linear_cases import DTYPES, definition_of
from tolerance import assert_close, floor_of
from torch import Tensor

from vgpo_kernels import LinearDivergence, linear_divergence
from vgpo_kernels.reference.linear_divergence import MEASURES
from vgpo_kernels.reference.linear_logprob import IGNORED

__all__ = ["DTYPES", "RESULTS", "Views", "check", "dense", "divergences", "gradients", "make_views"]

RESULTS = (*MEASURES, "logp", "other_logp")
TENSORS = ("hidden", "other", "weight", "other_weight", "bias", "other_bias")


@dataclass(frozen=True)
class Views:
    """Hidden states of both views, the head or heads, and the targets of one call."""

    hidden: Tensor  # [N, D]
    other: Tensor  # [N, E]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    other_weight: Tensor | None = None  # [V, E]
    bias: Tensor | None = None  # [V]
    other_bias: Tensor | None = None  # [V]

    def tensors(self) -> dict[str, Tensor]:
        """Return what a call is differentiable in, by name."""
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def leaves(self) -> Views:
        """Return fresh leaves."""
        return replace(self, **{name: one.detach().clone().requires_grad_() for name, one in self.tensors().items()})

    def double(self) -> Views:
        """Return the same numbers in fp64, which the reference implementation computes."""
        return replace(self, **{name: one.double() for name, one in self.tensors().items()})

    def to(self, device: torch.device) -> Views:
        """Return the views on another device."""
        return replace(
            self, targets=self.targets.to(device), **{n: one.to(device) for n, one in self.tensors().items()}
        )


def make_views(
    rows: int,
    features: int,
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.float32,
    apart: float = 0.5,
    bias: bool = False,
    other_features: int | None = None,
    ignored: float = 0.0,
    spread: float = 3.0,
    seed: int = 0,
) -> Views:
    """Draw views whose hidden states differ by ``apart``, or whose heads do; some rows are ignored, and NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight = normal(rows, features), normal(vocabulary, features) * spread / features**0.5
    other = hidden + apart * normal(rows, features)
    other_weight = None
    if other_features is not None:
        other, other_weight = (
            normal(rows, other_features),
            normal(vocabulary, other_features) * spread / other_features**0.5,
        )
    skipped = torch.rand(rows, generator=generator) < ignored
    hidden, other = (states.masked_fill(skipped[:, None], math.nan).to(dtype) for states in (hidden, other))
    return Views(
        hidden,
        other,
        weight.to(dtype),
        torch.randint(vocabulary, (rows,), generator=generator).masked_fill(skipped, IGNORED),
        None if other_weight is None else other_weight.to(dtype),
        normal(vocabulary) if bias else None,
        normal(vocabulary) if bias and other_weight is not None else None,
    )


def divergences(views: Views, **options: Any) -> LinearDivergence:
    """Every measure, on the backend in force, or of fp64 views, which only the reference implementation computes."""
    options = {"measures": MEASURES, **options}
    named = {name: one for name, one in views.tensors().items() if name not in ("hidden", "other", "weight")}
    with definition_of(views.hidden):
        return linear_divergence(views.hidden, views.other, views.weight, views.targets, **named, **options)


def dense(
    views: Views,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    js_beta: float = 0.5,
) -> dict[str, Tensor]:
    """What a training loop writes: both views' logits, their log-softmax, and sums over the vocabulary."""
    kept = views.targets != IGNORED

    def log_softmax(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = torch.where(kept[:, None], states, 0.0) @ weight.T
        logits = (logits if bias is None else logits + bias) * logit_scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        divisor = torch.where(kept, temperature, 1.0)[:, None] if isinstance(temperature, Tensor) else temperature
        return (logits / divisor).log_softmax(-1)

    x = log_softmax(views.hidden, views.weight, views.bias)
    if views.other_weight is None:
        y = log_softmax(views.other, views.weight, views.bias)
    else:
        y = log_softmax(views.other, views.other_weight, views.other_bias)
    p, q = x.exp(), y.exp()
    mixture = torch.logaddexp(x + math.log(js_beta), y + math.log(1 - js_beta))
    targets = views.targets.clamp(min=0)[:, None]
    found = {
        "kl": mean(p, x - y),
        "reverse_kl": mean(q, y - x),
        "js": js_beta * mean(p, x - mixture) + (1 - js_beta) * mean(q, y - mixture),
        "tv": (p - q).abs().sum(-1) / 2,
        "hellinger": 1 - ((x + y) / 2).exp().sum(-1),
        "entropy": -mean(p, x),
        "other_entropy": -mean(q, y),
        "logp": x.gather(-1, targets)[:, 0],
        "other_logp": y.gather(-1, targets)[:, 0],
    }
    return {name: torch.where(kept, value, 0.0) for name, value in found.items()}


def mean(probability: Tensor, value: Tensor) -> Tensor:
    """Mean of a value that counts as nothing where it has no probability, however far away it is."""
    return torch.where(probability > 0, probability * value, 0.0).sum(-1)


def gradients(views: Views, found: dict[str, Tensor], names: tuple[str, ...] = RESULTS) -> dict[str, Tensor]:
    """Gradients of a weighted sum of some results w.r.t. every tensor of the views."""
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=found[names[0]].dtype, device=views.hidden.device)
    for name in RESULTS:
        weights = torch.randn(views.targets.shape, generator=generator, dtype=torch.float32).to(total)
        if name in names:
            total = total + (found[name] * weights).sum()
    leaves = views.tensors()
    by = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if one is None else one
        for (name, leaf), one in zip(leaves.items(), by, strict=True)
    }


def check(
    views: Views, device: torch.device, names: tuple[str, ...] = RESULTS, chunk_bytes: int | None = None, **options: Any
) -> None:
    """Compare with a training loop in fp64; its error in the views' own dtype is the yardstick."""
    here, wide, narrow = views.to(device).leaves(), views.double().leaves(), views.leaves()
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    found = divergences(here, chunk_bytes=chunk_bytes, **moved)
    doubled = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    expected, yardstick = dense(wide, **doubled), dense(narrow, **options)
    single = replace(views, **{name: one.float() for name, one in views.tensors().items()})
    in_single = dense(single, **options)
    for name in names:
        value = getattr(found, name)
        assert value.dtype == torch.float32 and value.shape == views.targets.shape
        assert_close(value, expected[name], in_single[name], name=name)
    computed = {name: getattr(found, name) for name in names}
    # The gradients of nine results add up, of which some are of opposite signs.
    floor = 2 * floor_of(views.hidden.dtype, views.weight.shape[0])
    by, exact, rough = (gradients(*one, names) for one in ((here, computed), (wide, expected), (narrow, yardstick)))
    for name, one in by.items():
        assert_close(one, exact[name], rough[name], name=f"gradient by {name}", floor=floor)
