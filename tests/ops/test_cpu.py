"""What only the C++ backend promises: every SIMD level, any number of threads, 64-bit offsets."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import EDGES, make_batch
from operator_cases import field_kind
from tolerance import assert_close, assert_matches

import vgpo_kernels
from vgpo_kernels import (
    ShapingConfig,
    VGPOConfig,
    attention_heatmap,
    attention_mass,
    backend,
    backends,
    policy_loss,
    shape_tokens,
    visual_focus,
    visual_prototype,
    visual_weights,
)
from vgpo_kernels.config import PolicyLossOptions
from vgpo_kernels.reference import token_shaping as shaping_definition
from vgpo_kernels.reference import visual_focus as focus_definition
from vgpo_kernels.reference import visual_weights as weights_definition

if not backends.describe()["built"]["cpp"]:
    pytest.skip("the C++ extension is not built", allow_module_level=True)

from vgpo_kernels import _C


@pytest.fixture(autouse=True)
def cpp() -> Iterator[None]:
    with backend("cpp"):
        yield


@pytest.fixture(params=_C.simd_levels())
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once for each instruction set that this processor has."""
    previous = _C.simd()
    _C.set_simd(request.param)
    yield request.param
    _C.set_simd(previous)


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back."""
    previous = torch.get_num_threads()
    yield
    torch.set_num_threads(previous)


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        (VGPOConfig, _C.config_fields),
        (PolicyLossOptions, _C.options_fields),
        (ShapingConfig, _C.shaping_fields),
    ],
)
def test_settings_are_read_as_they_are_written(
    settings: type[VGPOConfig | PolicyLossOptions | ShapingConfig], fields: Callable[[], list[tuple[str, str, int]]]
) -> None:
    """Kernels read numbers without names: C++ and Python must have the same fields, kinds and choices in one order."""
    written = settings.kinds.items()
    assert fields() == [(name, field_kind(kind), len(getattr(kind, "choices", ()))) for name, kind in written]


def test_levels_are_named_from_the_simplest() -> None:
    assert _C.simd_levels()[0] == "portable"
    assert _C.simd() in _C.simd_levels()
    assert _C.build_info()["simd"] == _C.simd()


def test_an_unknown_level_is_refused() -> None:
    before = _C.simd()
    with pytest.raises(ValueError, match="simd must be one of"):
        _C.set_simd("mmx")
    assert _C.simd() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_converted_exactly(simd: str, dtype: torch.dtype) -> None:
    hidden = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    # The mean of one row is the row. The offset by one puts other numbers into the last, incomplete vector.
    for row in (hidden, hidden[1:]):
        mean = visual_prototype(row[None, None], torch.ones(1, 1, dtype=torch.bool))[0]
        expected = row.float()
        assert torch.equal(mean.isnan(), expected.isnan())
        assert torch.equal(mean.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("features", [1, 4, 15, 31, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_focus_at_every_level(simd: str, dtype: torch.dtype, features: int) -> None:
    batch = make_batch(EDGES["holes"] + EDGES["one token"], features=features, dtype=dtype)
    cos = visual_focus(batch.hidden, batch.visual_mask, batch.response_mask)
    arguments = (batch.hidden, batch.visual_mask, batch.response_mask)
    assert_matches(cos, focus_definition.visual_focus, arguments, ("cos",))


def test_prototypes_are_equal_at_every_level(simd: str) -> None:
    batch = make_batch(EDGES["long"], features=100, dtype=torch.bfloat16)
    actual = visual_prototype(batch.hidden, batch.visual_mask)
    _C.set_simd("portable")
    assert torch.equal(actual, visual_prototype(batch.hidden, batch.visual_mask))


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 40, 1025])
def test_weights_at_every_level(simd: str, length: int, preset: str) -> None:
    generator = torch.Generator().manual_seed(length)
    cos = 0.3 * torch.randn(3, length, generator=generator)
    mask = torch.rand(3, length, generator=generator) > 0.2
    config = getattr(VGPOConfig, preset)()
    groups = torch.tensor([0, 0, 1])
    factors, psi, w, phi, score, metrics = visual_weights(cos, mask, groups, config)
    arguments = (cos, mask, groups, None, None, config.as_floats())
    names = ("factors", "psi", "w", "phi", "score", "metrics")
    actual = (factors, psi, w, phi, score, torch.stack(list(metrics.values())))
    assert_matches(actual, weights_definition.visual_weights, arguments, names)


@pytest.mark.parametrize("weight", ["softmax", "gate"])
@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 40, 1025])
def test_shaping_at_every_level(simd: str, length: int, weight: str) -> None:
    generator = torch.Generator().manual_seed(length)
    visual, entropy, gap = torch.rand(3, 3, length, generator=generator)
    mask = torch.rand(3, length, generator=generator) > 0.2
    config = ShapingConfig.vepo(
        weight=weight, entropy_gate=0.5, log1p=True, top_entropy=0.2, scope="group", response="softmax"
    )
    arguments = (visual, entropy, gap, mask, torch.tensor([0, 1, 0]), None, 1.0, config.as_floats())
    names = ("factors", "weights", "selected", "response_factor", "score", "metrics")

    def shape(*given: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return tuple(result.to(dtype) for result in shaping_definition.token_shaping(*given, dtype=dtype))

    assert_matches(torch.ops.vgpo_kernels.token_shaping(*arguments), shape, arguments, names)


def test_the_exponential_is_exact_to_a_few_units(simd: str) -> None:
    log_ratio = torch.cat([torch.linspace(-87, 88, 20011), torch.tensor([0.0, -0.0, 1e-9, -1e-9])])
    old_logp = torch.zeros_like(log_ratio)
    # Where the clip is not in force the gradient is the ratio: above 1 for A = -1, below 1 for A = 1.
    advantages = torch.where(log_ratio > 0, -1.0, 1.0)
    logp = log_ratio.clone().requires_grad_()
    mask = torch.ones(1, len(log_ratio), dtype=torch.bool)
    options = {"ratio_clamp": None, "aggregation": "seq-mean-token-sum"}
    loss = policy_loss(logp[None], old_logp[None], advantages[None], mask, **options).loss
    (gradient,) = torch.autograd.grad(loss, logp)
    relative = (gradient.abs().double() / log_ratio.double().exp() - 1).abs()
    assert relative.max() < 3e-7


@pytest.mark.parametrize(("log_ratio", "expected"), [(89.0, math.inf), (-110.0, 0.0), (math.nan, math.nan)])
def test_the_exponential_at_its_ends(simd: str, log_ratio: float, expected: float) -> None:
    logp, mask = torch.full((1, 3), log_ratio), torch.ones(1, 3, dtype=torch.bool)
    metrics = policy_loss(logp, torch.zeros(1, 3), torch.ones(1), mask, ratio_clamp=None).metrics
    torch.testing.assert_close(metrics["ratio_mean"], torch.tensor(expected), equal_nan=True)


def everything(hidden: torch.Tensor, visual: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Run every operator once and return every result."""
    generator = torch.Generator().manual_seed(1)
    logp = -torch.rand(mask.shape, generator=generator)
    old_logp = logp + 0.2 * torch.randn(mask.shape, generator=generator)
    logp.requires_grad_()
    cos = visual_focus(hidden, visual, mask)
    results = [visual_prototype(hidden, visual), cos]
    groups = torch.arange(len(mask)) // 2
    results += visual_weights(cos, mask, groups, VGPOConfig.released())[:5]
    signals = {"visual": cos, "entropy": -logp.detach(), "gap": (old_logp - logp).detach().abs()}
    for shaping in (ShapingConfig.pepo(response="softmax"), ShapingConfig.vepo(), ShapingConfig.cgpo(weight="gate")):
        *tensors, metrics = shape_tokens(signals, mask, groups, shaping, progress=0.5)
        results += [*tensors, *metrics.values()]
    for loss_type in ("dapo", "gspo", "luspo", "vespo"):
        loss, metrics = vgpo_kernels.vgpo_loss(
            hidden,
            logp,
            old_logp,
            torch.tensor([1.0, -1.0])[: len(mask)],
            visual,
            mask,
            groups,
            VGPOConfig.paper(),
            loss_type=loss_type,
        )
        results += [loss.detach(), *torch.autograd.grad(loss, logp), *metrics.values()]
    return results


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.usefixtures("threads")
def test_threads_do_not_change_a_bit(simd: str, batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    hidden = torch.randn(batch, 2500, 600, generator=generator).bfloat16()
    visual = torch.rand(batch, 2500, generator=generator) < 0.2
    mask = torch.rand(batch, 2300, generator=generator) < 0.8
    expected = None
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        actual = everything(hidden, visual, mask)
        expected = expected or actual
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_offsets_past_two_to_the_31(packed: bool) -> None:
    # Rows 2^27 elements apart, in memory that is reserved but never touched between them.
    features, rows, stride = 64, 20, 2**27
    memory = mmap.mmap(-1, 2 * (stride * (rows - 1) + features))
    storage = torch.frombuffer(memory, dtype=torch.bfloat16)
    hidden = storage.as_strided((rows, features), (stride, 1))
    near = torch.randn(rows, features, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden.copy_(near)
    visual, mask = torch.arange(rows) < 5, torch.arange(rows) >= 7
    if packed:
        boundaries = torch.tensor([0, rows])
        far = visual_focus(hidden, visual, mask, cu_seqlens=boundaries)
        assert torch.equal(far, visual_focus(near, visual, mask, cu_seqlens=boundaries))
    else:
        assert torch.equal(
            visual_focus(hidden[None], visual[None], mask[None]), visual_focus(near[None], visual[None], mask[None])
        )
        # Each row a response: the batch stride is the large one.
        alone = torch.ones(rows, 1, dtype=torch.bool)
        assert_close(visual_focus(hidden[:, None], alone, alone), torch.ones(rows, 1).double())


@pytest.mark.parametrize("boundaries", [[1, 4], [0, 3], [0, 5, 4], [0, 9, 4]])
def test_the_operator_itself_refuses_wrong_boundaries(boundaries: list[int]) -> None:
    hidden, mask = torch.ones(4, 8), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 4"):
        torch.ops.vgpo_kernels.visual_prototype(hidden, mask, torch.tensor(boundaries), False, False)


def test_the_operator_itself_refuses_wrong_shapes() -> None:
    hidden, mask = torch.ones(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="visual_mask must be"):
        torch.ops.vgpo_kernels.visual_focus(hidden, mask[:, :3].contiguous(), mask, None, None, None, False, False)
    with pytest.raises(ValueError, match="prototype_index must lie in"):
        index = torch.tensor([0, 3])
        torch.ops.vgpo_kernels.visual_focus(hidden, None, mask, None, torch.ones(3, 8), index, False, False)
    with pytest.raises(TypeError, match="hidden must be float32, bfloat16 or float16"):
        torch.ops.vgpo_kernels.visual_focus(hidden.double(), mask, mask, None, None, None, False, False)
    with pytest.raises(ValueError, match="config must have 18 numbers"):
        groups = torch.zeros(2, dtype=torch.int64)
        torch.ops.vgpo_kernels.visual_weights(torch.ones(2, 4), mask, groups, None, None, [0.0])


def test_the_ceilings_read_and_copy_everything(simd: str) -> None:
    values = torch.zeros(1_000_003)
    for index in (0, 999_999, 1_000_002):
        values[index] = index + 1.0
        assert _C.read_memory(values) == index + 1.0
    target = torch.full_like(values, math.nan)
    _C.copy_memory(values, target)
    assert torch.equal(values, target)
    with pytest.raises(ValueError, match="same number of bytes"):
        _C.copy_memory(values, target[:-1])


@pytest.mark.parametrize("size", [24, 100, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_does_not_depend_on_its_place_in_a_tile(simd: str, dtype: torch.dtype, size: int) -> None:
    """One query in every row of some tiles, and one key in every column: nothing tells them apart."""
    generator = torch.Generator().manual_seed(size)
    q, k = (torch.randn(1, 1, length, size, generator=generator).to(dtype) for length in (300, 70))
    labels = torch.arange(70)[None] % 2
    last = torch.full((1, 300), 69)
    mass = attention_mass(q[:, :, :1].expand_as(q), k, labels, query_positions=last)
    assert torch.equal(mass, mass[:, :1].expand_as(mass))
    heat = attention_heatmap(q, k[:, :, :1].expand_as(k), labels == 0, query_positions=last)[:, ::2]
    assert torch.equal(heat, heat[:, :1].expand_as(heat))


@pytest.mark.parametrize("heads", [1, 7])
def test_attention_is_the_same_for_any_number_of_threads(simd: str, threads: None, heads: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    q, k = (torch.randn(1, of, 300, 64, generator=generator) for of in (heads, 1))
    every = torch.ones(1, 300, dtype=torch.bool)
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append((attention_mass(q, k, torch.arange(300)[None] % 3), attention_heatmap(q, k, every)))
    for mass, heat in found[1:]:
        assert torch.equal(mass, found[0][0]) and torch.equal(heat, found[0][1])
