"""Speed of attention_mass and attention_heatmap: q k^T and its softmax, by streaming.

Flops: 2 Hq T S d of the product, of which causality leaves 87.5% here (the queries are the last quarter of the keys);
7.5e9 at the CPU shape, twice that for the heat map, which goes over the scores once for their denominators and once for
the keys. Bytes: q and k once, and one number a query and segment or a key. An exponential a score comes on top, about a
tenth of the products' time in fp32.

The first ceiling is the bare product of all queries with all keys, by torch: "of ceiling" is its time by ours. The
peers are eager attention followed by a sum over each segment, and one forward pass of scaled_dot_product_attention,
which multiplies by the values as well and returns no probability.

Prediction for the CPU: below half of eager attention's time and of scaled_dot_product_attention's in fp32, and peak
memory of the result and a few panels of keys: below 1/20 of the T S Hq scores. On processors that multiply bf16
matrices in hardware (AMX) products of bf16 nearly vanish, and the exponentials are what remains: half of fp32's time,
close to that of scaled_dot_product_attention, which is made of the same exponentials.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, Ceiling
from vgpo_kernels import attention_heatmap, attention_mass, backend

SEGMENTS = 3


class AttentionShape(NamedTuple):
    """Queries at the end of their keys, as response tokens are."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    size: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.heads}/{self.key_heads} heads x {self.size}, {self.queries} of {self.keys}"

    @property
    def flops(self) -> int:
        """Flops of the product of all queries with all keys."""
        return 2 * self.batch * self.heads * self.queries * self.keys * self.size

    @property
    def score_mib(self) -> float:
        """Memory that all scores would take in fp32."""
        return 4 * self.batch * self.heads * self.queries * self.keys / 2**20


# Qwen2.5-VL-7B's heads, and a quarter of its response.
CPU_SHAPE = AttentionShape(batch=1, heads=28, key_heads=4, queries=512, keys=2048, size=128)


def eager(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention as models write it, ``[B, Hq, T, S]``."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32)


def attention_case(op: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Case:
    """One of the two ops beside eager attention and scaled_dot_product_attention."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(shape.batch, heads, tokens, shape.size, generator=generator, device=device).to(dtype)

    q, k = normal(shape.heads, shape.queries), normal(shape.key_heads, shape.keys)
    v = normal(shape.key_heads, shape.keys)
    position = torch.arange(shape.keys, device=device)
    segments = (position >= shape.keys // 2).long() + (position >= shape.keys - shape.queries)
    visible = position <= position[-shape.queries :, None]
    labels = segments.expand(shape.batch, -1)
    members = F.one_hot(segments, SEGMENTS).float()

    def ours() -> Tensor:
        if op == "attention_mass":
            return attention_mass(q, k, labels)
        return attention_heatmap(q, k, labels == 0)

    def summed() -> Tensor:
        weights = eager(q, k, visible)
        return (weights @ members).mean(1) if op == "attention_mass" else weights.mean((1, 2)) * (segments == 0)

    def check() -> None:
        with backend("reference"):
            exact = ours()
        torch.testing.assert_close(ours(), exact, atol=1e-5, rtol=0, check_dtype=False)

    moved = (q.numel() + k.numel()) * dtype.itemsize
    return Case(
        op=op,
        shape=str(shape),
        dtype=dtype,
        device=device,
        bytes=moved,
        flops=shape.flops * (1 if op == "attention_mass" else 2),
        run=ours,
        check=check,
        ceilings=(Ceiling("q k^T", moved, lambda: q.view(shape.batch, shape.key_heads, -1, shape.size) @ k.mT),),
        peers={
            "eager attention + segment sum": summed,
            "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, enable_gqa=True
            ),
        },
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", ["attention_mass", "attention_heatmap"])
def test_attention(speed, device: torch.device, op: str, dtype: torch.dtype) -> None:
    rows = {row.implementation: row for row in speed(attention_case(op, CPU_SHAPE, dtype, device))}
    if rows:  # none with --benchmark-disable
        ours = rows["vgpo_kernels"]
        assert ours.ms < rows["eager attention + segment sum"].ms
        assert ours.peak_mib is None or ours.peak_mib < CPU_SHAPE.score_mib / 20
