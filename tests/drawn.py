"""What the property tests draw with hypothesis, and how they compare: to the bit on the C++ backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Batch, Response
from hypothesis import settings
from hypothesis import strategies as st
from tolerance import assert_close, same_bits

from vgpo_kernels import VGPOConfig, backends
from vgpo_kernels.config import CHOICES

# The vector code is what could go wrong, so the C++ backend is drawn on; the reference where it is not built.
ON_THE_CPU = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="drawn on the CPU: on a GPU the parametrised tests run on every backend"
    ),
    pytest.mark.usefixtures("drawn_backend"),
]
BACKEND = "cpp" if backends.describe()["built"]["cpp"] else "reference"
EXACT = BACKEND == "cpp"
CASES = settings(max_examples=140, deadline=None, derandomize=True)
MANY, FEW = settings(CASES, max_examples=400), settings(CASES, max_examples=60)  # of the quick ones, and of the slow
# What arithmetic would carry on: multiplied by zero they are NaN, or vanish beside nothing.
POISONS = [float("nan"), float("inf"), float("-inf"), 3e38]

responses = st.lists(
    st.builds(
        Response,
        visual=st.integers(0, 12),
        text=st.integers(0, 4),
        length=st.integers(0, 40),
        group=st.integers(-2, 3),
        holes=st.booleans(),
        late=st.integers(0, 4),
    ),
    max_size=7,
).map(tuple)
# Exactly the positions of tokens in responses of some lengths, and others far from them.
ratios = st.one_of(
    st.builds(lambda whole, part: part % whole / whole, st.integers(1, 40), st.integers(0, 39)),
    st.floats(0, 0.9).map(lambda ratio: ratio + 1.7e-5),
)
configs = st.builds(
    VGPOConfig,
    beta=st.one_of(st.floats(0, 2), st.just(1e4)),
    tail_ratio=st.floats(0, 1),
    top_ratio=st.floats(0.01, 1),
    schedule=st.sampled_from(CHOICES["schedule"]),
    start_ratio=st.one_of(ratios, st.just(0.9999999)),
    step_ratio=ratios,
    gate=st.booleans(),
    intra=st.booleans(),
    inter=st.booleans(),
    position=st.sampled_from(CHOICES["position"]),
    accumulation=st.sampled_from(CHOICES["accumulation"]),
)
seeds = st.integers(0, 10_000)
visibilities = st.sampled_from(("all", "causal"))


def same(one: torch.Tensor, two: torch.Tensor, name: str) -> None:
    """Assert the same bits; closeness where the reference is drawn on."""
    if EXACT:
        assert same_bits(one, two), name
    else:
        assert_close(one, two.double(), name=name)


def part_of(batch: Batch, index: torch.Tensor) -> Batch:
    """Some responses of a padded batch."""
    return replace(batch, **{name: value[index] for name, value in vars(batch).items() if value is not None})
