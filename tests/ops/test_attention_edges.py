"""attention_mass and attention_heatmap at the edges: rows that take no part, positions and windows of any size, scales.

What is right is said by loops over queries in Python's integers and fp64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_attention_mass import Attention, check, draw, mass
from tolerance import assert_close, same_bits
from torch import Tensor

from vgpo_kernels import attention_checks, attention_heatmap, attention_mass
from vgpo_kernels.ops import registry

NAN, INFINITY = float("nan"), float("inf")


def seen_by(labels: list[int], positions: list[int], window: int | None) -> list[list[int]]:
    """Keys of a response that each of its queries sees, by the definition."""
    return [
        [key for key, label in enumerate(labels) if label >= 0 and key <= at and (window is None or at - key < window)]
        for at in positions
    ]


def seen_keys(case: Attention, window: int | None) -> list[list[list[int]]]:
    """Keys that each query of each response of a padded batch sees."""
    queries, keys = case.q.shape[2], case.k.shape[2]
    default = [list(range(keys - queries, keys))] * len(case.segments)
    positions = default if case.positions is None else case.positions.tolist()
    return [seen_by(labels, row, window) for labels, row in zip(case.segments.tolist(), positions, strict=True)]


def by_loops(case: Attention, heatmap: bool, window: int | None, scale: float, chosen: Tensor | None) -> Tensor:
    """Masses of three segments ``[B, Hq, T, 3]`` or a heat map of segment 1 ``[B, Hq, S]``, query by query."""
    (batch, heads, queries, _), keys = case.q.shape, case.k.shape[2]
    group = heads // case.k.shape[1]
    result = case.q.new_zeros((batch, heads, keys) if heatmap else (batch, heads, queries, 3))
    for b, rows in enumerate(seen_keys(case, window)):
        counted = [t for t, row in enumerate(rows) if row and (chosen is None or chosen[b, t])]
        for head in range(heads):
            for t in range(queries) if not heatmap else counted:
                row = torch.tensor(rows[t], dtype=torch.int64)
                if not len(row):
                    continue
                shares = (case.k[b, head // group, row] @ case.q[b, head, t] * scale).softmax(0)
                labels = case.segments[b, row]
                if heatmap:
                    image = labels == 1
                    result = result.index_put(
                        (torch.tensor(b), torch.tensor(head), row[image]), shares[image] / len(counted), accumulate=True
                    )
                else:
                    added = torch.stack([(shares * (labels == segment)).sum() for segment in range(3)])
                    result = result.index_put((torch.tensor(b), torch.tensor(head), torch.tensor(t)), added)
    return result


def gradients(result: Tensor, case: Attention, direction: Tensor) -> list[Tensor]:
    """Return the result, and the gradients w.r.t. q and k of its product with a direction."""
    return [result.detach(), *torch.autograd.grad(result, (case.q, case.k), direction.to(result))]


def call(case: Attention, heatmap: bool, window: int | None, chosen: Tensor | None = None, **options: Any) -> Tensor:
    options |= case.layout | {"window": window, "per_head": True}
    if not heatmap:
        return attention_mass(case.q, case.k, case.segments, **options)
    seen = case.segments >= 0
    return attention_heatmap(case.q, case.k, case.segments == 1, query_mask=chosen, attention_mask=seen, **options)


def positions(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


WHOLE = draw(((40, 40),), heads=4, size=8, padding=17)
SHORT = draw(((6, 40), (6, 40)), heads=4, size=8)
# Queries and keys of which some take no part, and the window.
BLIND: dict[str, tuple[Attention, int | None]] = {
    "left padding": (WHOLE, None),
    "left padding and a window": (WHOLE, 9),
    "negative positions": (replace(SHORT, positions=positions([5, -1, 20, -7, 33, 4], [-1] * 6)), None),
    "keys behind every query": (replace(SHORT, positions=positions([0, 3, 9, 9, 2, 7], [20, 1, 2, 3, 4, 5])), None),
    "keys before every window": (SHORT, 5),
    "keys between windows": (replace(SHORT, positions=positions([3, 30, 31, 4, 38, 2], [9, 39, 9, 39, 9, 39])), 4),
    "queries behind their window": (replace(SHORT, positions=positions([44, 43, 60, 2**40, 30, 39], [45] * 6)), 5),
}
HEATMAP = pytest.mark.parametrize("heatmap", [False, True], ids=["mass", "heatmap"])


def poison(rows: int) -> torch.Tensor:
    """Return one after the other what nobody may read, ``[rows, 1]``."""
    kinds = torch.tensor([NAN, INFINITY, -INFINITY, torch.finfo(torch.float32).max])
    return kinds[torch.arange(rows) % len(kinds)][:, None]


@pytest.mark.parametrize("name", BLIND)
@HEATMAP
def test_rows_that_take_no_part_change_no_bit(
    backend_name: str, device: torch.device, heatmap: bool, name: str
) -> None:
    """Not of a result nor of a gradient; nor does the incoming gradient of a result that is constant."""
    case, window = BLIND[name]
    chosen = None
    if heatmap and name == "left padding":
        chosen = torch.arange(40)[None] % 3 == 0
    seen = seen_keys(case, window)
    blind = torch.tensor(
        [[not row or (chosen is not None and t % 3 != 0) for t, row in enumerate(rows)] for rows in seen]
    )
    unseen = torch.ones(case.segments.shape, dtype=torch.bool)
    for b, rows in enumerate(seen):
        for t, row in enumerate(rows):
            if not blind[b, t]:
                unseen[b, row] = False
    assert blind.any() or unseen.any()
    # A mass without a key of its segment to see is zero whatever q and k are, and so is the heat of a key unseen.
    labels = [[{int(case.segments[b, key]) for key in row} for row in rows] for b, rows in enumerate(seen)]
    constant = torch.tensor([[[segment not in found for segment in range(3)] for found in rows] for rows in labels])
    constant = (unseen[:, None] if heatmap else constant[:, None]).expand(
        *case.q.shape[:2], *(unseen.shape[1:] if heatmap else constant.shape[1:])
    )
    direction = torch.randn(constant.shape, generator=torch.Generator().manual_seed(7))
    found = []
    for fill in (lambda rows: torch.zeros(rows, 1), poison):
        in_q, in_k, in_gradient = (fill(rows) for rows in (case.q.shape[2], case.k.shape[2], constant.numel()))
        leaves = replace(
            case,
            q=torch.where(blind[:, None, :, None], in_q, case.q),
            k=torch.where(unseen[:, None, :, None], in_k, case.k),
        )
        leaves = leaves.to(device).leaves()
        on_device = None if chosen is None else chosen.to(device)
        given = torch.where(constant, in_gradient.view(constant.shape), direction).to(device)
        found.append(gradients(call(leaves, heatmap, window, on_device), leaves, given))
    for part, clean, poisoned in zip(("result", "grad q", "grad k"), *found, strict=True):
        assert torch.equal(clean, poisoned), part
    assert not found[1][1].cpu()[blind[:, None].expand(case.q.shape[:3])].any()
    assert not found[1][2].cpu()[unseen[:, None].expand(case.k.shape[:3])].any()

    exact = replace(case, q=case.q.double(), k=torch.where(unseen[:, None, :, None], 0.0, case.k).double()).leaves()
    expected = gradients(by_loops(exact, heatmap, window, 8**-0.5, chosen), exact, direction.where(~constant, 0.0))
    for part, one, wide in zip(("result", "grad q", "grad k"), found[1], expected, strict=True):
        assert_close(one, wide, name=part, floor=4e-6)


@HEATMAP
def test_a_nan_that_takes_part_shows(backend_name: str, device: torch.device, heatmap: bool) -> None:
    """In what depends on it. What does not keeps its bits, but for one thing (see below)."""
    case = replace(SHORT, positions=positions([1, 9, 12, 20, 30, 39], [39, 30, 20, 12, 9, 1]))
    direction = torch.rand((2, 4, 40) if heatmap else (2, 4, 6, 3))
    leaves = case.to(device).leaves()
    clean = gradients(call(leaves, heatmap, None), leaves, direction)
    for broken in ("query", "key"):
        spoilt = case.to(device).leaves()
        with torch.no_grad():
            if broken == "query":  # of head 3, at position 20
                spoilt.q[0, 3, 3, 1] = NAN
            else:  # seen from position 16 on, in heads 2 and 3
                spoilt.k[0, 1, 16, 2] = NAN
        result, grad_q, grad_k = gradients(call(spoilt, heatmap, None), spoilt, direction)
        if broken == "query":
            queries, keys = [(3, 3)], [(1, slice(0, 21))]
        else:
            queries, keys = [(2, slice(3, 6)), (3, slice(3, 6))], [(1, slice(0, 40))]
        shows = [torch.zeros(tensor.shape, dtype=torch.bool) for tensor in (result, grad_q, grad_k)]
        for head, rows in queries:
            shows[1][0, head, rows] = True
            if not heatmap:
                shows[0][0, head, rows] = True
        if heatmap:
            image = case.segments[0] == 1
            for head in {head for head, _ in queries}:
                reach = 21 if broken == "query" else 40
                shows[0][0, head, :reach] = image[:reach]
        for head, rows in keys:
            shows[2][0, head, rows] = True
        for index, (one, other, nan) in enumerate(zip((result, grad_q, grad_k), clean, shows, strict=True)):
            if index == 1 and broken == "key" and backend_name == "triton":
                # A tile's queries share its keys, also those that only some of them see.
                assert one.cpu()[nan].isnan().all()
                continue
            assert torch.equal(one.isnan().cpu(), nan), (broken, index)
            assert torch.equal(one.cpu()[~nan], other.cpu()[~nan]), (broken, index)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
def test_queries_of_weight_zero_are_not_read(backend_name: str, device: torch.device, padded: bool) -> None:
    """Nor is what the forward pass said of them."""
    case = draw(((12, 30), (12, 30)), heads=4, size=8, packed=not padded).to(device)
    boundaries = [None if tensor is None else tensor.long() for tensor in (case.cu_seqlens_q, case.cu_seqlens_k)]
    weights = torch.rand((2, 12) if padded else (24,), generator=torch.Generator().manual_seed(1)).to(device)
    weights[..., 3:7] = 0.0
    labels = case.segments.clamp(max=1).int()
    for window in (0, 2):
        _, _, lse = registry.call(
            "attention_mass", device, torch.float32, q=case.q, k=case.k, key_segments=labels, query_positions=None,
            cu_seqlens_q=boundaries[0], cu_seqlens_k=boundaries[1], num_segments=2, scale=0.3, window=window,
            per_head=True,
        )  # fmt: skip
        lse = lse.float()
        found = []
        for value in (0.0, NAN):
            q, spoilt_lse = case.q.clone(), lse.clone()
            rows = q[:, :, 3:7] if padded else q[3:7]
            rows.fill_(value)
            spoilt_lse[..., 3:7] = value
            arguments = {
                "q": q, "k": case.k, "key_segments": labels, "query_positions": None, "query_weights": weights,
                "lse": spoilt_lse, "cu_seqlens_q": boundaries[0], "cu_seqlens_k": boundaries[1], "scale": 0.3,
                "window": window,
            }  # fmt: skip
            heat = registry.call("attention_heatmap", device, torch.float32, **arguments, per_head=True)
            grad = torch.ones(heat.shape, device=device).cumsum(-1)
            grads = registry.call("attention_heatmap_backward", device, torch.float32, **arguments, grad_heat=grad)
            found.append([heat, *grads])
        for clean, poisoned in zip(*found, strict=True):
            assert poisoned.isfinite().all() and torch.equal(clean, poisoned)


FAR = [2**31 - 2, 2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, -(2**63), -(2**31), -(2**32) + 5, 12, 24, 25, 30, 0, -1]
FAR_WINDOWS = [2**31 - 1, 2**31 - 10, 2**31 + 3, 2**32 - 20, 2**63 - 1, 2**63 - 12]


@pytest.mark.parametrize("window", [None, 1, 5, 24, 25, 26, *FAR_WINDOWS])
@HEATMAP
def test_positions_and_windows_of_any_size(
    backend_name: str, device: torch.device, heatmap: bool, window: int | None
) -> None:
    """A position behind the last key sees what its window reaches, by arithmetic that does not overflow."""
    case = replace(draw(((14, 25),), heads=2, size=8), positions=positions(FAR))
    direction = torch.randn((1, 2, 25) if heatmap else (1, 2, 14, 3), generator=torch.Generator().manual_seed(3))
    leaves, exact = case.to(device).leaves(), case.to(torch.float64).leaves()
    found = gradients(call(leaves, heatmap, window), leaves, direction)
    expected = gradients(by_loops(exact, heatmap, window, 8**-0.5, None), exact, direction)
    for part, one, wide in zip(("result", "grad q", "grad k"), found, expected, strict=True):
        assert_close(one, wide, name=part, floor=4e-6)


def test_far_positions_of_a_packed_batch(backend_name: str, device: torch.device) -> None:
    case = draw(((3, 9), (2, 0), (4, 20)), heads=2, size=8, packed=True)
    far = torch.tensor([2**63 - 1, 2**31, -(2**63), 0, 2**40, 2**63 - 1, 2**32 + 1, 19, -1])
    near = torch.tensor([8, 8, -1, -1, -1, 19, 19, 19, -1])
    one, other = (replace(case, positions=value).to(device) for value in (far, near))
    assert torch.equal(mass(one, per_head=True), mass(other, per_head=True))
    found, expected = (mass(given, window=2**63 - 1) for given in (one, other))
    assert not found[[0, 5]].isnan().any() and torch.equal(
        found[[1, 2, 3, 4, 6, 7, 8]], expected[[1, 2, 3, 4, 6, 7, 8]]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_below_float32_get_nothing(backend_name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Scores of -infinity take nothing, also where a whole block of them comes before the first finite one."""
    q = torch.full((1, 1, 1, 1), 2.0**70, device=device, dtype=dtype)
    for far in (1, 150):
        k = torch.cat([torch.full((far,), -(2.0**70)), torch.zeros(2)]).to(q).view(1, 1, -1, 1)
        labels = torch.tensor([[0] * far + [1, 2]], device=device)
        leaves = q.clone().requires_grad_(), k.clone().requires_grad_()
        masses = attention_mass(*leaves, labels, scale=1.0)
        assert masses.tolist() == [[[0.0, 0.5, 0.5]]]
        heat = attention_heatmap(*leaves, labels > 0, scale=1.0)
        assert heat.tolist() == [[0.0] * far + [0.5, 0.5]]
        by_q, by_k = torch.autograd.grad(masses[..., 1].sum(), leaves)
        assert not by_q.any()
        assert by_k.flatten().tolist() == [0.0] * far + [2.0**68, -(2.0**68)]


@pytest.mark.parametrize("scale", [0.0, -0.3, -0.0, 1e-3, 1e-30, 1e-45, -1e-300, 5.0])
def test_scales_of_either_sign_and_none(backend_name: str, device: torch.device, scale: float) -> None:
    check(mass, draw(((5, 30), (5, 30)), mixed=True).to(device), scale=scale)


def test_a_scale_of_zero_looks_everywhere(backend_name: str, device: torch.device) -> None:
    case = draw(((5, 12),), heads=2).to(device)
    seen = torch.arange(12) <= torch.arange(7, 12)[:, None]
    counts = torch.stack([(seen & (case.segments[0].cpu() == segment)).sum(-1) for segment in range(3)], -1).double()
    assert_close(mass(case, scale=0.0), (counts / seen.sum(-1, keepdim=True))[None])
    leaves = case.leaves()
    mass(leaves, scale=0.0)[..., 0].sum().backward()
    assert not leaves.q.grad.any() and not leaves.k.grad.any()


@pytest.mark.parametrize("scale", [1e300, 3.5e38, -3.5e38, 2.0**127 * 1.01, INFINITY, -INFINITY, NAN, 10**400])
def test_scales_beyond_float32_are_refused(scale: float) -> None:
    case = draw(((2, 4),), heads=2)
    for heatmap in (False, True):
        with pytest.raises(ValueError, match=r"scale must be finite and within \+-2\*\*127, got"):
            call(case, heatmap, None, scale=scale)


def operator_arguments(device: torch.device, scale: float, num_segments: int) -> tuple[Any, ...]:
    q, k = torch.rand(1, 2, 1, 8, device=device), torch.rand(1, 1, 4, 8, device=device)
    labels = torch.zeros(1, 4, dtype=torch.int32, device=device)
    return q, k, labels, None, None, None, num_segments, scale, 0, True


@pytest.mark.parametrize("scale", [1e300, 3.5e38, -INFINITY, NAN])
def test_operators_refuse_scales_beyond_float32(exact_backend: str, device: torch.device, scale: float) -> None:
    operator = registry.implementation("attention_mass", exact_backend if exact_backend == "triton" else "cpp")
    operator(*operator_arguments(device, 0.5, 3))
    with pytest.raises(ValueError, match="scale must be finite and within"):
        operator(*operator_arguments(device, scale, 3))


@pytest.mark.parametrize("number", [attention_checks.MOST_SEGMENTS + 1, 10**6, 2**31 - 1, 2**31, 2**40, 2**63 - 1])
def test_more_segments_than_a_grid_has_are_refused(exact_backend: str, device: torch.device, number: int) -> None:
    """At once: nothing of their size is allocated."""
    operator = registry.implementation("attention_mass", exact_backend if exact_backend == "triton" else "cpp")
    with pytest.raises(ValueError, match="num_segments"):
        operator(*operator_arguments(device, 0.5, number))
    q, k, labels, *_ = operator_arguments(device, 0.5, number)
    with pytest.raises(
        ValueError, match=f"num_segments must be at most {attention_checks.MOST_SEGMENTS}, got {number}"
    ):
        attention_mass(q, k, labels, num_segments=number)


def test_many_segments(backend_name: str, device: torch.device) -> None:
    """More than a block, a program or a tile of keys has."""
    case = draw(((2, 70),), heads=2, size=8)
    wide = replace(case, segments=(torch.arange(70) * 37 % 1000)[None]).to(device)
    found = attention_mass(wide.q, wide.k, wide.segments, num_segments=1000)
    assert found.shape == (1, 2, 1000)
    check(mass, wide, num_segments=1000)


def test_as_many_segments_as_are_allowed() -> None:
    q, k, labels, *_ = operator_arguments(torch.device("cpu"), 0.5, 3)
    labels[0] = torch.tensor([0, attention_checks.MOST_SEGMENTS - 1, 7, -1])
    found = attention_mass(q, k, labels, num_segments=attention_checks.MOST_SEGMENTS)
    exact = attention_mass(q, k, torch.tensor([[0, 2, 1, -1]]), num_segments=3)
    # The default position of the query is the last key, so it sees all three.
    assert same_bits(found[..., [0, 7, attention_checks.MOST_SEGMENTS - 1]], exact)
    assert_close(found.sum(-1), torch.ones(1, 1, dtype=torch.float64))
