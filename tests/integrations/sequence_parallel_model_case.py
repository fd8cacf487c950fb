"""A Qwen2.5-VL whose decoder runs on parts of the sequence: ``sequence_parallel_model_case.py FOLDER``.

Two ranks, which are forks of this process: with attention as verl's Ulysses has it (parts in order; an all-to-all
exchanges positions for heads), and as ring attention sees it (zig-zag parts; keys and values come from every rank).
Each rank also runs the model whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from architectures.families_qwen import IMAGE
from architectures.zoo import ANSWER, example
from integrations.sequence_parallel_case import objective
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor, all_gather_tensor_autograd
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from verl.utils import ulysses

from vgpo_kernels import linear_logprob, visual_focus
from vgpo_kernels.integrations.sequence_parallel import parallel_focus, parallel_token_logprob, zigzag_positions

WORLD = 2
KINDS = ("ulysses", "zigzag")


def attention_of(kind: str, positions: Tensor, valid: Tensor) -> Callable[..., tuple[Tensor, None]]:
    """Return attention of the rows at these positions; ``valid [B, S]`` are keys that are no padding."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        assert attention_mask is None
        every = torch.arange(valid.shape[-1])
        if kind == "ulysses":
            exchange = [ulysses.gather_seq_scatter_heads(one, seq_dim=2, head_dim=1) for one in (query, key, value)]
            asking, order = every, every
        else:
            everyone = dist.group.WORLD
            exchange = [query, *(all_gather_tensor_autograd(one, 2, everyone) for one in (key, value))]
            asking, order = positions, all_gather_tensor(positions, 0, everyone)
        allowed = (order <= asking[:, None]) & valid[:, None, None, order]
        found = scaled_dot_product_attention(*exchange, attn_mask=allowed, scale=scaling, enable_gqa=True)
        if kind == "ulysses":
            found = ulysses.gather_heads_scatter_seq(found, head_dim=1, seq_dim=2)
        return found.transpose(1, 2), None

    return attend


def split(decoder: nn.Module, positions: Tensor, valid: Tensor, kind: str) -> None:
    """Make a decoder compute the rows at these positions of what it is given."""
    name = f"parts of {kind}"
    AttentionInterface.register(name, attention_of(kind, positions, valid))
    decoder.config._attn_implementation = name

    def take_rows(_: nn.Module, args: tuple[()], given: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        more = int(positions.max()) + 1 - given["inputs_embeds"].shape[1]
        embeddings = pad(given["inputs_embeds"], (0, 0, 0, max(more, 0)))
        places = pad(given["position_ids"], (0, max(more, 0)))
        own = {"inputs_embeds": embeddings[:, positions], "position_ids": places[..., positions]}
        return args, given | own | {"attention_mask": {"full_attention": None}}

    decoder.register_forward_pre_hook(take_rows, with_kwargs=True)


def run(kind: str | None, rank: int) -> dict[str, Tensor]:
    """Focus, log-probabilities and gradients of the model whole, or of its parts."""
    model, inputs = example("qwen2_5_vl")
    ids, mask = inputs["input_ids"], torch.ones(2, ANSWER, dtype=torch.bool)
    mask[1, 1] = False
    image, head = ids == IMAGE, model.get_output_embeddings().weight
    length = ids.shape[1]
    part = -(-length // WORLD)
    positions = torch.arange(part) + part * rank if kind == "ulysses" else zigzag_positions(length, WORLD, rank)
    decoder = model.model.language_model
    if kind is not None:
        valid = pad(inputs["attention_mask"].bool(), (0, 2 * WORLD * -(-length // (2 * WORLD)) - length))
        split(decoder, positions, valid[:, : part * WORLD] if kind == "ulysses" else valid, kind)
    hidden = model.model(**inputs).last_hidden_state
    if kind is None:
        logp, entropy = linear_logprob(hidden[:, -ANSWER - 1 : -1], head, ids[:, -ANSWER:], return_entropy=True)
        logp, entropy = (torch.where(mask, one, 0) for one in (logp, entropy))
        cosines = {one: visual_focus(hidden, image, mask, visibility=one) for one in ("all", "causal")}
    else:
        given = None if kind == "ulysses" else positions
        logp, entropy = parallel_token_logprob(hidden, head, ids, mask, positions=given, return_entropy=True)
        cosines = {
            one: parallel_focus(hidden, image, mask, positions=given, visibility=one) for one in ("all", "causal")
        }
    objective(logp, entropy).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"logp": logp.detach(), "entropy": entropy.detach(), **cosines, **gradients}


def run_rank(rank: int, folder: Path) -> None:
    """Write what one rank computes."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    ulysses.set_ulysses_sequence_parallel_group(dist.group.WORLD)
    torch.save({kind: run(kind, rank) for kind in (None, *KINDS)}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(run_rank, (Path(sys.argv[1]),), WORLD, start_method="fork")
