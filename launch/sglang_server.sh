#!/usr/bin/env bash
# An SGLang server on GPUs for a learner elsewhere: routes captured, metrics served, loopback only.
#
#   bash launch/sglang_server.sh MODEL_FOLDER [flags of sglang serve]
#
# MODEL_FOLDER holds config.json and *.safetensors: any weights of the model's shape, since the
# learner publishes its own before it asks for a token. Flags come after the ones below, and the
# last one counts. Those that matter to a learner (all of sglang 0.5.23):
#
#   --port 30001                      30000 unless given
#   --host 10.0.0.5                   where the learner reaches it, 127.0.0.1 unless given. Nothing
#                                     is encrypted, and whoever reaches the port commands the server
#                                     and reads the files it can: use a private network and a key
#   --tp-size 8                       GPUs that share the model; --ep-size 8 spreads its experts
#   --mem-fraction-static 0.85        share of GPU memory for weights and cache. Less where an update
#                                     runs out of memory: tensors are loaded beside the live ones
#   --context-length 33792            prompt and response; at least the learner's max_length
#   --quantization fp8                weights of a bfloat16 model rounded at each update
#   --kv-cache-dtype fp8_e4m3         half the cache memory
#   --enable-fp32-lm-head             logits, and so log-probabilities, in float32
#   --enable-deterministic-inference --attention-backend fa3
#                                     seeds are obeyed and a token's log-probability does not depend
#                                     on its batch; slower. Prefixes stay cached with fa3, fa4 and
#                                     triton; flashinfer, the default on Blackwell, turns that off
#   --weight-loader-prefetch-checkpoints
#                                     reads a network folder once, not once for each GPU
#   --weight-loader-disable-mmap      reads files whole; for bucket mounts that map files slowly
#   --skip-tokenizer-init             for a folder without a tokenizer: token ids in, no text out
#
# SGLANG_API_KEY   clients must send it as `Authorization: Bearer KEY`; not in `ps`, not in the log
# SGLANG_PYTHON    the Python that has sglang installed, python3 unless set
#
# /health answers at once instead of generating a token, so that a server paused for an update is not
# taken for a lost one; sglang's watchdog ends one that hangs. Leave chunked prefill on: the buffer of
# routes has its size. sglang reads SGLANG_PORT for ports of its own; the server's is --port.
set -euo pipefail
launch="$(cd "$(dirname "$0")" && pwd)"
case "${1:-}" in
  "" | -*)
    echo "Usage: bash launch/sglang_server.sh MODEL_FOLDER [flags of sglang serve]" >&2
    exit 2
    ;;
esac
export SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION="${SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION:-0}"
exec "${SGLANG_PYTHON:-python3}" "$launch/sglang_serve.py" --model-path "$1" \
  --host 127.0.0.1 --port 30000 \
  --enable-return-routed-experts --enable-metrics \
  "${@:2}"
