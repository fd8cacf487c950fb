"""Start verl's ``main_ppo`` on Ray on this machine: vLLM samples, FSDP2 on gloo trains, no accelerator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS, PROMPTS, RESPONSES = 2, 4, 4

# A run of two steps that a tiny model makes in minutes on two cores.
SETTINGS = {
    "algorithm.adv_estimator": "grpo",
    "algorithm.use_kl_in_reward": False,
    "data.train_batch_size": PROMPTS,
    "data.max_prompt_length": 96,
    "data.max_response_length": 16,
    "data.image_key": "images",
    "data.dataloader_num_workers": 0,
    "data.return_raw_chat": True,
    "data.filter_overlong_prompts": False,
    "actor_rollout_ref.model.use_remove_padding": False,
    "actor_rollout_ref.model.enable_gradient_checkpointing": False,
    "+actor_rollout_ref.model.override_config.attn_implementation": "eager",
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.ref.strategy": "fsdp2",
    "actor_rollout_ref.actor.fsdp_config.strategy": "fsdp2",
    "actor_rollout_ref.actor.fsdp_config.dtype": "float32",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision": "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
    "actor_rollout_ref.actor.use_torch_compile": False,
    "actor_rollout_ref.actor.ppo_mini_batch_size": PROMPTS,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.use_dynamic_bsz": False,
    "actor_rollout_ref.actor.optim.lr": 1e-3,
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.n": RESPONSES,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
    "actor_rollout_ref.rollout.dtype": "float32",
    "actor_rollout_ref.rollout.enforce_eager": True,
    "actor_rollout_ref.rollout.free_cache_engine": False,
    "+actor_rollout_ref.rollout.enable_sleep_mode": False,
    "actor_rollout_ref.rollout.gpu_memory_utilization": 0.1,
    "actor_rollout_ref.rollout.max_model_len": 128,
    "actor_rollout_ref.rollout.max_num_seqs": 16,
    "actor_rollout_ref.rollout.max_num_batched_tokens": 512,
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes": 8,
    "actor_rollout_ref.rollout.agent.num_workers": 1,
    "+actor_rollout_ref.rollout.agent.agent_loop_manager_class": "recorder.RecordingManager",
    "actor_rollout_ref.rollout.load_format": "auto",
    "reward.num_workers": 1,
    "reward.custom_reward_function.path": HERE / "task.py",
    "reward.custom_reward_function.name": "compute_score",
    "trainer.device": "cpu",
    "trainer.n_gpus_per_node": 1,
    "trainer.nnodes": 1,
    "trainer.logger": "[console]",
    "trainer.total_epochs": 1,
    "trainer.total_training_steps": STEPS,
    "trainer.val_before_train": False,
    "trainer.test_freq": -1,
    "trainer.save_freq": -1,
    # Ray's own processes ask for CPUs that a small machine does not have.
    "ray_kwargs.ray_init.num_cpus": 32,
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    "+ray_kwargs.ray_init.num_gpus": 1,
    "+ray_kwargs.ray_init.include_dashboard": False,
    "+ray_kwargs.ray_init.object_store_memory": 300000000,
}


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a run whose files are in ``folder``."""
    # verl looks for a distribution of this name, and vLLM for its platform in that one's version.
    named = folder / "site" / "vllm-0.27.1+cpu.dist-info"
    named.mkdir(parents=True, exist_ok=True)
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.27.1+cpu\n")
    ray = folder / "ray"
    ray.mkdir(exist_ok=True)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (HERE / "site", HERE, named.parent))),
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_USE_EXTERNAL_MODULES": "cpu_platform",
        "VGPO_RECORDS": str(folder / "records"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # its token would be written to the home folder
        "RAY_TMPDIR": str(ray),
        "OMP_NUM_THREADS": "1",
        "HYDRA_FULL_ERROR": "1",
    }


def run(folder: Path, model: Path, prompts: Path, *overrides: str, timeout: int = 900) -> tuple[int, str]:
    """Run verl with this library and return its exit status and output; settings of ``overrides`` win.

    Raises:
        subprocess.TimeoutExpired: It took longer than ``timeout`` seconds.

    """
    files = {
        "actor_rollout_ref.model.path": model,
        "data.train_files": prompts,
        "data.val_files": prompts,
        "trainer.default_local_dir": folder / "checkpoints",
    }
    given = [override.lstrip("+").partition("=")[0] for override in overrides]
    settings = [f"{name}={value}" for name, value in (SETTINGS | files).items() if name.lstrip("+") not in given]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *settings, *overrides]
    log = folder / "log.txt"
    with log.open("w") as output:
        status = subprocess.run(
            command,
            cwd=folder,
            env=environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        ).returncode
    return status, log.read_text()
