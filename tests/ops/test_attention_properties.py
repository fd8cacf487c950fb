"""Properties of attention shares and heatmaps, drawn by hypothesis."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from cases import default_dtype
from drawn import FEW, ON_THE_CPU, POISONS, same, seeds
from hypothesis import given
from hypothesis import strategies as st
from test_attention_edges import FAR, FAR_WINDOWS, seen_by
from test_attention_mass import Attention, draw

from vgpo_kernels import attention_heatmap, attention_mass

pytestmark = ON_THE_CPU


lengths = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30)).map(sorted), min_size=1, max_size=4).map(tuple)
windows = st.one_of(st.none(), st.integers(1, 12))


def attend(case: Attention, window: int | None, **options: Any) -> list[torch.Tensor]:
    """Masses and heatmap of every head."""
    options |= case.layout | {"window": window, "per_head": True}
    mass = attention_mass(case.q, case.k, case.segments, **options)
    heat = attention_heatmap(case.q, case.k, case.segments == 1, attention_mask=case.segments >= 0, **options)
    return [mass, heat]


def takes_part(case: Attention, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which queries of a packed batch see a key, and which keys some query sees."""
    assert case.positions is not None and case.cu_seqlens_q is not None and case.cu_seqlens_k is not None
    queries = torch.zeros(case.q.shape[0], dtype=torch.bool)
    keys = torch.zeros(case.k.shape[0], dtype=torch.bool)
    begins = zip(case.cu_seqlens_q.tolist(), case.cu_seqlens_k.tolist(), strict=True)
    for (begin, key_begin), (end, key_end) in pairwise(begins):
        labels, positions = case.segments[key_begin:key_end].tolist(), case.positions[begin:end].tolist()
        for query, seen in enumerate(seen_by(labels, positions, window), begin):
            queries[query] = bool(seen)
            keys[[key_begin + key for key in seen]] = True
    return queries, keys


@FEW
@given(
    lengths,
    seeds,
    st.one_of(windows, st.sampled_from(FAR_WINDOWS)),
    st.one_of(st.just(0.0), st.floats(-2, 2)),
    st.sampled_from(POISONS),
    st.sampled_from(("plain", "heads apart", "wide rows", "one query for all heads")),
    st.randoms(),
)
def test_attention_reads_no_row_that_takes_no_part(
    drawn: tuple[tuple[int, int], ...],
    seed: int,
    window: int | None,
    scale: float,
    poison: float,
    strides: str,
    random: Any,
) -> None:
    """Neither do its gradients: queries without a key to see, keys that no query sees, gradients of their results."""
    case = draw(drawn, heads=4, key_heads=2, size=8, packed=True, mixed=True, seed=seed)
    near = range(-3, case.k.shape[0] + 1)
    case = replace(case, positions=torch.tensor([random.choice((*near, *FAR)) for _ in case.q], dtype=torch.int64))
    if strides == "one query for all heads":
        case = replace(case, q=case.q[:, :1].expand(-1, 4, -1))
    queries, keys = takes_part(case, window)
    results = []
    for value in (0.0, poison):
        q = case.q.masked_fill(~queries[:, None, None], value)
        k = case.k.masked_fill(~keys[:, None, None], value)
        if strides == "heads apart":
            q, k = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (q, k))
        elif strides == "wide rows":
            q, k = (
                torch.full((*tensor.shape[:2], 11), poison).index_copy(2, torch.arange(1, 9), tensor)[..., 1:9]
                for tensor in (q, k)
            )
        elif strides == "one query for all heads":
            q = q[:, :1].expand(-1, 4, -1)
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        parts = attend(replace(case, q=q, k=k), window, scale=scale)
        results.append([part.detach() for part in parts])
        for part, counts in zip(parts, (queries, keys), strict=True):
            direction = torch.randn(part.shape, generator=torch.Generator().manual_seed(seed))
            direction = direction.movedim(1, -1).masked_fill(~counts, value).movedim(-1, 1)
            results[-1] += torch.autograd.grad(part, (q, k), direction)
    for clean, poisoned in zip(*results, strict=True):
        assert poisoned.isfinite().all() and torch.equal(clean, poisoned)
    for grad_q, grad_k in (results[1][2:4], results[1][4:6]):
        assert not grad_q[~queries].any() and not grad_k[~keys].any()


@FEW
@given(lengths, seeds, windows, st.sampled_from((torch.float64, torch.bfloat16, torch.float16)))
def test_the_default_dtype_of_torch_does_not_show_in_attention(
    drawn: tuple[tuple[int, int], ...], seed: int, window: int | None, dtype: torch.dtype
) -> None:
    case = draw(drawn, heads=2, key_heads=1, size=8, packed=True, mixed=True, seed=seed)

    def everything() -> list[torch.Tensor]:
        leaves = case.leaves()
        parts = attend(leaves, window)
        grads = [torch.autograd.grad(part, (leaves.q, leaves.k), torch.ones_like(part).cumsum(1)) for part in parts]
        return [*parts, *grads[0], *grads[1]]

    expected = everything()
    with default_dtype(dtype):
        found = everything()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@FEW
@given(lengths, seeds, windows, st.randoms())
def test_attention_of_a_response_is_its_own(
    drawn: tuple[tuple[int, int], ...], seed: int, window: int | None, random: object
) -> None:
    """Alone, or in a packed batch of any order: the same masses and heat, to the bit."""
    case = draw(drawn, heads=4, key_heads=2, size=8, packed=True, mixed=True, seed=seed)
    assert case.cu_seqlens_q is not None and case.cu_seqlens_k is not None
    order = list(range(len(drawn)))
    random.shuffle(order)  # type: ignore[attr-defined]

    def split(tensor: torch.Tensor, boundaries: torch.Tensor, dim: int = 0) -> list[torch.Tensor]:
        return [*tensor.split(boundaries.diff().tolist(), dim)]

    def joined(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        return torch.cat([parts[index] for index in order], dim)

    def bounds(boundaries: torch.Tensor) -> torch.Tensor:
        lengths = boundaries.diff()[torch.tensor(order)]
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()

    sides = {"q": case.cu_seqlens_q, "k": case.cu_seqlens_k, "segments": case.cu_seqlens_k}
    pieces = {name: split(getattr(case, name), boundaries) for name, boundaries in sides.items()}
    shuffled = replace(
        case,
        **{name: joined(parts) for name, parts in pieces.items()},
        cu_seqlens_q=bounds(case.cu_seqlens_q),
        cu_seqlens_k=bounds(case.cu_seqlens_k),
    )
    whole, again = attend(case, window), attend(shuffled, window)
    for result, other, boundaries in zip(whole, again, (case.cu_seqlens_q, case.cu_seqlens_k), strict=True):
        parts = split(result, boundaries, 1)
        same(other, joined(parts, 1), "another order")
        for index, part in enumerate(parts):
            alone = Attention(
                *(pieces[name][index].transpose(0, 1)[None] for name in ("q", "k")), pieces["segments"][index][None]
            )
            found = attend(alone, window)[0 if result is whole[0] else 1]
            same(found[0], part, "alone")
