"""attention_mass by the products of warpgroups on a Hopper GPU: against fp64, and beside the default kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from gpu_calls import NEEDS_HOPPER_KERNELS, captured
from tolerance import assert_close, floor_of, same_bits
from torch import Tensor

from vgpo_kernels import attention_mass, backend

pytestmark = NEEDS_HOPPER_KERNELS

DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def cuda_backend() -> Iterator[None]:
    with backend("cuda"):
        yield


class Case(NamedTuple):
    heads: int
    key_heads: int
    queries: int
    keys: int
    size: int
    segments: int = 3
    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    mixed: bool = False  # segments change from key to key, and some keys are in none
    window: int | None = None
    lengths: tuple[tuple[int, int], ...] = ()  # of a packed batch, in the place of batch, queries and keys

    def draw(self) -> dict[str, Tensor]:
        """Draw queries, keys and segments; keys to ignore are NaN."""
        generator = torch.Generator("cuda").manual_seed(0)
        queries, keys = [sum(side) for side in zip(*self.lengths, strict=True)] or (self.queries, self.keys)
        outer = () if self.lengths else (self.batch,)

        def normal(tokens: int, heads: int) -> Tensor:
            drawn = torch.randn(*outer, tokens, heads, self.size, device="cuda", generator=generator).to(self.dtype)
            return drawn if self.lengths else drawn.transpose(1, 2)

        q, k = normal(queries, self.heads), 1.5 * normal(keys, self.key_heads)
        labels = (torch.arange(keys, device="cuda") * self.segments // keys).expand(*outer, keys).clone()
        if self.mixed:
            labels = torch.randint(-1, self.segments, (*outer, keys), device="cuda", generator=generator)
        ignored = (labels < 0)[..., None, None]
        k = torch.where(ignored if self.lengths else ignored.transpose(1, 2), torch.nan, k)
        drawn = {"q": q, "k": k, "key_segments": labels.to(torch.int32)}
        if self.lengths:
            starts = torch.tensor([(0, 0), *self.lengths], device="cuda").cumsum(0).to(torch.int32)
            drawn |= {"cu_seqlens_q": starts[:, 0].contiguous(), "cu_seqlens_k": starts[:, 1].contiguous()}
        return drawn

    def masses(self, drawn: dict[str, Tensor]) -> Tensor:
        return attention_mass(**drawn, num_segments=self.segments, window=self.window, per_head=True)


CASES = {
    "7B": Case(28, 4, 2048, 3072, 128, batch=1),
    "7B, fp16": Case(28, 4, 500, 900, 128, dtype=torch.float16),
    "a tile and a bit": Case(7, 1, 20, 70, 128),
    "one query": Case(4, 2, 1, 1000, 64),
    "64": Case(12, 4, 700, 1003, 64),
    "64, fp16": Case(6, 6, 129, 333, 64, dtype=torch.float16),
    "mixed": Case(8, 2, 300, 777, 128, segments=11, mixed=True),
    "window": Case(8, 2, 600, 1500, 128, window=200),
    "packed": Case(8, 2, 0, 0, 128, lengths=((3, 90), (700, 1500), (0, 5), (66, 200), (2, 2))),
    "packed, mixed, 64": Case(4, 1, 0, 0, 64, mixed=True, lengths=((300, 300), (1, 64), (65, 129))),
}


def both(case: Case, drawn: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Return masses by warpgroups, and by the other kernel."""
    monkeypatch.setenv("VGPO_WARPGROUP_ATTENTION", "1")
    found = case.masses(drawn)
    monkeypatch.setenv("VGPO_WARPGROUP_ATTENTION", "0")
    return found, case.masses(drawn)


@pytest.mark.parametrize("name", CASES)
def test_masses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    drawn = case.draw()
    found, by_warps = both(case, drawn, monkeypatch)
    floor = floor_of(terms=case.keys or 1500, device=DEVICE)
    assert_close(found, by_warps.double(), name="masses beside the other kernel", floor=2 * floor)
    if case.queries > 1000:
        return  # the definition needs all scores in fp64
    with backend("reference"):
        exact = case.masses(drawn | {name: drawn[name].double() for name in ("q", "k")})
    assert_close(found, exact, name="masses", floor=floor)


def test_the_kernel_that_is_asked_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, case = CASES["64"].draw(), CASES["64"]
    case.masses(drawn)
    for value, kernel in (("1", "attention_warpgroup_kernel"), ("0", "attention_mass_kernel")):
        monkeypatch.setenv("VGPO_WARPGROUP_ATTENTION", value)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            case.masses(drawn)
            torch.cuda.synchronize()
        ran = [event.name for event in profile.events() if "kernel" in event.name]
        if not ran:
            pytest.skip("the profiler sees no kernels here")
        assert any(kernel in one for one in ran), ran


def test_a_call_has_the_same_bits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """While other blocks come in other orders, in a batch that fills the device more than once."""
    monkeypatch.setenv("VGPO_WARPGROUP_ATTENTION", "1")
    for name in ("7B", "mixed", "64"):
        drawn = CASES[name].draw()
        expected = CASES[name].masses(drawn)
        for _ in range(30):
            assert same_bits(CASES[name].masses(drawn), expected)


def test_numbers_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(4, 2, 300, 500, 64)
    drawn = case.draw()
    clean, _ = both(case, drawn, monkeypatch)
    drawn["q"][0, 1, 7] = torch.nan
    drawn["k"][1, 1, 400, 5] = torch.inf
    found, by_warps = both(case, drawn, monkeypatch)
    assert torch.equal(found.isnan(), by_warps.isnan())
    assert found[0, 1, 7].isnan().all()
    touched = torch.zeros_like(found, dtype=torch.bool)
    touched[0, 1, 7] = touched[1, 2:, 200:] = True  # queries that see the key, in the heads that share it
    assert torch.equal(found[~touched], clean[~touched])


def test_gradients_take_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(8, 2, 200, 400, 128)
    drawn, gradients = case.draw(), []
    for value in ("1", "0"):
        monkeypatch.setenv("VGPO_WARPGROUP_ATTENTION", value)
        inputs = {name: drawn[name].detach().requires_grad_() for name in ("q", "k")}
        masses = case.masses(drawn | inputs)
        gradients.append(torch.autograd.grad(masses.square().sum(), list(inputs.values())))
    for one, other in zip(*gradients, strict=True):
        assert ((one.double() - other.double()).norm() / other.double().norm()).item() < 4e-3


def test_a_call_is_captured_into_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGPO_WARPGROUP_ATTENTION", "1")
    case = CASES["64"]
    drawn = case.draw()
    expected = case.masses(drawn)
    graph, masses = captured(lambda: case.masses(drawn))
    masses.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(masses, expected)
