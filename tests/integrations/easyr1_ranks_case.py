"""One rank of EasyR1's sequence parallelism on the double: ``easyr1_ranks_case.py RANK WORLD FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from integrations.easyr1_double import make_modules, rollout
from integrations.rollout_case import tiny_model
from tolerance import assert_close
from verl.utils import ulysses

from vgpo_kernels import VGPOConfig
from vgpo_kernels.integrations.easyr1 import patch_easyr1


def main(rank: int, world: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    model = tiny_model(layers=1)
    model.model.layers = torch.nn.ModuleList()  # no attention, which would have to see what another rank has
    modules = make_modules()
    patch_easyr1(VGPOConfig.paper(), **modules)
    data = rollout()
    data.batch["attention_mask"][0, 0] = 0  # now one of the parts has to be padded
    found = []
    for size in (1, world):
        ulysses.set_ulysses_sequence_parallel_group(dist.group.WORLD if size > 1 else None)
        actor = modules["actor_module"].DataParallelPPOActor(model, padding_free=True, ulysses_size=size)
        found.append(modules["worker_module"].FSDPWorker(actor).compute_log_probs(data).batch)
    whole, parts = found
    assert_close(parts["old_log_probs"], whole["old_log_probs"].double(), name="log-probs")
    assert_close(parts["visual_focus"], whole["visual_focus"].double(), name="focus")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
