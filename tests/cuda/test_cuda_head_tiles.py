"""The LM head in tiles on an emulated Hopper GPU: clusters, copies of boxes, warpgroups' products, both epilogues."""

from __future__ import annotations

import pytest
import torch
from emulation.harness import Emulator, Shape
from emulation.serving import adopt
from linear_cases import Head, check, make_head
from tolerance import assert_close
from torch import Tensor

from vgpo_kernels.ops import linear_logprob
from vgpo_kernels.reference import linear_logprob as reference
from vgpo_kernels.reference.linear_logprob import gradient_of
from vgpo_kernels.reference.logits import LogitMap

adopt(globals())

FIRST, LOGITS = 30, LogitMap(temperature=1.8, logit_scale=2.0)
OTHER_GPU, HOPPER = Shape(blocks=2), Shape(blocks=2, hopper=True)
SHAPES = {
    "forward": HOPPER,
    "reverse, two clusters": Shape(blocks=4, order="reverse", hopper=True),
    "shuffled, three clusters": Shape(blocks=6, order="shuffled", seed=1, hopper=True),
    "interleaved": Shape(blocks=2, order="interleaved", hopper=True),
    "guards before": Shape(blocks=2, order="shuffled", seed=2, guard="before", hopper=True),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def head_of(rows: int, dim: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Head:
    """Draw a head, of whose targets some lie before and some behind the slice of the vocabulary from FIRST on."""
    head = make_head(rows, dim, columns, dtype=dtype, seed=rows + columns)
    outside = torch.tensor([FIRST - 1, FIRST + columns, -(10**6), 2**62])
    targets = head.targets + FIRST
    targets[3::7] = outside[torch.arange(len(targets[3::7])) % len(outside)]
    return Head(head.hidden, head.weight, None, targets)


def workspace(head: Head) -> Tensor:
    """Return the narrow workspace: four numbers for each of a row's tiles."""
    return torch.full((head.hidden.shape[0], -(-head.weight.shape[0] // 256) * 4), float("nan"))


def statistics(emulator: Emulator, head: Head, running: Tensor | None = None, first: int = FIRST) -> Tensor:
    """Update running statistics in tiles."""
    found = new_running(head) if running is None else running.clone()
    arguments = (head.hidden, head.weight, None, head.targets, first, *LOGITS)
    emulator.head_statistics(*arguments, found, workspace(head), False)
    assert [name.partition("<")[0] for name in emulator.launched] == ["head_tiles_kernel", "head_merge_kernel"]
    return found


def new_running(head: Head) -> Tensor:
    """Return statistics of something before, as they may be."""
    return torch.tensor([1.5, 3.0, -2.0, 0.25])[:, None].repeat(1, head.hidden.shape[0])


def expected_statistics(head: Head, dtype: torch.dtype) -> Tensor:
    running = new_running(head).to(dtype)
    logits = torch.empty(head.hidden.shape[0], head.weight.shape[0])
    arguments = (head.hidden, head.weight, None, head.targets, FIRST, *LOGITS)
    reference.head_statistics(*arguments, running, logits, False, dtype=dtype)
    return running


def coefficients_of(head: Head) -> Tensor:
    coefficients = torch.randn(5, head.hidden.shape[0], generator=torch.Generator().manual_seed(2))
    coefficients[0] += 9  # a maximum, so that no probability explodes
    return coefficients


def place_for(head: Head, padding: int = 0) -> Tensor:
    """Return a poisoned place for logits, in rows that are longer by ``padding``."""
    rows, columns = head.hidden.shape[0], head.weight.shape[0]
    return torch.full((rows, columns + padding), float("nan"))[:, :columns]


def gradient(emulator: Emulator, head: Head, padding: int = 0) -> Tensor:
    """Compute a gradient in tiles; behind it a row stays as it was."""
    logits, dtype = place_for(head, padding), head.hidden.dtype
    arguments = (head.hidden, head.weight, None, head.targets, FIRST, *LOGITS)
    emulator.head_gradient(*arguments, coefficients_of(head), logits, True)
    assert [name.partition("<")[0] for name in emulator.launched] == ["head_tiles_kernel"]
    behind = logits.contiguous().view(torch.int16)[:, head.weight.shape[0] :]
    assert torch.equal(behind, place_for(head).view(torch.int16)[:, head.weight.shape[0] :])
    return gradient_of(logits, dtype).clone()


def expected_gradient(head: Head, dtype: torch.dtype) -> Tensor:
    logits = place_for(head)
    arguments = (head.hidden, head.weight, None, head.targets, FIRST, *LOGITS)
    reference.head_gradient(*arguments, coefficients_of(head), logits, True, dtype=dtype)
    return gradient_of(logits, head.hidden.dtype).clone()


def check_statistics(found: Tensor, head: Head, name: str = "") -> None:
    exact, narrow = (expected_statistics(head, dtype) for dtype in (torch.float64, torch.float32))
    assert_close(found, exact.double(), narrow.float(), name=f"statistics, {name}", floor=4e-6)


def check_gradient(found: Tensor, head: Head, name: str = "") -> None:
    exact, narrow = (expected_gradient(head, dtype) for dtype in (torch.float64, torch.float32))
    rounding = 2 * torch.finfo(head.hidden.dtype).eps
    assert_close(found, exact.double(), narrow, name=f"gradient, {name}", floor=rounding)


@pytest.mark.parametrize(
    ("rows", "dim", "columns", "padding"),
    [
        (1, 8, 5, 0),
        (128, 64, 256, 0),
        (129, 72, 257, 3),  # rows are aligned where the first of them is, which depends on the guards
        (300, 200, 700, 0),  # as many steps as stages
        (130, 328, 513, 7),  # six steps
        (3, 8, 4200, 0),  # more tiles than warps merge at a time
    ],
)
@DTYPES
def test_tiles(emulator: Emulator, dtype: torch.dtype, rows: int, dim: int, columns: int, padding: int) -> None:
    """Tiles that are full, and that end in a row or a column; every order of threads, with the same bits."""
    head = head_of(rows, dim, columns, dtype)
    bits = None
    for name, shape in SHAPES.items():
        with emulator.launched_as(shape):
            found = statistics(emulator, head), gradient(emulator, head, padding)
        if bits is None:
            check_statistics(found[0], head, name)
            check_gradient(found[1], head, name)
            bits = found
        assert torch.equal(found[0], bits[0]), name
        assert torch.equal(found[1], bits[1]), name


def test_rows_far_apart(emulator: Emulator) -> None:
    """Rows of hidden states and of the weight are parts of longer ones, and no number of vectors."""
    drawn = head_of(140, 75, 300)
    hidden, weight = (torch.full((len(given), 88), float("nan")).bfloat16() for given in (drawn.hidden, drawn.weight))
    hidden[:, :75], weight[:, :75] = drawn.hidden, drawn.weight
    head = Head(hidden[:, :75], weight[:, :75], None, drawn.targets)
    # With guards behind its last number such a matrix would not begin at a multiple of 16 bytes.
    with emulator.launched_as(SHAPES["guards before"]):
        check_statistics(statistics(emulator, head), head)
        check_gradient(gradient(emulator, head), head)


def test_two_calls_merge(emulator: Emulator) -> None:
    head = head_of(130, 72, 600)
    halves = [Head(head.hidden, weight, None, head.targets) for weight in (head.weight[:260], head.weight[260:])]
    with emulator.launched_as(HOPPER):
        found = statistics(emulator, halves[1], statistics(emulator, halves[0]), first=FIRST + 260)
    check_statistics(found, head)


def test_a_row_does_not_depend_on_the_others(emulator: Emulator) -> None:
    head = head_of(300, 72, 300)
    with emulator.launched_as(HOPPER):
        together = statistics(emulator, head)
        for part in (slice(77, 78), slice(100, 240)):
            alone = Head(head.hidden[part].clone(), head.weight, None, head.targets[part])
            assert torch.equal(statistics(emulator, alone), together[:, part])


def test_numbers_that_are_not_finite(emulator: Emulator) -> None:
    """The same as without tiles: nothing of a row gets into another, and minus infinities alone are no entries."""
    head = head_of(130, 72, 300)
    head.weight[:, 0] = head.weight[:, 0].abs() + 0.5
    for row, value in {1: float("-inf"), 5: float("inf"), 70: float("nan"), 129: float("-inf")}.items():
        head.hidden[row] = 0.0
        head.hidden[row, 0] = value
    head.hidden[6, 3] = float("inf")  # logits of both signs
    arguments = (head.hidden, head.weight, None, head.targets, FIRST, *LOGITS)
    logits = place_for(head)
    with emulator.launched_as(HOPPER):
        found, slopes = statistics(emulator, head), gradient(emulator, head)
    with emulator.launched_as(OTHER_GPU):
        expected = new_running(head)
        emulator.head_statistics(*arguments, expected, logits.clone(), False)
        emulator.head_gradient(*arguments, coefficients_of(head), logits, True)
    torch.testing.assert_close(found, expected, equal_nan=True)
    wanted = gradient_of(logits, torch.bfloat16)
    torch.testing.assert_close(slopes.float(), wanted.float(), equal_nan=True, rtol=0.02, atol=1e-6)
    # What was there before is what minus infinities leave.
    torch.testing.assert_close(found[:3, [1, 129]], new_running(head)[:3, [1, 129]])
    assert found[1, [5, 6, 70]].isnan().all()
    assert found[1].isnan().sum() == 3


def plain(emulator: Emulator, head: Head, shape: Shape, logit_map: LogitMap = LOGITS) -> list[Tensor]:
    """Statistics with a place for logits, and the gradient, by whatever kernels the device takes."""
    arguments = (head.hidden, head.weight, head.bias, head.targets, FIRST, *logit_map)
    running, logits = new_running(head), place_for(head)
    with emulator.launched_as(shape):
        emulator.head_statistics(*arguments, running, logits, False)
        assert [name.partition("<")[0] for name in emulator.launched] == ["head_statistics_kernel"]
        emulator.head_gradient(*arguments, coefficients_of(head), logits, True)
    return [running, gradient_of(logits, head.hidden.dtype).clone()]


FALLBACKS = {
    "bias": Head(*make_head(9, 16, 300, dtype=torch.bfloat16, bias=True).tensors(), torch.arange(9) + FIRST),
    "floats": head_of(9, 16, 300, torch.float32),
    # 24 bytes a row.
    "stride": Head(head_of(9, 12, 300).hidden, head_of(9, 12, 300).weight, None, torch.arange(9) + FIRST),
    # Rows of 32 bytes, of which nine numbers count: with guards behind the last one all begin askew.
    "address": Head(*(one[:, :9] for one in head_of(9, 16, 300).tensors()), None, torch.arange(9) + FIRST),
    "cap": head_of(9, 16, 300),
    "temperatures": head_of(9, 16, 300),
}
OTHER_LOGITS = {"cap": LogitMap(softcap=3.0), "temperatures": LogitMap(temperatures=torch.linspace(0.5, 2, 9))}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_does_not_suit_tiles(emulator: Emulator, name: str) -> None:
    """On a Hopper GPU, too, other calls end with the kernels for all of them, to the bit."""
    head, logit_map = FALLBACKS[name], OTHER_LOGITS.get(name, LOGITS)
    on_hopper = plain(emulator, head, HOPPER, logit_map)
    assert [name.partition("<")[0] for name in emulator.launched] == ["head_gradient_kernel"]
    for found, expected in zip(on_hopper, plain(emulator, head, OTHER_GPU, logit_map), strict=True):
        assert torch.equal(found, expected)
    arguments = (head.hidden, head.weight, head.bias, head.targets, FIRST, *logit_map, new_running(head))
    with emulator.launched_as(HOPPER), pytest.raises(ValueError, match="logits"):
        emulator.head_statistics(*arguments, workspace(head), False)


def test_where_tiles_are_not_asked_for(emulator: Emulator) -> None:
    """Products that are kept need their place, and so does every other GPU. A place for them asks for no tiles."""
    head = head_of(9, 16, 300)
    arguments = (head.hidden, head.weight, None, head.targets, FIRST, *LOGITS, new_running(head))
    for shape, keep in ((HOPPER, True), (OTHER_GPU, False)):
        with emulator.launched_as(shape), pytest.raises(ValueError, match="logits"):
            emulator.head_statistics(*arguments, workspace(head), keep)
    on_hopper = plain(emulator, head, HOPPER)
    assert emulator.launched[0].startswith("head_tiles_kernel")  # of the gradient, which needs no other place
    assert torch.equal(on_hopper[0], plain(emulator, head, OTHER_GPU)[0])
    logits = place_for(head)
    with emulator.launched_as(HOPPER):
        emulator.head_statistics(*arguments, logits, True)
    torch.testing.assert_close(logits, head.hidden.float() @ head.weight.float().T)


@DTYPES
def test_linear_logprob_in_tiles(
    emulator: Emulator, backend_name: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The public function, with ignored rows, and with so little memory that rows come in several calls."""
    kernels = linear_logprob.compiled_kernels(torch.device("cpu"))
    kernels = kernels._replace(tile_columns=lambda hidden, weight, has_bias: -(-weight.shape[0] // 256) * 4)
    monkeypatch.setattr(linear_logprob, "compiled_kernels", lambda _: kernels)
    head = make_head(300, 40, 520, dtype=dtype, ignored=0.3)
    with emulator.launched_as(SHAPES["interleaved"]):
        check(head, torch.device("cpu"), temperature=0.8)
        check(head, torch.device("cpu"), chunk_bytes=12 * 1024)
