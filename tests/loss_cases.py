"""Batches with values at single tokens that arithmetic would carry on, and what a policy loss must make of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from loss_equations import Loss, Token
from loss_equations import policy_loss as by_equations
from torch import Tensor

from vgpo_kernels import PolicyLossOptions, ViewTerm, policy_loss
from vgpo_kernels.config import CHOICES
from vgpo_kernels.reference.policy_loss import SEQUENCE_RATIO

NAN, INF = math.nan, math.inf
POISONS = (0.0, -0.0, INF, -INF, NAN, 1e38, -1e38, -1e4, 1e4)
# Of one value for a whole response, whose sum over tokens must not overflow.
POISONS_OF_RESPONSES = (0.0, -0.0, INF, -INF, NAN, -1e4)
# Arguments of tokens, and what loops over the equations call them otherwise.
FIELDS = {
    **{name: name for name in ("logp", "old_logp", "ref_logp", "entropy", "selected")},
    "factors": "factor",
    "advantages": "advantage",
    "importance_weights": "importance",
    "token_weights": "weight",
}


@dataclass
class LossCase:
    """Arguments of ``policy_loss`` by name, the options among them, and which responses hold a drawn value.

    View number 0 has its log-probs and, maybe, its mask among the tensors, as ``view_0`` and ``view_mask_0``.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    poisoned: set[int]
    views: list[tuple[float, str]] = field(default_factory=list)  # coefficients and estimators


def draw_options(random: Random) -> dict[str, Any]:
    """Draw every option, with zeros wherever they are legal."""

    def either(*values: Any) -> Any:
        return random.choice(values)

    return {
        "loss_type": either(*CHOICES["loss_type"]),
        "aggregation": either(*CHOICES["aggregation"]),
        "epsilon_low": either(0.2, 0.0, 1.0),
        "epsilon_high": either(0.28, 0.0),
        "dual_clip": either(None, 1.5, 3.0),
        "kl_coef": either(0.0, 0.1, -0.05),
        "kl_estimator": either(*CHOICES["kl_estimator"]),
        "kl_bias_correction": either(False, True),
        "entropy_coef": either(0.0, 0.01),
        "max_length": 64.0,
        "vespo_k_pos": either(2.0, 0.0),
        "vespo_lambda_pos": either(3.0, 0.0),
        "vespo_k_neg": either(3.0, 0.0),
        "vespo_lambda_neg": either(2.0, 0.0),
        "ratio_clamp": either(20.0, None, 0.5),
        "cispo_cap": either(None, 1.2),
        "importance_cap": either(None, 1.0),
        "importance_mode": either(*CHOICES["importance_mode"]),
        "num_tokens": either(None, None, 0, 100),
        "num_sequences": either(None, None, 0, 5),
    }


def draw_loss(random: Random, options: dict[str, Any] | None = None) -> LossCase:
    """Draw a padded batch with NaN off its mask, and values of POISONS at some of its tokens."""
    chosen = draw_options(random) | (options or {})
    batch, width = random.randint(1, 4), random.randint(1, 20)
    generator = torch.Generator().manual_seed(random.randint(0, 10_000))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.rand(batch, width, generator=generator) < random.choice((0.7, 1.0))
    logp = -normal(batch, width).abs() - 0.05
    tensors = {
        "logp": logp,
        "old_logp": logp + 0.3 * normal(batch, width),
        "ref_logp": logp + 0.3 * normal(batch, width),
        "entropy": normal(batch, width).abs(),
        "factors": 1 + 0.3 * normal(batch, width),
        "advantages": normal(batch, width) if random.choice((False, True)) else normal(batch),
        "importance_weights": 2 * torch.rand(*random.choice(((batch,), (batch, width))), generator=generator),
    }
    for name in ("ref_logp", "entropy", "factors", "importance_weights"):
        needed = {"ref_logp": chosen["kl_coef"], "entropy": chosen["entropy_coef"]}.get(name, 0)
        if not needed and random.choice((False, True)):
            del tensors[name]
    poisoned = set()
    for _ in range(random.randint(0, 3)):
        name, row = random.choice(sorted(tensors)), random.randrange(batch)
        values = tensors[name]
        if values.dim() == 1:
            values[row] = random.choice(POISONS_OF_RESPONSES)
        else:
            # Two huge log-ratios of one response may cancel, and nothing of the others is left.
            huge = name not in ("logp", "old_logp") or not poisoned
            values[row, random.randrange(width)] = random.choice(POISONS if huge else POISONS_OF_RESPONSES[:-1])
        poisoned.add(row)
    for values in tensors.values():
        if values.dim() == 2:
            values.masked_fill_(~mask, random.choice((NAN, INF, 1e38)))
    return LossCase(tensors | {"response_mask": mask}, chosen, poisoned)


def draw_terms(random: Random, options: dict[str, Any] | None = None) -> LossCase:
    """Draw a batch as :func:`draw_loss` does, with weights of tokens, selected tokens, and views, or some of them."""
    case = draw_loss(random, options)
    mask = case.tensors["response_mask"]
    batch, width = mask.shape
    generator = torch.Generator().manual_seed(random.randint(0, 10_000))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    tensors, views = dict(case.tensors), []
    for name in ("advantages", "factors"):  # which must not overflow before they are divided
        if name in tensors:
            tensors[name] = torch.where(tensors[name].abs() == POISONS[5], 1e4, tensors[name])
    parts = random.choice(({"weights"}, {"selected"}, {"views"}, {"weights", "selected", "views"}))
    if "weights" in parts:
        tensors["token_weights"] = 0.1 + 2 * uniform(*random.choice(((batch,), (batch, width))))
    if "selected" in parts:
        tensors["selected"] = uniform(batch, width) < random.choice((0.0, 0.4, 1.0))
        whole = case.options.get("num_tokens") is not None
        case.options["num_selected"] = random.choice((0, 7) if whole else (None, None, 0, 7))
    estimators = CHOICES["kl_estimator"]
    for index in range(random.randint(1, 2) if "views" in parts else 0):
        views.append((random.choice((-0.1, 0.2, 0.0)), random.choice(estimators)))
        tensors[f"view_{index}"] = tensors["logp"] + uniform(batch, width) - 0.5
        read = mask
        ratio_of_response = case.options["loss_type"] in SEQUENCE_RATIO and case.options["kl_bias_correction"]
        if not ratio_of_response and random.choice((False, True)):
            tensors[f"view_mask_{index}"] = uniform(batch, width) < 0.5
            read = mask & tensors[f"view_mask_{index}"]
        tensors[f"view_{index}"].masked_fill_(~read, random.choice((NAN, INF, 1e38)))
    for name in tensors.keys() & {"token_weights"}:
        if tensors[name].dim() == 2:
            tensors[name].masked_fill_(~mask, NAN)
    return replace(case, tensors=tensors, views=views)


def packed(case: LossCase) -> LossCase:
    """The same batch, packed: without its padding, one response after the other."""
    mask = case.tensors["response_mask"]
    batch, width = mask.shape
    per_token = {name: value.reshape(-1) for name, value in case.tensors.items() if value.dim() == 2}
    boundaries = torch.arange(batch + 1) * width
    if width == 1:  # [B] and [N] are one shape, which would be read as a value for each response
        return case
    return replace(case, tensors=case.tensors | per_token | {"cu_seqlens": boundaries})


def run(case: LossCase, device: torch.device | str = "cpu") -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients by the name of their tensor and metrics of the backend in force."""
    given = {name: value.to(device) for name, value in case.tensors.items()}
    leaves = {name: given[name].clone().requires_grad_() for name in ("logp", "entropy") if name in given}
    given |= leaves
    views = []
    for index, (coefficient, estimator) in enumerate(case.views):
        views.append(
            ViewTerm(given.pop(f"view_{index}"), coefficient, estimator, given.pop(f"view_mask_{index}", None))
        )
    loss, metrics = policy_loss(**given, views=views, **case.options)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True)), metrics


def expected(case: LossCase, bits: int = 32) -> Loss:
    """What the equations make of a padded case."""
    options = dict(case.options)
    counts = {name: options.pop(name, None) for name in ("num_tokens", "num_sequences", "num_selected")}
    settings = PolicyLossOptions(**options)
    tensors, mask = case.tensors, case.tensors["response_mask"]
    if "selected" in tensors and counts["num_selected"] is None:
        counts["num_selected"] = (tensors["selected"] & mask).sum().item()
    responses = []
    for row, valid in enumerate(mask):
        response = []
        for column in valid.nonzero().squeeze(-1).tolist():
            values = {
                FIELDS[name]: (values[row] if values.dim() == 1 else values[row, column]).item()
                for name, values in tensors.items()
                if name in FIELDS
            }
            views = tuple(
                tensors[f"view_{index}"][row, column].item()
                if tensors.get(f"view_mask_{index}", mask)[row, column]
                else None
                for index in range(len(case.views))
            )
            response.append(Token(**values, views=views))
        responses.append(response)
    weights = tensors.get("importance_weights")
    per_response = weights is not None and weights.dim() == 1
    counts |= {"importance_per_response": per_response, "views": case.views, "bits": bits}
    return by_equations(responses, settings, **counts)


def check_loss(case: LossCase, device: torch.device | str = "cpu", bits: int = 32) -> None:
    """Compare loss, gradients and metrics of the backend in force with the equations, number by number."""
    mask = case.tensors["response_mask"]
    loss, gradients, metrics = run(case, device)
    right = expected(case, bits)
    for name, wanted in (("logp", right.gradient), ("entropy", right.entropy_gradient)):
        if name not in gradients:
            continue
        found = gradients[name].cpu()
        assert (found[~mask] == 0).all(), "no gradient off the mask"
        for row, of_response in enumerate(wanted):
            finite = [abs(value) for value in of_response if math.isfinite(value)]
            # Of a response, whose tokens may share sums.
            allowed = 1e-5 * max(finite, default=0.0) + 1e-7
            undefined = any(map(math.isnan, of_response))
            for actual, value in zip(found[row][mask[row]].tolist(), of_response, strict=True):
                if undefined and not math.isfinite(value):  # infinities of both signs, in whichever order they meet
                    assert not math.isfinite(actual), f"gradient w.r.t. {name} in response {row}: {actual}"
                    continue
                assert_number(actual, value, allowed, f"gradient w.r.t. {name} in response {row}")
    largest = max(values.double().abs().nan_to_num(0, 0, 0).max().item() for values in case.tensors.values())
    for name, found_metric in metrics.items():
        # Means of huge numbers of both signs cancel.
        means = name in ("ref_kl", "entropy", "factor_mean", "factor_std", "approx_kl") or name.startswith("view_kl")
        huge = largest if means else 0.0
        allowed = 1e-6 + (1e-5 * huge if huge > 1e3 else 0.0)
        assert_number(found_metric.item(), right.metrics[name], allowed, name)
    assert_number(loss.item(), right.value, 1e-5 * right.magnitude, "loss")


def assert_number(actual: float, wanted: float, allowed: float, name: str) -> None:
    """Fail unless both are NaN, the same infinity, or as close as allowed."""
    wanted = torch.tensor(wanted, dtype=torch.float64).float().item()  # beyond the range of fp32: infinite
    if math.isnan(wanted):
        assert math.isnan(actual), f"{name}: {actual}, expected NaN"
    elif math.isinf(wanted):
        assert actual == wanted, f"{name}: {actual}, expected {wanted}"
    else:
        limit = allowed + 2e-5 * abs(wanted)
        assert abs(actual - wanted) <= limit, f"{name}: {actual}, expected {wanted} within {limit}"
