"""attention_shift on every backend, against loops that build each distribution."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_attention_mass import CASES, RAGGED, Attention, draw
from tolerance import assert_close
from torch import Tensor

from vgpo_kernels import attention_shift
from vgpo_kernels.ops import attention_shift as module

FLOOR = 1e-5
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "per head": {"per_head": True},
    "window": {"window": 17},
    "window, per head": {"window": 17, "per_head": True},
    "scale": {"scale": 0.05},
    "text": {"segment": (1, 2)},
}


def shift(case: Attention, **options: Any) -> Tensor:
    return attention_shift(case.q, case.k, case.segments, **case.layout, **options)


def responses_of(case: Attention) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Queries ``[Hq, T, d]`` and keys ``[Hk, S, d]`` in fp64, segments and positions of each response."""
    found = []
    if case.cu_seqlens_q is None or case.cu_seqlens_k is None:
        for index in range(len(case.q)):
            q, k = case.q[index].double().cpu(), case.k[index].double().cpu()
            last = torch.arange(q.shape[1]) + k.shape[1] - q.shape[1]
            positions = last if case.positions is None else case.positions[index].cpu()
            found.append((q, k, case.segments[index].cpu(), positions))
        return found
    queries, keys = case.cu_seqlens_q.tolist(), case.cu_seqlens_k.tolist()
    for index in range(len(queries) - 1):
        rows, columns = slice(*queries[index : index + 2]), slice(*keys[index : index + 2])
        q, k = case.q[rows].double().cpu().transpose(0, 1), case.k[columns].double().cpu().transpose(0, 1)
        last = torch.arange(q.shape[1]) + k.shape[1] - q.shape[1]
        positions = last if case.positions is None else case.positions[rows].cpu()
        found.append((q, k, case.segments[columns].cpu(), positions))
    return found


def by_loops(case: Attention, *, segment: Any = 0, scale: float | None = None, window: int = 0, per_head: bool = False):
    """The definition: distributions of two queries over the keys that both see, and the arc between them."""
    chosen = [segment] if isinstance(segment, int) else list(segment)
    rows = []
    for q, k, labels, positions in responses_of(case):
        heads, queries, size = q.shape
        shifts = torch.full((heads if per_head else 1, queries), math.nan, dtype=torch.float64)
        factor = size**-0.5 if scale is None else scale

        def attention(t: int, q: Tensor = q, k: Tensor = k, labels=labels, positions=positions, factor=factor):
            places = torch.arange(len(labels))
            seen = (labels >= 0) & (places <= positions[t])
            seen &= places > positions[t] - window if window else seen
            weights = torch.zeros(len(q), len(labels), dtype=torch.float64)
            for head in range(len(q)):
                scores = k[head * len(k) // len(q)][seen] @ q[head, t] * factor
                weights[head, seen] = scores.softmax(-1)
            return weights if per_head else weights.mean(0, keepdim=True), seen

        for t in range(1, queries):
            (before, seen_before), (after, seen_after) = attention(t - 1), attention(t)
            common = seen_before & seen_after & torch.isin(labels, torch.tensor(chosen))
            if not common.any():
                continue
            p, r = (part[:, common] / part[:, common].sum(-1, keepdim=True) for part in (before, after))
            shifts[:, t] = 2 * (p * r).sqrt().sum(-1).clamp(max=1).arccos()
        rows.append(shifts)
    found = torch.stack(rows) if case.cu_seqlens_q is None else torch.cat(rows, -1)
    return found if per_head else found.squeeze(-2)


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_settings_match_the_definition(backend_name: str, device: torch.device, options: str, packed: bool) -> None:
    case = draw(RAGGED if packed else ((7, 30), (7, 30)), packed=packed, mixed=True).to(device)
    found = shift(case, **SETTINGS[options])
    assert found.dtype == torch.float32
    assert_close(found, by_loops(case, **SETTINGS[options]), floor=FLOOR)


@pytest.mark.parametrize("case", CASES)
def test_cases_match_the_definition(backend_name: str, device: torch.device, case: str) -> None:
    assert_close(shift(CASES[case].to(device)), by_loops(CASES[case]), floor=FLOOR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend_name: str, device: torch.device, dtype: torch.dtype) -> None:
    case = draw(((6, 37), (6, 37)), mixed=True, dtype=dtype).to(device)
    assert_close(shift(case), by_loops(case), floor=FLOOR)


def test_chunks_change_nothing(backend_name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(((23, 40),), mixed=True).to(device)
    whole = shift(case)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    monkeypatch.setattr(module, "FEWEST_QUERIES", 4)
    assert_close(shift(case), whole.double(), floor=FLOOR)


def test_ends_of_the_range(backend_name: str, device: torch.device) -> None:
    """The same query again, one that looks elsewhere, and one that sees nothing."""
    case = draw(((4, 12),), heads=2, key_heads=1, size=16, num_segments=1).to(device)
    k = torch.eye(12, 16, device=device)[None, None]
    here, there = 400 * k[0, 0, 3], 400 * k[0, 0, 8]
    q = torch.stack([here, here, there, here])[None, None].expand(1, 2, -1, -1)
    case = replace(case, q=q, k=k, positions=torch.tensor([[11, 11, 11, -1]], device=device))
    found = shift(case)[0]
    assert found[0].isnan()
    assert found[1] == 0
    assert found[2].item() == pytest.approx(math.pi)
    assert found[3].isnan()
    assert shift(case, segment=1).isnan().all()


def test_a_small_shift_keeps_its_digits(backend_name: str, device: torch.device) -> None:
    """In float32 arccos of the sum would say 0 or 5e-4."""
    case = draw(((2, 40),), num_segments=1)
    q = case.q.clone()
    q[:, :, 1] = q[:, :, 0] + 1e-4 * torch.randn(q[:, :, 0].shape, generator=torch.Generator().manual_seed(3))
    case = replace(case, q=q, positions=torch.tensor([[39, 39]])).to(device)
    found, wanted = shift(case)[0, 1].item(), by_loops(case)[0, 1].item()
    assert 1e-5 < wanted < 1e-3
    assert found == pytest.approx(wanted, abs=1e-5)


def test_faint_attention_to_the_image_is_normalised(backend_name: str, device: torch.device) -> None:
    """What is looked at of it is e^-200 of the whole, which float32 does not have."""
    case = draw(((3, 12),), heads=2, key_heads=2, size=8, num_segments=2).to(device)
    k = case.k.clone()
    k[:, :, 6:] = 0
    k[:, :, 6:, 0] = 200 * 8**0.5
    q = case.q.clone()
    q[..., 0] = 1
    case = replace(case, q=q, k=k)
    assert_close(shift(case), by_loops(case), floor=1e-4)
    assert shift(case)[0, 1:].gt(0.1).all()


def test_broken_scores_are_told_from_no_image(backend_name: str, device: torch.device) -> None:
    case = draw(((5, 20), (5, 20)), num_segments=1).to(device)
    expected = shift(case)
    q = case.q.clone()
    q[0, 0, 2, 0] = math.nan
    found = shift(replace(case, q=q))
    assert found[0, 2:4].isposinf().all()
    assert torch.equal(found[0, [1, 4]], expected[0, [1, 4]])
    assert torch.equal(found[1, 1:], expected[1, 1:])


def test_it_is_detached(backend_name: str, device: torch.device) -> None:
    assert not shift(draw(((3, 9),)).to(device).leaves()).requires_grad
