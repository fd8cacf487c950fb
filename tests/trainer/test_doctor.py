"""``vgpo doctor``: says what is there, and notices what is wrong."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vgpo_trainer import fused_head, trainer
from vgpo_trainer.cli import main
from vgpo_trainer.commands import doctor, model_checks

import vgpo_kernels
from vgpo_kernels import backends
from vgpo_kernels.integrations import attention_call, attention_passes, surface
from vgpo_kernels.integrations import transformers as adapter

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def without_model(monkeypatch):
    monkeypatch.setattr(model_checks, "CHECKS", ())


def test_everything_works_and_nothing_else_is_said(capsys):
    assert main(["doctor"]) == 0
    shown, told = capsys.readouterr()
    lines = shown.splitlines()
    heading = next(index for index, line in enumerate(lines) if "tiny LLaVA" in line)
    assert len(model_checks.CHECKS) == 5
    assert lines[heading + 1 :] == [f"{check.claim}: works" for check in model_checks.CHECKS]
    assert "\033" not in shown and told == ""


@pytest.mark.usefixtures("without_model")
def test_prints_versions_backends_and_a_passed_check(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert f"handled by {backends.describe()['serves']['cpu']}" in shown
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


@pytest.mark.usefixtures("without_model")
def test_wrong_numbers_fail(monkeypatch, capsys):
    right = vgpo_kernels.visual_focus

    def wrong(hidden, *masks):
        return right(hidden, *masks) * (1.01 if hidden.dtype == torch.float32 else 1.0)

    monkeypatch.setattr(vgpo_kernels, "visual_focus", wrong)
    assert main(["doctor"]) == 1
    assert "wrong by" in capsys.readouterr().out


@pytest.mark.usefixtures("without_model")
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


@pytest.mark.usefixtures("without_model")
def test_forced_backend_is_named(capsys):
    with backends.backend("reference"):
        assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "cpu by reference" in shown and "forced" in shown


@pytest.mark.usefixtures("without_model")
def test_an_extension_that_is_refused_fails(monkeypatch, capsys):
    described = backends.describe()
    monkeypatch.setattr(backends, "describe", lambda: {**described, "refused": "built from other sources"})
    assert main(["doctor"]) == 1
    assert "extension: failed: built from other sources" in capsys.readouterr().out


# What the tiny model proves: each check fails when what it claims is broken.


def failure_of(prove):
    return model_checks.failure_of(model_checks.Check("", (), prove))


def break_last_norm(monkeypatch):
    def other(model, norm=None):
        return adapter.unwrap(model).get_decoder().layers[-1].post_attention_layernorm

    monkeypatch.setattr(adapter, "final_norm", other)


def break_last_bit(monkeypatch):
    monkeypatch.setattr(adapter, "_local", lambda hidden: torch.nextafter(hidden, hidden + 1))


def break_shares(monkeypatch):
    right = attention_call.attention_mass
    monkeypatch.setattr(attention_call, "attention_mass", lambda *inputs, **options: 0.99 * right(*inputs, **options))


def break_places_of_decoded_tokens(monkeypatch):
    right = attention_passes.Follower.begin

    def begin(self, *inputs):
        return replace(right(self, *inputs), tokens_before=0)

    monkeypatch.setattr(attention_passes.Follower, "begin", begin)


def break_shares_of_decoded_tokens(monkeypatch):
    right = attention_call.AttentionCall.mass

    def mass(self, *inputs, **options):
        return right(self, *inputs, **options) * (self.q.shape[2] > 1)

    monkeypatch.setattr(attention_call.AttentionCall, "mass", mass)


def break_head(monkeypatch):
    def half(hidden, weight, *inputs, **options):
        return right(hidden / 2, weight, *inputs, **options)

    right = fused_head.linear_logprob
    monkeypatch.setattr(fused_head, "linear_logprob", half)


def break_head_of_padded_rows(monkeypatch):
    """A head that is right for the probe's single row, so that it is installed."""

    def shifted(hidden, *inputs, **options):
        return right(hidden if len(hidden) == 1 else hidden.roll(1, 0), *inputs, **options)

    right = fused_head.linear_logprob
    monkeypatch.setattr(fused_head, "linear_logprob", shifted)


def break_step(monkeypatch):
    def without_effect(*inputs, **options):
        result = right(*inputs, **options)
        return result._replace(loss=0 * result.loss)

    right = trainer.policy_loss
    monkeypatch.setattr(trainer, "policy_loss", without_effect)


@pytest.mark.parametrize(
    ("breaks", "prove", "reason"),
    [
        (break_last_norm, model_checks.prove_hidden_states, "wrong by"),
        (break_last_bit, model_checks.prove_hidden_states, "wrong by"),
        (break_shares, model_checks.prove_attention, "wrong by"),
        (break_places_of_decoded_tokens, model_checks.prove_attention_in_generate, ""),
        (break_shares_of_decoded_tokens, model_checks.prove_attention_in_generate, "wrong by"),
        (break_head, model_checks.prove_fused_head, "fused_head: "),
        (break_head_of_padded_rows, model_checks.prove_fused_head, "wrong by"),
        (break_step, model_checks.prove_training_step, "no weight changed"),
    ],
)
def test_a_check_fails_when_what_it_claims_is_broken(monkeypatch, breaks, prove, reason):
    breaks(monkeypatch)
    failure = failure_of(prove)
    assert failure is not None and reason in failure
    assert "\n" not in failure


def test_a_failed_check_is_one_line_and_no_traceback(monkeypatch, capsys):
    def broken(device):
        print("noise on", device)
        raise RuntimeError("no such thing\nand more")

    claims = (model_checks.Check("first", (), broken), model_checks.Check("second", (), lambda device: None))
    monkeypatch.setattr(model_checks, "CHECKS", claims)
    assert main(["doctor"]) == 1
    shown, told = capsys.readouterr()
    assert shown.endswith("\nfirst: failed: RuntimeError: no such thing\nsecond: works\n") and told == ""


def test_metrics_of_a_step_are_judged():
    before = {"weight": torch.zeros(2)}
    after = {"weight": torch.ones(2)}
    record = {"loss": 0.5, **{f"vgpo/{name}": 1.0 for name in model_checks.VGPO_METRICS}}
    model_checks.judge_step(before, after, record)
    for wrong, reason in (
        ({**record, "loss": None}, "not finite: loss"),
        ({**record, "vgpo/weighted_share": 0.5}, "50% of its responses"),
        ({name: value for name, value in record.items() if name != "vgpo/psi_std"}, "lack vgpo/psi_std"),
    ):
        with pytest.raises(model_checks.Failure, match=reason):
            model_checks.judge_step(before, after, wrong)
    with pytest.raises(model_checks.Failure, match="weight is not finite"):
        model_checks.judge_step(before, {"weight": torch.tensor([1.0, math.nan])}, record)


def test_without_the_packages_of_the_trainer_the_kernels_are_checked():
    program = """
import sys
names = ("PIL", "rich", "trl", "transformers", "accelerate", "datasets", "sklearn", "scipy", "peft")
sys.modules.update(dict.fromkeys(names))
from vgpo_trainer.cli import main
raise SystemExit(main(["doctor"]))
"""
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "works, error" in result.stdout
    for check in model_checks.CHECKS:
        assert f"{check.claim}: not installed: PIL, transformers" in result.stdout


def test_versions_beside_those_tested(monkeypatch):
    monkeypatch.setattr(surface, "TESTED", {"torch": "2.8 to 2.15", "trl": "1.16"})
    for package, installed, mark in (
        ("torch", "2.8.0+cpu", "tested: 2.8 to 2.15"),
        ("torch", "2.15.3", "tested: 2.8 to 2.15"),
        ("torch", "2.16.0.dev20260101+cu130", "newer than tested: 2.8 to 2.15"),
        ("torch", "2.7.1", "older than tested: 2.8 to 2.15"),
        ("trl", "1.16.4", "tested: 1.16"),
        ("trl", "1.17.0", "newer than tested: 1.16"),
        ("trl", "not installed", "tested: 1.16"),
    ):
        assert doctor.with_tested(package, installed) == f"{installed} ({mark})"
    assert doctor.with_tested("numpy", "2.4.6") == "2.4.6"
