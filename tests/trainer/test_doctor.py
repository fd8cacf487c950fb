"""``vgpo doctor``: says what is there, and notices what is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from vgpo_trainer import doctor
from vgpo_trainer.cli import main

import vgpo_kernels
from vgpo_kernels import backends

torch.set_num_threads(1)


def test_prints_versions_backends_and_a_passed_check(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert f"served by {backends.describe()['serves']['cpu']}" in shown
    assert "cpu by" in shown and "works, error" in shown


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_check_is_close_but_not_idle(name):
    if not backends.describe()["built"][name]:
        pytest.skip(f"{name} is not built")
    with backends.backend(name):
        result = doctor.check_device("cpu", name)
    assert result.passed
    assert 0 < result.error < doctor.TOLERANCE
    assert result.milliseconds > 0


def test_wrong_numbers_fail(monkeypatch, capsys):
    right = vgpo_kernels.visual_focus

    def wrong(hidden, *masks):
        return right(hidden, *masks) * (1.01 if hidden.dtype == torch.float32 else 1.0)

    monkeypatch.setattr(vgpo_kernels, "visual_focus", wrong)
    assert main(["doctor"]) == 1
    assert "wrong by" in capsys.readouterr().out


def test_a_backend_that_raises_fails_without_a_traceback(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(vgpo_kernels, "policy_loss", broken)
    result = doctor.check_device("cpu", "cpp")
    assert not result.passed and math.isnan(result.error)
    assert main(["doctor"]) == 1
    assert "failed: RuntimeError: no such kernel" in capsys.readouterr().out


def test_version_of_a_package_that_is_not_there():
    assert doctor.installed_version("vgpo-no-such-package") == "not installed"


def test_forced_backend_is_named(capsys):
    with backends.backend("reference"):
        assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "cpu by reference" in shown and "forced" in shown
