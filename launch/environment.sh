# Sourced by the other scripts: makes .venv from Python 3.11 or 3.12 and installs what is missing.
#
#   install EXTRAS      EXTRAS is "" or, for example, "[dev]"
#
# The install is repeated only when pyproject.toml, the extras or the Python changed.

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.11 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "No Python 3.11 or 3.12 with its venv module found (Debian: apt install python3-venv)." >&2
  echo "Install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
  return 1
}

install() {
  local extras="$1" venv="${VENV:-.venv}" python stamp
  python="$(find_python)"
  stamp="$(cat pyproject.toml <("$python" --version) <(echo "$extras") | sha256sum | cut -d ' ' -f 1)"
  if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$stamp" ]; then
    echo "Installing jaxrl_llm$extras into $venv with $("$python" --version) ..."
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".$extras"
    echo "$stamp" >"$venv/.installed"
  fi
  export PATH="$PWD/$venv/bin:$PATH"
}

# Large arrays on the CPU in huge pages: in 4 kB steps the kernel hands out fresh memory at an eighth
# of its speed, and a step allocates gigabytes. Of glibc 2.35 and later; others do not read it.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
