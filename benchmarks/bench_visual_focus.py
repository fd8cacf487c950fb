"""Speed of visual_prototype and visual_focus: prototypes and cosines in one reading of the visual and response rows.

Bytes: every visual row and every response row once, B (V + T) D elements, and the cosines, B T floats; on the CPU's
shape 184.6 MB in fp32 and 92.3 MB in bf16. Flops: one addition an element of a visual row, two multiply-adds an element
of a response row.

Prediction for the CPU: at least 90% of the read ceiling. Rows are read in the same several streams as the ceiling
reads, and the arithmetic (at most two multiply-adds an element) is far below what a vector unit does in the time an
element takes to arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import GPU_TOKENS, Case, Op, Peer, by_reference, normals, read_ceiling
from vgpo_kernels import visual_focus, visual_prototype


class RolloutShape(NamedTuple):
    """A padded rollout batch: `batch` rows of `length` hidden states, `visual` image and `response` tokens each.

    With `late`, that many tokens in the middle of each response are another image, which a tool shows.
    """

    batch: int
    length: int
    features: int
    visual: int
    response: int
    late: int = 0

    def __str__(self) -> str:
        late = f", {self.late} visual in between" if self.late else ""
        return f"{self.batch} x {self.length} x {self.features}, {self.visual} visual + {self.response} response{late}"

    @property
    def tokens(self) -> int:
        return self.batch * self.response

    def hidden_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the visual and response rows."""
        return self.batch * (self.visual + self.response) * self.features * dtype.itemsize


# Qwen2.5-VL-7B's shape and two larger batches, and one order smaller for CPUs.
CPU_SHAPE = RolloutShape(batch=8, length=3072, features=2048, visual=768, response=2048)
GPU_SHAPES = tuple(
    RolloutShape(batch=batch, length=1024 + response, features=3584, visual=1024, response=response)
    for batch, response in GPU_TOKENS
)
SMALL_SHAPE = RolloutShape(batch=8, length=192, features=512, visual=64, response=96)


@dataclass(frozen=True)
class Rollout:
    """The tensors of a rollout batch: image tokens first, text between, response tokens last."""

    hidden: Tensor  # [B, S, D]
    visual_mask: Tensor  # [B, S]
    response_mask: Tensor  # [B, T]
    group_ids: Tensor  # [B], four responses to each prompt

    @property
    def focus(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.visual_mask, self.response_mask


def make_rollout(shape: RolloutShape, dtype: torch.dtype, device: torch.device, seed: int) -> Rollout:
    normal = normals(seed, device)
    hidden = torch.empty(shape.batch, shape.length, shape.features, dtype=dtype, device=device)
    for response in hidden:
        response.copy_(normal(shape.length, shape.features) + 0.7 * normal(1, shape.features))
    place = torch.arange(shape.length, device=device)
    middle = shape.length - shape.response // 2
    late = (place >= middle) & (place < middle + shape.late)
    return Rollout(
        hidden=hidden,
        visual_mask=((place < shape.visual) | late).repeat(shape.batch, 1),
        response_mask=~late[-shape.response :].repeat(shape.batch, 1),
        group_ids=torch.arange(shape.batch, device=device) // 4,
    )


def exact_cosines(rollout: Rollout, **options: Any) -> Tensor:
    """Cosines by the reference implementation, a response at a time to save memory."""
    parts = zip(*(tensor.split(1) for tensor in rollout.focus), strict=True)
    return torch.cat([by_reference(lambda part=part: visual_focus(*part, **options)) for part in parts])


def prototypes(hidden: Tensor, visual_mask: Tensor) -> Tensor:
    """Masked mean as a matrix product, the fastest way that torch has."""
    weights = visual_mask.to(hidden.dtype) / visual_mask.sum(-1, keepdim=True).to(hidden.dtype)
    return torch.bmm(weights[:, None], hidden)


def with_cosine_similarity(hidden: Tensor, visual_mask: Tensor, response_mask: Tensor) -> Tensor:
    rows = hidden[:, -response_mask.shape[1] :]
    return F.cosine_similarity(rows, prototypes(hidden, visual_mask), dim=-1) * response_mask


def with_bmm(hidden: Tensor, visual_mask: Tensor, response_mask: Tensor) -> Tensor:
    rows, means = hidden[:, -response_mask.shape[1] :], prototypes(hidden, visual_mask)
    dots = torch.bmm(rows, means.transpose(1, 2)).squeeze(-1)
    norms = torch.linalg.vector_norm(rows, dim=-1) * torch.linalg.vector_norm(means, dim=-1)
    return dots / norms.clamp(min=1e-8) * response_mask


def with_every_cosine(hidden: Tensor, visual_mask: Tensor, response_mask: Tensor) -> Tensor:
    """The mean of each token's cosines with all image tokens, by an array of them, ``[B, T, S]``."""
    units = F.normalize(hidden.float(), dim=-1, eps=1e-8)
    cosines = torch.bmm(units[:, -response_mask.shape[1] :], units.transpose(1, 2))
    seen = visual_mask[:, None].float()
    return (cosines * seen).sum(-1) / seen.sum(-1) * response_mask


def with_mean_of_units(hidden: Tensor, visual_mask: Tensor, response_mask: Tensor) -> Tensor:
    """The same by the mean of the image's unit vectors."""
    units = F.normalize(hidden.float(), dim=-1, eps=1e-8)
    means = prototypes(units, visual_mask)
    return torch.bmm(units[:, -response_mask.shape[1] :], means.transpose(1, 2)).squeeze(-1) * response_mask


def focus_case(shape: RolloutShape, dtype: torch.dtype, device: torch.device, seed: int) -> Case:
    rollout = make_rollout(shape, dtype, device, seed)
    exact = cache(lambda: exact_cosines(rollout))
    compiled, compiled_wide = (torch.compile(function, dynamic=False) for function in (with_bmm, peers.focus))
    return Case(
        run=lambda: visual_focus(*rollout.focus),
        check=lambda found, bound: assert_close(found, exact(), name="cosines", floor=bound),
        ceiling=read_ceiling(rollout.hidden),
        bytes=shape.hidden_bytes(dtype) + 4 * shape.tokens,
        flops=shape.batch * (shape.visual + 4 * shape.response) * shape.features,
        peers={
            "F.cosine_similarity": Peer(lambda: with_cosine_similarity(*rollout.focus)),
            "bmm + vector_norm": Peer(lambda: with_bmm(*rollout.focus)),
            "torch.compile(bmm + vector_norm)": Peer(lambda: compiled(*rollout.focus)),
            "PyTorch in fp32": Peer(lambda: peers.focus(*rollout.focus), gpu_only=True),
            "torch.compile in fp32": Peer(lambda: compiled_wide(*rollout.focus), gpu_only=True),
            "token loop": Peer(lambda: peers.token_loop(*rollout.focus), gpu_only=True, captured=False),
        },
    )


def causal_case(shape: RolloutShape, dtype: torch.dtype, device: torch.device, seed: int) -> Case:
    """Causal visibility: where images arrive in the middle, tokens before them are compared with those before."""
    rollout = make_rollout(shape, dtype, device, seed)
    exact = cache(lambda: exact_cosines(rollout, visibility="causal"))
    return Case(
        run=lambda: visual_focus(*rollout.focus, visibility="causal"),
        check=lambda found, bound: assert_close(found, exact(), name="cosines", floor=bound),
        ceiling=read_ceiling(rollout.hidden),
        bytes=shape.hidden_bytes(dtype) + 4 * shape.tokens,
        flops=shape.batch * (shape.visual + shape.late + 4 * (shape.response - shape.late)) * shape.features,
    )


def unit_mean_case(shape: RolloutShape, dtype: torch.dtype, device: torch.device, seed: int) -> Case:
    """Means of cosines with all image tokens: rows of the image are read once more, on CPUs from the cache."""
    rollout = make_rollout(shape, dtype, device, seed)
    exact = cache(lambda: exact_cosines(rollout, pooling="unit_mean"))
    compiled = torch.compile(with_mean_of_units, dynamic=False)
    return Case(
        run=lambda: visual_focus(*rollout.focus, pooling="unit_mean"),
        check=lambda found, bound: assert_close(found, exact(), name="mean cosines", floor=bound),
        ceiling=read_ceiling(rollout.hidden),
        bytes=shape.hidden_bytes(dtype) + 4 * shape.tokens,
        flops=shape.batch * (4 * shape.visual + 4 * shape.response) * shape.features,
        peers={
            "every cosine": Peer(lambda: with_every_cosine(*rollout.focus)),
            "PyTorch": Peer(lambda: with_mean_of_units(*rollout.focus)),
            "torch.compile": Peer(lambda: compiled(*rollout.focus)),
        },
    )


def prototype_case(shape: RolloutShape, dtype: torch.dtype, device: torch.device, seed: int) -> Case:
    rollout = make_rollout(shape, dtype, device, seed)
    arguments = (rollout.hidden, rollout.visual_mask)
    compiled = torch.compile(peers.prototype, dynamic=False)
    parts = tuple(zip(*(tensor.split(1) for tensor in arguments), strict=True))
    exact = cache(lambda: torch.cat([by_reference(lambda part=part: visual_prototype(*part)) for part in parts]))
    return Case(
        run=lambda: visual_prototype(*arguments),
        check=lambda found, bound: assert_close(found, exact(), name="prototypes", floor=bound),
        ceiling=read_ceiling(rollout.hidden),
        bytes=shape.batch * shape.features * (shape.visual * dtype.itemsize + 4),
        peers={
            "PyTorch": Peer(lambda: peers.prototype(*arguments)),
            "torch.compile": Peer(lambda: compiled(*arguments)),
        },
    )


OPS = (
    Op("visual_focus", focus_case, cpu=(CPU_SHAPE,), gpu=GPU_SHAPES, small=SMALL_SHAPE),
    Op(
        "visual_focus, causal",
        causal_case,
        cpu=(CPU_SHAPE, CPU_SHAPE._replace(late=256)),
        gpu=(GPU_SHAPES[0], GPU_SHAPES[0]._replace(late=256)),
        small=SMALL_SHAPE._replace(late=16),
    ),
    Op("visual_focus, unit_mean", unit_mean_case, cpu=(CPU_SHAPE,), gpu=GPU_SHAPES[:1], small=SMALL_SHAPE),
    Op("visual_prototype", prototype_case, cpu=(), gpu=GPU_SHAPES, small=SMALL_SHAPE),
)


def test_visual_focus(speed, setting) -> None:
    speed(setting)
