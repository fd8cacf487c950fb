"""Liger's LM head behind ``linear_logprob``: when it serves, and what it computes, by its own fallback for CPUs.

Its kernel needs a Hopper GPU (tests/cuda/test_cuda_liger.py). Elsewhere the same function of Liger's computes the
same in plain PyTorch, in the inputs' dtype.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from linear_cases import Head, make_head
from tolerance import assert_close, floor_of
from torch import Tensor

from vgpo_kernels import backend, backends, linear_logprob
from vgpo_kernels.ops import liger_head
from vgpo_kernels.reference.linear_logprob import IGNORED
from vgpo_kernels.reference.logits import LogitMap

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PLAIN = LogitMap()
CHECK = "LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"


# ---- when it serves ------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this machine one with a Hopper GPU and everything installed, and turn Liger's head off at the end."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backends, "_missing_for_liger", lambda: None)
    yield
    backends.liger_head(False)


def state() -> str:
    return backends.describe()["liger_head"]  # type: ignore[no-any-return]


def test_it_is_off_until_it_is_turned_on(hopper: None) -> None:
    assert "is off" in state() and not backends.liger_serves(GPU)
    backends.liger_head(True)
    assert state() == "is on" and backends.liger_serves(GPU) and not backends.liger_serves(CPU)
    backends.liger_head(False)
    assert "is off" in state() and not backends.liger_serves(GPU)


def test_a_forced_backend_is_the_one_that_computes(hopper: None) -> None:
    backends.liger_head(True)
    with backend("reference"):
        assert "'reference' is forced" in state() and not backends.liger_serves(GPU)
    assert backends.liger_serves(GPU)


def test_other_gpus_are_left_to_our_kernels(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    backends.liger_head(True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert "this GPU has 10.0" in state() and not backends.liger_serves(GPU)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "needs an NVIDIA GPU" in state() and not backends.liger_serves(GPU)


def test_what_is_not_installed_is_said_where_it_is_asked_for(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_liger", True)  # as VGPO_LIGER=1 does
    monkeypatch.setattr(backends, "_missing_for_liger", lambda: "needs the moon")
    assert state() == "needs the moon"
    with pytest.raises(RuntimeError, match="VGPO_LIGER=1 asks for Liger's head, which needs the moon"):
        backends.liger_serves(GPU)
    assert not backends.liger_serves(CPU)
    with pytest.raises(RuntimeError, match="Liger's head needs the moon"):
        backends.liger_head(True)


@pytest.mark.parametrize(
    ("installed", "message"),
    [(None, "liger-kernel 0.8.5, which is not"), ("0.9.0", "0.9.0 is"), ("0.8.5", "needs nvidia-cutlass-dsl, which")],
)
def test_the_release_that_was_read_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, message: str
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise backends.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(backends, "version", version)
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert message in str(backends._missing_for_liger.__wrapped__())
    monkeypatch.setattr(backends, "version", lambda name: backends.LIGER)
    monkeypatch.setattr(backends, "find_spec", lambda name: name)
    assert backends._missing_for_liger.__wrapped__() is None


def test_the_setting_is_a_bool_and_the_variable_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="enabled must be a bool, got int"):
        backends.liger_head(1)  # type: ignore[arg-type]
    for value, expected in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("VGPO_LIGER", value)
        assert backends._asked_for_liger() is expected
    monkeypatch.setenv("VGPO_LIGER", "yes")
    with pytest.raises(ValueError, match="VGPO_LIGER must be 0 or 1, got 'yes'"):
        backends._asked_for_liger()


def of(rows: int, features: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, features, dtype=dtype), torch.zeros(vocabulary, features, dtype=dtype)


def test_it_covers_what_it_takes_as_it_is() -> None:
    hidden, weight = of(3, 64, 72)
    assert liger_head.covers(hidden, weight, None, PLAIN)
    assert liger_head.covers(hidden.view(3, 1, 64), weight, None, PLAIN)
    assert liger_head.covers(of(64, 3, 1)[0].T, weight, None, PLAIN), "rows are copied, a weight is not"
    assert not liger_head.covers(hidden, weight, torch.zeros(72), PLAIN)
    assert not liger_head.covers(hidden[:0], weight, None, PLAIN)
    assert not liger_head.covers(hidden.float(), weight, None, PLAIN)
    assert not liger_head.covers(hidden, weight.float(), None, PLAIN)
    assert not liger_head.covers(*of(3, 64, 72, torch.float16), None, PLAIN)
    assert not liger_head.covers(*of(3, 72, 72), None, PLAIN)
    assert not liger_head.covers(*of(3, 64, 70), None, PLAIN)
    assert liger_head.covers(hidden, weight, None, LogitMap(temperature=0.7, logit_scale=0.1))
    assert not liger_head.covers(hidden, weight, None, LogitMap(softcap=30.0))
    assert not liger_head.covers(hidden, weight, None, LogitMap(temperatures=torch.ones(3)))
    assert not liger_head.covers(hidden, torch.zeros(64, 72, dtype=torch.bfloat16).T, None, PLAIN)
    assert not liger_head.covers(hidden, torch.zeros(72 * 64 + 1, dtype=torch.bfloat16)[1:].view(72, 64), None, PLAIN)


# ---- what it computes ----------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Liger's fallback serve CPUs."""
    pytest.importorskip("liger_kernel", reason="needs liger-kernel, which the test extra installs on Linux for x86-64")
    monkeypatch.setattr(backends, "liger_serves", lambda device: True)


@pytest.fixture
def in_fp32(served: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it serve fp32 as well, in which the fallback is precise enough for the tolerance of our own kernels."""
    covers = liger_head.covers
    monkeypatch.setattr(
        liger_head,
        "covers",
        lambda *head: covers(*(one.bfloat16() if isinstance(one, Tensor) else one for one in head)),
    )


def by_reference(head: Head, temperature: float, slopes: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
    wide = head.double()
    leaves = wide.leaves()
    values = linear_logprob(*leaves, wide.targets, temperature=temperature, return_entropy=len(slopes) == 2)
    values = values if len(slopes) == 2 else (values,)
    gradients = torch.autograd.grad(values, leaves, [slope.double() for slope in slopes])
    return tuple(value.detach() for value in values), gradients


@pytest.mark.parametrize("both", [False, True], ids=["log-probs", "with entropies"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 20])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_it_is_linear_logprob(in_fp32: None, ignored: float, temperature: float, both: bool) -> None:
    """Values and gradients are the reference's; a row that is not read is NaN here, and its gradient zero."""
    head = make_head(517 if ignored else 5, 64, 200, ignored=ignored)
    slopes = tuple(torch.randn(len(head.targets), generator=torch.Generator().manual_seed(i)) for i in range(1 + both))
    values, gradients = by_reference(head, temperature, slopes)
    leaves = head.leaves()
    found = linear_logprob(*leaves, head.targets, temperature=temperature, return_entropy=both)
    found = found if both else (found,)
    assert all("LigerHead" in one.grad_fn.next_functions[0][0].name() for one in found), "not Liger"
    for name, one, wide in zip(("logp", "entropy"), found, values, strict=False):
        assert one.dtype == torch.float32
        assert_close(one, wide, name=name, floor=4e-6)
        assert not one[head.targets == IGNORED].any()
    for name, one, wide in zip(
        ("hidden", "weight"), torch.autograd.grad(found, leaves, slopes), gradients, strict=True
    ):
        assert_close(one, wide, name=name, floor=4 * floor_of())
    with torch.no_grad():
        again = linear_logprob(*leaves, head.targets, temperature=temperature, return_entropy=both)
    for one, two in zip(found, again if both else (again,), strict=True):
        assert torch.equal(one, two) and two.grad_fn is None


def test_one_result_may_have_no_gradient_and_one_input_need_none(in_fp32: None) -> None:
    head = make_head(9, 64, 40, ignored=0.4)
    slope = torch.randn(9)
    for part in range(2):
        slopes = tuple(slope * (part == index) for index in range(2))
        _, exact = by_reference(head, 1.0, slopes)
        hidden, weight = head.leaves()
        (by_hidden,) = torch.autograd.grad(
            linear_logprob(hidden, weight.detach(), head.targets, return_entropy=True)[part], hidden, slope
        )
        (by_weight,) = torch.autograd.grad(
            linear_logprob(hidden.detach(), weight, head.targets, return_entropy=True)[part], weight, slope
        )
        assert_close(by_hidden, exact[0], name="hidden", floor=4 * floor_of())
        assert_close(by_weight, exact[1], name="weight", floor=4 * floor_of())


@pytest.mark.parametrize("both", [False, True])
def test_every_row_ignored(served: None, both: bool) -> None:
    leaves = [torch.full(one.shape, float("nan"), dtype=one.dtype).requires_grad_() for one in of(4, 64, 72)]
    found = linear_logprob(*leaves, torch.full((4,), IGNORED), return_entropy=both)
    found = found if both else (found,)
    assert all(one.dtype == torch.float32 and not one.any() for one in found)
    for one, leaf in zip(torch.autograd.grad(found, leaves, [torch.ones(4)] * len(found)), leaves, strict=True):
        assert one.dtype == leaf.dtype and one.shape == leaf.shape and not one.any()


@pytest.mark.parametrize("ignore_index", [None, 3])
def test_bf16_and_dimensions_before(served: None, ignore_index: int | None) -> None:
    """With the dtype and the shapes of a training step; results are fp32, gradients in their inputs' dtypes."""
    head = make_head(24, 128, 160, dtype=torch.bfloat16)
    targets = head.targets.view(2, 3, 4)
    targets[0] = 3

    def computed() -> tuple[Tensor, ...]:
        leaves = head.leaves()
        hidden = leaves[0].view(2, 3, 4, 128).transpose(0, 1)
        found = linear_logprob(
            hidden, leaves[1], targets.transpose(0, 1), return_entropy=True, ignore_index=ignore_index
        )
        return (*found, *torch.autograd.grad(found[0].sum() + found[1].square().sum(), leaves))

    by_liger = computed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "liger_serves", lambda device: False)
        ours = computed()
    for name, one, two in zip(("logp", "entropy", "hidden", "weight"), by_liger, ours, strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape, name
        assert (one - two).norm() <= 0.02 * two.norm(), name


def test_gradients_are_differentiable_once(served: None) -> None:
    head = make_head(5, 64, 72, dtype=torch.bfloat16)
    hidden, weight = head.leaves()
    logp = linear_logprob(hidden, weight, head.targets)
    first = torch.autograd.grad(logp.sum(), (hidden, weight), create_graph=True)
    again = torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="Liger's LM head has first derivatives only"):
        torch.autograd.grad(first[0].sum(), weight)


def test_other_calls_are_our_own(served: None) -> None:
    head = make_head(5, 64, 70, dtype=torch.bfloat16)
    logp = linear_logprob(*head.leaves(), head.targets)
    assert "linear_logprob" not in str(logp.grad_fn) and "Liger" not in logp.grad_fn.next_functions[0][0].name()
    head = make_head(5, 64, 72, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="targets must be at least 0 and below 72"):
        linear_logprob(head.hidden, head.weight, head.targets + 100)


def test_ligers_own_check_of_targets_is_as_it_was(served: None, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(5, 64, 72, dtype=torch.bfloat16)
    for before in ("1", None):
        monkeypatch.delenv(CHECK, raising=False) if before is None else monkeypatch.setenv(CHECK, before)
        linear_logprob(head.hidden, head.weight, head.targets)
        assert os.environ.get(CHECK) == before
        with liger_head._without_check():
            assert os.environ[CHECK] == "0"
