"""One rollout batch, trained on by one process or two, in one piece or cut: the same loss and the same gradients."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from accelerate import ParallelismConfig
from trainer.distributed_cases import CASES, run_case
from vgpo_trainer import VGPOTrainingConfig

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")


LEAST = {"pepo": 0.005}  # cosines of a whole model hardly vary


@cache
def in_one_piece(name: str) -> dict[str, Any]:
    return run_case(name, micro_batches=1)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, Any]:
    """Every case on two gloo processes that accelerate launches, two micro-batches each."""
    out = tmp_path_factory.mktemp("launch") / "results.pt"
    script = Path(__file__).with_name("distributed_cases.py")
    # --cpu would want mpirun; this flag starts processes by torchrun, and the script tells its trainers to use the CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [*launch, str(script), str(out)], env=environment, capture_output=True, text=True, timeout=540
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    content = torch.load(out)
    assert content["processes"] == 2
    return content["results"]


def assert_same_training(one: dict[str, Any], other: dict[str, Any], least: float = 0.1) -> None:
    """``least`` is how far the weights must vary: of responses by VGPO, of tokens by another method."""
    assert len(one["loss"]) == len(other["loss"]) == len(one["gradients"]) == len(other["gradients"]) > 0
    assert other["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert other["spread"] == pytest.approx(one["spread"], abs=1e-6)
    assert one["spread"][-1] > least
    for record, other_record in zip(one["logged"], other["logged"], strict=True):
        ours = {name: value for name, value in record.items() if name.startswith("vgpo/")}
        assert ours == pytest.approx({name: other_record[name] for name in ours}, rel=1e-4, abs=1e-5)
    for gradients, others in zip(one["gradients"], other["gradients"], strict=True):
        others = {name.removeprefix("module."): gradient for name, gradient in others.items()}
        assert gradients.keys() == others.keys()
        largest = max(gradient.abs().max() for gradient in gradients.values())
        assert largest > 0.01
        for name, gradient in gradients.items():
            assert (gradient - others[name]).abs().max() < 1e-6 * largest.clamp(min=1), name


@pytest.mark.parametrize("name", CASES)
def test_four_micro_batches_are_one_batch(name):
    assert_same_training(in_one_piece(name), run_case(name, micro_batches=4), LEAST.get(name, 0.1))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_of_two_micro_batches_are_one_batch(name, two_processes):
    """The second of the three prompts has responses on both processes."""
    assert_same_training(in_one_piece(name), two_processes[name], LEAST.get(name, 0.1))


@pytest.mark.slow
def test_a_fully_sharded_model_trains_alike(two_processes):
    assert two_processes["sharded"]["kinds"] == {"DTensor"}
    assert_same_training(in_one_piece("dapo"), two_processes["sharded"])


@pytest.mark.slow
def test_a_fully_sharded_model_passes_two_views_alike(two_processes):
    assert two_processes["sharded views"]["kinds"] == {"DTensor"}
    assert_same_training(in_one_piece("two views"), two_processes["sharded views"])


@pytest.mark.slow
def test_each_process_swaps_the_images_of_its_own_rows(two_processes):
    """They hold responses to two prompts each."""
    (record,) = two_processes["swapped"]["logged"]
    assert record["vgpo/weighted_share"] == 1
    assert record["vgpo/view_kl"] > 0 and record["vgpo/view_kl"] == pytest.approx(record["vgpo/visual_focus"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_log_what_trls_do(two_processes):
    """Means, extremes of responses and the loss of the policy, over both."""
    ours, theirs = two_processes["logs"]["ours"], two_processes["logs"]["trl's"]
    assert len(ours) == len(theirs) == 2
    for record, other in zip(ours, theirs, strict=True):
        assert {name for name in record if not name.startswith("vgpo/")} == set(other)
        for name in set(other) - {"step_time"}:
            assert record[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    assert 0 < ours[1]["clip_ratio/region_mean"] < 1 and ours[1]["clip_ratio/high_max"] > 0
    (record,) = two_processes["grpo"]["logged"]
    assert record["vgpo/groups"] == 3 and record["vgpo/singleton_groups"] == 0


@pytest.mark.slow
def test_groups_of_an_evaluation_straddle_processes(two_processes):
    """Three responses on each, two to a group; the last batch has two, which accelerate fills up to six."""
    found = two_processes["evaluation"]
    assert len(found["batches"]) == 2 and found["phi_std"] > 0.1
    for batch in found["batches"]:
        groups, answers = zip(*batch, strict=True)
        assert groups == (0, 0, 2, 2, 4, 4) and answers[::2] == answers[1::2]


@pytest.mark.slow
def test_rows_of_text_beside_images_are_refused_by_a_sharded_model(two_processes):
    """A process whose batch has no image would not gather the vision tower, and the other would wait for it."""
    message = two_processes["refused"]
    assert re.search(r"^row 0 of the generation batch, 'Add the digits.', has no image|^a row of another", message)
    assert "a vision tower that is sharded has to run on all processes" in message


@pytest.mark.slow
def test_sequences_that_accelerate_splits_are_refused(two_processes):
    """TRL refuses them in its own configuration, and fails in the first step where a launcher's asks for them."""
    messages = two_processes["refused split"]
    assert messages["CP"].startswith("cp_size=2 is not supported: accelerate splits sequences when a batch is loaded")
    assert messages["SP"].startswith("sp_size=2 is not supported")
    with pytest.raises(ValueError, match="does not support sequence-dim parallelism"):
        VGPOTrainingConfig("run", use_cpu=True, bf16=False, parallelism_config=ParallelismConfig(cp_size=2))
