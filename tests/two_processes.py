"""What each of two processes does in test_processes.py: run as a program, in both at once."""

import sys
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrl_llm import processes
from jaxrl_llm.rollout.engine import EngineError
from jaxrl_llm.types import RouteError

processes.LARGEST = 2**12  # so that what is sent here takes several blocks
processes.join(8)
FIRST = processes.first()


def never() -> str:
    raise AssertionError("only the first process makes anything")


def check_values() -> None:
    """Values, small and large, and what of them is shared."""
    made = processes.from_first(lambda: {"a": (1, "ä"), "b": np.arange(3)} if FIRST else never())
    assert made["a"] == (1, "ä")
    assert made["b"].tolist() == [0, 1, 2]
    large = bytes(range(256)) * 2**9 + b"the end"  # more than travels at once
    assert processes.from_first(lambda: large) == large
    kept = processes.from_first(lambda: [1, 2, 3], share=lambda value: value[:1])
    assert kept == ([1, 2, 3] if FIRST else [1])
    assert processes.from_first(lambda: None) is None


def check_errors() -> None:
    """An exception arrives as what it was, with its message and attributes."""

    def fail(error: Exception) -> None:
        raise error

    errors = (EngineError("no server"), RouteError("missing", "no routes"), OSError(28, "full"))
    for error in errors:
        with pytest.raises(type(error)) as arrived:
            processes.from_first(partial(fail, error))
        assert str(arrived.value) == str(error)
        assert vars(arrived.value) == vars(error)
    unpicklable = ValueError("a lambda in it")
    unpicklable.cause = lambda: None  # type: ignore[attr-defined]
    with pytest.raises((ValueError, RuntimeError), match="a lambda in it"):
        processes.from_first(partial(fail, unpicklable))


def check_requests() -> None:
    """What the first announces, the others act on, in order, until the first is done."""
    seen: list[int] = []

    def lead() -> str:
        for number in range(3):
            processes.announce(number)
        return "done"

    assert processes.from_first(lead, act=seen.append) == "done"
    assert seen == ([] if FIRST else [0, 1, 2])


def check_flags() -> None:
    """A flag in either process is known to both."""
    assert [processes.anywhere(flag) for flag in (False, FIRST, not FIRST)] == [False, True, True]


def check_spread() -> None:
    """The first one's arrays, bit for bit, on the devices of both, in blocks."""
    names = ("rows", "positions", "tensor")
    mesh = jax.make_mesh((4, 2, 1), names, (AxisType.Explicit,) * 3)
    sharding = NamedSharding(mesh, PartitionSpec("rows", "positions"))
    generator = np.random.default_rng(0)
    floats = generator.normal(size=(8, 6)).astype(np.float32)
    floats[0, :3] = -0.0, np.nan, np.inf
    tree = {
        "floats": floats,
        "flags": generator.random((8, 6)) < 0.5,
        "routes": generator.integers(-1, 9, (8, 6, 48, 3)).astype(np.int16),
    }
    sent = tree if FIRST else processes.outline(tree)
    placed = processes.spread(sent, sharding)
    for name, values in tree.items():
        assert placed[name].sharding == sharding
        assert placed[name].dtype == values.dtype
        for shard in placed[name].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), values[shard.index])
            assert np.asarray(shard.data).tobytes() == values[shard.index].tobytes()


for check in (check_values, check_errors, check_requests, check_flags, check_spread):
    check()
print("all checked", flush=True)
sys.exit(0)
