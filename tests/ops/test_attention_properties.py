"""Properties of attention shares and heatmaps, drawn by hypothesis."""

from __future__ import annotations

from dataclasses import replace

import torch
from drawn import FEW, ON_THE_CPU, POISONS, same, seeds
from hypothesis import given
from hypothesis import strategies as st
from test_attention_mass import Attention, draw

from vgpo_kernels import attention_heatmap, attention_mass

pytestmark = ON_THE_CPU


lengths = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30)).map(sorted), min_size=1, max_size=4).map(tuple)
windows = st.one_of(st.none(), st.integers(1, 12))


def attend(case: Attention, window: int | None) -> list[torch.Tensor]:
    """Masses and heatmap of every head."""
    options = case.layout | {"window": window, "per_head": True}
    mass = attention_mass(case.q, case.k, case.segments, **options)
    heat = attention_heatmap(case.q, case.k, case.segments == 1, attention_mask=case.segments >= 0, **options)
    return [mass, heat]


@FEW
@given(lengths, seeds, windows, st.sampled_from(POISONS), st.randoms())
def test_attention_reads_no_ignored_key_nor_query(
    drawn: tuple[tuple[int, int], ...], seed: int, window: int | None, poison: float, random: object
) -> None:
    case = draw(drawn, heads=4, key_heads=2, size=8, packed=True, mixed=True, seed=seed)
    queries, keys = case.q.shape[0], case.k.shape[0]
    # Queries at a negative position see nothing.
    positions = torch.tensor([random.randint(-3, keys) for _ in range(queries)], dtype=torch.int64)  # type: ignore[attr-defined]
    results = []
    for value in (0.0, poison):
        q = torch.where((positions < 0)[:, None, None], value, case.q)
        k = torch.where((case.segments < 0)[:, None, None], value, case.k)
        results.append(attend(replace(case, q=q, k=k, positions=positions), window))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


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
