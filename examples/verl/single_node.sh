#!/usr/bin/env bash
# VGPO in verl on one node: GRPO on Qwen2.5-VL-7B, 8 GPUs. Settings behind it win.
#
#   pip install verl vllm vgpo_kernels    # this library from a checkout: pip install --no-build-isolation .
#   TRAIN=geo3k/train.parquet VAL=geo3k/test.parquet examples/verl/single_node.sh trainer.total_epochs=1
#
# One line below is VGPO's switch. verl finds the library by itself where it is installed; the banner at the start of the
# run says that it did. Any field of VGPOConfig can follow: +algorithm.vgpo.beta=0.5.
set -euo pipefail

settings=(
    +algorithm.vgpo.preset=paper
    algorithm.adv_estimator=grpo
    algorithm.use_kl_in_reward=False
    data.train_files="${TRAIN:?a table of prompts in the format of verl}"
    data.val_files="${VAL:?another}"
    data.image_key=images
    data.train_batch_size=512
    data.max_prompt_length=1024
    data.max_response_length=2048
    data.filter_overlong_prompts=True
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}"
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.ppo_mini_batch_size=128
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384
    actor_rollout_ref.actor.use_kl_loss=True
    actor_rollout_ref.actor.kl_loss_coef=0.01
    actor_rollout_ref.ref.strategy=fsdp2
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n=8
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6
    trainer.logger='["console"]'
    trainer.project_name=vgpo
    trainer.experiment_name=qwen2_5_vl_7b
    trainer.n_gpus_per_node="${GPUS:-8}"
    trainer.nnodes=1
    trainer.save_freq=20
    trainer.test_freq=5
    trainer.total_epochs=15
)

exec python3 -m verl.trainer.main_ppo "${settings[@]}" "$@"
