"""attention_mass and attention_heatmap on every backend, against the reference implementation and eager attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor

import vgpo_kernels
from vgpo_kernels import attention_heatmap, attention_mass, backend, backends
from vgpo_kernels.ops import registry

NAN = float("nan")


@dataclass(frozen=True)
class Attention:
    """Queries and keys in one layout; keys to ignore hold NaN."""

    q: Tensor  # [B, Hq, T, d] or [N, Hq, d]
    k: Tensor  # [B, Hk, S, d] or [M, Hk, d]
    segments: Tensor  # [B, S] or [M]
    positions: Tensor | None = None  # [B, T] or [N]
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    @property
    def layout(self) -> dict[str, Any]:
        """Keyword arguments that say where queries and keys lie."""
        return {
            "query_positions": self.positions,
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k": self.cu_seqlens_k,
        }

    def to(self, target: torch.device | torch.dtype) -> Attention:
        """Move to a device, or convert q and k to a dtype."""
        names = vars(self) if isinstance(target, torch.device) else ("q", "k")
        moved = {name: getattr(self, name).to(target) for name in names if getattr(self, name) is not None}
        return replace(self, **moved)

    def leaves(self) -> Attention:
        """Return a copy whose q and k ask for gradients."""
        return replace(self, q=self.q.detach().clone().requires_grad_(), k=self.k.detach().clone().requires_grad_())


def draw(
    lengths: tuple[tuple[int, int], ...] = ((9, 40), (9, 40)),  # queries and keys of each response
    *,
    heads: int = 6,
    key_heads: int = 2,
    size: int = 24,
    num_segments: int = 3,
    packed: bool = False,
    padding: int = 0,
    mixed: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Attention:
    """Draw responses whose numbers depend on the seed and their index, not on the layout.

    Segments are runs of keys, or with ``mixed`` alternate from key to key, some ignored. ``padding`` keys to ignore
    come first in each response, as left padding does.
    """
    queries, keys, segments = [], [], []
    for index, (num_queries, num_keys) in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        queries.append(torch.randn(num_queries, heads, size, generator=generator))
        # Wide enough that a softmax is far from even.
        keys.append(1.5 * torch.randn(num_keys, key_heads, size, generator=generator))
        labels = torch.arange(num_keys) * num_segments // max(num_keys, 1)
        if mixed:
            labels = torch.randint(-1, num_segments, (num_keys,), generator=generator)
        labels[:padding] = -1
        segments.append(labels)
    q, k, labels = torch.cat(queries), torch.cat(keys), torch.cat(segments)
    k = torch.where((labels >= 0)[:, None, None], k, NAN).to(dtype)
    q = q.to(dtype)
    if not packed:
        batch = len(lengths)
        q, k = (tensor.unflatten(0, (batch, -1)).transpose(1, 2) for tensor in (q, k))
        return Attention(q, k, labels.unflatten(0, (batch, -1)))
    boundaries = torch.tensor([[0, 0], *lengths]).cumsum(0).to(torch.int32)
    return Attention(q, k, labels, None, boundaries[:, 0], boundaries[:, 1])


RAGGED = ((5, 31), (0, 4), (6, 6), (1, 40))
CASES = {
    "padded": draw(),
    "packed": draw(RAGGED, packed=True),
    "left padding": draw(padding=17),
    "segments mixed key by key": draw(mixed=True, num_segments=3),
    "one key head": draw(heads=5, key_heads=1),
    "a key head a query head": draw(heads=3, key_heads=3, size=8),
    "odd head size": draw(size=19),
    "more keys than a tile": draw(((3, 150),), mixed=True),
    "more queries than a tile": draw(((40, 45),), heads=7, key_heads=1, size=16),
    "one query": draw(((1, 33), (1, 33))),
    "positions": replace(draw(), positions=torch.tensor([[0, 39, 100, -1, 5, 5, 16, 15, -7], list(range(9))])),
    "packed positions": replace(draw(RAGGED, packed=True), positions=torch.arange(12) % 13 - 1),
}
SETTINGS = {
    "defaults": {},
    "per head": {"per_head": True},
    "window": {"window": 7, "per_head": True},
    "scale": {"scale": 0.05},
}


def mass(case: Attention, num_segments: int = 3, **options: Any) -> Tensor:
    return attention_mass(case.q, case.k, case.segments, num_segments=num_segments, **case.layout, **options)


def heatmap(case: Attention, **options: Any) -> Tensor:
    seen = case.segments >= 0
    return attention_heatmap(case.q, case.k, case.segments == 1, attention_mask=seen, **case.layout, **options)


def check(function: Any, case: Attention, **options: Any) -> None:
    """Compare a result and its gradients by q and k with those of the reference implementation, in fp64 and in fp32."""
    with backend("reference"):
        exact = run(function, case.to(torch.float64), **options)
    # What a definition in fp32 gets wrong: the yardstick.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "wide_dtype", lambda device: torch.float32)
        with backend("reference"):
            narrow = run(function, case.to(torch.float32), **options)
    names = (function.__name__, "gradient of q", "gradient of k")
    for name, one, wide, thin in zip(names, run(function, case, **options), exact, narrow, strict=True):
        # Gradients leave in the inputs' dtype, whose rounding is relative to their size.
        unit = wide.abs().amax().clamp(min=1e-30) if name != names[0] and wide.numel() else 1.0
        # A GPU's exponential is off by two units in the last place.
        units = {torch.float32: 24 if one.is_cuda else 8, torch.float16: 2, torch.bfloat16: 2}[case.q.dtype]
        # Scores grow with their scale, and so does what forward and backward, which multiply apart, round otherwise.
        growth = max(1.0, abs(options.get("scale") or 0.0) * case.q.shape[-1] ** 0.5)
        floor = units * torch.finfo(one.dtype).eps * growth
        assert_close(one.double() / unit, wide / unit, thin.double() / unit, name=name, floor=floor)


def run(function: Any, case: Attention, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    case = case.leaves()
    result = function(case, **options)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(7)).to(result)
    (result * direction).sum().backward()
    assert case.q.grad is not None and case.k.grad is not None
    assert case.q.grad.dtype == case.q.dtype and case.k.grad.dtype == case.k.dtype
    return result.detach(), case.q.grad, case.k.grad


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("function", [mass, heatmap])
def test_settings_match_the_definition(backend_name: str, device: torch.device, function: Any, options: str) -> None:
    check(function, CASES["packed"].to(device), **SETTINGS[options])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", [mass, heatmap])
def test_cases_match_the_definition(backend_name: str, device: torch.device, function: Any, case: str) -> None:
    check(function, CASES[case].to(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [mass, heatmap])
def test_half_precision_matches_the_definition(
    backend_name: str, device: torch.device, function: Any, dtype: torch.dtype
) -> None:
    check(function, draw(((6, 37), (6, 37)), mixed=True, dtype=dtype).to(device))


@pytest.mark.parametrize("num_segments", [1, 2, 40])
def test_any_number_of_segments(backend_name: str, device: torch.device, num_segments: int) -> None:
    case = draw(((3, 50),), num_segments=num_segments, mixed=num_segments == 40)
    check(mass, case.to(device), num_segments=num_segments)


def test_it_is_eager_attention_summed_by_segment(backend_name: str, device: torch.device) -> None:
    """Softmax over repeated keys with a causal mask, as models write it, against both ops."""
    case = draw(((7, 30), (7, 30)), padding=0).to(device)
    keys = case.k.repeat_interleave(3, dim=1)
    scores = case.q @ keys.mT / case.q.shape[-1] ** 0.5
    later = torch.ones(30, 30, dtype=torch.bool, device=device).triu(1)[-7:]
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    by_segment = torch.stack([weights[..., case.segments[0] == g].sum(-1) for g in range(3)], dim=-1)
    assert_close(mass(case), by_segment.mean(1).double(), floor=1e-6)
    assert_close(mass(case, per_head=True), by_segment.double(), floor=1e-6)
    image = case.segments == 1
    assert_close(heatmap(case), (weights.mean((1, 2)) * image).double(), floor=1e-6)
    chosen = torch.zeros(2, 7, dtype=torch.bool, device=device)
    chosen[0, 4] = chosen[1, 2] = chosen[1, 6] = True
    rows = torch.stack([weights[0, :, 4].mean(0), (weights[1, :, 2] + weights[1, :, 6]).mean(0) / 2])
    assert_close(heatmap(case, query_mask=chosen), (rows * image).double(), floor=1e-6)


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 25)), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(0, 12),
    st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=25)
def test_a_row_sums_to_one_or_sees_nothing(
    lengths: list[tuple[int, int]], num_segments: int, window: int, seed: int
) -> None:
    fitting = tuple((min(queries, keys), keys) for queries, keys in lengths)
    case = draw(fitting, size=4, num_segments=num_segments, packed=True, mixed=True, seed=seed)
    masses = mass(case, num_segments, window=window or None, per_head=True)
    total = masses.sum(-1)
    _, _, lse = registry.implementation("attention_mass", backends.select(total.device))(
        *(case.q, case.k, case.segments.int(), None, case.cu_seqlens_q.long(), case.cu_seqlens_k.long()),
        *(num_segments, 0.5, window, True),
    )
    assert torch.equal(total == 0, lse == -torch.inf)
    assert ((total == 0) | ((total - 1).abs() < 1e-5)).all()
    assert (masses >= 0).all()


def test_the_map_of_an_image_adds_up_to_its_mass(backend_name: str, device: torch.device) -> None:
    case = CASES["packed"].to(device)
    masses, heat = mass(case)[:, 1], heatmap(case)
    rows = [part.mean() for part in masses.split(case.cu_seqlens_q.diff().tolist())]
    maps = [part.sum() for part in heat.split(case.cu_seqlens_k.diff().tolist())]
    assert_close(torch.stack(maps), torch.stack(rows).double().nan_to_num(), floor=1e-6)  # no query: an empty mean


@pytest.mark.parametrize("function", [mass, heatmap])
def test_packing_changes_no_bit_on_the_cpu(function: Any) -> None:
    """A row of the C++ backend is its own: neither its batch nor its neighbours in a tile show in it."""
    if not backends.describe()["built"]["cpp"]:
        pytest.skip("the extension is not built")
    lengths = ((11, 90), (11, 90), (11, 90))
    with backend("cpp"):
        padded, packed = function(draw(lengths, mixed=True)), function(draw(lengths, mixed=True, packed=True))
        alone = function(draw(lengths[:1], mixed=True))
    assert torch.equal(padded.flatten(0, 1), packed)
    assert torch.equal(padded[0], alone[0])


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "neon", "neon-bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set(level: str, dtype: torch.dtype) -> None:
    extension = backends._C
    if extension is None or level not in extension.simd_levels():
        pytest.skip(f"{level} is not built, or does not run here")
    previous = extension.simd()
    extension.set_simd(level)
    try:
        with backend("cpp"):
            check(mass, draw(((11, 140), (11, 140)), mixed=True, dtype=dtype))
            check(heatmap, draw(((11, 140), (11, 140)), mixed=True, dtype=dtype))
    finally:
        extension.set_simd(previous)


@pytest.mark.parametrize(
    ("queries", "keys"), [((2, 4, 0, 8), (2, 2, 5, 8)), ((2, 4, 0, 8), (2, 2, 0, 8)), ((0, 4, 3, 8), (0, 2, 5, 8))]
)
def test_nothing_to_do(
    backend_name: str, device: torch.device, queries: tuple[int, ...], keys: tuple[int, ...]
) -> None:
    q, k = torch.zeros(queries, device=device), torch.zeros(keys, device=device)
    labels = torch.zeros(keys[0], keys[2], dtype=torch.int64, device=device)
    assert attention_mass(q, k, labels).shape == (queries[0], queries[2], 3)
    heat = attention_heatmap(q, k, labels == 0)
    assert heat.shape == labels.shape and not heat.any()


def test_no_key_at_all(backend_name: str, device: torch.device) -> None:
    q, k = torch.ones(1, 2, 3, 8, device=device), torch.ones(1, 2, 0, 8, device=device)
    labels = torch.zeros(1, 0, dtype=torch.int64, device=device)
    positions = torch.zeros(1, 3, dtype=torch.int64, device=device)
    assert torch.equal(attention_mass(q, k, labels, query_positions=positions), torch.zeros(1, 3, 3, device=device))


@pytest.mark.parametrize("function", [mass, heatmap])
def test_ignored_keys_leave_no_trace(backend_name: str, device: torch.device, function: Any) -> None:
    """Left padding full of NaN, with queries in it: zeros there, and finite gradients everywhere."""
    case = draw(((40, 40),), padding=23).to(device)
    result, grad_q, grad_k = run(function, case)
    if function is mass:
        assert not result[0, :23].any() and result[0, 23:].sum(-1).sub(1).abs().max() < 1e-5
    assert result.isfinite().all() and grad_q.isfinite().all() and grad_k.isfinite().all()
    assert not grad_q[:, :, :23].any() and not grad_k[:, :, :23].any()


def test_a_nan_stays_in_its_response(backend_name: str, device: torch.device) -> None:
    case = draw(((4, 20), (4, 20), (4, 20))).to(device)
    clean = mass(case)
    case.k[1, 0, 3] = NAN
    spoilt = mass(case)
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])
    assert spoilt[1].isnan().all()


def test_large_scores_do_not_overflow(backend_name: str, device: torch.device) -> None:
    case = draw(((4, 50),)).to(device)
    check(mass, replace(case, q=case.q * 200))


def test_strides_do_not_matter(backend_name: str, device: torch.device) -> None:
    case = draw().to(device)
    swapped = replace(case, q=case.q.mT.contiguous().mT, k=case.k.transpose(0, 2).contiguous().transpose(0, 2))
    assert not swapped.q.is_contiguous() and not swapped.k.is_contiguous()
    assert torch.equal(mass(swapped), mass(case))
    assert torch.equal(heatmap(swapped), heatmap(case))


@pytest.mark.parametrize("function", [mass, heatmap])
def test_runs_repeat_bit_for_bit(exact_backend: str, device: torch.device, function: Any) -> None:
    case = CASES["more queries than a tile"].to(device)
    first, second = run(function, case), run(function, case)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("function", [mass, heatmap])
def test_gradients_of_the_definition(function: Any) -> None:
    case = draw(((3, 8), (2, 5)), heads=2, key_heads=1, size=3, packed=True, mixed=True).to(torch.float64)
    case = replace(case, k=case.k.nan_to_num())

    def result(q: Tensor, k: Tensor) -> Tensor:
        return function(replace(case, q=q, k=k))

    leaves = case.leaves()
    assert torch.autograd.gradcheck(result, (leaves.q, leaves.k))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "name", ["attention_mass", "attention_mass_backward", "attention_heatmap", "attention_heatmap_backward"]
)
def test_opcheck(exact_backend: str, device: torch.device, name: str, packed: bool) -> None:
    case = draw(((4, 11), (4, 11)), packed=packed).to(device)
    case = replace(case, k=case.k.nan_to_num()).leaves()
    boundaries = [None if tensor is None else tensor.long() for tensor in (case.cu_seqlens_q, case.cu_seqlens_k)]
    labels = case.segments.clamp(max=1).int()
    mass_arguments = (case.q, case.k, labels, None, *boundaries, 2, 0.2, 0)
    operator = registry.implementation("attention_mass", exact_backend)
    with torch.no_grad():
        head_mass, _, lse = operator(*mass_arguments, True)
    weights = torch.full(lse.select(-2, 0).shape, 0.25, device=device)
    grad = torch.rand(case.segments.shape, device=device).unsqueeze(-2).repeat_interleave(6, -2)
    tensors = tuple(tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in mass_arguments[:6])
    arguments = {
        "attention_mass": (*mass_arguments, False),
        "attention_mass_backward": (torch.rand_like(head_mass), *tensors, head_mass, lse, 0.2, 0),
        "attention_heatmap": (*mass_arguments[:4], weights, lse, *boundaries, 0.2, 0, True),
        "attention_heatmap_backward": (grad, *tensors[:4], weights, lse, *boundaries, 0.2, 0),
    }[name]
    torch.library.opcheck(registry.implementation(name, exact_backend), arguments)


@pytest.mark.parametrize("function", [mass, heatmap])
def test_traces_into_one_graph(backend_name: str, device: torch.device, function: Any) -> None:
    case = replace(CASES["packed"].to(device), k=CASES["packed"].k.nan_to_num().to(device))
    expected = run(function, case)

    def traced(q: Tensor, k: Tensor) -> Tensor:
        return function(replace(case, q=q, k=k)) * 2

    leaves = case.leaves()
    result = torch.compile(traced, fullgraph=True, backend="aot_eager")(leaves.q, leaves.k)
    assert_close(result / 2, expected[0].double(), floor=1e-6)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(7)).to(result)
    (result * direction / 2).sum().backward()
    assert_close(leaves.q.grad, expected[1].double(), floor=1e-6)


GOOD = {
    "q": torch.zeros(2, 4, 3, 8),
    "k": torch.zeros(2, 2, 5, 8),
    "key_segments": torch.zeros(2, 5, dtype=torch.int64),
}
HEATMAP = {"q": GOOD["q"], "k": GOOD["k"], "key_mask": torch.ones(2, 5, dtype=torch.bool)}
STARTS = torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"q": [1.0]}, TypeError, "q must be a torch.Tensor"),
        ({"q": GOOD["q"].int()}, TypeError, "q must be float32"),
        ({"q": GOOD["q"][0]}, ValueError, r"q must have shape \[B, Hq, T, d\] without cu_seqlens"),
        ({"q": torch.zeros(2, 3, 3, 8)}, ValueError, "q must have a multiple of k's heads, got 3 heads"),
        ({"q": torch.zeros(2, 4, 6, 8)}, ValueError, "more queries than k"),
        ({"k": GOOD["k"].half()}, TypeError, "k must have q's dtype"),
        ({"k": GOOD["k"].to("meta")}, ValueError, "k must be on cpu like q"),
        ({"k": GOOD["k"][:1]}, ValueError, "k must have q's head size and batch"),
        ({"k": torch.zeros(2, 2, 5, 4)}, ValueError, "k must have q's head size and batch"),
        ({"k": torch.zeros(2, 0, 5, 8)}, ValueError, "multiple of k's heads"),
        ({"key_segments": GOOD["key_segments"].float()}, TypeError, "key_segments must be an integer tensor"),
        ({"key_segments": GOOD["key_segments"][:, 1:]}, ValueError, r"key_segments must have shape \[2, 5\]"),
        ({"key_segments": GOOD["key_segments"] + 3}, ValueError, "below num_segments=3 .*got 3"),
        ({"num_segments": 0}, ValueError, "num_segments must be at least 1, got 0"),
        ({"num_segments": 3.0}, TypeError, "num_segments must be an integer, got float"),
        ({"query_positions": torch.zeros(2, 3)}, TypeError, "query_positions must be an integer tensor"),
        ({"query_positions": torch.zeros(3, dtype=torch.int64)}, ValueError, "query_positions must have shape"),
        ({"scale": "auto"}, TypeError, "scale must be a number or None, got str"),
        ({"scale": NAN}, ValueError, "scale must be finite"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": True}, TypeError, "window must be an integer, got bool"),
        ({"cu_seqlens_q": STARTS}, ValueError, "cu_seqlens_q and cu_seqlens_k belong together"),
        ({"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}, ValueError, r"q must have shape \[N, Hq, d\] with"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        attention_mass(**(GOOD | changed))


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"cu_seqlens_k": torch.tensor([0, 2, 4])}, ValueError, "cu_seqlens_k must rise from 0 to 5"),
        ({"cu_seqlens_k": torch.tensor([0, 2, 4, 5])}, ValueError, r"cu_seqlens_k must have shape \[3\]"),
        ({"cu_seqlens_q": STARTS.float()}, TypeError, "cu_seqlens_q must be int32 or int64"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 3])}, ValueError, "more queries than k"),
    ],
)
def test_bad_boundaries_are_named(changed: dict[str, Any], error: type[Exception], says: str) -> None:
    good = {"q": torch.zeros(3, 4, 8), "k": torch.zeros(5, 2, 8), "key_segments": torch.zeros(5, dtype=torch.int64)}
    good |= {"cu_seqlens_q": STARTS, "cu_seqlens_k": torch.tensor([0, 2, 5])}
    attention_mass(**good)
    with pytest.raises(error, match=says):
        attention_mass(**(good | changed))


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"key_mask": torch.ones(2, 5)}, TypeError, "key_mask must be bool"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "key_mask must have shape"),
        ({"attention_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "attention_mask must have shape"),
        ({"query_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"query_mask must have shape \[2, 3\]"),
    ],
)
def test_bad_masks_are_named(changed: dict[str, Any], error: type[Exception], says: str) -> None:
    attention_heatmap(**HEATMAP)
    with pytest.raises(error, match=says):
        attention_heatmap(**(HEATMAP | changed))


def test_both_are_public() -> None:
    assert {"attention_mass", "attention_heatmap"} <= set(vgpo_kernels.__all__)
