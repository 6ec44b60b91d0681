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
    kept = processes.from_first(
        lambda: [1, 2, 3] if FIRST else never(), share=lambda value: value[:1]
    )
    assert kept == ([1, 2, 3] if FIRST else [1])
    assert processes.from_first(lambda: None) is None


def check_errors() -> None:
    """An exception arrives as what it was, with its message and attributes."""

    def fail(error: Exception) -> None:
        raise error

    errors = (
        EngineError("no server"),
        RouteError("missing", "no routes"),
        OSError(28, "full"),
        FileNotFoundError(2, "No such file or directory", "prompts.jsonl"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    )
    for error in errors:
        with pytest.raises(type(error)) as arrived:
            processes.from_first(partial(fail, error))
        assert str(arrived.value) == str(error)
        assert vars(arrived.value) == vars(error)
        assert getattr(arrived.value, "filename", None) == getattr(error, "filename", None)
    unpicklable = EngineError("a lambda in it")
    unpicklable.cause = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match=r"^a lambda in it$"):
        processes.from_first(partial(fail, unpicklable))

    class Local(Exception):
        """Of no module that could be imported elsewhere."""

    with pytest.raises(Local if FIRST else RuntimeError, match=r"nowhere else$"):
        processes.from_first(partial(fail, Local("nowhere else")))


def check_failures_of_one() -> None:
    """Where a process fails in what all do, every one of them raises."""

    def fail_in(process: int) -> str:
        if jax.process_index() == process:
            raise FileNotFoundError(2, "No such file or directory", "prompts.jsonl")
        return "there"

    for process in (0, 1):
        here = jax.process_index() == process
        message = "prompts.jsonl" if here else "another process"
        with pytest.raises(FileNotFoundError if here else RuntimeError, match=message):
            processes.everywhere(partial(fail_in, process))
    assert processes.everywhere(partial(fail_in, 2)) == "there"


def check_failed_requests() -> None:
    """What all fail in alike while the first leads: its word counts, and they still meet."""

    def act(request: str) -> None:
        raise ValueError(request)

    def lead(then: str) -> str:
        processes.announce("both fail")
        if then == "raise":
            raise EngineError("in other words")
        return "made nevertheless"

    with pytest.raises(EngineError, match="in other words"):
        processes.from_first(partial(lead, "raise"), act=act)
    if FIRST:
        assert processes.from_first(partial(lead, "return"), act=act) == "made nevertheless"
    else:
        with pytest.raises(ValueError, match="both fail"):
            processes.from_first(partial(lead, "return"), act=act)
    assert processes.from_first(lambda: "again") == "again"


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


checks = (
    check_values,
    check_errors,
    check_failures_of_one,
    check_requests,
    check_failed_requests,
    check_flags,
    check_spread,
)
for check in checks:
    check()
print("all checked", flush=True)
sys.exit(0)
