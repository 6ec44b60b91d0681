#!/usr/bin/env bash
# Everything that must hold before a change lands: style, types, tests. Arguments go on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
install "[dev]"
ruff check .
ruff format --check .
mypy
# Compiled programs are kept between runs; the tests compile many small ones.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/jax_cache}"
# The SGLang server that tests/sglang starts; quick where it is installed already.
bash launch/sglang_cpu.sh --install
# Two processes, each with whole files: what the tests of a file share is made once. One that dies
# ends the run: pytest-xdist 3.8 can wait for ever for the tests of one it has replaced.
exec python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --max-worker-restart 0 "$@"
