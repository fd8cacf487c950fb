"""``linear_logprob`` by Liger's kernel for NVIDIA Hopper GPUs, where ``backends.liger_head`` has turned it on.

It is liger-kernel 0.8.5's ``LigerFusedLinearScaledCrossEntropyFunction``. The statistics of a tile of logits are made
where its products end, so that no logits reach memory; one persistent kernel computes both gradients, also where only
one is needed. What it rounds more than ours is said in :func:`vgpo_kernels.backends.liger_head`. No sum has an order
that depends on time (the parts of the weight's gradient are added with barriers between them).

By itself it reads rows whose targets are ignored, and the host waits for a check of targets. Here such rows are left
out, as our kernels leave them out, and the check is turned off.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels import backends
from vgpo_kernels.ops import registry
from vgpo_kernels.ops.lm_head import kept_rows, without_autocast
from vgpo_kernels.reference.logits import LogitMap

# Other widths it would pad, which copies the weight.
FEATURES, ENTRIES = 64, 8
ALIGNMENT = 16  # bytes, of the first element
_CHECK = "LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"
_NO_TARGET = -100  # rows to ignore are gone when the kernel is called

_lock = threading.Lock()


def serves(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_map: LogitMap) -> bool:
    """Return whether Liger's kernel computes a call: turned on, made for this GPU, and covering the call."""
    if torch.compiler.is_compiling() or not backends.liger_serves(hidden.device):
        return False
    return covers(hidden, weight, bias, logit_map) and not registry.transformed()


def covers(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_map: LogitMap) -> bool:
    """Return whether the kernel takes hidden states ``[..., D]`` and a head ``[V, D]`` as they are."""
    return (
        bias is None
        and logit_map.temperatures is None
        and not logit_map.softcap
        and hidden.dtype == weight.dtype == torch.bfloat16
        and weight.is_contiguous()
        and weight.data_ptr() % ALIGNMENT == 0
        and weight.shape[0] % ENTRIES == 0
        and weight.shape[1] % FEATURES == 0
        and hidden.numel() > 0
    )


def logp_and_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [...] int64
    temperature: float,
    ignore_index: int | None,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies in targets' shape, fp32; without ``entropy`` an empty tensor for these."""
    arguments = (hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), temperature, ignore_index, entropy)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        logp, entropies = _LigerHead.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            logp, entropies = _LigerHead.forward(None, *arguments)
    return logp.reshape(targets.shape), entropies.reshape(targets.shape) if entropy else entropies


class _LigerHead(torch.autograd.Function):
    """Liger's function on the rows to compute. Differentiable once, where Liger's own would be silently wrong twice."""

    @staticmethod
    def forward(
        ctx: Any,  # None: without gradients
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        ignore_index: int | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        index = kept_rows(targets, ignore_index)
        rows, ids = (hidden, targets) if index is None else (hidden[index], targets[index])
        rows, head = rows.detach().contiguous(), weight.detach()
        if rows.data_ptr() % ALIGNMENT:
            rows = rows.clone()
        if ctx is not None:
            rows.requires_grad_(ctx.needs_input_grad[0])
            head.requires_grad_(ctx.needs_input_grad[1])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(hidden, weight, index)
        found: tuple[Tensor, ...] = ()
        if rows.shape[0]:
            with nullcontext() if ctx is None else torch.enable_grad():
                found = _by_liger(rows, head, ids, temperature, entropy)
        if ctx is not None:
            ctx.inner = (rows, head, found)
        lengths = (targets.shape[0], targets.shape[0] if entropy else 0)
        logp, entropies = (hidden.new_zeros(length, dtype=torch.float32) for length in lengths)
        for values, one in zip((logp, entropies), found, strict=False):
            values.copy_(one.detach()) if index is None else values.index_copy_(0, index, one.detach())
        return logp, entropies

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = _gradients(ctx, incoming)
        if torch.is_grad_enabled():
            found = [*registry.differentiable_once(ctx, "Liger's LM head", incoming, found)]
        return (*found, None, None, None, None)


def _gradients(ctx: Any, incoming: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Gradients w.r.t. hidden states and weight, where they are needed."""
    hidden, weight, index = ctx.saved_tensors
    rows, head, results = ctx.inner
    pairs = [(one, by) for one, by in zip(results, incoming, strict=False) if by is not None]
    needed = [one for one in (rows, head) if one.requires_grad]
    if not pairs:  # every row is ignored
        return [
            torch.zeros_like(one) if need else None
            for one, need in zip((hidden, weight), ctx.needs_input_grad[:2], strict=True)
        ]
    outputs, gradients = zip(*((one, by if index is None else by[index]) for one, by in pairs), strict=True)
    with _on(hidden), without_autocast(hidden):
        # Whether the caller keeps its graph is not known; this one ends with it.
        found = iter(torch.autograd.grad(outputs, needed, gradients, retain_graph=True))
    by_rows, by_weight = (next(found) if one.requires_grad else None for one in (rows, head))
    if by_rows is not None and index is not None:
        by_rows = torch.zeros_like(hidden).index_copy_(0, index, by_rows)
    return [by_rows, by_weight]


def _by_liger(rows: Tensor, weight: Tensor, ids: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
    """Log-probabilities, and entropies where they are asked for, ``[N]`` fp32, with Liger's own graph."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Liger

    with _on(rows), without_autocast(rows), _without_check():
        found = Liger.apply(rows, weight, ids, temperature, _NO_TARGET, 1, entropy)
    return (found[0].neg(), found[1].float()) if entropy else (found.neg(),)


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's GPU the current one: Liger launches there, and only there reads a tensor without a copy."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


@contextmanager
def _without_check() -> Iterator[None]:
    """Turn off Liger's check of targets, for which the host would wait, and leave it as it was for other callers."""
    with _lock:
        before = os.environ.get(_CHECK)
        os.environ[_CHECK] = "0"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_CHECK]
            else:
                os.environ[_CHECK] = before
