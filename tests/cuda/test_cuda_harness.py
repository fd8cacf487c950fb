"""The emulated GPU itself: correct kernels pass in every order, and each planted mistake is caught."""

from __future__ import annotations

import pytest
import torch
from emulation.harness import GUARDS, EmulationError, Emulator, Shape
from emulation.serving import adopt
from torch import Tensor

adopt(globals())

THREADS = 64
SCHEDULES = [("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2), ("interleaved", 0)]


def run(
    emulator: Emulator, name: str, order: str, seed: int = 0, *, guard: str = "after", blocks: int = 3
) -> tuple[str, Tensor, Tensor | None]:
    """Return the harness's message, the input, and the output of a kernel that it finds nothing wrong with."""
    values = torch.arange(1.0, blocks * THREADS + 1)
    with emulator.launched_as(Shape(blocks, THREADS, order, seed, guard)):
        try:
            return "", values, emulator.run_plant(values, name)
        except EmulationError as error:
            return str(error), values, None


def reversed_blocks(values: Tensor) -> Tensor:
    return values.view(-1, THREADS).flip(-1).flatten()


def rounds(values: Tensor) -> Tensor:
    return 3 * values.view(-1, THREADS).roll(-1, -1).flatten() + 3


def two_sums(values: Tensor) -> Tensor:
    sums = values.view(-1, THREADS).sum(-1, keepdim=True)
    return (2 * sums + THREADS).expand(-1, THREADS).flatten()


def neighbours(values: Tensor) -> Tensor:
    return values.roll(-THREADS)


def warp_sums(values: Tensor) -> Tensor:
    warps = values.view(-1, 32)
    return (warps.sum(-1, keepdim=True) + warps[:, :1]).expand(warps.shape).flatten()


def half_warps(values: Tensor) -> Tensor:
    pairs = values.view(-1, 2, 16)
    other = pairs.view(-1, 2, 8, 2).flip(-1).view(-1, 2, 16)
    return torch.stack([pairs[:, 0] + other[:, 0], pairs[:, 1] - other[:, 1]], dim=1).flatten()


def atomics(values: Tensor) -> Tensor:
    return torch.full_like(values, -1 + 2 * len(values) + 1000 * values.max().item())


CORRECT = {
    "reverse": reversed_blocks,
    "dynamic": reversed_blocks,
    "asynchronous copies": reversed_blocks,
    "matrices": torch.clone,
    "rounds": rounds,
    "two sums": two_sums,
    "neighbours": neighbours,
    "shared across the grid": reversed_blocks,
    "warp operations": warp_sums,
    "half warps": half_warps,
    "atomics": atomics,
}


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_kernel_is_correct_in_every_order(
    emulator: Emulator, name: str, order: str, seed: int, guard: str
) -> None:
    message, values, output = run(emulator, name, order, seed, guard=guard)
    assert message == ""
    assert torch.equal(output, CORRECT[name](values))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing barrier", reversed_blocks),
        ("missing barrier, dynamic", reversed_blocks),
        ("missing barrier between rounds", rounds),
        ("missing barrier between sums", two_sums),
        ("missing grid barrier", neighbours),
        ("missing wait", reversed_blocks),
    ],
)
def test_a_missing_barrier_shows(emulator: Emulator, name: str, expected: object) -> None:
    """No order reports an error, but not every order computes the right result: that is what the kernels' tests use."""
    assert callable(expected)
    wrong = []
    for order, seed in SCHEDULES:
        message, values, output = run(emulator, name, order, seed)
        assert message == ""
        wrong.append(not torch.equal(output, expected(values)))
    assert any(wrong)


@pytest.mark.parametrize(
    ("name", "guard", "expected"),
    [
        (
            "read past the end",
            "after",
            "access, 0 bytes past the end of input, in block (2, 0, 0), thread (63",
        ),
        (
            "read before the begin",
            "before",
            "access, 4 bytes before the begin of input, in block (0, 0, 0)",
        ),
        ("index past shared memory", "after", "undefined behaviour: an index"),
        ("dynamic memory too small", "after", "0 bytes past the end of dynamic shared memory"),
        ("write to an input", "after", "out-of-range access, a write to input, in block (0, 0, 0), thread (0, 0, 0)"),
        ("write past an output", "after", "0 bytes past the end of the tensor of shape [192] from plants.h"),
        ("write before an output", "before", "4 bytes before the begin of the tensor of shape [192] from plants.h"),
        ("write past an array of the workspace", "after", "0 bytes past the end of scratch"),
        ("write before an array of the workspace", "before", "4 bytes before the begin of scratch"),
        ("misaligned vector", "before", "undefined behaviour: an index, alignment"),
        ("misaligned copy", "after", "misaligned asynchronous copy"),
        ("matrices by half a warp", "after", "deadlock in block (0, 0, 0): 32 threads in a warp operation"),
        ("grid barrier without cooperation", "after", "grid synchronisation in a launch that is not cooperative"),
        ("divergent barrier", "after", "deadlock in block (0, 0, 0): 63 threads at __syncthreads"),
        ("two barriers", "after", "divergent __syncthreads"),
        ("wrong warp mask", "after", "deadlock in block (0, 0, 0): 64 threads in a warp operation"),
        ("stack overflow", "after", "out-of-range access"),
    ],
)
def test_a_mistake_is_reported(emulator: Emulator, name: str, guard: str, expected: str) -> None:
    message, _, _ = run(emulator, name, "forward", guard=guard)
    assert expected in message
    # The harness survives: the next launch is not affected.
    message, values, output = run(emulator, "reverse", "forward")
    assert message == ""
    assert torch.equal(output, reversed_blocks(values))


@pytest.mark.parametrize("memory", ["output", "workspace"])
def test_what_a_binding_allocates_is_poisoned(emulator: Emulator, memory: str) -> None:
    run(emulator, "reverse", "forward")
    message, _, output = run(emulator, f"unwritten {memory}", "forward")
    assert message == ""
    assert output.isnan().all()


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_shared_memory_is_poisoned_at_block_start(emulator: Emulator, order: str, seed: int) -> None:
    run(emulator, "reverse", order, seed)
    message, _, output = run(emulator, "unwritten shared memory", order, seed)
    assert message == ""
    assert output.isnan().all()
