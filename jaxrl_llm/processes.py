"""Several processes that run one job: what the first one finds out, every one of them knows.

All processes of a job run the same program on the same values, each on its own devices of one mesh.
What they cannot each find out alike (rollouts, rewards, what is in the run directory, signals,
failures) reaches all of them here. What it is not: sharding, or anything that a job of one process
notices.

join(), anywhere(), everywhere(), from_first() and spread() are meetings: all processes must come to
each of them in the same order. A process that is gone ends the others: their next operation on the
devices fails, or JAX's heartbeat ends them.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from jaxrl_llm.sharding import reserve_threads

T = TypeVar("T")

HEARTBEAT_SECONDS = 60
"""After so long without a sign of life a process counts as lost, and JAX ends the others."""

LEAVING_SECONDS = 120
"""How long a process that has ended waits for the others: the first one may still draw a report."""

SMALLEST, LARGEST = 2**12, 2**26
"""Bytes that travel at once: a power of two from these, so that few programs are compiled."""

NOTHING = np.empty(0, np.uint8)


def join(devices: int) -> None:
    """Make this process one of a job's. Before anything else that uses JAX.

    On a TPU pod, under Slurm and under Open MPI, JAX finds out how many there are and which this
    one is. Elsewhere the environment says so: JAX_COORDINATOR_ADDRESS (HOST:PORT of the first),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    devices: of the whole job.

    Raises ValueError where only some of these variables are set, or one is no number.
    """
    reserve_threads(devices)
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if given and len(given) < len(names):
        missing = ", ".join(name for name in names if name not in given)
        raise ValueError(f"{', '.join(given)} is set without {missing}; set all three or none")
    address, count, index = (given.get(name) for name in names)
    for name, value in zip(names[1:], (count, index), strict=True):
        if value is not None and not value.isdecimal():
            raise ValueError(f"{name} is {value!r}; it must be a number, from 0")
    jax.distributed.initialize(
        address,
        None if count is None else int(count),
        None if index is None else int(index),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=LEAVING_SECONDS,
    )


def first() -> bool:
    """Whether this process is the one that deals with what is outside."""
    return jax.process_index() == 0


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def everywhere(make: Callable[[], T]) -> T:
    """What make() returns in this process, if no process raises; else every one of them does.

    Where it raises in another process alone, that is a RuntimeError here.
    """
    try:
        value = make()
    except Exception:
        anywhere(True)
        raise
    if anywhere(False):
        raise RuntimeError("another process of this job failed; its output says why")
    return value


def from_first(
    make: Callable[[], T],
    *,
    share: Callable[[T], T] = lambda value: value,
    act: Callable[[Any], object] = lambda request: None,
) -> T:
    """What make() returns in the first process, in every process; what it raises, too.

    Args:
      make: called in the first process alone.
      share: what of its value the others get, by pickle; the first keeps the value itself.
      act: what the others do at each announce() meanwhile. If it raises, it has in the first
        process too, whose word on it counts.
    """
    if jax.process_count() == 1:
        return make()
    if first():
        try:
            value = make()
        except Exception as error:
            _send(("error", _packed(error)))
            raise
        _send(("value", share(value)))
        return value
    failure: Exception | None = None
    while True:
        kind, content = _receive()
        if kind == "error":
            raise _rebuilt(content)
        if failure is not None:
            raise failure
        if kind == "value":
            return content
        try:
            act(content)
        except Exception as error:
            failure = error


def announce(request: Any) -> None:
    """From inside make() of from_first: have the others act on this request.

    For what takes the devices of all, as a sharded array does. The caller goes on to do the same.
    """
    if jax.process_count() > 1:
        _send(("request", request))


def spread(tree: Any, sharding: Sharding) -> Any:
    """The first process's numpy arrays on the devices of all, split by `sharding`.

    tree: arrays [B, ...] in the first process. In the others whatever has their shapes and dtypes,
    whose values are not read. A process has no more on its host than its part and one block.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: _spread(leaf, sharding), tree)


def outline(tree: Any) -> Any:
    """Shapes and dtypes of a tree of numpy arrays: all that spread() reads in other processes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _spread(leaf: Any, sharding: Sharding) -> jax.Array:
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    indices = sharding.addressable_devices_indices_map(shape).values()
    mine = {
        bounds: np.empty([stop - start for start, stop in bounds], dtype)
        for bounds in (_bounds(index, shape) for index in indices)
    }
    row = math.prod(shape[1:]) * dtype.itemsize
    block = max(1, LARGEST // max(row, 1))
    for top in range(0, shape[0], block):
        bottom = min(top + block, shape[0])
        data = NOTHING
        if first():
            data = np.ascontiguousarray(leaf[top:bottom]).reshape(-1).view(np.uint8)
        rows = _broadcast(data, (bottom - top) * row).view(dtype).reshape(-1, *shape[1:])
        for ((start, stop), *others), part in mine.items():
            low, high = max(start, top), min(stop, bottom)
            if low < high:
                within = (slice(low - top, high - top), *(slice(*other) for other in others))
                part[low - start : high - start] = rows[within]
    return jax.make_array_from_callback(
        shape, sharding, lambda index: mine[_bounds(index, shape)], dtype=dtype
    )


def _bounds(index: Sequence[slice] | None, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """From and to of every dimension of a shard."""
    ranges = (part.indices(size) for part, size in zip(index or (), shape, strict=True))
    return tuple((start, stop) for start, stop, _ in ranges)


def _send(message: Any) -> None:
    data = np.frombuffer(pickle.dumps(message, pickle.HIGHEST_PROTOCOL), np.uint8)
    _agree_on_size(data.size)
    _broadcast(data, data.size)


def _receive() -> Any:
    # Pickle is safe here: what comes is the first process's, of the same job and code.
    return pickle.loads(_broadcast(NOTHING, _agree_on_size(0)).data)


def _agree_on_size(size: int) -> int:
    """The first process's. The others wait here while it samples.

    For minutes perhaps: between CPUs a gather has the patience, a sum or maximum has 30 seconds.
    """
    return int(multihost_utils.process_allgather(np.array(size, np.uint32))[0])


def _broadcast(data: np.ndarray, size: int) -> np.ndarray:
    """The first process's u8[size], in every process; theirs are not read."""
    parts = []
    for start in range(0, size, LARGEST):
        count = min(LARGEST, size - start)
        # As 32-bit words: what every backend adds up.
        words = np.zeros(max(SMALLEST, 1 << (count - 1).bit_length()) // 4, np.uint32)
        if first():
            words.view(np.uint8)[:count] = data[start : start + count]
        parts.append(multihost_utils.broadcast_one_to_all(words).view(np.uint8)[:count])
    return np.concatenate(parts) if parts else NOTHING


class _Parts(NamedTuple):
    """An exception that pickle does not make again: its constructor takes other arguments."""

    kind: type[Exception]
    args: tuple[Any, ...]
    attributes: dict[str, Any]


def _packed(error: Exception) -> bytes:
    """What _rebuilt() makes the exception of again; with as much of it as can travel."""
    kind, text = type(error), str(error)
    for content in (error, _Parts(kind, error.args, vars(error)), _Parts(kind, (text,), {})):
        with contextlib.suppress(Exception):
            packed = pickle.dumps(content)
            if str(_rebuilt(packed)) == text:
                return packed
    return pickle.dumps(RuntimeError(f"{kind.__name__}: {text}"))


def _rebuilt(packed: bytes) -> Exception:
    content = pickle.loads(packed)
    if not isinstance(content, _Parts):
        return content
    error = content.kind.__new__(content.kind, *content.args)
    error.args = content.args
    vars(error).update(content.attributes)
    return error
