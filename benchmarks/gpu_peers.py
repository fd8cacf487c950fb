"""What other libraries have for a GPU: the LM head without its logits, and attention by torch's fused kernels.

Peers of the benchmarks, each as its library is used. A library is imported when its peer is first called: one that
cannot be imported costs only its own rows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.measure import installed
from vgpo_kernels import backends

Values = tuple[Tensor, ...]
# From hidden states, weight and targets to log-probabilities, or to those and entropies.
LogProbs = Callable[[Tensor, Tensor, Tensor], Values]
# From hidden states, weight and targets to the summed negative log-likelihood.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


# ---- the LM head -------------------------------------------------------------------------------------------------


def logprobs(entropy: bool, device: torch.device) -> dict[str, LogProbs]:
    """Heads of installed libraries that give log-probabilities, and entropies where those are asked for."""
    found: dict[str, LogProbs] = {}
    if installed("trl"):
        found["TRL, chunked"] = lambda *head: _trl(*head, entropy)
    if device.type != "cuda":
        return found
    if installed("verl"):
        found["verl, Triton"] = lambda *head: _verl()(*head, 1.0, "none", None)[: 1 + entropy]
    if installed("cut_cross_entropy") and not entropy:
        found["CCE"] = lambda *head: _cut(*head, "high")
        found["CCE, every gradient"] = lambda *head: _cut(*head, None)
    # On other GPUs than Hopper's it is made of torch's operators; on Hopper's it needs CUTLASS's language.
    if installed("liger_kernel") and (installed("cutlass") or torch.cuda.get_device_capability(device) != (9, 0)):
        found["Liger, scaled"] = lambda *head: _liger_scaled(*head, entropy)
    return found


def losses() -> dict[str, Loss]:
    """Cross-entropies of installed libraries that give a sum over tokens only."""
    found: dict[str, Loss] = {}
    if installed("liger_kernel"):
        found["Liger"] = _liger
    if installed("quack") and installed("cutlass"):
        found["quack"] = _quack
    return found


def _trl(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Values:
    """The head of TRL's trainers, in its chunks."""
    utils: Any = import_module("trl.trainer.utils")
    outputs = ("log_probs", "entropy")[: 1 + entropy]
    settings = (1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs)
    found = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, *settings)
    return tuple(found[: 1 + entropy])


@cache
def _verl() -> Callable[..., Values]:
    """verl's kernel; its package would import Ray."""
    (root,) = find_spec("verl").submodule_search_locations
    for name in ("verl", "verl.utils"):
        package = ModuleType(name)
        package.__spec__ = ModuleSpec(name, None, is_package=True)
        package.__path__ = [os.path.join(os.path.dirname(root), *name.split("."))]
        sys.modules.setdefault(name, package)
    return import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy


def _cut(hidden: Tensor, weight: Tensor, targets: Tensor, filter_eps: str | None) -> Values:
    """Apple's cut cross-entropy, which by default leaves out gradients below a threshold, block by block."""
    from cut_cross_entropy import linear_cross_entropy

    return (-linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=filter_eps),)


def _liger_scaled(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Values:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Head

    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"  # the host would wait for the device, as ours does not
    found = Head.apply(hidden, weight, targets, return_entropy=entropy)
    return (-found[0], found[1].float()) if entropy else (-found,)


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")
    return loss


def _quack(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss: Tensor = chunked_linear_cross_entropy(hidden, weight, targets, reduction="sum")
    return loss


# ---- attention ---------------------------------------------------------------------------------------------------


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last queries by torch's flash kernel, ``[B, Hq, T, d]``."""
    mask: Any = causal_lower_right(q.shape[2], k.shape[2])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Attention by cuDNN's kernel, which aligns queries and keys at their beginnings."""

    @cache
    def heads() -> tuple[Tensor, Tensor]:
        """Heads of k and v, repeated where this release of torch has no groups in cuDNN."""
        grouped = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, True)
        if torch.backends.cuda.can_use_cudnn_attention(grouped):
            return k, v
        group = q.shape[1] // k.shape[1]
        return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    def attend() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, *heads(), is_causal=True, enable_gqa=heads()[0] is k)

    return attend


def flash_masses(q: Tensor, k: Tensor, members: Tensor) -> Tensor:
    """Masses as attention to values that name a key's segment, ``[B, T, segments]``.

    Args:
        q: Queries, ``[B, Hq, T, d]``.
        k: Keys, ``[B, Hk, S, d]``.
        members: Ones where a key belongs to a segment, ``[S, segments]``.

    """
    # The kernel takes values as long as keys.
    values = F.pad(members, (0, k.shape[-1] - members.shape[-1])).to(k.dtype).expand_as(k)
    return flash_attention(q, k, values)[..., : members.shape[-1]].mean(1, dtype=torch.float32)


def flash_column_means(q: Tensor, k: Tensor) -> Tensor:
    """Mean probability of each key, ``[B, S]``: of a sum of attention's outputs the gradient w.r.t. the values."""
    values = torch.zeros_like(k).requires_grad_()
    found = flash_attention(q, k, values)
    (columns,) = torch.autograd.grad(found, values, torch.ones_like(found))
    return columns[..., 0].sum(1, dtype=torch.float32) / (q.shape[1] * q.shape[2])


def warpgroup_attention(run: Callable[[], Values], device: torch.device) -> dict[str, Callable[[], Values]]:
    """Our own masses by the kernel that is off by default, on a GPU that has it."""
    extension = backends.describe()["extension"]
    if (
        device.type != "cuda"
        or torch.cuda.get_device_capability(device) != (9, 0)
        or not (extension or {}).get("hopper")
    ):
        return {}
    name = "VGPO_WARPGROUP_ATTENTION"

    def asked_for() -> Values:
        before = os.environ.get(name, "0")
        os.environ[name] = "1"
        try:
            with backends.backend("cuda"):
                return run()
        finally:
            os.environ[name] = before

    return {"cuda, warpgroups": asked_for}
