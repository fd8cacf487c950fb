"""Batches that are split over the ranks of a process group: ``sequence_parallel_case.py FOLDER``.

Every rank of each world makes the same batches, computes on its part of them, and writes the results to FOLDER. Ranks
are forks of this process: importing torch once takes longer than everything that they do.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from cases import EDGES, Batch, Response, make_batch
from linear_cases import with_predicting_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vgpo_kernels.integrations.sequence_parallel import (
    gather_tokens,
    parallel_focus,
    parallel_token_logprob,
    zigzag_positions,
)

# How ranks share positions, and in which dtype, for each number of ranks.
LAYOUTS = {
    2: (("default", "float32"), ("zigzag", "bfloat16")),
    4: (("default", "bfloat16"), ("zigzag", "float32"), ("stripes", "float32"), ("uneven", "float32")),
}
EDGE_NAMES = ("holes", "empty response", "all empty", "no image", "late images", "single", "no responses", "long")
NAMES = (*EDGE_NAMES, "any masks", "one image less", "broken", "zero images", "tiny")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VISIBILITIES = ("all", "causal")
VOCABULARY = 50
TEMPERATURE = 1.3


class Key(NamedTuple):
    """What a result is of."""

    name: str
    packed: bool
    layout: str
    dtype: str
    visibility: str


def batch_of(name: str, packed: bool, dtype: str) -> Batch:
    """Return a batch by its name: an edge of every op's tests, or one of those made here."""
    kind = DTYPES[dtype]
    if name in EDGES:
        return make_batch(EDGES[name], packed=packed, dtype=kind)
    if name == "tiny":  # shorter than four ranks need it to be
        return make_batch((Response(visual=4, text=1, length=4),), packed=packed, dtype=kind)
    batch = make_batch(EDGES["late images"], packed=packed, dtype=kind)
    hidden, visible, scored = batch.hidden.clone(), batch.visual_mask.clone(), batch.response_mask
    if name == "any masks":  # tokens that are both, images in many pieces, wherever
        generator = torch.Generator().manual_seed(3)
        hidden = torch.randn(hidden.shape, generator=generator).to(kind)
        visible, scored = (torch.rand(one.shape, generator=generator) < 0.4 for one in (visible, scored))
        return replace(batch, hidden=hidden, visual_mask=visible, response_mask=scored)
    flat, image = hidden.view(-1, hidden.shape[-1]), visible.view(-1).nonzero()[:, 0]
    answer = response_rows(batch).view(-1).nonzero()[:, 0]
    if name == "one image less":  # the last to arrive: nothing before it may change
        visible.view(-1)[image[-3:]] = False
    elif name == "broken":
        flat[image[8], 1] = float("nan")  # in the middle of an image
        flat[image[13]] = float("inf")
        flat[answer[2], 0] = -float("inf")
        flat[answer[-2]] = 1e30  # the square of its norm is out of range
    elif name == "zero images":
        flat[image] = 0
        flat[answer[3], 0] = float("nan")
        flat[answer[-1], 0] = float("inf")
    return replace(batch, hidden=hidden, visual_mask=visible)


def response_rows(batch: Batch) -> Tensor:
    """Return the response mask over the rows of hidden."""
    return torch.nn.functional.pad(
        batch.response_mask, (batch.visual_mask.shape[-1] - batch.response_mask.shape[-1], 0)
    )


def positions_of(layout: str, length: int, world: int, rank: int) -> Tensor:
    """Return the positions of a rank."""
    if layout == "zigzag":
        return zigzag_positions(length, world, rank)
    if layout == "stripes":
        return torch.arange(rank, max(length, rank), world)
    if layout == "uneven":  # the first rank has no row, the last has most, and some padding
        cuts = [0, *range(world - 1), length + 3]
        return torch.arange(cuts[rank], cuts[rank + 1])
    part = -(-length // world)
    return torch.arange(part) + rank * part


def rows_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Return a rank's rows; those of padding are NaN."""
    length = hidden.shape[-2]
    more = max(0, int(positions.max()) + 1 - length) if len(positions) else 0
    padded = torch.nn.functional.pad(hidden, (0, 0, 0, more), value=float("nan"))
    return padded.index_select(-2, positions)


class Traffic(TorchDispatchMode):
    """Names of the collectives that run inside, and how many bytes each of their tensors has."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            tensors, _ = torch.utils._pytree.tree_flatten(args)
            sent = [one for one in tensors if isinstance(one, Tensor)]
            self.calls.append((function._opname, max(one.numel() * one.element_size() for one in sent)))
        return function(*args, **(kwargs or {}))


def keys(world: int) -> list[Key]:
    """Return what the ranks of a world compute cosines of."""
    return [
        Key(name, packed, *layout, visibility)
        for name in NAMES
        for packed in (False, True)
        for layout in LAYOUTS[world]
        for visibility in VISIBILITIES
    ]


def focus(
    key: Key, world: int, rank: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, list[tuple[str, int]]]:
    """Cosines as this rank has them, and what moved for them."""
    batch = batch_of(key.name, key.packed, key.dtype)
    positions = positions_of(key.layout, batch.visual_mask.shape[-1], world, rank)
    with Traffic() as traffic:
        cos = parallel_focus(
            rows_at(batch.hidden, positions),
            batch.visual_mask,
            batch.response_mask,
            positions=None if key.layout == "default" else positions,
            group=group,
            cu_seqlens=batch.cu_seqlens,
            visibility=key.visibility,  # type: ignore[arg-type]
        )
    return cos, traffic.calls


def answered(packed: bool) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """Return a batch whose hidden states predict its tokens, these tokens, and the weight and bias of a head."""
    responses = (Response(), Response(length=0), Response(length=17, holes=True), Response(visual=0, length=3))
    batch, head = with_predicting_rows(make_batch(responses, packed=packed), VOCABULARY)
    assert head.bias is not None
    ids = torch.randint(VOCABULARY, batch.visual_mask.shape, generator=torch.Generator().manual_seed(5))
    return batch, ids, head.weight.float(), head.bias


def objective(logp: Tensor, entropy: Tensor) -> Tensor:
    """A number that depends on every log-probability and entropy in its own way."""
    weights = torch.linspace(-1, 2, logp.numel(), dtype=logp.dtype).view_as(logp)
    return (weights * logp).sum() + (weights.square() * entropy).sum()


def logprobs(packed: bool, layout: str, world: int, rank: int, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Log-probabilities and entropies, and gradients by this rank's hidden states, the weight and the bias."""
    batch, ids, weight, bias = answered(packed)
    positions = positions_of(layout, ids.shape[-1], world, rank)
    leaves = [one.requires_grad_() for one in (rows_at(batch.hidden, positions), weight, bias)]
    found = parallel_token_logprob(
        *leaves[:2],
        ids,
        batch.response_mask,
        positions=None if layout == "default" else positions,
        group=group,
        cu_seqlens=batch.cu_seqlens,
        bias=leaves[2],
        temperature=TEMPERATURE,
        return_entropy=True,
    )
    logp, entropy = found
    alone = parallel_token_logprob(
        *leaves[:2], ids, batch.response_mask, positions=positions, group=group, cu_seqlens=batch.cu_seqlens,
        bias=leaves[2], temperature=TEMPERATURE,
    )  # fmt: skip
    assert isinstance(alone, Tensor)
    return [logp.detach(), entropy.detach(), *torch.autograd.grad(objective(logp, entropy), leaves), alone.detach()]


def gathered(world: int, rank: int) -> list[Tensor]:
    """Values of a few positions, in bf16 and with a leading dimension, and their gradient; two are outside."""
    positions = torch.tensor([-1, rank, world + rank, 2 * world])
    values = (torch.arange(8.0).view(2, 4) + 10 * rank).bfloat16().requires_grad_()
    whole = gather_tokens(values, positions, 2 * world)
    (gradient,) = torch.autograd.grad(whole.float().square().sum(), values)
    return [whole.detach(), gradient]


def in_pairs(rank: int) -> dict[str, Any]:
    """What one of four ranks computes where two of them share a batch, and the two others another."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair, layout = rank // 2, LAYOUTS[2][rank // 2]
    key = Key(("late images", "any masks")[pair], pair == 0, *layout, "causal")
    return {
        "key": tuple(key),
        "focus": focus(key, 2, rank % 2, groups[pair]),
        "logprobs": logprobs(pair == 0, layout[0], 2, rank % 2, groups[pair]),
    }


def run_rank(rank: int, world: int, folder: Path) -> None:
    """Write what one rank computes."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    results = {
        "focus": {tuple(key): focus(key, world, rank) for key in keys(world)},
        "logprobs": {
            (packed, layout): logprobs(packed, layout, world, rank)
            for packed in (False, True)
            for layout, _ in LAYOUTS[world]
        },
        "gathered": gathered(world, rank),
        "pairs": in_pairs(rank) if world == 4 else None,
    }
    torch.save(results, folder / f"rank{rank}of{world}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    for size in LAYOUTS:
        torch.multiprocessing.start_processes(run_rank, (size, Path(sys.argv[1])), size, start_method="fork")
