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


# ---- clusters, copies of boxes, products of warpgroups -----------------------------------------------------------


def multiply_boxes(emulator: Emulator, name: str, order: str, seed: int, blocks: int = 2) -> str:
    """Return what is found of the product of this name: the harness's message, "wrong numbers", or nothing."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-3, 4, (256, 320), generator=generator).bfloat16() for _ in range(2))
    with emulator.launched_as(Shape(blocks, THREADS, order, seed)):
        try:
            product = emulator.run_box_plant(left, right, name)
        except EmulationError as error:
            return str(error)
    return "" if torch.equal(product, left.float() @ right.float().T) else "wrong numbers"


@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_a_right_product_of_boxes(emulator: Emulator, order: str, seed: int, blocks: int) -> None:
    assert multiply_boxes(emulator, "right", order, seed, blocks) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("box released before its products are waited for", "wrong numbers"),
        ("arrives at the own block only", "129 threads waiting for a phase"),
        ("arrives twice", "more arrivals than a phase of the barrier has"),
        ("bytes are not expected", "129 threads waiting for a phase"),
        ("fewer bytes are expected", "a phase gets more bytes than it was told of"),
        ("wrong parity", "deadlock in block (0, 0, 0)"),
        ("boxes are not waited for", "more arrivals than a phase of the barrier has"),
        ("sums are read before the wait", "wrong numbers"),
        ("sums are written before the wait", "sums were written while products were on their way"),
        ("products are not waited for", "sums were written while products were on their way"),
        ("no begin of the products", "products that are not begun anew after a wait"),
        ("no end of the products", "sums were written while products were on their way"),
        ("three warps", "96 threads waiting for the other threads of a product"),
        ("different operands", "the threads of a warpgroup multiply different matrices"),
        ("barriers are not published", "a barrier that has not been published"),
        ("no barrier of the cluster at first", "a barrier that is not initialised"),
        ("no barrier of the cluster at last", "an arrival at a block that has ended"),
        ("box askew", "a box must begin on a multiple of 1,024 bytes"),
        ("operand is not swizzled", "an operand that is not swizzled"),
        ("block outside the cluster", "blocks that the cluster does not have"),
    ],
)
def test_a_mistake_with_boxes_shows(emulator: Emulator, name: str, expected: str) -> None:
    """In some order of threads; the next launch is not affected."""
    found = [multiply_boxes(emulator, name, order, seed) for order, seed in SCHEDULES]
    assert any(expected in one for one in found), found
    assert multiply_boxes(emulator, "right", "forward", 0) == ""


def test_a_deadlock_of_a_cluster_names_both_blocks(emulator: Emulator) -> None:
    message = multiply_boxes(emulator, "bytes are not expected", "forward", 0)
    for block in (0, 1):
        assert f"deadlock in block ({block}, 0, 0): 127 threads at the cluster's barrier" in message
    assert "hopper_plants.h:" in message


def test_a_matrix_that_copies_cannot_fetch(emulator: Emulator) -> None:
    left = torch.zeros(64, 65).bfloat16()[:, :64]  # 130 bytes a row
    with pytest.raises(EmulationError, match="no map of this matrix"):
        emulator.run_box_plant(left, torch.zeros(256, 64).bfloat16(), "right")
