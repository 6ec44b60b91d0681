#!/usr/bin/env bash
# A real SGLang server on this machine's CPU. It is for tests and for trying things out: it computes
# what the server on a GPU computes, in float32, and slowly.
#
#   bash launch/sglang_cpu.sh MODEL_FOLDER [--port 30001] [other flags of sglang serve]
#   bash launch/sglang_cpu.sh --install
#
# MODEL_FOLDER holds config.json and *.safetensors, as `jaxrl-llm export` writes them. Flags come
# after the ones below, and the last one counts. It listens on 127.0.0.1:30000 and is ready when
# GET /health answers 200, after 40 s on an idle machine (three processes import torch). A folder
# without a tokenizer needs --skip-tokenizer-init; token ids go in and out then, no text, which is
# all that a learner asks for. SIGTERM ends it and its children.
#
# SGLANG_API_KEY   clients must send it as `Authorization: Bearer KEY`; not in `ps`, not in the log
# SGLANG_VENV      the server's environment, ~/.cache/jaxrl_llm/sglang_cpu unless set
# SGLANG_PYTHON    the Python 3.11 or 3.12 to make it from
#
# The environment is not the learner's: sglang pins torch and 60 other packages. It is made at the
# first start (2.9 GB, 2 to 7 minutes) and again when the pins change. Python 3.11 is preferred:
# torch's CPU build can then be had from a wheel folder. Where pip finds a CUDA build only, the
# environment is some 5 GB and works as well; pip's own settings say where else it may look.
set -euo pipefail
launch="$(cd "$(dirname "$0")" && pwd)"
shim="$launch/sglang_cpu"
venv="${SGLANG_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/jaxrl_llm/sglang_cpu}"

usage() {
  echo "Usage: bash launch/sglang_cpu.sh MODEL_FOLDER [flags of sglang serve], or --install" >&2
  exit 2
}

# Does nothing where the environment is that of these pins; reinstalls the stand-ins alone where
# nothing but their sources changed.
install_sglang() {
  # These pin CUDA packages, hence --no-deps. triton is imported and never runs; torchvision above
  # 0.16 registers operators that a CPU torch does not have.
  local without_dependencies=(triton==3.7.1 torchvision==0.16.2 sglang==0.5.23)
  local python pins own copy pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  python="$(PYTHON="${SGLANG_PYTHON:-python3.11}" find_python)"
  pins="$(cat "$shim/requirements.txt" <("$python" --version) <(echo "${without_dependencies[@]}") |
    sha256sum)"
  own="$(cat "$shim"/*.py "$shim/pyproject.toml" | sha256sum)"
  mkdir -p "$venv"
  exec 9>"$venv/.lock" # two tests may start at once
  flock 9
  if [ "$(cat "$venv/.pins" 2>/dev/null)" != "$pins" ]; then
    echo "Installing sglang for CPUs into $venv with $("$python" --version) ..."
    rm -f "$venv/.pins" "$venv/.own"
    "$python" -m venv "$venv"
    "${pip[@]}" --requirement "$shim/requirements.txt"
    "${pip[@]}" --no-deps "${without_dependencies[@]}"
    echo "$pins" >"$venv/.pins"
  fi
  if [ "$(cat "$venv/.own" 2>/dev/null)" != "$own" ]; then
    copy="$(mktemp -d)" # pip would leave build/ beside the sources
    cp "$shim"/*.py "$shim/pyproject.toml" "$copy"
    "${pip[@]}" --no-deps --no-build-isolation --force-reinstall "$copy"
    rm -r "$copy"
    echo "$own" >"$venv/.own"
  fi
  exec 9>&- # the server must not hold the lock
}

case "${1:-}" in
  --install) ;;
  "" | -*) usage ;;
esac
# shellcheck source=environment.sh
source "$launch/environment.sh"
install_sglang
[ "$1" != --install ] || exit 0

# The CPU engine; no compiler at run time; /health answers at once instead of generating a token.
export SGLANG_USE_CPU_ENGINE=1 TORCHDYNAMO_DISABLE=1 SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=0
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# float32 and torch's own kernels: log-probabilities to 1e-6 of the learner's, the same routes.
# Routes are captured, seeds obeyed. 20,000 tokens of cache are 7 MB for a tiny model.
exec "$venv/bin/python" "$launch/sglang_serve.py" --model-path "$1" \
  --host 127.0.0.1 --port 30000 \
  --device cpu --dtype float32 --attention-backend torch_native --sampling-backend pytorch \
  --cuda-graph-backend-decode=disabled --cuda-graph-backend-prefill=disabled \
  --mem-fraction-static 0.1 --max-total-tokens 20000 --skip-server-warmup \
  --enable-return-routed-experts --enable-deterministic-inference --enable-metrics \
  "${@:2}"
