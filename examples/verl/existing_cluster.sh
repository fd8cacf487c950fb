#!/usr/bin/env bash
# As single_node.sh, on a Ray cluster that runs already, such as 4 nodes of 8 GPUs.
#
#   RAY_ADDRESS=http://HEAD:8265 examples/verl/existing_cluster.sh
#
# The cluster's processes were started without this shell's environment, so what they import has to be installed there:
# this library on every node, in one version. runtime_env.yaml, which this script submits, names it: verl imports it
# even where its plugins are turned off (VERL_USE_EXTERNAL_PLUGINS), and says what went wrong if it cannot. The driver
# asks every worker for its version before anything is sampled. The head node has this folder under the same path.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
exec ray job submit --address "${RAY_ADDRESS:?of the dashboard}" --runtime-env "$here/runtime_env.yaml" -- \
    env TRAIN="$TRAIN" VAL="$VAL" ${MODEL:+MODEL="$MODEL"} ${GPUS:+GPUS="$GPUS"} \
    "$here/single_node.sh" trainer.nnodes="${NODES:-4}" "$@"
