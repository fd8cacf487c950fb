"""The CUDA kernels, run on the emulated GPU: every test of the operators, and every order of threads and blocks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_luspo_vespo
import test_policy_loss
import test_policy_loss_edges
import test_policy_loss_metrics
import test_unit_mean
import test_vgpo_loss
import test_visibility
import test_visual_focus
import test_visual_weights
import torch
from cases import EDGES, Batch, Response, make_batch
from emulation.harness import EmulationError, Emulator, Shape
from emulation.serving import adopt
from tolerance import assert_close, assert_matches
from torch import Tensor

from vgpo_kernels import VGPOConfig, backends
from vgpo_kernels.config import PolicyLossOptions
from vgpo_kernels.ops import registry
from vgpo_kernels.reference import visual_focus as reference
from vgpo_kernels.reference import visual_weights as weights_reference

ROOT = Path(__file__).resolve().parents[2]

adopt(globals(), test_visual_focus, test_visibility, test_visual_weights, test_policy_loss, test_vgpo_loss)
adopt(globals(), test_luspo_vespo, test_policy_loss_metrics, test_policy_loss_edges, test_unit_mean)


# ---- schedules ---------------------------------------------------------------------------------------------------

MIXED = (
    Response(visual=70, length=90, holes=True),
    Response(visual=0, length=33),
    Response(visual=1, length=0),
    Response(visual=33, length=1, group=1),
    Response(visual=5, length=150, group=1),
    Response(visual=0, late=40, length=110),
    Response(visual=3, late=7, length=31, group=1),
)

SHAPES = {
    "one block": Shape(blocks=1, threads=64),
    "reverse": Shape(blocks=3, threads=64, order="reverse"),
    "shuffled": Shape(blocks=3, threads=64, order="shuffled", seed=1),
    "shuffled again": Shape(blocks=5, threads=64, order="shuffled", seed=2),
    "interleaved": Shape(blocks=3, threads=64, order="interleaved"),
    "more blocks than work": Shape(blocks=40, threads=64),
    "guards before": Shape(blocks=4, threads=64, order="reverse", guard="before"),
}


def call_everything(emulator: Emulator, batch: Batch, config: VGPOConfig, options: PolicyLossOptions) -> list[Tensor]:
    """Every kernel on one batch; the results of all, flat."""
    boundaries = None if batch.cu_seqlens is None else batch.cu_seqlens.long()
    hidden, mask = batch.hidden, batch.response_mask
    floats = config.as_floats()
    prototype = emulator.visual_prototype(hidden, batch.visual_mask, boundaries, False, False)
    running = emulator.visual_prototype(hidden, batch.visual_mask, boundaries, True, False)
    cos = emulator.visual_focus(hidden, batch.visual_mask, mask, boundaries, None, None, False, False)
    late = emulator.visual_focus(hidden, batch.visual_mask, mask, boundaries, None, None, True, False)
    given = emulator.visual_focus(hidden, None, mask, boundaries, prototype, None, False, False)
    rows = torch.arange(mask.numel()).view(mask.shape) // 3 % (len(prototype) + 1) - 1
    each = emulator.visual_focus(hidden, None, mask, boundaries, prototype, rows, False, False)
    units = [emulator.visual_prototype(hidden, batch.visual_mask, boundaries, seen, True) for seen in (False, True)]
    units += [
        emulator.visual_focus(hidden, batch.visual_mask, mask, boundaries, None, None, seen, True)
        for seen in (False, True)
    ]
    units.append(emulator.visual_focus(hidden, None, mask, boundaries, units[0], rows, False, True))
    weights = emulator.visual_weights(cos, mask, batch.group_ids, batch.has_visual, boundaries, floats)
    weights += emulator.visual_weights(late, mask, batch.group_ids, None, boundaries, floats)
    phi = emulator.group_weights(weights[4], batch.group_ids, batch.has_visual, floats)
    terms = (batch.ref_logp, batch.entropy, None, None, None)
    loss = emulator.policy_loss(
        *(batch.logp, batch.old_logp, batch.advantages, mask, weights[0], boundaries),
        *(*terms, options.as_floats()),
    )
    whole = [
        emulator.vgpo_loss(
            *(hidden, batch.logp, batch.old_logp, batch.advantages, batch.visual_mask, mask),
            *(batch.group_ids, boundaries, None, None, causal, *terms, floats, options.as_floats()),
        )
        for causal in (False, True)
    ]
    return [prototype, running, cos, late, given, each, *units, *weights, phi, *loss, *whole[0], *whole[1]]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_order_of_threads_or_blocks_changes_a_bit(emulator: Emulator, dtype: torch.dtype, packed: bool) -> None:
    """What a missing barrier, a race or an index out of range would break; the plants in test_cuda_harness show it."""
    batch = make_batch(MIXED, dtype=dtype, packed=packed, features=40)
    arguments = (batch, VGPOConfig.released(), PolicyLossOptions(loss_type="gspo", kl_coef=0.1, entropy_coef=0.1))
    expected = call_everything(emulator, *arguments)
    for name, shape in SHAPES.items():
        with emulator.launched_as(shape):
            for actual, wanted in zip(call_everything(emulator, *arguments), expected, strict=True):
                assert torch.equal(actual.nan_to_num(7.0), wanted.nan_to_num(7.0)), name


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_launches_as_on_a_gpu(emulator: Emulator, packed: bool) -> None:
    """With the binding's own blocks and threads, and all arrays of a workspace in one allocation."""
    batch = make_batch(EDGES["long"] + MIXED, packed=packed, features=24)
    arguments = (batch, VGPOConfig.released(), PolicyLossOptions(loss_type="gspo", kl_coef=0.1, entropy_coef=0.1))
    expected = call_everything(emulator, *arguments)
    with emulator.launched_as(Shape(blocks=0)):
        found = call_everything(emulator, *arguments)
    with emulator.launched_as(Shape(blocks=0, order="reverse", guard="before")):
        again = call_everything(emulator, *arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(again, found, rtol=0, atol=0, equal_nan=True)


class OnTheCpu:
    """The CPU's operators, called like the emulator's."""

    def __getattr__(self, name: str) -> Any:
        return registry.implementation(name, "cpp")


@pytest.mark.skipif(not backends.describe()["built"]["cpp"], reason="needs the CPU's operators to compare with")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_more_responses_than_a_warp_looks_at_together(emulator: Emulator, packed: bool) -> None:
    """Empty ones, too, where the warp goes on to the next 31, and at the end."""
    lengths = [0 if index in (30, 31, 32, 61, 62, 69) else index * 7 % 11 for index in range(70)]
    many = tuple(Response(visual=i % 4, length=length, group=i // 4) for i, length in enumerate(lengths))
    batch = make_batch(many, packed=packed, features=24)
    arguments = (batch, VGPOConfig.paper(), PolicyLossOptions(loss_type="gspo", kl_coef=0.1, entropy_coef=0.1))
    expected = call_everything(OnTheCpu(), *arguments)  # type: ignore[arg-type]
    for shape in (Shape(blocks=2, threads=64), Shape(blocks=0)):
        with emulator.launched_as(shape):
            found = call_everything(emulator, *arguments)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("threads", [32, 96, 512])
def test_any_block_size_is_right(emulator: Emulator, threads: int) -> None:
    batch = make_batch(EDGES["long"] + MIXED, features=24)
    focus = (batch.hidden, batch.visual_mask, batch.response_mask, None, None, None, False, False)
    units = (*focus[:-1], True)
    with emulator.launched_as(Shape(blocks=2, threads=threads, order="reverse")):
        cos, means = emulator.visual_focus(*focus), emulator.visual_focus(*units)
        weigh = (cos, batch.response_mask, batch.group_ids, batch.has_visual, None, VGPOConfig.paper().as_floats())
        weights = emulator.visual_weights(*weigh)
    assert_matches(cos, reference.visual_focus, focus, ("cos",))
    assert_matches(means, reference.visual_focus, units, ("mean cosines",))
    names = ("factors", "psi", "w", "phi", "score", "metrics")
    assert_matches(weights, weights_reference.visual_weights, weigh, names)


def test_a_limit_of_blocks_is_checked() -> None:
    """VGPO_CUDA_BLOCKS is read at the first cooperative launch of a process."""
    given = "torch.ones(1, 2, 8), torch.ones(1, 2, dtype=torch.bool), None, False, False"
    call = f"operators['visual_prototype']({given})"
    script = f"import torch; from emulation.harness import emulated_operators; operators = emulated_operators(); {call}"
    folders = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests")]
    environment = {**os.environ, "VGPO_CUDA_BLOCKS": "0", "PYTHONPATH": os.pathsep.join(folders)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "VGPO_CUDA_BLOCKS must be a number of blocks, 1 or more, got '0'" in result.stderr


# ---- long responses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "gspo_token", "luspo", "vespo"])
def test_long_responses_are_taken_in_pieces(emulator: Emulator, loss_type: str, packed: bool) -> None:
    """Warps share out 64 tokens of a response at a time, and more of a long one: lengths around and across that."""
    lengths = (16_500, 64, 65, 0, 1)
    edge = tuple(Response(visual=1, text=0, length=length, holes=length == 65) for length in lengths)
    batch = make_batch(edge, features=1, packed=packed)
    boundaries = None if batch.cu_seqlens is None else batch.cu_seqlens.long()
    options = PolicyLossOptions(loss_type=loss_type, kl_coef=0.1, entropy_coef=0.1)
    arguments = (
        *(batch.logp, batch.old_logp, batch.advantages, batch.response_mask, None, boundaries),
        *(batch.ref_logp, batch.entropy, None, None, None, options.as_floats()),
    )
    loss, gradient, _, metrics = emulator.policy_loss(*arguments)
    for shape in SHAPES.values():
        with emulator.launched_as(shape):
            again = emulator.policy_loss(*arguments)
        assert torch.equal(again[0], loss) and torch.equal(again[1], gradient) and torch.equal(again[3], metrics)
    logp = batch.logp.double().requires_grad_()
    exact, exact_metrics = registry.implementation("policy_loss", "reference")(logp, *arguments[1:])
    assert_close(loss, exact, name="loss", floor=4e-6)
    assert_close(metrics, exact_metrics, name="metrics", floor=4e-6 * exact_metrics.max().item())
    (slope,) = torch.autograd.grad(exact, logp)
    unit = slope.abs().max()  # far below 1 in a mean
    assert_close(gradient / unit, slope / unit, name="gradient", floor=4e-6)


def long_cosines() -> tuple[Batch, Tensor]:
    """Responses on both sides of the length beyond which blocks weigh slices, and what their cosines may be."""
    lengths = (9000, 20, 8193, 8192, 8500, 8400, 10_000)
    edge = [
        Response(visual=1, text=0, length=length, holes=length == 9000, group=i % 2) for i, length in enumerate(lengths)
    ]
    batch = make_batch(tuple(edge), features=1, packed=True)
    assert batch.cu_seqlens is not None
    cos = torch.rand(len(batch.response_mask), generator=torch.Generator().manual_seed(0)) * 2 - 1
    begins = batch.cu_seqlens.tolist()
    cos[begins[2] : begins[2] + 1500] = float("nan")  # sees no image at first
    cos[begins[4] + 5000] = float("nan")  # broken
    cos[begins[6] : begins[7]] = cos[begins[6] : begins[7]].mul(4).round() / 4  # ties
    return batch, cos


@pytest.mark.parametrize(
    "preset", [VGPOConfig.paper(), VGPOConfig.released(), VGPOConfig(gate=False)], ids=["paper", "released", "no gate"]
)
def test_long_responses_are_weighed_in_slices(
    emulator: Emulator, preset: VGPOConfig, request: pytest.FixtureRequest
) -> None:
    batch, cos = long_cosines()
    assert batch.cu_seqlens is not None
    boundaries = batch.cu_seqlens.long()
    has_visual = torch.arange(len(boundaries) - 1) != 5
    arguments = (cos, batch.response_mask, batch.group_ids, has_visual, boundaries, preset.as_floats())
    found = emulator.visual_weights(*arguments)
    names = ("factors", "psi", "w", "phi", "score", "metrics")
    assert_matches(found, weights_reference.visual_weights, arguments, names)
    for shape in (*SHAPES.values(), Shape(blocks=0)):
        with emulator.launched_as(shape):
            for name, again, first in zip(names, emulator.visual_weights(*arguments), found, strict=True):
                # The metrics' order follows the block's size.
                if name == "metrics" and shape.blocks == 0:
                    torch.testing.assert_close(again, first, equal_nan=True)
                else:
                    assert torch.equal(again.nan_to_num(7.0), first.nan_to_num(7.0)), name
    if "released" not in request.node.name:  # whose offset is the batch's
        first = slice(int(boundaries[1]))
        alone = (cos[first], batch.response_mask[first], batch.group_ids[:1], None, boundaries[:2])
        _, psi, w, *_ = emulator.visual_weights(*alone, preset.as_floats())
        assert torch.equal(psi, found[1][first]) and torch.equal(w, found[2][first])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_vgpo_loss_weighs_slices(emulator: Emulator, packed: bool) -> None:
    edge = (Response(visual=9, length=8300), Response(visual=3, length=40), Response(visual=0, late=8, length=8400))
    batch = make_batch(edge, features=8, packed=packed)
    boundaries = None if batch.cu_seqlens is None else batch.cu_seqlens.long()
    terms = (batch.ref_logp, batch.entropy, None, None, None)
    arguments = (
        *(batch.hidden, batch.logp, batch.old_logp, batch.advantages, batch.visual_mask, batch.response_mask),
        *(batch.group_ids, boundaries, None, None, True, *terms),
        *(VGPOConfig.released().as_floats(), PolicyLossOptions(kl_coef=0.1).as_floats()),
    )
    loss, gradient, _, metrics = emulator.vgpo_loss(*arguments)
    exact, exact_metrics = registry.implementation("vgpo_loss", "reference")(*arguments)
    assert_close(loss, exact, name="loss", floor=4e-6)
    assert_close(metrics, exact_metrics, name="metrics", floor=4e-6 * exact_metrics.nan_to_num().max().item())
    for shape in SHAPES.values():
        with emulator.launched_as(shape):
            again = emulator.vgpo_loss(*arguments)
        assert torch.equal(again[0], loss) and torch.equal(again[1], gradient)
        assert torch.equal(again[3].nan_to_num(7.0), metrics.nan_to_num(7.0))


# ---- hidden states -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", [1, 5, 8, 64, 129, 256, 520])
def test_unaligned_rows_give_the_same_bits(emulator: Emulator, features: int, dtype: torch.dtype) -> None:
    """Rows of whole aligned vectors, and the same rows where they must be read element by element."""
    batch = make_batch(EDGES["plain"][:2], features=features, dtype=dtype)
    wide = torch.full((*batch.hidden.shape[:2], features + 3), float("nan"), dtype=dtype)
    wide[..., 1:-2] = batch.hidden
    for unit in (False, True):
        rest = (batch.visual_mask, batch.response_mask, None, None, None, False, unit)
        expected = emulator.visual_focus(batch.hidden, *rest)
        assert_matches(expected, reference.visual_focus, (batch.hidden, *rest), ("cos",))
        for guard in ("after", "before"):
            with emulator.launched_as(Shape(guard=guard)):
                assert torch.equal(emulator.visual_focus(wide[..., 1:-2], *rest), expected)


def test_strides_of_single_rows_do_not_matter(emulator: Emulator) -> None:
    """A dimension of size 1 may have any stride, and rows are read as whole vectors all the same."""
    hidden = torch.randn(64, dtype=torch.bfloat16)
    yes = torch.ones(1, 1, dtype=torch.bool)
    expected = emulator.visual_focus(hidden.view(1, 1, 64), yes, yes, None, None, None, False, False)
    odd = hidden.as_strided((1, 1, 64), (3, 5, 1))
    assert torch.equal(emulator.visual_focus(odd, yes, yes, None, None, None, False, False), expected)


def test_many_visual_rows_make_longer_runs(emulator: Emulator) -> None:
    """Above 8,192 visual rows a response is summed in longer runs, not more."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20_001, 8, generator=generator)
    mask = torch.rand(20_001, generator=generator) > 0.3
    boundaries = torch.tensor([0, 19_000, 19_000, 20_001])
    for unit in (False, True):
        arguments = (hidden, mask, boundaries, False, unit)
        assert_matches(emulator.visual_prototype(*arguments), reference.visual_prototype, arguments, ("prototype",))


def test_boundaries_that_lie_cannot_lead_outside(emulator: Emulator) -> None:
    """No value on the device is checked before a launch: kernels clamp, and a wrong call stays inside its arrays."""
    batch = make_batch(EDGES["plain"], packed=True)
    count = len(batch.response_mask)
    everywhere = torch.ones_like(batch.response_mask)
    for wrong in ([-5, 10, 20, 10**12, count], [count, 0, count, 3, 0], [0, 0, 0, 0, 2 * count], [0, count] * 40):
        boundaries = torch.tensor(wrong)
        each = torch.zeros(len(wrong) - 1)
        terms = (everywhere, None, boundaries, None, None, None, None, None)
        emulator.policy_loss(batch.logp, batch.old_logp, each, *terms, PolicyLossOptions().as_floats())
        config = VGPOConfig.released().as_floats()
        emulator.visual_weights(batch.logp, everywhere, each.long(), None, boundaries, config)
        emulator.visual_prototype(batch.hidden, everywhere, boundaries, False, False)
        for way in ((False, False), (True, False), (False, True), (True, True)):  # causal, unit
            given = (batch.hidden, batch.visual_mask, batch.response_mask, boundaries, None, None, *way)
            emulator.visual_focus(*given)
            emulator.visual_prototype(batch.hidden, batch.visual_mask, boundaries, *way)
    prototypes = torch.ones(2, batch.hidden.shape[-1])
    index = torch.tensor([0, 7, -9, 1])
    rest = (None, batch.response_mask, batch.cu_seqlens.long(), prototypes, index, False, False)
    emulator.visual_focus(batch.hidden, *rest)


def test_a_kernel_that_strays_is_caught(emulator: Emulator) -> None:
    """The harness looks at product kernels, too: a response mask shorter than its layout says is read past its end."""
    batch = make_batch(EDGES["plain"], packed=True)
    arguments = (batch.hidden, batch.visual_mask, batch.response_mask, batch.cu_seqlens.long(), None, None)
    strays = "visual_focus: visual_focus_kernel<float>: .* past the end of response_mask"
    with emulator.cut_short(response_mask=3), pytest.raises(EmulationError, match=strays):
        emulator.visual_focus(*arguments, False, False)
