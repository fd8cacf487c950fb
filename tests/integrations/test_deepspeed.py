"""VGPOTrainer with DeepSpeed on two processes: the same losses, factors and weights as without it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")
if find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed (make verl)", allow_module_level=True)

from integrations.deepspeed_case import CASES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Any]:
    """Every case of deepspeed_case.py on two gloo processes."""
    out = tmp_path_factory.mktemp("deepspeed") / "results.pt"
    script = Path(__file__).with_name("deepspeed_case.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    finished = subprocess.run(
        [*launch, str(script), str(out)], env=environment, capture_output=True, text=True, timeout=540
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-4000:]
    # The warning that a head was not proven on the model, and others have to take its place.
    assert finished.stderr.count("fused_head:") == 0, finished.stderr
    content = torch.load(out)
    assert content["processes"] == 2
    return content["results"]


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_without_deepspeed(trained, name):
    plain, sharded = trained[name]
    assert (plain["kind"], sharded["kind"]) == ("MULTI_CPU", "DEEPSPEED")
    assert len(plain["logged"]) == len(sharded["logged"]) == len(plain["steps"]) - 1 > 0
    for record, other in zip(plain["logged"], sharded["logged"], strict=True):
        assert record.keys() == other.keys()
        expected = {key: value for key, value in record.items() if key != "step_time"}
        assert {key: other[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=2e-6)
    assert plain["logged"][0]["vgpo/psi_std"] > 0.1
    before, after = plain["steps"][0], plain["steps"][1]
    assert len(sharded["steps"]) == len(plain["steps"])
    for weights, others in zip(plain["steps"], sharded["steps"], strict=True):
        assert weights.keys() == others.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(others[key], weight, rtol=1e-6, atol=1e-6)
    assert max((after[key] - weight).abs().max() for key, weight in before.items()) > 1e-3
    assert all(sharded["empty"]) == (name != "ZeRO-2") and not any(plain["empty"])


def test_the_head_is_trained(trained):
    """Its gradient would be missing first: TRL and this trainer read its weight beside its module."""
    for name in ("sampled, old log-probabilities", "two views, loaded for ZeRO-3", "LoRA, two views"):
        _, sharded = trained[name]
        before, after = sharded["steps"][0], sharded["steps"][1]
        (head,) = (key for key in before if key.endswith(("lm_head.weight", "lm_head.modules_to_save.default.weight")))
        assert (after[head] - before[head]).abs().max() > 1e-3, name


def test_a_gradient_of_nan_ends_the_run(trained):
    """DeepSpeed leaves out the step, and says that the norm is infinite."""
    assert trained["failure"].startswith("step 2: the gradient's norm is inf; its batch is in ")


def test_an_evaluation_before_training(trained):
    plain, sharded = trained["evaluations"]
    assert sharded["batches"] == plain["batches"]
    assert sharded["phi_std"] == pytest.approx(plain["phi_std"], rel=1e-4)
