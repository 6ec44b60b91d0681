#!/usr/bin/env bash
# The main job on this machine: install, then cold start, MiniRL with routing replay, evaluation,
# report. Two cores and no GPU are enough. Arguments go on to the trainer, for example:
#
#   bash launch/quickstart.sh --seed 1 --loss.clip.high 0.3
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
install ""
exec jaxrl-llm train configs/quickstart.py "$@"
