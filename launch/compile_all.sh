#!/usr/bin/env bash
# Compiles the steps of every config for TPUs in full and prints what they need, on a machine without
# a TPU: the tables of README.md, "Will it fit?". About ten minutes on two cores. Arguments go on to
# each `jaxrl-llm compile`. Ends with its status where a config leaves too little memory free.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
install "[tpu]"
status=0
while read -r config topology; do
    jaxrl-llm compile "configs/$config.py" --topology "$topology" "$@" < /dev/null || status=$?
done <<'CONFIGS'
qwen3_30b_a3b_v5p_64 v5p:2x4x4
qwen3_30b_a3b_v6e_64 v6e:8x8
qwen3_moe_v5e_8 v5e:2x4
CONFIGS
exit "$status"
