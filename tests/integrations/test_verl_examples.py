"""The scripts of examples/verl: settings that verl has, and that ask for VGPO."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl", reason="verl is not installed (make verl installs it)")

import verl
from hydra import compose, initialize_config_dir

from vgpo_kernels import VGPOConfig
from vgpo_kernels.integrations.verl import run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "verl"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))


def composed(script: Path, tmp_path: Path) -> Any:
    """Return verl's configuration as a script would start it, with programs that print their arguments."""
    for name in ("python3", "ray"):
        program = tmp_path / name
        # What Ray would submit comes after "--", and does not see this shell's environment.
        program.write_text(
            '#!/usr/bin/env bash\nif [ "$0" != "${0%ray}" ]; then\n'
            'while [ "$1" != -- ]; do shift; done\nshift\nexec env -i PATH="$PATH" "$@"\nfi\nprintf "%s\\0" "$@"\n'
        )
        program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "TRAIN": "a.parquet",
        "VAL": "b.parquet",
        "MODEL": "a/model",
        "GPUS": "2",
        "RAY_ADDRESS": "http://head:8265",
    }
    done = subprocess.run(
        [script, "trainer.total_epochs=3"], env=environment, capture_output=True, text=True, check=True
    )
    module, name, *settings = done.stdout.rstrip("\0").split("\0")
    assert (module, name) == ("-m", "verl.trainer.main_ppo"), shlex.join([module, name])
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer", overrides=settings)


def test_there_are_scripts() -> None:
    names = {script.stem for script in SCRIPTS}
    assert names == {"single_node", "existing_cluster", "ulysses", "separate_async"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_ask_for_vgpo(script: Path, tmp_path: Path) -> None:
    config = composed(script, tmp_path)
    found = run.switch(config)
    assert found == run.Switch(VGPOConfig.paper(), bypass=False)
    assert config.trainer.total_epochs == 3, "settings behind a script win"
    assert config.actor_rollout_ref.model.path == "a/model"
    assert config.trainer.n_gpus_per_node == (4 if script.stem == "separate_async" else 2)
    if script.stem == "separate_async":
        # What verl asks of this trainer.
        steps = config.trainer.v1.separate_async.parameter_sync_step
        assert config.data.train_batch_size == steps * config.actor_rollout_ref.actor.ppo_mini_batch_size
        assert config.actor_rollout_ref.rollout.checkpoint_engine.backend != "naive"
    if script.stem == "existing_cluster":
        assert config.trainer.nnodes == 4
