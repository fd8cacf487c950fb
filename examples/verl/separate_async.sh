#!/usr/bin/env bash
# As single_node.sh, asynchronous: 4 GPUs train while 4 others sample, and weights go from one to the other by NCCL.
# Groups arrive whole, so factors are those of a synchronous run of the same responses. rollout_correction weighs tokens
# by the ratio of the policy to the one that sampled them.
set -euo pipefail

export GPUS=4
exec "$(dirname "$0")/single_node.sh" \
    trainer.v1.trainer_mode=separate_async \
    trainer.v1.separate_async.parameter_sync_step=4 \
    actor_rollout_ref.rollout.nnodes=1 \
    actor_rollout_ref.rollout.n_gpus_per_node=4 \
    actor_rollout_ref.rollout.checkpoint_engine.backend=nccl \
    actor_rollout_ref.rollout.calculate_log_probs=True \
    algorithm.rollout_correction.rollout_is=token \
    "$@"
