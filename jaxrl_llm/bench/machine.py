"""What a benchmark ran on. Call it in a process that may start jax."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jax

PACKAGES = ("jax", "jaxlib", "torch", "transformers")
VARIABLES = ("GLIBC_TUNABLES", "JAX_PLATFORMS", "XLA_FLAGS", "OMP_NUM_THREADS")
"""Of the environment: what changes how fast both sides are."""


def machine_facts() -> dict[str, str | int]:
    """Names and versions, for the head of a table and for the JSON."""
    facts: dict[str, str | int] = {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30,
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return facts | {"commit": _commit(Path(__file__).parent)}


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit(folder: Path) -> str:
    """Of a git checkout, with what is not committed said so; "" elsewhere."""

    def git(arguments: Sequence[str]) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        commit, changed = git(["rev-parse", "HEAD"]), git(["status", "--porcelain", "-uno"])
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit}, with changes" if changed else commit
