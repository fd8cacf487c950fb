"""Bad input explained: what an error says. That there is one for every argument is in test_bad_input."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest
import torch
from cases import EDGES, make_batch

import vgpo_kernels
from vgpo_kernels import VGPOConfig, backends

PADDED = make_batch(EDGES["plain"], features=8)
PACKED = make_batch(EDGES["plain"], features=8, packed=True)
BATCH = len(PADDED.group_ids)
TOKENS = PADDED.response_mask.shape[1]


def good_arguments(function: str, packed: bool = False) -> dict[str, Any]:
    """Arguments that the function accepts."""
    batch = PACKED if packed else PADDED
    boundaries = {"cu_seqlens": batch.cu_seqlens} if packed else {}
    image = {"hidden": batch.hidden, "visual_mask": batch.visual_mask}
    response = {"response_mask": batch.response_mask}
    policy = {"logp": batch.logp, "old_logp": batch.old_logp, "advantages": batch.advantages}
    groups = {"group_ids": batch.group_ids, "config": VGPOConfig()}
    return {
        "visual_prototype": image | boundaries,
        "visual_focus": image | response | boundaries,
        "visual_weights": {"cos": batch.logp} | response | groups | boundaries,
        "group_weights": {"score": batch.advantages} | groups,
        "policy_loss": policy | response | boundaries,
        "vgpo_loss": image | policy | response | groups | boundaries,
    }[function]


def bad(function: str, name: str, value: Any, error: type[Exception], says: str, packed: bool = False) -> Any:
    return pytest.param(function, {name: value}, error, says, packed, id=f"{function}: {says}"[:80])


@pytest.mark.parametrize(
    ("function", "changed", "error", "says", "packed"),
    [
        bad("visual_focus", "hidden", PADDED.hidden[0], ValueError, r"hidden must have shape \[B, S, D\]"),
        bad("visual_focus", "hidden", PADDED.hidden.int(), TypeError, "hidden must be float32"),
        bad("visual_focus", "hidden", [1.0], TypeError, "hidden must be a torch.Tensor, got list"),
        bad("visual_focus", "hidden", PADDED.hidden[..., :0], ValueError, "at least one feature"),
        bad("visual_focus", "hidden", PADDED.hidden[:, : TOKENS - 1], ValueError, "last T"),
        bad("visual_focus", "visual_mask", None, ValueError, "visual_mask is None"),
        bad("visual_focus", "visual_mask", PADDED.visual_mask.float(), TypeError, r"visual_mask.bool\(\)"),
        bad("visual_focus", "response_mask", PADDED.response_mask.half(), TypeError, "response_mask must be bool"),
        bad("visual_focus", "prototype", PADDED.hidden[:, 0, :5], ValueError, r"prototype must have shape \[P, 8\]"),
        bad("visual_focus", "prototype", PADDED.hidden[:2, 0], ValueError, "a row per response"),
        bad("visual_focus", "prototype_index", PADDED.group_ids, ValueError, "needs prototype"),
        bad("visual_focus", "cu_seqlens", PACKED.cu_seqlens, ValueError, r"hidden must have shape \[N, D\]"),
        bad("visual_focus", "cu_seqlens", PACKED.cu_seqlens.flip(0), ValueError, "cu_seqlens must rise", True),
        bad("visual_focus", "cu_seqlens", PACKED.cu_seqlens[:-1], ValueError, "cu_seqlens must rise from 0", True),
        bad("visual_focus", "cu_seqlens", PACKED.cu_seqlens + 1, ValueError, "cu_seqlens must rise", True),
        bad("visual_focus", "cu_seqlens", PACKED.cu_seqlens.float(), TypeError, "int32 or int64", True),
        bad("visual_focus", "cu_seqlens", PACKED.cu_seqlens[None], ValueError, r"\[B \+ 1\]", True),
        bad("visual_focus", "cu_seqlens", PACKED.cu_seqlens[:0], ValueError, r"\[B \+ 1\]", True),
        bad("visual_focus", "cu_seqlens", [0, 4], TypeError, "cu_seqlens must be a torch.Tensor", True),
        bad("visual_weights", "group_ids", PADDED.advantages, TypeError, "group_ids must be an integer"),
        bad("visual_weights", "group_ids", torch.full((BATCH,), float("nan")), TypeError, "group_ids"),
        bad("visual_weights", "config", "paper", TypeError, "config must be a VGPOConfig, got str"),
        bad("visual_weights", "has_visual", PADDED.group_ids[:2] > 0, ValueError, "has_visual"),
        bad("visual_weights", "cos", PADDED.logp.int(), TypeError, "cos must be float32"),
        bad("group_weights", "score", PADDED.logp, ValueError, r"score must have shape \[B\]"),
        bad("group_weights", "score", 3.0, TypeError, "score must be a torch.Tensor"),
        bad("group_weights", "group_ids", PADDED.group_ids[:1], ValueError, "group_ids must have shape"),
        bad("policy_loss", "advantages", PADDED.advantages[:, None], ValueError, "advantages must have shape"),
        bad("policy_loss", "factors", PADDED.advantages, ValueError, "factors must have shape"),
        bad("policy_loss", "ref_logp", PADDED.advantages, ValueError, "ref_logp must have shape"),
        bad("policy_loss", "entropy", PADDED.advantages, ValueError, "entropy must have shape"),
        bad("policy_loss", "importance_weights", PADDED.logp[:1], ValueError, "importance_weights must have"),
        bad("policy_loss", "num_tokens", -1, ValueError, "num_tokens must be finite and not negative, got -1"),
        bad("policy_loss", "num_tokens", float("nan"), ValueError, "num_tokens"),
        bad("policy_loss", "num_tokens", "many", TypeError, "num_tokens must be a number"),
        bad("policy_loss", "num_tokens", 10**5000, ValueError, "num_tokens must be .* got an integer of 16610 bits"),
        bad("policy_loss", "num_tokens", Fraction(1, 2), TypeError, "num_tokens must be .* got fractions.Fraction"),
        bad("policy_loss", "num_tokens", PADDED.advantages, ValueError, "a tensor of one number"),
        bad("policy_loss", "num_sequences", True, TypeError, "num_sequences"),
        bad("policy_loss", "loss_type", "ppo", ValueError, "loss_type must be one of grpo"),
        bad("policy_loss", "epsilon", 0.2, TypeError, "epsilon"),
        bad("vgpo_loss", "factors", PADDED.logp, TypeError, "factors"),
        bad("vgpo_loss", "group_ids", None, TypeError, "group_ids must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_input_is_explained(
    function: str, changed: dict[str, Any], error: type[Exception], says: str, packed: bool
) -> None:
    with pytest.raises(error, match=says):
        getattr(vgpo_kernels, function)(**(good_arguments(function, packed) | changed))


def test_a_prototype_index_out_of_range_is_refused() -> None:
    arguments = good_arguments("visual_focus") | {"prototype": PADDED.hidden[:2, -1].nan_to_num()}
    for index in ([0, 1, 2, 0], [0, 1, -2, 0]):
        with pytest.raises(ValueError, match=re.escape("prototype_index must lie in [-1, 2)")):
            vgpo_kernels.visual_focus(**arguments, prototype_index=torch.tensor(index))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="reference, cpp, cuda, triton, got 'gpu'"), vgpo_kernels.backend("gpu"):
        pass


def test_a_backend_that_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    for name, reason in (("triton", "TRITON_INTERPRET=1"), ("cuda", "VGPO_BUILD=cuda|handles CUDA tensors")):
        with vgpo_kernels.backend(name), pytest.raises(RuntimeError, match=reason):
            vgpo_kernels.visual_focus(**good_arguments("visual_focus"))
    with vgpo_kernels.backend("cpp"), pytest.raises(RuntimeError, match=r"float64|not built"):
        vgpo_kernels.visual_prototype(PADDED.hidden.double(), PADDED.visual_mask)


def test_a_backend_is_restored_after_an_error() -> None:
    before = backends.describe()["forced"]
    with pytest.raises(KeyError), vgpo_kernels.backend("reference"):
        assert backends.describe()["forced"] == "reference"
        raise KeyError
    assert backends.describe()["forced"] == before
