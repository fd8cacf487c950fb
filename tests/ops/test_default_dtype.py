"""``torch.set_default_dtype`` is the caller's: it changes no bit of any result, and no backend."""

from __future__ import annotations

from inspect import isfunction
from typing import Any

import pytest
import torch
from bad_input import Subject, subjects
from cases import default_dtype
from tolerance import same_bits
from torch import Tensor
from torch.utils._pytree import tree_leaves

import vgpo_kernels
from vgpo_kernels import VGPOConfig, backends
from vgpo_kernels.config import CHOICES
from vgpo_kernels.ops import registry

SUBJECTS = {
    label: made
    for label, made in subjects().items()
    if made.function is getattr(vgpo_kernels, label.partition(",")[0], None) and isfunction(made.function)
}
CONFIGS = (
    VGPOConfig.paper(schedule="exponential", beta=0.37, accumulation="mean"),
    VGPOConfig.released(schedule="step", beta=0.37),
)
# No bf16 number, so that one which passes through the default dtype shows.
NUMBERS = {
    "kl_coef": 0.137,
    "epsilon_low": 0.213,
    "epsilon_high": 0.287,
    "sapo_temperature_positive": 1.013,
    "sapo_temperature_negative": 1.057,
    "vespo_k_pos": 2.013,
    "vespo_lambda_pos": 3.013,
    "vespo_k_neg": 3.017,
    "vespo_lambda_neg": 2.017,
    "temperature": 0.913,
    "logit_scale": 1.087,
    "softcap": 7.013,
    "num_tokens": 1001,
    "num_sequences": 257,
    "scale": 0.313,
}


def variants(made: Subject, name: str) -> list[dict[str, Any]]:
    """Settings under which a function takes another way."""
    known = made.arguments()
    numbers = {key: value for key, value in NUMBERS.items() if key in known}
    if name in ("linear_policy_loss", "policy_loss"):
        return [numbers | {"loss_type": kind} for kind in CHOICES["loss_type"]]
    if "config" in known:
        return [numbers | {"config": config} for config in CONFIGS]
    return [numbers]


def results_of(made: Subject, given: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Compute everything that a function returns, and the gradients of a weighted sum of it."""
    leaves = [value.requires_grad_() for value in given.values() if _differentiable(value)]
    with default_dtype(dtype):
        returned = made.function(**given)
        found = [value for value in tree_leaves(returned) if isinstance(value, Tensor)]
        roots = [value for value in found if value.requires_grad]
        if roots:
            weights = [torch.arange(1, root.numel() + 1).view_as(root).to(root) / 7 for root in roots]
            by_leaf = torch.autograd.grad(roots, leaves, weights, allow_unused=True)
            found += [gradient for gradient in by_leaf if gradient is not None]
    return [value.detach() for value in found]


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.filterwarnings("ignore:group_weights compares scores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("label", SUBJECTS)
def test_the_default_dtype_changes_no_bit(
    backend_name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, label: str, dtype: torch.dtype
) -> None:
    made, (name, _, layout) = SUBJECTS[label], label.partition(", ")
    ways = variants(made, name)
    if backend_name == "triton":  # slow in its interpreter, and its kernels never see the default dtype
        if name == "linear_vgpo_loss" or layout == "padded":
            pytest.skip("calls what is tested by itself")
        ways = ways[:1]
    served: list[str] = []
    implementation = registry.implementation

    def seen(operator: str, backend: str) -> Any:
        served.append(backend)
        return implementation(operator, backend)

    monkeypatch.setattr(registry, "implementation", seen)
    for way in ways:
        given = {
            key: value.detach().clone().to(device) if isinstance(value, Tensor) else value
            for key, value in (made.good | way).items()
        }
        expected = results_of(made, given, torch.float32)
        chosen = served[:]
        served.clear()
        found = results_of(made, given, dtype)
        assert served == chosen
        served.clear()
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert same_bits(one, other), way


def test_the_backend_that_serves_without_being_forced_stays() -> None:
    if not backends.describe()["built"]["cpp"]:
        pytest.skip("the extension is not built")
    made = SUBJECTS["linear_policy_loss, packed"]
    with backends.backend("cpp"):
        expected = results_of(made, made.good, torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for one, other in zip(results_of(made, made.good, dtype), expected, strict=True):
            assert same_bits(one, other)
