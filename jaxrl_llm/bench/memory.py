"""Bytes that a process or its device holds."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import jax

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Memory of this process that is in RAM now. Linux only."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most that was, since the process began or reset_peak() was called. Linux only."""
    return _status("VmHWM")


def reset_peak() -> bool:
    """Lets peak_resident_bytes() start anew; False where the kernel does not allow it.

    What set-up has freed, compilation above all, goes back to the system before.
    """
    with contextlib.suppress(OSError, AttributeError):  # where the C library is not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{_STATUS} has no {field}; memory is measured on Linux only")


def array_bytes() -> int:
    """Of all arrays that jax holds on this process's devices, a shared buffer counted once."""
    jax.block_until_ready(jax.live_arrays())
    sizes = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            sizes[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(sizes.values())
