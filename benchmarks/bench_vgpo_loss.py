"""Speed of vgpo_loss: hidden states to loss, metrics and gradient in one call.

Bytes: those of visual_focus (see bench_visual_focus.py) but its cosines, which need not leave the chip; logp, old_logp,
the mask and the gradient add 13 bytes a token, 0.1% of them.

Prediction for the CPU: at most 1.05 times visual_focus alone, and a few MiB of memory: prototypes and arrays of N
floats, nothing of the size of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from tolerance import assert_close
from torch import Tensor

from benchmarks import peers
from benchmarks.bench_visual_focus import (
    CPU_SHAPE,
    GPU_SHAPES,
    SMALL_SHAPE,
    RolloutShape,
    exact_cosines,
    make_rollout,
    with_bmm,
)
from benchmarks.measure import Case, Op, Peer, by_reference, normals, read_ceiling, with_gradient
from vgpo_kernels import VGPOConfig, policy_loss, vgpo_loss, visual_focus, visual_weights

CONFIG = VGPOConfig.paper()


def vgpo_case(shape: RolloutShape, dtype: torch.dtype, device: torch.device, seed: int) -> Case:
    """Forward and backward on a drawn batch, beside visual_focus alone and the same in torch."""
    rollout = make_rollout(shape, dtype, device, seed)
    mask, groups = rollout.response_mask, rollout.group_ids
    normal = normals(seed + 1000, device)
    logp = -normal(*mask.shape).abs()
    old_logp, advantages = logp + 0.1 * normal(*mask.shape), normal(shape.batch)
    tokens = (old_logp, advantages)

    def factors(focus: Callable[..., Tensor]) -> Tensor:
        return peers.weights(focus(*rollout.focus).float(), mask, groups)

    compiled_factors, compiled_loss = (torch.compile(function, dynamic=False) for function in (factors, peers.loss))

    def ours() -> tuple[Tensor, Tensor]:
        masks = (rollout.visual_mask, mask, groups)
        return with_gradient(lambda leaf: vgpo_loss(rollout.hidden, leaf, *tokens, *masks, CONFIG).loss, logp)

    def in_torch(focus: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        return with_gradient(lambda leaf: peers.loss(leaf, *tokens, mask, factors(focus)), logp)

    def compiled() -> tuple[Tensor, Tensor]:
        found = compiled_factors(peers.focus)
        return with_gradient(lambda leaf: compiled_loss(leaf, *tokens, mask, found), logp)

    @cache
    def exact() -> tuple[Tensor, Tensor]:
        cos = exact_cosines(rollout)
        factors = by_reference(lambda: visual_weights(cos, mask, groups, CONFIG)).factors
        loss = partial(policy_loss, response_mask=mask, factors=factors)
        return by_reference(lambda: with_gradient(lambda leaf: loss(leaf, *tokens).loss, logp))

    def check(found: tuple[Tensor, Tensor], bound: float) -> None:
        loss, gradient = exact()
        assert_close(found[0], loss, name="loss", floor=max(bound, 1e-4))
        # A token at the gate's threshold may fall to either side of it by rounding of the cosine.
        wrong = ((found[1] - gradient).abs() > max(bound, 1e-3) * gradient.abs().max()).sum().item()
        assert wrong <= gradient.numel() // 8000, f"{wrong} of {gradient.numel()} gradients are wrong"

    return Case(
        run=ours,
        check=check,
        ceiling=read_ceiling(rollout.hidden),
        bytes=shape.hidden_bytes(dtype) + 13 * shape.tokens,
        peers={
            "visual_focus alone": Peer(lambda: visual_focus(*rollout.focus), same=False),
            # Cosines that are rounded to bf16 open other gates.
            "PyTorch": Peer(lambda: in_torch(with_bmm), same=dtype == torch.float32),
            "PyTorch in fp32": Peer(lambda: in_torch(peers.focus), gpu_only=True),
            "torch.compile in fp32": Peer(compiled, gpu_only=True),
        },
    )


OPS = (Op("vgpo_loss", vgpo_case, cpu=(CPU_SHAPE,), gpu=GPU_SHAPES, small=SMALL_SHAPE),)


def test_vgpo_loss(speed, setting) -> None:
    speed(setting)
