"""Speed of shape_tokens with the presets of published methods: from signals to factors, weights and selections.

Bytes a token: the signals that a preset reads (4 each) and the mask (1) in; factors and weights (8) and the selection
(1) out. A response's passes over its signals stay in a core's cache; a selection over the batch reads its keys from
memory once more. Flops are not counted: about a hundred operations a token for exponentials, tanh and powers, two
divisions, and of a selection a histogram of 11 bits and the same of what is left.

Prediction for the CPU: arithmetic and not memory decides, at 3 to 10 ns a token of one core. Several times faster than
PyTorch, whose ten to thirty passes each read and write a batch; on 8 x 2048 tokens about half of a call is the checks
of its arguments.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from tolerance import assert_close
from torch import Tensor

from benchmarks import shaping_peers
from benchmarks.measure import GPU_TOKENS, Case, Op, Peer, Tokens, by_reference, copy_ceiling, normals
from vgpo_kernels import ShapingConfig, shape_tokens


def shaping_case(method: str, size: Tokens, dtype: torch.dtype, device: torch.device, seed: int) -> Case:
    config = ShapingConfig.preset(method)
    assert isinstance(config, ShapingConfig)
    normal = normals(seed, device)
    signals = {name: normal(*size).abs() for name in config.needs()}
    mask = torch.ones(size, dtype=torch.bool, device=device)
    groups = torch.arange(size.batch, device=device) // 8
    peer = shaping_peers.METHODS[method]
    compiled = torch.compile(peer, dynamic=False)

    def ours() -> tuple[Tensor, ...]:
        return (shape_tokens(signals, mask, groups, config, progress=shaping_peers.PROGRESS).factors,)

    exact = cache(lambda: by_reference(ours)[0].double())

    def check(found: tuple[Tensor, ...], bound: float) -> None:
        factors = found[0].double()
        # Scores that differ by less than fp32 tells apart may change places.
        swapped = (factors - exact()).abs() > 0.25 if config.fusion == "soft_or" else factors.isnan()
        assert swapped.sum() <= factors.numel() / 10_000
        assert_close(torch.where(swapped, exact(), factors), exact(), name="factors", floor=max(bound, 1e-4))

    moved = (4 * len(signals) + 10) * size.batch * size.length
    return Case(
        run=ours,
        check=check,
        ceiling=copy_ceiling(moved),
        bytes=moved,
        peers={
            "PyTorch": Peer(lambda: (peer(signals, mask),)),
            "torch.compile": Peer(lambda: (compiled(signals, mask),), gpu_only=True),
        },
    )


OPS = tuple(
    Op(
        name=f"token_shaping, {method}",
        make=partial(shaping_case, method),
        cpu=(Tokens(32, 4096), Tokens(8, 2048)),
        gpu=GPU_TOKENS,
        small=Tokens(8, 256),
        dtypes=(torch.float32,),
    )
    for method in shaping_peers.METHODS
)


def test_token_shaping(speed, setting) -> None:
    speed(setting)
