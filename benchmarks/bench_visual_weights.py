"""Speed of visual_weights and group_weights: from cosines to factors, and phi alone from scores.

Bytes a token: the cosine (4) and the mask (1) in; factors, psi and w out (12). The tail's order keys, the selection of
the gate's threshold and two more passes over w stay in a core's cache. Flops: two divisions and some thirty other
operations a token, and half a token's worth of 32 integer comparisons. group_weights: a score (4), a group's id (8) and
phi (4) a response.

Prediction for the CPU: arithmetic and not memory decides; several times faster than sorting one copy of the cosines.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from tolerance import assert_close
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import GPU_TOKENS, Case, Op, Peer, Tokens, by_reference, copy_ceiling, normals
from vgpo_kernels import VGPOConfig, group_weights, visual_weights

CONFIG = VGPOConfig.paper()


class Responses(NamedTuple):
    """A batch of one number a response."""

    batch: int

    def __str__(self) -> str:
        return f"{self.batch} responses"


def weights_case(size: Tokens, dtype: torch.dtype, device: torch.device, seed: int) -> Case:
    cos = (0.3 * normals(seed, device)(*size)).clamp(-1, 1)
    mask = torch.ones(size, dtype=torch.bool, device=device)
    groups = torch.arange(size.batch, device=device) // 8
    compiled = torch.compile(peers.weights, dynamic=False)

    def ours() -> tuple[Tensor, Tensor]:
        weights = visual_weights(cos, mask, groups, CONFIG)
        return weights.factors, weights.psi

    exact = cache(lambda: by_reference(ours))

    def check(found: tuple[Tensor, ...], bound: float) -> None:
        # phi is a difference of fp32 sums of thousands of weights, by their small range.
        assert_close(found[0], exact()[0], name="factors", floor=max(bound, 1e-4))
        for psi in found[1:]:  # peers have none
            assert_close(psi, exact()[1], name="psi", floor=bound / 10)

    moved = 17 * size.batch * size.length
    return Case(
        run=ours,
        check=check,
        ceiling=copy_ceiling(moved),
        bytes=moved,
        peers={
            "one sort of the cosines": Peer(lambda: cos.sort(dim=-1), same=False),
            "PyTorch": Peer(lambda: (peers.weights(cos, mask, groups),)),
            "torch.compile": Peer(lambda: (compiled(cos, mask, groups),), gpu_only=True),
        },
    )


def group_case(size: Responses, dtype: torch.dtype, device: torch.device, seed: int) -> Case:
    score = 1000 + 10 * normals(seed, device)(size.batch)
    groups = torch.arange(size.batch, device=device) // 8
    compiled = torch.compile(peers.group, dynamic=False)
    exact = cache(lambda: by_reference(lambda: group_weights(score, groups, CONFIG)))
    moved = 16 * size.batch
    return Case(
        run=lambda: group_weights(score, groups, CONFIG),
        check=lambda found, bound: assert_close(found, exact(), name="phi", floor=max(bound, 1e-4)),
        ceiling=copy_ceiling(moved),
        bytes=moved,
        peers={
            "PyTorch": Peer(lambda: peers.group(score, groups)),
            "torch.compile": Peer(lambda: compiled(score, groups)),
        },
    )


OPS = (
    Op(
        name="visual_weights",
        make=weights_case,
        cpu=(Tokens(64, 4096), Tokens(1, 131072)),
        gpu=GPU_TOKENS,
        small=Tokens(8, 256),
        dtypes=(torch.float32,),
    ),
    Op(
        name="group_weights",
        make=group_case,
        cpu=(),
        gpu=tuple(Responses(size.batch) for size in GPU_TOKENS),
        small=Responses(8),
        dtypes=(torch.float32,),
    ),
)


def test_visual_weights(speed, setting) -> None:
    speed(setting)
