"""Accelerators without float64 that no kernel of ours serves: checks in a process that has such a device."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.utils import backend_registration

RUN = Path(__file__).with_name("run.py")

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no third-party device in Python",
)


def run(*arguments: str) -> None:
    """Run checks in a process of their own, as the registration of a device stays for good."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # libraries would take a GPU first
    command = [sys.executable, "-W", "ignore::UserWarning", str(RUN), *arguments]
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stdout


def test_every_operator() -> None:
    run("operators", "quick")


@pytest.mark.slow
def test_every_operator_thoroughly() -> None:
    run("operators", "thorough")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_what_workers_of_verl_compute_on_ascend() -> None:
    run("adapters", "everything", "npu")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="needs the trainer's packages")
def test_the_trainer_and_its_commands() -> None:
    run("training", "everything")
