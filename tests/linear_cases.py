"""Rows before an LM head, and the heads of the tests, with everything that must not be read poisoned."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import Batch
from tolerance import assert_close, floor_of
from torch import Tensor

from vgpo_kernels import backend, linear_logprob
from vgpo_kernels.reference.linear_logprob import IGNORED, predicting_rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Head:
    """Hidden states, the LM head and the targets of one call."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N]

    def double(self) -> Head:
        """Return the same numbers in fp64, which the reference implementation computes."""
        bias = None if self.bias is None else self.bias.double()
        return replace(self, hidden=self.hidden.double(), weight=self.weight.double(), bias=bias)

    def to(self, device: torch.device) -> Head:
        """Return the head on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)

    def tensors(self) -> list[Tensor]:
        """Return hidden, weight and, where there is one, bias."""
        return [tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]

    def leaves(self) -> list[Tensor]:
        """Return fresh leaves in the order of :meth:`tensors`."""
        return [tensor.detach().clone().requires_grad_() for tensor in self.tensors()]


def make_head(
    rows: int,
    features: int,
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    ignored: float = 0.0,
    spread: float = 3.0,
    seed: int = 0,
) -> Head:
    """Draw a head whose logits have a standard deviation of ``spread``; a share of its rows is ignored, and NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight = normal(rows, features), normal(vocabulary, features) * spread / features**0.5
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    skipped = torch.rand(rows, generator=generator) < ignored
    return Head(
        hidden.masked_fill(skipped[:, None], float("nan")).to(dtype),
        weight.to(dtype),
        normal(vocabulary) if bias else None,
        targets.masked_fill(skipped, IGNORED),
    )


def with_predicting_rows(batch: Batch, vocabulary: int, seed: int = 0) -> tuple[Batch, Head]:
    """Fill in the rows that predict a batch's scored tokens, and give it a head and targets for those tokens.

    Batches are poisoned where nothing is read, which for losses without a head includes those rows. A response must not
    begin its sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    features = batch.hidden.shape[-1]
    hidden = batch.hidden.float().clone()
    flat, mask = hidden.view(-1, features), batch.response_mask
    rows = predicting_rows(mask, hidden)[mask.view(-1)]
    fresh = torch.randn(len(rows), features, generator=generator)
    flat[rows] = torch.where(flat[rows].isnan(), fresh, flat[rows])
    weight = torch.randn(vocabulary, features, generator=generator) * 0.2
    targets = torch.randint(vocabulary, mask.shape, generator=generator)
    # Ids off the mask are no ids at all.
    targets = targets.masked_fill(~mask, -(10**6))
    dtype = batch.hidden.dtype
    head = Head(hidden.to(dtype), weight.to(dtype), torch.randn(vocabulary, generator=generator), targets)
    return replace(batch, hidden=head.hidden), head


def logprob(head: Head, leaves: list[Tensor] | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a head, of its own tensors or of leaves in their place.

    On the backend in force, or of an fp64 head, which only the reference implementation computes.
    """
    hidden, weight, *bias = leaves or head.tensors()
    arguments = (hidden, weight, head.targets)
    options |= {"bias": bias[0] if bias else None, "return_entropy": True}
    with definition_of(hidden):
        return linear_logprob(*arguments, **options)


def definition_of(hidden: Tensor) -> Any:
    """Choose the reference implementation for fp64 numbers."""
    return backend("reference") if hidden.dtype == torch.float64 else nullcontext()


def gradients(head: Head, function: Callable[..., tuple[Tensor, Tensor]] = logprob, **options: Any) -> list[Tensor]:
    """Gradients of a weighted sum of both results by hidden, weight and bias."""
    leaves = head.leaves()
    logp, entropy = function(head, leaves, **options)
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(2, *logp.shape, generator=generator, dtype=torch.float32).to(logp)
    total = (logp * weights[0]).sum() + (entropy * weights[1]).sum()
    return list(torch.autograd.grad(total, leaves))


def materialised(
    head: Head,
    leaves: list[Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What a training loop writes: all logits, their log-softmax, and its sum over the vocabulary."""
    hidden, weight, *bias = leaves or head.tensors()
    kept = head.targets != IGNORED
    logits = torch.where(kept[:, None], hidden, 0.0) @ weight.T
    logits = (logits + bias[0] if bias else logits) * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if isinstance(temperature, Tensor):
        temperature = torch.where(kept, temperature, 1.0).to(logits)[:, None]
    logits = logits / temperature
    log_probabilities = logits.log_softmax(-1)
    logp = log_probabilities.gather(-1, head.targets.clamp(min=0)[:, None]).squeeze(-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return torch.where(kept, logp, 0.0), torch.where(kept, entropy, 0.0)


def check(head: Head, device: torch.device, **options: Any) -> None:
    """Compare with a training loop in fp64; its error in fp32, on the same numbers, is the yardstick."""
    settings = {name: options[name] for name in ("temperature", "logit_scale", "softcap") if name in options}
    wide = replace(head.double(), targets=head.targets)
    narrow = replace(head, hidden=head.hidden.float(), weight=head.weight.float())
    values = [materialised(one, **settings) for one in (wide, narrow)]
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    for name, actual, *expected in zip(("logp", "entropy"), logprob(head.to(device), **options), *values, strict=True):
        assert actual.dtype == torch.float32
        assert_close(actual, *expected, name=name)
    found = gradients(head.to(device), **options)
    slopes = [gradients(one, materialised, **settings) for one in (wide, narrow)]
    terms = {"hidden": head.weight.shape[0], "weight": head.hidden.shape[0], "bias": head.hidden.shape[0]}
    for (name, number), actual, leaf, *expected in zip(terms.items(), found, head.tensors(), *slopes, strict=False):
        assert actual.dtype == leaf.dtype
        assert_close(actual, *expected, name=f"gradient by {name}", floor=floor_of(head.hidden.dtype, number))
