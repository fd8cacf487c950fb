"""The reference implementation in fp32, as on devices without float64, and which backend a device gets.

The fixture takes float64 from the CPU in name alone; tests/devices takes it from a whole device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import vgpo_kernels as vk
from vgpo_kernels import VGPOConfig, backend, backends
from vgpo_kernels.reference import token_shaping as shaping
from vgpo_kernels.reference import visual_weights as reference
from vgpo_kernels.reference.layout import sums_of


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(backends._WIDE, "cpu", torch.float32)
    with backend("reference"):
        yield


def test_a_device_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.wide_dtype(torch.device("cpu")) == backends.wide_dtype(torch.device("cuda", 1)) == torch.float64
    assert backends.wide_dtype(torch.device("mps")) == torch.float32
    tried = []

    def computes(device: torch.device) -> bool:
        tried.append(device)
        return device.index == 0

    monkeypatch.setattr(backends, "_computes_float64", computes)
    monkeypatch.setattr(backends, "_WIDE", dict(backends._WIDE))
    devices = [torch.device("xpu", index) for index in (0, 1, 0, 1)]
    found = [backends.wide_dtype(device) for device in devices]
    assert found == [torch.float64, torch.float32] * 2 and tried == devices[:2]


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
def test_a_device_that_stores_float64_is_asked_to_compute(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    device = torch.device("cpu")
    assert backends._computes_float64(device)
    full: Any = torch.full

    def narrows(*size: object, **options: object) -> Tensor:
        return full(*size, **options | {"dtype": torch.float32})  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "full", narrows)
    assert not backends._computes_float64(device)

    def refuses(*_: object, **__: object) -> Tensor:
        raise error("Required aspect fp64 is not supported on the device")

    monkeypatch.setattr(torch, "full", refuses)
    assert not backends._computes_float64(device)


def test_triton_serves_the_device_of_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends, "_WIDE", backends._WIDE | {"xpu:0": torch.float64, "xpu:1": torch.float32})
    monkeypatch.setattr(backends, "_warned", set())
    active = SimpleNamespace(get_active_torch_device=lambda: torch.device("xpu", 0))
    monkeypatch.setattr(driver, "_active", active)
    backends._find_triton_device.cache_clear()
    try:
        assert backends.select(torch.device("xpu", 0)) == "triton"
        assert backends.select(torch.device("xpu", 0), torch.float64) == "reference"
        monkeypatch.setitem(backends._WIDE, "hpu", torch.float64)
        for device, installed, missing in (
            (torch.device("xpu", 1), True, "sums in float64"),
            (torch.device("mps"), False, "sums in float64"),  # for which there is no package
            (torch.device("hpu"), True, "no driver for hpu"),
        ):
            monkeypatch.setattr(backends, "_HAS_TRITON", installed)
            with pytest.warns(RuntimeWarning, match=missing):
                assert backends.select(device) == "reference"
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert backends.select(device) == "reference"
            with backend("triton"), pytest.raises(RuntimeError, match=missing):
                backends.select(device)
    finally:
        backends._find_triton_device.cache_clear()


def exact_sums(rows: Tensor, index: Tensor, number: int) -> list[list[float]]:
    found = [[Fraction(0)] * rows.shape[1] for _ in range(number)]
    for row, entry in zip(rows.tolist(), index.tolist(), strict=True):
        found[entry] = [one + Fraction(other) for one, other in zip(found[entry], row, strict=True)]
    return [[float(one) for one in entry] for entry in found]


@pytest.mark.parametrize("scale", [1.0, 3e-20, 7e30])
def test_sums_are_exact_to_a_share_of_the_largest_magnitude(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 3, generator=generator) * torch.tensor([1.0, 1e-3, 1e3]) * scale
    index = torch.randint(5, (400,), generator=generator).sort().values
    index[index >= 2] += 1  # the third entry has no rows
    found = sums_of(rows, index, 7)
    exact = torch.tensor(exact_sums(rows, index, 7), dtype=torch.float64)
    assert (found[2] == 0).all() and (found[6] == 0).all()
    largest = rows.abs().max().double()
    allowed = exact.abs() * torch.finfo(torch.float32).eps / 2 + len(rows) * largest * 2.0**-38
    assert ((found.double() - exact).abs() <= allowed).all()


def test_sums_do_not_depend_on_order_or_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, index = torch.randn(300, 2, generator=generator), torch.arange(3).repeat_interleave(100)
    found = sums_of(rows, index, 3)
    shuffled = torch.cat([rows[100 * entry + torch.randperm(100, generator=generator)] for entry in range(3)])
    assert torch.equal(sums_of(shuffled, index, 3), found)
    assert torch.equal(sums_of(rows[100:200], index[:100], 1)[0], found[1])
    assert not torch.equal(rows[:100].sum(0), shuffled[:100].flip(0).cumsum(0)[-1])  # as floats do


def test_what_is_not_finite_spoils_its_own_sum() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0], [math.inf, 4.0, -math.inf], [1.0, math.nan, 1.0], [5.0, 6.0, 7.0]])
    found = sums_of(rows, torch.tensor([0, 0, 0, 1]), 2)
    assert torch.equal(
        found.nan_to_num(99.0, math.inf, -math.inf), torch.tensor([[math.inf, 99.0, -math.inf], [5.0, 6.0, 7.0]])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("visibility", ["all", "causal"])
def test_layout_and_order_do_not_change_a_bit_of_the_factors(narrow: None, dtype: torch.dtype, visibility: str) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths, image, width, size = [40, 9, 17, 40, 23, 31], 7, 60, 16
    hidden = torch.randn(len(lengths), width, size, generator=generator).to(dtype)
    visual = (torch.arange(width) < image).expand(len(lengths), width)
    response = torch.arange(width) - image < torch.tensor(lengths)[:, None]
    response = response & (torch.arange(width) >= image)
    group_ids = torch.tensor([4, 9, 4, 9, 9, 4])

    def factors_of(rows: Tensor, *masks: Tensor, ids: Tensor, boundaries: Tensor | None = None) -> Tensor:
        cos = vk.visual_focus(rows, *masks, cu_seqlens=boundaries, visibility=visibility)  # type: ignore[arg-type]
        return vk.visual_weights(cos, masks[1], ids, VGPOConfig.paper(), cu_seqlens=boundaries).factors

    padded = factors_of(hidden, visual, response, ids=group_ids)
    assert padded.dtype == torch.float32 and padded[response].unique().numel() > 20
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    assert torch.equal(factors_of(hidden[order], visual[order], response[order], ids=group_ids[order]), padded[order])
    kept = visual | response
    ends = torch.tensor([0, *(image + length for length in lengths)]).cumsum(0)
    packed = factors_of(hidden[kept], visual[kept], response[kept], ids=group_ids, boundaries=ends)
    assert torch.equal(packed[response[kept]], padded[response])


def test_gates_count_as_float64_does(narrow: None) -> None:
    """In fp32 the share 0.7 of ten tokens is less than seven, and of other lengths more."""
    lengths = torch.arange(1, 3000)
    for ratio in (0.7, 0.1, 0.3, 1 - 0.7):
        expected = [int(length * ratio) for length in lengths.tolist()]
        assert reference._share_of(lengths, ratio, wide=False).tolist() == expected
        assert reference._share_of(lengths, ratio, wide=True).tolist() == expected
    assert (lengths.float() * 0.7).to(torch.int64).tolist() != [int(length * 0.7) for length in lengths.tolist()]


def test_top_fractions_count_as_float64_does(narrow: None) -> None:
    """A share that is a whole number of tokens is that number, whatever its product rounds to."""
    lengths = torch.arange(1, 3000)
    for fraction in (0.1, 0.3, 0.4, 0.7):
        exact = [max(1, math.ceil(Fraction(str(fraction)) * length)) for length in lengths.tolist()]
        for wide in (False, True):
            assert shaping.top_count(lengths, fraction, wide=wide).tolist() == exact


def test_autocast_narrows_no_product(narrow: None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 50, 64, generator=generator) for heads in (4, 2))
    segments = torch.arange(50)[None] % 3

    def signals() -> list[Tensor]:
        shift = vk.attention_shift(q, k, segments)[:, 1:]
        return [vk.attention_mass(q, k, segments), vk.attention_heatmap(q, k, segments == 1), shift]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = signals()
    assert all(torch.equal(one, other) for one, other in zip(found, signals(), strict=True))


@pytest.fixture
def unserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_fastest", lambda *_: "reference")
    monkeypatch.setattr(backends, "_warned", {"cpu"})


def small_losses() -> dict[str, Callable[[Tensor, float], Tensor]]:
    """Functions of the hidden states ``[12, 8]`` of two sequences, and of a temperature."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(31, 8, generator=generator)
    targets = torch.randint(31, (2, 6), generator=generator)
    mask = torch.arange(6).expand(2, 6) > 1
    advantages = torch.tensor([1.0, -0.5])

    def logprob(hidden: Tensor, temperature: float) -> Tensor:
        return vk.linear_logprob(hidden, weight, targets.view(-1), temperature=temperature).sum()

    def loss(hidden: Tensor, temperature: float) -> Tensor:
        rows = hidden.view(2, 6, 8)
        return vk.linear_policy_loss(rows, weight, targets, None, advantages, mask, temperature=temperature).loss

    def divergence(hidden: Tensor, temperature: float) -> Tensor:
        found = vk.linear_divergence(hidden, hidden.flip(0), weight, measures=("kl",), temperature=temperature).kl
        assert found is not None
        return found.sum()

    return {"logprob": logprob, "loss": loss, "divergence": divergence}


@pytest.mark.parametrize("name", ["logprob", "loss", "divergence"])
def test_heads_in_chunks_have_every_derivative_of_the_reference(unserved: None, name: str) -> None:
    function = partial(small_losses()[name], temperature=0.7)
    hidden = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))

    def derivatives() -> list[Tensor]:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(hidden, torch.ones_like(hidden)))).tangent
        assert tangent is not None
        return [tangent, torch.func.grad(function)(hidden)]

    found = derivatives()
    with backend("reference"):
        expected = derivatives()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["logprob", "loss", "divergence"])
def test_chunks_compile_once_for_many_temperatures(unserved: None, name: str) -> None:
    function = small_losses()[name]
    hidden = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=count)
    for temperature in (0.7, 0.8, 0.9, 1.1, 1.3):
        assert torch.equal(compiled(hidden, temperature), function(hidden, temperature))
    assert len(graphs) == 2  # of a constant, and of any
