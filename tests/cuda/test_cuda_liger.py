"""Liger's kernel on a Hopper GPU behind ``linear_logprob``: values, gradients, equal bits, streams and graphs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from gpu_calls import captured, is_hopper, on_a_sleeping_stream, without_synchronising
from linear_cases import make_head
from tolerance import same_bits
from torch import Tensor

from vgpo_kernels import backend, backends, linear_logprob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_hopper(), reason="needs an NVIDIA GPU of compute capability 9.0"),
    pytest.mark.skipif(
        backends._missing_for_liger() is not None, reason=f"Liger's head {backends._missing_for_liger()}"
    ),
]

# Rows, features, entries. Its tiles are 128 rows by 320 entries (256 in backward); it rounds sums after 1,024 rows. It
# compiles for most of these anew.
SHAPES = [
    (512, 3584, 152_064),
    *((rows, 256, 8 * 1009) for rows in (1, 129, 1000)),
    *((300, 64, entries) for entries in (8, 328)),
    (2500, 448, 4104),
]
NAMES = ("logp", "entropy", "hidden", "weight")


@pytest.fixture(autouse=True)
def liger() -> Iterator[None]:
    if backends.describe()["forced"] is not None:
        pytest.skip("a backend is forced")
    backends.liger_head(True)
    yield
    backends.liger_head(False)


def of_both(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    slopes: tuple[Tensor, ...],
    temperature: float = 1.0,
    ignore_index: int | None = None,
) -> list[Tensor]:
    """Log-probs, entropies and their gradients w.r.t. hidden states and weight."""
    leaves = [one.detach().requires_grad_() for one in (hidden, weight)]
    options = {"temperature": temperature, "ignore_index": ignore_index}
    found = linear_logprob(*leaves, targets, return_entropy=True, **options)
    return [*(one.detach() for one in found), *torch.autograd.grad(found, leaves, slopes)]


def by_name(name: str, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    with backend(name):
        return call()


def error(found: Tensor, exact: Tensor) -> float:
    """Relative to the size of the whole."""
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def slopes_of(rows: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(rows, generator=generator).cuda() for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int, int], temperature: float) -> None:
    """As near to fp64 as its roundings allow: fp16 logits, bf16 entropies, bf16 sums of 1,024 rows."""
    head = make_head(*shape, dtype=torch.bfloat16, ignored=0.2 if shape[0] > 2 else 0.0).to(torch.device("cuda"))
    slopes = slopes_of(shape[0])
    ignored = head.targets == -100
    call = partial(of_both, head.hidden, head.weight, head.targets, slopes, temperature, -100)
    found = call()
    doubles = [one.double() for one in (head.hidden, head.weight)]
    exact = of_both(*doubles, head.targets, tuple(slope.double() for slope in slopes), temperature, -100)
    ours = by_name("cuda" if backends.describe()["built"]["cuda"] else "reference", call)
    compared = zip(NAMES, found, ours, exact, strict=True)
    errors = {name: (error(one, wide), error(other, wide)) for name, one, other, wide in compared}
    print(f"{shape}, temperature {temperature}: relative errors of Liger, of ours: {errors}")
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)
    for name, one, dtype in zip(NAMES, found, dtypes, strict=True):
        assert one.dtype == dtype, name
        assert one.isfinite().all(), name
    for one in found[:3]:
        assert not one[ignored].any()
    largest = (doubles[0].nan_to_num() @ doubles[1].T).abs().max().item()
    of_a_logit = 2 * largest / temperature * 2.0**-11 + 2e-4
    assert (found[0] - exact[0]).abs().max() <= of_a_logit
    assert (found[1] - exact[1]).abs().max() <= of_a_logit + 2.0**-8 * exact[1].abs().max()
    for name, (of_liger, _) in list(errors.items())[2:]:
        assert of_liger <= 0.03, name


@pytest.fixture
def call() -> Callable[[], list[Tensor]]:
    """Several sums of the weight's gradient, no row ignored."""
    head = make_head(2500, 448, 4104, dtype=torch.bfloat16).to(torch.device("cuda"))
    return partial(of_both, head.hidden, head.weight, head.targets, slopes_of(2500))


def test_it_is_ligers(call: Callable[[], list[Tensor]]) -> None:
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    kernels = {event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA}
    print(*sorted(kernels), sep="\n")
    assert any(re.search(r"kernel_cutlass|liger|ScaledCE", name) for name in kernels)


def test_calls_repeat_to_the_bit(call: Callable[[], list[Tensor]]) -> None:
    expected = call()
    for _ in range(20):
        assert all(same_bits(one, two) for one, two in zip(call(), expected, strict=True))


def test_entropies_do_not_change_log_probs(call: Callable[[], list[Tensor]]) -> None:
    """Those of an old policy, without entropies, are compared with those of a new one."""
    expected = call()[0]
    head = make_head(2500, 448, 4104, dtype=torch.bfloat16).to(torch.device("cuda"))
    with torch.no_grad():
        alone = linear_logprob(head.hidden, head.weight, head.targets)
        part = linear_logprob(head.hidden[:777], head.weight, head.targets[:777])
    assert (alone - expected).abs().max() <= 1e-5
    assert (part - expected[:777]).abs().max() <= 1e-5


def test_no_call_synchronises(call: Callable[[], list[Tensor]]) -> None:
    call()
    without_synchronising(call)


def test_a_call_runs_on_the_current_stream(call: Callable[[], list[Tensor]]) -> None:
    expected = call()
    found = on_a_sleeping_stream(call)
    assert all(same_bits(one, two) for one, two in zip(found, expected, strict=True))


def test_a_call_is_captured_into_a_graph(call: Callable[[], list[Tensor]]) -> None:
    expected = call()
    graph, found = captured(call)
    for _ in range(3):
        graph.replay()
    assert all(same_bits(one, two) for one, two in zip(found, expected, strict=True))


def test_inputs_stay_as_they_are() -> None:
    head = make_head(300, 256, 1000, dtype=torch.bfloat16, ignored=0.3).to(torch.device("cuda"))
    before = [one.clone() for one in (head.hidden, head.weight, head.targets)]
    slopes = slopes_of(300)
    of_both(head.hidden, head.weight, head.targets, slopes, ignore_index=-100)
    assert all(same_bits(one, two) for one, two in zip((head.hidden, head.weight, head.targets), before, strict=True))


@pytest.mark.parametrize("entries", [1000, 1001])
def test_what_it_does_not_cover_is_our_own(entries: int) -> None:
    head = make_head(300, 256, entries, dtype=torch.bfloat16).to(torch.device("cuda"))
    found = linear_logprob(head.hidden, head.weight, head.targets)
    backends.liger_head(False)
    ours = linear_logprob(head.hidden, head.weight, head.targets)
    assert same_bits(found, ours) == (entries == 1001)


def test_on_another_device() -> None:
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    if last.index == 0 or torch.cuda.get_device_capability(last) != (9, 0):
        pytest.skip("needs two GPUs of compute capability 9.0")
    head = make_head(300, 256, 1000, dtype=torch.bfloat16).to(last)
    slopes = tuple(slope.to(last) for slope in slopes_of(300))
    assert all(one.device == last for one in of_both(head.hidden, head.weight, head.targets, slopes))
    assert torch.cuda.current_device() == 0
