"""Fresh processes, so that a row's memory is its own and its failure ends nothing else."""

from __future__ import annotations

import glob
import importlib.util
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar, TypeVarTuple

Arguments = TypeVarTuple("Arguments")
T = TypeVar("T")

_GPU = Path("/dev/nvidiactl")


def in_fresh_process(function: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
    """What a function of a module returns, called in a new process with this one's environment.

    Raises what it raises, and concurrent.futures.process.BrokenProcessPool if the process dies.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        return pool.submit(function, *arguments).result()


def _end_with_parent() -> None:
    """Has this process end when the one that started it does, also in the middle of a step."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a pool started this process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def additions(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that every measuring process gets on top of the user's, who wins where both say."""
    added = {
        # Large arrays in huge pages. In 4 kB steps a fresh one is faulted in at an eighth of the
        # speed of memory, in any library: both sides of a comparison gain.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "JAX_PLATFORMS": _platforms(),
    }
    if _GPU.exists():
        # JAX would take three quarters of the GPU's memory before a peer, or a second process, has
        # any.
        added["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return {name: text for name, text in added.items() if text and name not in environment}


def _platforms() -> str:
    """Where libtpu is installed for its compiler and there is no TPU: what there is; else "".

    JAX would look for chips, and complain.
    """
    if importlib.util.find_spec("libtpu") is None or glob.glob("/dev/accel*"):
        return ""
    if glob.glob("/dev/vfio/[0-9]*"):
        return ""
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    has_cuda = any(importlib.util.find_spec(plugin) for plugin in plugins)
    return "cuda,cpu" if has_cuda and _GPU.exists() else "cpu"
