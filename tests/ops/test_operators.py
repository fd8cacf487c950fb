"""What torch asks of an operator: schema, fake kernel, autograd, and tracing into one graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import EDGES, Batch, make_batch
from operator_cases import BATCH_OPERATORS, CONFIG, computed_metrics, operator_arguments
from tolerance import assert_close
from torch import Tensor

import vgpo_kernels
from vgpo_kernels import VGPOConfig
from vgpo_kernels.ops import registry
from vgpo_kernels.ops.policy_loss import POLICY_METRICS

ROOT = Path(__file__).resolve().parents[2]
# Where every op has a file of its stem.
ROOMS = {
    "vgpo_kernels/ops": "{}.py",
    "vgpo_kernels/reference": "{}.py",
    "vgpo_kernels/triton_kernels": "{}.py",
    "csrc/cpu": "{}.cpp",
    "csrc/cuda": "{}.cu",
    "benchmarks": "bench_{}.py",
    "tests/ops": "test_{}.py",
}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", BATCH_OPERATORS)
def test_opcheck(exact_backend: str, device: torch.device, name: str, packed: bool) -> None:
    arguments = operator_arguments(name, make_batch(EDGES["plain"], packed=packed).to(device))
    torch.library.opcheck(registry.implementation(name, exact_backend), tuple(arguments.values()))


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("name", ["visual_prototype", "visual_focus"])
def test_opcheck_of_unit_vectors(exact_backend: str, device: torch.device, name: str, causal: bool) -> None:
    arguments = operator_arguments(name, make_batch(EDGES["plain"][:2]).to(device), causal=causal, unit=True)
    torch.library.opcheck(registry.implementation(name, exact_backend), tuple(arguments.values()))


def focus(batch: Batch, hidden: Tensor) -> Tensor:
    return vgpo_kernels.visual_focus(hidden, batch.visual_mask, batch.response_mask, cu_seqlens=batch.cu_seqlens)


def factors(batch: Batch, hidden: Tensor) -> Tensor:
    cos = focus(batch, hidden)
    return vgpo_kernels.visual_weights(
        cos, batch.response_mask, batch.group_ids, VGPOConfig.paper(), cu_seqlens=batch.cu_seqlens
    ).factors


def policy(batch: Batch, hidden: Tensor) -> Tensor:
    logp = batch.logp * hidden.detach().nan_to_num().mean().abs()
    result = vgpo_kernels.policy_loss(
        logp,
        batch.old_logp,
        batch.advantages,
        batch.response_mask,
        factors=factors(batch, hidden),
        cu_seqlens=batch.cu_seqlens,
        num_tokens=100,
    )
    return result.loss + result.metrics["ratio_mean"]


def composed(batch: Batch, hidden: Tensor) -> Tensor:
    return vgpo_kernels.vgpo_loss(
        hidden,
        batch.logp,
        batch.old_logp,
        batch.advantages,
        batch.visual_mask,
        batch.response_mask,
        batch.group_ids,
        VGPOConfig.released(),
        cu_seqlens=batch.cu_seqlens,
    ).loss


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("function", [focus, factors, policy, composed])
def test_traces_into_one_graph(
    backend_name: str, device: torch.device, function: Callable[[Batch, Tensor], Tensor], packed: bool
) -> None:
    batch = make_batch(EDGES["shuffled groups"], packed=packed).to(device)
    expected = function(batch, batch.hidden)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(compiled(batch, batch.hidden), expected.double(), name=function.__name__, floor=1e-5)


def test_a_traced_loss_has_its_gradient(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"]).to(device)

    def loss(logp: Tensor) -> Tensor:
        return vgpo_kernels.policy_loss(logp, batch.old_logp, batch.advantages, batch.response_mask).loss * 3

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        logp = batch.logp.clone().requires_grad_()
        function(logp).backward()
        gradients.append(logp.grad)
    assert_close(gradients[1], gradients[0].double(), name="gradient")


def test_tracing_for_any_shape_begins_once() -> None:
    """Numbers that stand for None in settings must not be taken for inputs of the graph."""
    batch = make_batch(EDGES["plain"])
    graphs = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    loss = torch.compile(policy, fullgraph=True, dynamic=True, backend=compiler)
    assert_close(loss(batch, batch.hidden), policy(batch, batch.hidden).double(), floor=1e-5)
    assert len(graphs) == 1


def test_only_log_probs_are_differentiated_by_functorch() -> None:
    """Its tensors do not say that they require a gradient, and are detached all the same."""
    batch = make_batch(EDGES["plain"])
    logp = batch.logp.nan_to_num()

    def loss(current: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        return vgpo_kernels.policy_loss(current, old, advantages, batch.response_mask).loss

    with vgpo_kernels.backend("reference"):
        for place, values in enumerate((logp, logp, batch.advantages)):
            arguments = [logp, logp, batch.advantages]

            def of_one(value: Tensor, place: int = place, arguments: list[Tensor] = arguments) -> Tensor:
                return loss(*(value if index == place else other for index, other in enumerate(arguments)))

            _, slope = torch.func.jvp(of_one, (values,), (torch.ones_like(values),))
            assert (slope != 0) == (place == 0)
        slopes = torch.func.grad(lambda rows: torch.func.vmap(lambda row: loss(row, row, batch.advantages))(rows).sum())
        expected = torch.func.grad(lambda current: loss(current, logp, batch.advantages))(logp)
        assert_close(slopes(logp[None])[0], expected.double(), name="gradient")


def test_metrics_are_read_without_being_computed(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"]).to(device)
    metrics = vgpo_kernels.policy_loss(batch.logp, batch.old_logp, batch.advantages, batch.response_mask).metrics
    assert tuple(metrics) == computed_metrics(POLICY_METRICS, {})
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


def test_a_call_names_every_argument() -> None:
    """A missing and an unknown name are errors, whichever backend would handle the call."""
    given = {"score": torch.zeros(2), "group_ids": torch.zeros(2, dtype=torch.int64), "has_visual": None}
    cpu = torch.device("cpu")
    with vgpo_kernels.backend("reference"):
        registry.call("group_weights", cpu, torch.float32, **given, config=CONFIG)
        with pytest.raises(TypeError, match="missing or unknown: config"):
            registry.call("group_weights", cpu, torch.float32, **given)
        with pytest.raises(TypeError, match="missing or unknown: scores"):
            registry.call("group_weights", cpu, torch.float32, **given, config=CONFIG, scores=None)


def test_a_function_gets_the_arguments_that_it_declares() -> None:
    names = ("first", "second", "third")
    assert registry.by_name(lambda third, first: (first, third), names)(1, 2, 3) == (1, 3)
    assert registry.by_name(lambda second, **others: (second, others), names)(1, 2, 3) == (2, {"first": 1, "third": 3})
    assert registry.by_name(lambda second, dtype="fp64": (second, dtype), names)(1, 2, 3) == (2, "fp64")
    with pytest.raises(TypeError, match="reads fourth, none of the arguments first, second, third"):
        registry.by_name(lambda first, fourth: None, names)
    with pytest.raises(TypeError, match="got 2"):
        registry.by_name(lambda first: None, names)(1, 2)


@pytest.mark.parametrize("room", ROOMS)
def test_every_operator_has_its_stem_in_every_room(room: str) -> None:
    stems = {operator.stem for operator in registry.OPERATORS.values()}
    assert len(stems) >= 6
    missing = [stem for stem in stems if not (ROOT / room / ROOMS[room].format(stem)).is_file()]
    assert not missing
