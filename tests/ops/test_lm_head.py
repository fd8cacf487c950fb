"""The LM head in chunks: what is computed and what is held, and each backend's arithmetic of one chunk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_cases import DTYPES, check, gradients, logprob, make_head
from tolerance import assert_close, floor_of
from torch import Tensor

from vgpo_kernels import backend, backends, linear_logprob
from vgpo_kernels.ops.linear_logprob import compute, compute_backward
from vgpo_kernels.ops.lm_head import HeadKernels, compiled_kernels, new_statistics
from vgpo_kernels.reference import linear_logprob as reference
from vgpo_kernels.reference.linear_logprob import IGNORED, gradient_of
from vgpo_kernels.reference.logits import LogitMap

if backends.describe()["built"]["cpp"]:
    from vgpo_kernels import _C

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def kernels(exact_backend: str, device: torch.device) -> HeadKernels:
    """Kernels of a compiled backend."""
    if exact_backend == "triton":
        from vgpo_kernels.triton_kernels.linear_logprob import KERNELS

        return KERNELS
    return compiled_kernels(device)


class Counted:
    """Kernels that count the chunks they are given, and remember the largest."""

    def __init__(self, kernels: HeadKernels) -> None:
        self.calls: dict[str, int] = {}
        self.logits = 0
        self.kernels = kernels._replace(
            statistics=self._counting("statistics", kernels.statistics),
            gradient=self._counting("gradient", kernels.gradient),
            product=self._counting("product", kernels.product),
        )

    def _counting(self, name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def count(*arguments: Any) -> None:
            self.calls[name] = self.calls.get(name, 0) + 1
            if name != "product":
                self.logits = max(self.logits, arguments[10].numel())
            kernel(*arguments)

        return count


@pytest.fixture
def counted(kernels: HeadKernels) -> Counted:
    """Counting kernels of a compiled backend."""
    return Counted(kernels)


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True), (False, False)])
def test_what_is_frozen_costs_no_product(counted: Counted, device: torch.device, needed: tuple[bool, bool]) -> None:
    head = make_head(16, 8, 2048).to(device)
    arguments = (head.hidden, head.weight, None, head.targets, 0, *LogitMap(), None)
    statistics = compute(counted.kernels, *arguments, 4 * 16 * 1024)
    assert counted.calls == {"statistics": 2}
    found = compute_backward(
        counted.kernels, torch.ones_like(statistics), statistics, *arguments, [*needed, False], 4 * 16 * 1024
    )
    assert counted.calls.get("product", 0) == 2 * sum(needed)
    assert [gradient.numel() > 0 for gradient in found] == [*needed, False]


def test_autograd_asks_only_for_what_needs_a_gradient(exact_backend: str, device: torch.device) -> None:
    head = make_head(16, 8, 64, bias=True).to(device)
    hidden = head.hidden.clone().requires_grad_()
    total = linear_logprob(hidden, head.weight, head.targets, bias=head.bias)
    assert isinstance(total, Tensor)
    total.sum().backward()
    assert hidden.grad is not None and head.weight.grad is None


def test_a_chunk_is_bounded_and_ignored_rows_are_left_out(counted: Counted, device: torch.device) -> None:
    head = make_head(64, 8, 4096, ignored=0.5).to(device)
    kept = int((head.targets != IGNORED).sum())
    chunk_bytes = 4 * 20 * 1024
    compute(counted.kernels, head.hidden, head.weight, None, head.targets, 0, *LogitMap(), IGNORED, chunk_bytes)
    assert counted.logits <= chunk_bytes // 4
    # 1024 columns at a time, and as many of the kept rows as fit beside them.
    assert counted.calls["statistics"] == 4 * -(-kept // 20)


def test_peak_memory_is_a_fraction_of_the_logits(exact_backend: str, device: torch.device) -> None:
    if exact_backend == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter has memory of its own")
    head = make_head(1024, 64, 16384).to(device)
    leaves = head.leaves()

    def run() -> None:
        logp, entropy = logprob(head, leaves)
        torch.autograd.grad(logp.sum() + entropy.sum(), leaves)

    results = sum(4 * leaf.numel() for leaf in leaves)
    assert peak_bytes(run, device) - results <= 4 * 1024 * 16384 / 8


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most memory that torch's allocator had handed out at a time during a call, above what it had before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_small_workspaces_change_nothing_but_rounding(exact_backend: str, device: torch.device) -> None:
    head = make_head(50, 32, 3000)
    for chunk_bytes in (None, 4 * 777, 4 * 50 * 1024):
        check(head, device, chunk_bytes=chunk_bytes)


def test_threads_change_no_bit() -> None:
    if not backends.describe()["built"]["cpp"]:
        pytest.skip("the extension is not built")
    head = make_head(300, 64, 5000, dtype=torch.bfloat16)
    left, right = torch.rand(300, 5000), torch.rand(5000, 64)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            with backend("cpp"):
                found.append([*logprob(head), *gradients(head), left @ right])
    finally:
        torch.set_num_threads(threads)
    # Processors without matrix units for bf16 take torch's own products, whose bits may depend on the threads.
    torchs_depend = not torch.equal(found[0].pop(), found[1].pop())
    for one, other in zip(*found, strict=True):
        if torchs_depend:
            assert_close(one.float(), other.double(), floor=floor_of(one.dtype))
        else:
            assert torch.equal(one, other)


def instruction_sets(name: str) -> list[str | None]:
    """Every instruction set of the C++ backend; of the others ``None``, as they come."""
    return list(backends.describe()["extension"]["simd_levels"]) if name == "cpp" else [None]


def run_kernels(
    statistics_of: Callable[..., None], gradient_of_chunk: Callable[..., None], dtype: torch.dtype, *arguments: Any
) -> dict[str, Tensor]:
    """Run a chunk's kernels from statistics of other columns; the gradient once from kept logits, once anew."""
    *chunk, running, coefficients = arguments
    shape = (running.shape[1], chunk[1].shape[0])
    logits, again = (running.new_full((shape[0], shape[1] + 7), float("nan"))[:, : shape[1]] for _ in range(2))
    running = running.clone()
    statistics_of(*chunk, running, logits, True)
    kept = logits.clone()
    gradient_of_chunk(*chunk, coefficients, logits, False)
    gradient_of_chunk(*chunk, coefficients, again, True)
    slopes = (gradient_of(values, dtype).clone() for values in (logits, again))
    names = ("statistics", "logits", "gradient", "gradient from scratch")
    return dict(zip(names, (running, kept, *slopes), strict=True))


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_match_their_definition(
    kernels: HeadKernels, exact_backend: str, device: torch.device, dtype: str, with_bias: bool, capped: bool
) -> None:
    head = make_head(19, 40, 333, dtype=DTYPES[dtype], bias=with_bias).to(device)
    begun = torch.stack([torch.full((19,), 1.5), torch.full((19,), 3.0), torch.full((19,), -2.0), torch.zeros(19)])
    coefficients = torch.randn(5, 19, generator=torch.Generator().manual_seed(2))
    coefficients[0] += 9  # a maximum, so that no probability explodes
    # A few targets lie before these columns of the vocabulary.
    logit_map = LogitMap(0.9, torch.linspace(0.5, 2, 19, device=device), 1.5, 4.0) if capped else LogitMap(0.9)
    arguments = (head.hidden, head.weight, head.bias, head.targets + 950, 1000, *logit_map)
    arguments += (begun.to(device), coefficients.to(device))
    exact, narrow = (
        run_kernels(
            partial(reference.head_statistics, dtype=precision),
            partial(reference.head_gradient, dtype=precision),
            head.hidden.dtype,
            *(value.double() if index >= 9 else value for index, value in enumerate(arguments)),
        )
        for precision in (torch.float64, torch.float32)
    )
    previous = None if exact_backend != "cpp" else _C.simd()
    for level in instruction_sets(exact_backend):
        if level is not None:
            _C.set_simd(level)
        try:
            actual = run_kernels(kernels.statistics, kernels.gradient, head.hidden.dtype, *arguments)
        finally:
            if level is not None:
                _C.set_simd(previous)
        for name, values in actual.items():
            floor = floor_of(head.hidden.dtype if name.startswith("gradient") else torch.float32)
            assert_close(values, exact[name].double(), narrow[name], name=f"{name} ({level})", floor=floor)


def test_a_cap_is_precise(kernels: HeadKernels, exact_backend: str, device: torch.device) -> None:
    """The largest logit of a single column is the tanh of its product: also of small ones, to a few units."""
    magnitudes = torch.cat([torch.logspace(-30, 1.2, 4000), torch.linspace(0.6, 0.65, 500), torch.tensor([0.0, 1e4])])
    # The interpreter takes each row by itself.
    products = torch.cat([magnitudes, -magnitudes])[:: 20 if exact_backend == "triton" else 1].to(device)
    exact = products.cpu().double().tanh()
    unit = torch.nextafter(exact.float().abs(), torch.tensor(2.0)) - exact.float().abs()
    targets = torch.zeros(len(products), dtype=torch.int64, device=device)
    previous = None if exact_backend != "cpp" else _C.simd()
    for level in instruction_sets(exact_backend):
        if level is not None:
            _C.set_simd(level)
        try:
            running, logits = new_statistics(products), torch.empty(len(products), 1, device=device)
            chunk = (products[:, None], torch.ones(1, 1, device=device), None, targets, 0)
            kernels.statistics(*chunk, *LogitMap(softcap=1.0), running, logits, False)
        finally:
            if level is not None:
                _C.set_simd(previous)
        errors = (running[0].cpu().double() - exact).abs() / unit
        assert errors.max() <= 2.5, f"{errors.max()} units in the last place ({level})"


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(37, 70, 33), (600, 130, 65), (1, 1, 1), (5, 64, 2049), (300, 1100, 20)])
def test_products_match_their_definition(
    kernels: HeadKernels, device: torch.device, shape: tuple[int, int, int], dtype: str, accumulate: bool
) -> None:
    rows, columns, depth = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, depth, generator=generator).to(DTYPES[dtype])
    right = torch.randn(depth, columns, generator=generator).to(DTYPES[dtype])
    expected = left.double() @ right.double() * (2 if accumulate else 1)
    for one in (left, left.T.contiguous().T):
        for other in (right, right.T.contiguous().T):
            result = torch.full((rows, columns + 3), float("nan"), device=device)[:, :columns]
            kernels.product(one.to(device), other.to(device), result, False)
            if accumulate:
                kernels.product(one.to(device), other.to(device), result, True)
            assert_close(result, expected, name="product", floor=floor_of(terms=depth, device=device))


def test_processors_without_matrix_units_agree(tmp_path: Path) -> None:
    if not backends.describe()["built"]["cpp"]:
        pytest.skip("the extension is not built")
    head = make_head(40, 32, 700, dtype=torch.bfloat16)
    with backend("cpp"):
        expected = [*logprob(head), *gradients(head)]
    script = (
        "import sys, torch; sys.path[:0] = sys.argv[2:]\n"
        "from linear_cases import backend, gradients, logprob, make_head\n"
        "head = make_head(40, 32, 700, dtype=torch.bfloat16)\n"
        "with backend('cpp'):\n"
        "    torch.save([*logprob(head), *gradients(head)], sys.argv[1])\n"
    )
    # The library that torch multiplies 16-bit matrices with is told of an older processor.
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    paths = [str(ROOT), str(ROOT / "tests")]
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "found"), *paths], env=environment, check=True)
    for name, one, other in zip(
        ("logp", "entropy", "hidden", "weight"), torch.load(tmp_path / "found"), expected, strict=True
    ):
        assert_close(one, other.double(), name=name, floor=floor_of(one.dtype, 700))
