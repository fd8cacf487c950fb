#!/usr/bin/env bash
# As single_node.sh, for long responses: FSDP2, and sequences split over 2 GPUs by Ulysses. The ranks exchange partial
# sums of the images' hidden states and one cosine per token; no hidden state leaves its rank.
set -euo pipefail

exec "$(dirname "$0")/single_node.sh" \
    actor_rollout_ref.actor.ulysses_sequence_parallel_size=2 \
    actor_rollout_ref.ref.ulysses_sequence_parallel_size=2 \
    data.max_response_length=16384 \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=20480 \
    "$@"
