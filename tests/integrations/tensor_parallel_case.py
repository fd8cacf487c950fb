"""One rank of heads that are split over a process group: ``tensor_parallel_case.py RANK WORLD FOLDER``.

Reads the heads from FOLDER, if there are any, and writes there what this rank computes of them and of the losses.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from integrations import tensor_parallel_losses as losses
from torch import Tensor

FIRST = (0, 77, 200)  # where each of two ranks' rows begin in the vocabulary, and its end
TEMPERATURE = 1.3


def objective(logp: Tensor, entropy: Tensor) -> Tensor:
    """A number that depends on every log-probability and entropy in its own way."""
    weights = torch.linspace(-1, 2, logp.numel(), dtype=logp.dtype).view_as(logp)
    return (weights * logp).sum() + (weights.square() * entropy).sum()


def run_rank(rank: int, backend: str, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> list[Tensor]:
    """Log-probabilities, entropies, and gradients by hidden and by this rank's rows of weight and bias."""
    from vgpo_kernels import backends
    from vgpo_kernels.integrations.tensor_parallel import parallel_logprob

    own = slice(FIRST[rank], FIRST[rank + 1])
    leaves = [part.clone().requires_grad_() for part in (hidden, weight[own], bias[own])]
    settings: dict[str, Any] = {"temperature": TEMPERATURE, "return_entropy": True, "chunk_bytes": 4 * 1000}
    with backends.backend(backend):
        logp, entropy = parallel_logprob(*leaves[:2], targets, first=own.start, bias=leaves[2], **settings)
        return [logp.detach(), entropy.detach(), *torch.autograd.grad(objective(logp, entropy), leaves)]


def divergence_objective(found: Any) -> Tensor:
    """A number that depends on every measure of every row in its own way."""
    total = torch.zeros((), dtype=found.kl.dtype)
    for place, values in enumerate(found):
        total = total + (torch.linspace(-1, 2, values.numel(), dtype=values.dtype).view_as(values) * values).sum() / (
            place + 1
        )
    return total


def run_divergence(
    rank: int, backend: str, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor
) -> list[Tensor]:
    """Every measure, and gradients by both views and by this rank's rows of weight and bias."""
    from vgpo_kernels import backends
    from vgpo_kernels.integrations.tensor_parallel import parallel_divergence
    from vgpo_kernels.reference.linear_divergence import MEASURES

    own = slice(FIRST[rank], FIRST[rank + 1])
    leaves = [part.clone().requires_grad_() for part in (hidden, other_view(hidden), weight[own], bias[own])]
    settings: dict[str, Any] = {"temperature": TEMPERATURE, "measures": MEASURES, "js_beta": 0.3}
    with backends.backend(backend):
        found = parallel_divergence(*leaves[:3], targets, first=own.start, bias=leaves[3], **settings)
        return [*(value.detach() for value in found), *torch.autograd.grad(divergence_objective(found), leaves)]


def other_view(hidden: Tensor) -> Tensor:
    """Other hidden states than these."""
    return hidden + hidden.roll(1, -1) / 2


def main(rank: int, world: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    if (folder / "cases.pt").exists():
        results = {
            key: (run_rank(rank, key[0], *tensors), run_divergence(rank, key[0], *tensors))
            for key, tensors in torch.load(folder / "cases.pt").items()
        }
        torch.save(results, folder / f"rank{rank}.pt")
    found = {name: losses.run_rank(case, rank, world) for name, case in losses.CASES.items()}
    torch.save(found, folder / f"losses{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
