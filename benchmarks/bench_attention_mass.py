"""Speed of attention_mass and attention_heatmap: q k^T and its softmax, by streaming.

Flops: 2 d for each pair of a query and a key that it may see; the queries are the last of the keys. The heat map goes
over the scores once for their denominators and once for the image's keys. The gradient takes the scores twice more and
the products that make the gradients w.r.t. q and k: five products. Bytes: q and k once, and their gradients. An
exponential a score comes on top, on a CPU about a tenth of the products' time in fp32.

The ceiling on a CPU is the bare product of all queries with all keys, by torch: "of ceiling" is its time by ours. The
peers are eager attention followed by a sum over each segment, and one forward pass of scaled_dot_product_attention,
which multiplies by the values as well and returns no probability.

Prediction for the CPU: below half of eager attention's time and of scaled_dot_product_attention's in fp32, and peak
memory of the result and a few panels of keys: below 1/20 of the T S Hq scores. On processors that multiply bf16
matrices in hardware (AMX) products of bf16 nearly vanish, and the exponentials are what remains: half of fp32's time,
close to that of scaled_dot_product_attention, which is made of the same exponentials.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch import Tensor

from benchmarks import gpu_peers
from benchmarks.measure import Case, Ceiling, Op, Peer, by_reference, compare, normals
from vgpo_kernels import attention_heatmap, attention_mass

SEGMENTS = 3
CHECKED = 64  # queries of a response that the reference implementation computes at a time
ROUNDING = 2 * torch.finfo(torch.bfloat16).eps  # of a gradient in bf16


class AttentionShape(NamedTuple):
    """Queries at the end of their keys, as response tokens are, and the image's keys at their begin."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    size: int
    image: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.heads}/{self.key_heads} heads x {self.size}, {self.queries} of {self.keys}"

    @property
    def rows(self) -> int:
        return self.batch * self.heads * self.queries

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it may see."""
        return self.rows * (2 * self.keys - self.queries + 1) // 2

    @property
    def score_mib(self) -> float:
        """Memory that all scores would take in fp32."""
        return 4 * self.rows * self.keys / 2**20


def softmax_attention(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention as models write it, ``[B, Hq, T, S]``."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32)


def attention_case(
    shape: AttentionShape, dtype: torch.dtype, device: torch.device, seed: int, *, heatmap: bool, gradient: bool
) -> Case:
    """Masses or the heat map, or with ``gradient`` the gradients of a weighted sum of the masses w.r.t. q and k."""
    normal = normals(seed, device)

    def draw(heads: int, tokens: int) -> Tensor:
        return normal(shape.batch, heads, tokens, shape.size).to(dtype)

    q, k, v = draw(shape.heads, shape.queries), draw(shape.key_heads, shape.keys), draw(shape.key_heads, shape.keys)
    direction = normal(shape.batch, shape.queries, SEGMENTS)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in (q, k))
    position = torch.arange(shape.keys, device=device)
    segments = (position >= shape.image).long() + (position >= shape.keys - shape.queries)
    visible = position <= position[-shape.queries :, None]
    labels = segments.expand(shape.batch, -1).contiguous()
    members = F.one_hot(segments, SEGMENTS).float()

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return attention_heatmap(q, k, labels == 0) if heatmap else attention_mass(q, k, labels)

    def eager(q: Tensor, k: Tensor) -> Tensor:
        weights = softmax_attention(q, k, visible)
        return weights.mean((1, 2)) * (segments == 0) if heatmap else (weights @ members).mean(1)

    def flash_masses(q: Tensor, k: Tensor) -> Tensor:
        return gpu_peers.flash_masses(q, k, members)

    def flash_heatmap(q: Tensor, k: Tensor) -> Tensor:
        return gpu_peers.flash_column_means(q, k) * (segments == 0)

    def run(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad((function(*leaves) * direction).sum(), leaves)

        return both if gradient else lambda: (function(q, k),)

    @cache
    def exact() -> tuple[Tensor, ...]:
        """A few queries at a time, to save memory."""
        positions = position[-shape.queries :].expand(shape.batch, -1)
        found = []
        for rows, where, slope in zip(
            q.split(CHECKED, 2), positions.split(CHECKED, 1), direction.split(CHECKED, 1), strict=True
        ):
            wide, where = [tensor.float().requires_grad_(gradient) for tensor in (rows, k)], where.contiguous()
            if heatmap:
                found.append(attention_heatmap(*wide, labels == 0, query_positions=where) * rows.shape[2])
                continue
            masses = attention_mass(*wide, labels, query_positions=where)
            found.append(torch.autograd.grad((masses * slope).sum(), wide) if gradient else masses)
        if heatmap:
            return (torch.stack(found).sum(0) / shape.queries,)
        if gradient:
            by_q, by_k = zip(*found, strict=True)
            return torch.cat(by_q, 2), torch.stack(by_k).sum(0)
        return (torch.cat(found, 1),)

    def check(found: tuple[Tensor, ...], bound: float) -> None:
        expected = by_reference(exact)
        if gradient:
            for name, one, wide in zip(("gradient w.r.t. q", "gradient w.r.t. k"), found, expected, strict=True):
                compare(name, one, wide, max(bound, ROUNDING))
        elif heatmap:
            compare("heat map", found[0], expected[0], bound)
        else:
            assert_close(found[0], expected[0], name="masses", floor=bound)

    name = "" if heatmap or gradient else " + segment sum"
    peers = {
        f"eager attention{name}": Peer(run(eager)),
        "torch.compile": Peer(run(torch.compile(eager, dynamic=False)), gpu_only=True),
    }
    if not gradient:
        peers["scaled_dot_product_attention"] = Peer(
            lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True), same=False
        )
    if heatmap:
        by_flash = {"flash attention's gradient w.r.t. values": Peer(run(flash_heatmap), gpu_only=True)}
    else:
        by_flash = {"flash attention to segments": Peer(run(flash_masses), gpu_only=True)}
    peers |= by_flash
    if not gradient and not heatmap:
        # All keys as queries, as kernels without another alignment need it: more work than for the last ones alone.
        every = draw(shape.heads, shape.keys)
        whole = {
            "flash attention": lambda: gpu_peers.flash_attention(q, k, v),
            "flash attention, all keys": lambda: gpu_peers.flash_attention(every, k, v),
        }
        if device.type == "cuda":  # on a CPU, where a dry run calls peers, torch has the others alone
            whole["cuDNN attention, all keys"] = gpu_peers.cudnn_attention(every, k, v)
        peers |= {name: Peer(attend, same=False, gpu_only=True) for name, attend in whole.items()}
        variants = gpu_peers.warpgroup_attention(run(ours), device)
        peers |= {name: Peer(compute, gpu_only=True) for name, compute in variants.items()}
    if gradient:
        inputs = (*leaves, v.clone().requires_grad_())
        upstream = draw(shape.heads, shape.queries)
        peers["flash attention and its gradient"] = Peer(
            lambda: torch.autograd.grad(gpu_peers.flash_attention(*inputs), inputs, upstream),
            same=False,
            gpu_only=True,
        )
    product = 2 * shape.size * shape.pairs
    flops = 5 * product if gradient else product + heatmap * 2 * shape.size * shape.rows * shape.image
    bare = Ceiling("q k^T", "flops", flops, lambda: q.view(shape.batch, shape.key_heads, -1, shape.size) @ k.mT)
    return Case(
        run=run(ours),
        check=check,
        ceiling=bare,
        bytes=(1 + gradient) * (q.numel() + k.numel()) * dtype.itemsize,
        flops=flops,
        peers=peers,
    )


# Qwen2.5-VL-7B's heads, and a quarter of its response on a CPU.
CPU_SHAPE = AttentionShape(batch=1, heads=28, key_heads=4, queries=512, keys=2048, size=128, image=1024)
GPU_SHAPE = AttentionShape(batch=4, heads=28, key_heads=4, queries=2048, keys=3072, size=128, image=1024)
SMALL_SHAPE = AttentionShape(batch=1, heads=4, key_heads=2, queries=96, keys=160, size=32, image=32)

OPS = tuple(
    Op(
        name=name,
        make=partial(attention_case, heatmap=heatmap, gradient=gradient),
        cpu=() if gradient else (CPU_SHAPE,),
        gpu=(GPU_SHAPE,),
        small=SMALL_SHAPE,
        captured=False,
    )
    for name, heatmap, gradient in (
        ("attention_mass", False, False),
        ("attention_mass and its gradient", False, True),
        ("attention_heatmap", True, False),
    )
)


def test_attention(speed, setting) -> None:
    rows = {row.implementation.partition(" +")[0]: row for row in speed(setting)}
    if rows:  # none with --benchmark-disable
        ours = rows["vgpo_kernels"]
        assert ours.ms < rows["eager attention"].ms
        assert ours.peak_mib is None or ours.peak_mib < setting.size.score_mib / 20
