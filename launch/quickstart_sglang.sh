#!/usr/bin/env bash
# The quickstart with a real SGLang server on this machine's CPU: install both environments, export
# the model, start the server, train. Arguments go on to the trainer, for example --steps 10.
# The server ends with the script.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
install ""
bash launch/sglang_cpu.sh --install

export SGLANG_URL="${SGLANG_URL:-http://127.0.0.1:30000}"
healthy() {
  python -c 'import sys, httpx; httpx.get(sys.argv[1], timeout=5).raise_for_status()' \
    "$SGLANG_URL/health" 2>/dev/null
}
if healthy; then
  echo "A server answers at $SGLANG_URL already; the quickstart starts one of its own." >&2
  echo "Stop it, or choose another port: SGLANG_URL=http://127.0.0.1:30001 bash $0" >&2
  exit 1
fi
served="$(mktemp -d)"
jaxrl-llm export configs/quickstart_sglang.py "$served/model" --dtype float32
bash launch/sglang_cpu.sh "$served/model" --port "${SGLANG_URL##*:}" --skip-tokenizer-init \
  >"$served/server.log" 2>&1 &
server=$!
stop() {
  kill "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
  rm -rf "$served"
}
trap stop EXIT

echo "Waiting for the server at $SGLANG_URL (about a minute) ..."
until healthy; do
  if ! kill -0 "$server" 2>/dev/null; then
    tail -n 30 "$served/server.log" >&2
    echo "The server ended before it was ready; the end of its log is above." >&2
    exit 1
  fi
  sleep 1
done
jaxrl-llm train configs/quickstart_sglang.py "$@"
