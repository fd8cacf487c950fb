"""What EasyR1 imports and a CPU cannot have: vLLM, which generates, flash-attn, and qwen_vl_utils, which reads videos.

:func:`install` puts others in their places, in a process that has not imported them. Of flash-attn EasyR1 uses
functions that take padding away and bring it back: they are here, and attention within the sequences of a pack. Of the
others it uses nothing in a test.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

NAMES = ("vllm", "flash_attn", "qwen_vl_utils")
HERE = ("flash_attn", "flash_attn.bert_padding")


class StandIns(MetaPathFinder, Loader):
    """Finds every module of the packages, with a class for every name; of flash-attn only what is here."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        package = fullname.partition(".")[0]
        if package not in NAMES or (package == "flash_attn" and fullname not in HERE):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name) if spec.name in HERE else AnyName(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "flash_attn.bert_padding":
            from einops import rearrange

            vars(module).update(
                index_first_axis=index_first_axis, pad_input=pad_input, rearrange=rearrange, unpad_input=unpad_input
            )


class AnyName(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def install() -> None:
    sys.meta_path.insert(0, StandIns())


def unpad_input(values: Any, attended: Any) -> tuple[Any, Any, Any, int]:
    """Rows ``[B, S, ...]`` that are attended, ``[N, ...]``, their places, boundaries, the longest sequence."""
    from torch.nn.functional import pad

    lengths = attended.sum(-1)
    places = attended.flatten().nonzero().flatten()
    return values.flatten(0, 1)[places], places, pad(lengths.cumsum(0), (1, 0)), int(lengths.max())


def index_first_axis(values: Any, places: Any) -> Any:
    return values[places]


def pad_input(hidden_states: Any, indices: Any, batch: int, seqlen: int) -> Any:
    whole = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return whole.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def attention_of_packed(query: Any, key: Any, value: Any, cu_seqlens_q: Any, **settings: Any) -> Any:
    """Causal attention ``[N, H, D]`` within each sequence of a pack."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    parts = []
    for begin, end in pairwise(cu_seqlens_q.tolist()):
        own = [part[begin:end].transpose(0, 1)[None] for part in (query, key, value)]
        scale = settings["softmax_scale"]
        parts.append(scaled_dot_product_attention(*own, is_causal=True, scale=scale, enable_gqa=True)[0])
    return torch.cat(parts, 1).transpose(0, 1)


def attention_of_one(query: Any, key: Any, value: Any, *_: Any, **settings: Any) -> Any:
    """The same for one sequence, ``[1, S, H, D]``."""
    import torch

    ends = torch.tensor([0, query.shape[1]])
    return attention_of_packed(query[0], key[0], value[0], ends, softmax_scale=settings["softmax_scale"])[None]
