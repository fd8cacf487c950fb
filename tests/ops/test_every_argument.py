"""Every argument and option of every public function counts: another value gives another result, on every backend.

One that is added and forgotten on the way (in a public function, an operator, a backend) fails here, and so does one
that the tables below do not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import isfunction
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
from bad_input import subjects
from torch import Tensor
from torch.utils._pytree import tree_map_only

import vgpo_kernels
from vgpo_kernels import PolicyLossOptions, ShapingConfig, VGPOConfig, ViewTerm
from vgpo_kernels.config import CHOICES
from vgpo_kernels.ops import registry

# Packed, where every argument has a meaning.
SUBJECTS = {
    label.removesuffix(", packed"): made
    for label, made in subjects().items()
    if made.function is getattr(vgpo_kernels, label.removesuffix(", packed"), None) and isfunction(made.function)
}
del SUBJECTS["check_batch"]  # what it returns are no numbers


# ---- from the schemas of operators to the signatures of public functions -------------------------------------------

# What public functions make of other arguments. (The fields of options are keywords.)
DERIVED = {
    "attention_heatmap": {"key_segments", "lse", "query_weights"},  # of the masks
    "linear_divergence": {"first", "temperatures", "totals", "shares"},  # those of linear_divergence_slice; measures
    # Of linear_logprob_slice; a temperature that is a tensor; return_sum_squares; top_k, top_p and min_p.
    "linear_logprob": {"first", "temperatures", "squares", "truncated"},
    "linear_policy_loss": {"gradients", "options", "temperatures"},  # what is differentiable
    "policy_loss": {"options"},
    "vgpo_loss": {"causal", "options"},
    "visual_focus": {"causal", "unit"},  # visibility, pooling
    "visual_prototype": {"causal", "unit"},
}


@pytest.mark.parametrize("name", [name for name in registry.OPERATORS if name in SUBJECTS])
def test_the_public_function_names_every_argument_of_its_operator(name: str) -> None:
    """Through ``**options`` another one would work, undocumented."""
    assert set(registry.OPERATORS[name].arguments) - SUBJECTS[name].arguments() == DERIVED.get(name, set())


# ---- every value counts --------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Values of an argument that lead to different results.

    Attributes:
        values: The values, or what makes one of the arguments that the function accepts; none: all choices of its name.
        given: Other arguments, with which it counts.

    """

    values: tuple[Any, ...] = ()
    given: Mapping[str, Any] = {}


def changed(change: Callable[[Tensor], Tensor], name: str) -> tuple[Callable[[Mapping[str, Any]], Any], ...]:
    return (lambda good: good[name]), (lambda good: change(good[name]))


def every_other(mask: Tensor) -> Tensor:
    return mask & (torch.arange(mask.numel()) % 2 == 0).view_as(mask)


def of_targets(targets: Tensor) -> Tensor:
    """Temperatures, one for each target."""
    return torch.linspace(0.5, 1.5, targets.numel()).view_as(targets)


def without_one(boundaries: Tensor) -> Tensor:
    """Give the tokens of a sequence to the one after it."""
    return torch.cat([boundaries[:2], boundaries[1:2], boundaries[3:]])


# What is done to a tensor; order and scale of its values change.
CHANGES: dict[torch.dtype, Callable[[Tensor], Tensor]] = {
    torch.float32: torch.cos,
    torch.int64: lambda values: values.roll(1),
    torch.bool: every_other,
    torch.int32: without_one,
}
# With these every term has a part in the loss: gains and losses, and a group of three with images of its own.
DEFAULTS = vars(VGPOConfig()) | vars(PolicyLossOptions())
ACTIVE = {
    "kl_coef": 0.3,
    "entropy_coef": 0.1,
    "dual_clip": 1.3,
    "importance_cap": 0.5,
    "advantages": torch.tensor([-1.0, 1.0, -0.5, 0.5]),
    "group_ids": torch.tensor([0, 0, 0, 1]),
    "prototype_index": torch.tensor([0, 2, 1, -1]),
    "importance_weights": torch.tensor([0.2, 0.9, 0.7, 0.4]),
}
NO_PROTOTYPE = {"prototype": None, "prototype_index": None}
SELECTED = {"selected": lambda good: every_other(good["response_mask"])}
SELECTED_TOKENS = (None, SELECTED["selected"], lambda good: ~every_other(good["response_mask"]))
FAR = {"ref_logp": lambda good: good["ref_logp"] + 5}
# Where the ratio of the responses is that of their importance weights: a random head's is so small that nothing counts.
VESPO = {"loss_type": "vespo", "old_logp": None}
CASES = {
    # "bnpo", "dapo" and "dr_grpo" are "grpo" with other default aggregations, "luspo" is "gspo" with another one.
    "loss_type": Case(
        tuple(name for name in CHOICES["loss_type"] if name not in ("bnpo", "dapo", "dr_grpo", "luspo")),
        {"aggregation": "token-mean"},
    ),
    "aggregation": Case(),
    "epsilon_low": Case((0.2, 0.01)),
    "epsilon_high": Case((0.28, 0.01)),
    "dual_clip": Case((None, 1.05)),
    "kl_coef": Case((0.3, 0.6)),
    "kl_estimator": Case(given=FAR),
    "entropy_coef": Case((0.1, 0.2)),
    "max_length": Case((16, 8), {"aggregation": "seq-mean-token-sum-norm"}),
    "sapo_temperature_positive": Case((1.0, 2.0), {"loss_type": "sapo"}),
    "sapo_temperature_negative": Case((1.0, 2.0), {"loss_type": "sapo"}),
    "vespo_k_pos": Case((2.0, 1.0), VESPO),
    "vespo_lambda_pos": Case((3.0, 1.0), VESPO),
    "vespo_k_neg": Case((3.0, 1.0), VESPO),
    "vespo_lambda_neg": Case((2.0, 1.0), VESPO),
    "ratio_clamp": Case((None, 0.1)),
    "cispo_cap": Case((None, 1.05), {"loss_type": "cispo"}),
    "kl_bias_correction": Case((False, True)),
    "importance_cap": Case((None, 0.3)),
    "importance_weights": Case(changed(torch.cos, "importance_weights"), {"importance_cap": None}),
    "importance_mode": Case(),
    "beta": Case((0.3, 0.6)),
    "tail_ratio": Case((0.5, 1.0), {"top_ratio": 1.0}),
    "top_ratio": Case((0.2, 0.6)),
    # Where the gate is open at the last token alone, which is always at 1, positions do not count.
    "schedule": Case(given={"gate": False}),
    "start_ratio": Case((0.0, 0.5), {"gate": False}),
    "exponent": Case((2.0, 3.0), {"gate": False, "schedule": "exponential"}),
    "step_ratio": Case((0.5, 0.9), {"gate": False, "schedule": "step"}),
    "gate": Case((True, False)),
    "intra": Case((True, False)),
    "inter": Case((True, False)),
    "score": Case(),
    "score_offset": Case((None, -1.0), {"score": "offset"}),
    "position": Case(given={"gate": False}),
    "accumulation": Case(),
    "intra_clamp": Case((None, (0.9, 1.1))),
    "inter_clamp": Case((None, (0.9, 1.1))),
    "num_tokens": Case((30, 60)),
    "num_sequences": Case((4, 8), {"aggregation": "seq-mean-token-mean"}),
    "num_selected": Case((10, 20), SELECTED),
    "selected": Case(SELECTED_TOKENS, {"num_selected": None, "num_tokens": None}),
    "token_weights": Case((None, torch.tensor([0.5, 1.0, 2.0, 0.0]), lambda good: of_targets(good["old_logp"]))),
    "views": Case(
        (
            (),
            lambda good: (ViewTerm(good["old_logp"], 0.5),),
            lambda good: (ViewTerm(good["old_logp"], -0.5, "k2"),),
            lambda good: (ViewTerm(good["old_logp"], 0.5, mask=every_other(good["response_mask"])),),
        )
    ),
    "temperature": Case((1.0, 0.7, lambda good: of_targets(good["targets"]))),
    "logit_scale": Case((1.0, 1.3)),
    "softcap": Case((None, 2.0)),
    "ignore_index": Case((-100, lambda good: int(good["targets"][0]))),
    "first": Case((3, 2)),
    "return_entropy": Case((False, True)),
    "return_sum_squares": Case((False, True)),
    "top_k": Case((None, 2, 3)),
    "top_p": Case((None, 0.5, 0.8)),
    "min_p": Case((None, 0.1, 0.7)),
    "num_segments": Case((3, 4)),
    "segment": Case((0, 1, (0, 1))),
    "scale": Case((None, 1.0)),
    "window": Case((None, 1)),
    "per_head": Case((False, True)),
    "query_positions": Case(changed(lambda positions: positions - 1, "query_positions")),
    "visual_mask": Case(changed(every_other, "visual_mask"), NO_PROTOTYPE),
    # An image that arrives behind some tokens.
    "visibility": Case(("all", "causal"), NO_PROTOTYPE | {"visual_mask": lambda good: good["visual_mask"].roll(7, -1)}),
    "pooling": Case(("mean", "unit_mean"), NO_PROTOTYPE),
    "combine_factors: phi": Case(changed(torch.cos, "phi")),
    "combine_factors: psi": Case(changed(torch.cos, "psi")),
    "combine_factors: config": Case(
        (VGPOConfig(), VGPOConfig(intra_clamp=(0.9, 1.1)), VGPOConfig(inter_clamp=(0.9, 1.1)))
    ),
    "group_weights: config": Case((VGPOConfig(), VGPOConfig(inter=False))),
    "shape_tokens: config": Case((ShapingConfig.vppo(), ShapingConfig.pgpo(), ShapingConfig.vppo(response="none"))),
    "response_factors: config": Case((ShapingConfig.vppo(), ShapingConfig.cgpo(), ShapingConfig.va_opd())),
    "response_factors: score": Case(changed(torch.cos, "score")),
    "progress": Case((0.5, 1.0)),
    "group_weights: score": Case(changed(torch.cos, "score")),
    "measures": Case((("kl",), ("js",), ())),
    "js_beta": Case((0.5, 0.2), {"measures": ("js",)}),
    "linear_divergence_slice: js_beta": Case((0.5, 0.2)),
    "linear_divergence_slice: first": Case((3, 2), {"totals": None}),
    "linear_divergence_slice: targets": Case(changed(lambda targets: targets.roll(1), "targets"), {"totals": None}),
    "linear_divergence_slice: ignore_index": Case((-100, lambda good: int(good["targets"][0]))),
    "other_bias": Case(changed(torch.cos, "other_bias")),
    "combine_divergences: targets": Case(changed(lambda targets: targets.clone().fill_(-100), "targets")),
    "combine_slices: targets": Case(changed(lambda targets: targets.clone().fill_(-100), "targets")),
}
# How the work is cut, which no result depends on.
NO_RESULT = {"chunk_bytes", "recompute"}


def names_of(function: str) -> set[str]:
    """Return the names of a function's arguments, with the fields of its config."""
    names = SUBJECTS[function].arguments() - NO_RESULT
    if "config" in names and f"{function}: config" not in CASES:
        names = names - {"config"} | set(VGPOConfig.kinds)
    return names


def case_of(function: str, name: str, good: Mapping[str, Any]) -> Case:
    found = CASES.get(f"{function}: {name}") or CASES.get(name)
    if found is None:
        assert isinstance(good.get(name), Tensor), f"{name} of {function} has no case: with which values does it count?"
        return Case(changed(CHANGES[good[name].dtype], name))
    return found if found.values else found._replace(values=CHOICES[name])


def results_of(function: Callable[..., Any], given: dict[str, Any], device: torch.device) -> Tensor:
    """Return all that a function returns, and the gradients of a weighted sum of it, flat."""
    if set(VGPOConfig.kinds) <= given.keys():
        given = given | {"config": VGPOConfig(**{name: given.pop(name) for name in VGPOConfig.kinds})}
    given = tree_map_only(Tensor, lambda value: value.to(device), given)
    floats = [name for name, value in given.items() if isinstance(value, Tensor) and value.is_floating_point()]
    given |= {name: given[name].detach().requires_grad_() for name in floats}
    found = flat(function(**given))
    total = torch.zeros((), device=device)
    for result in found:
        weights = torch.arange(1.0, result.numel() + 1, device=device).view_as(result)
        total = total + (result * weights).nansum() if result.requires_grad else total
    if total.requires_grad:
        found += torch.autograd.grad(total, [given[name] for name in floats], allow_unused=True, materialize_grads=True)
    return torch.cat([result.detach().reshape(-1).float().nan_to_num() for result in found])


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    parts = results.values() if isinstance(results, dict) else results
    return [tensor for part in parts if part is not None for tensor in flat(part)]


def differ(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def key_of(value: Any) -> Any:
    return value.numpy().tobytes() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("function", SUBJECTS)
def test_every_argument_counts(backend_name: str, device: torch.device, function: str) -> None:
    if backend_name == "triton" and function == "linear_vgpo_loss":
        pytest.skip("calls public functions that are tested by themselves, and the interpreter is slow")
    made, names, silent = SUBJECTS[function], names_of(function), []
    good = {name: value for name, value in (DEFAULTS | made.good | ACTIVE).items() if name in names}
    results: dict[Any, Tensor] = {}

    def result(changes: Mapping[str, Any]) -> Tensor:
        given = good | {name: value(good) if callable(value) else value for name, value in changes.items()}
        key = frozenset((name, key_of(value)) for name, value in given.items())
        if key not in results:
            results[key] = results_of(made.function, given, device)
        return results[key]

    # Triton's kernels read settings in one place, whichever operator launches them.
    elsewhere: set[str] = set()
    if backend_name == "triton":
        elsewhere |= set(PolicyLossOptions.kinds) if function != "policy_loss" else set()
        elsewhere |= set(VGPOConfig.kinds) if function == "vgpo_loss" else set()
    for name in sorted(names - elsewhere):
        case = case_of(function, name, good)
        given = {other: value for other, value in case.given.items() if other in names}
        found = [result(given | {name: value}) for value in case.values]
        assert len(found) > 1
        if not all(differ(*pair) for pair in combinations(found, 2)):
            silent.append(name)
    assert not silent, "another value changes nothing"
