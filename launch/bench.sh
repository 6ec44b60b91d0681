#!/usr/bin/env bash
# How fast this is, against this machine's limit and against transformers in torch: a table, minutes.
# Arguments go on to the command, for example:
#
#   bash launch/bench.sh update decode --json figures.json
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
install "[bench]"
exec jaxrl-llm bench --peer tests/bench/transformers_peer.py "$@"
