"""The background thread and the iterator over what it hands over."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from jaxrl_llm.rollout.background import Background, Outcomes


async def nothing() -> None:
    """The last that a background does."""


@pytest.fixture
def background() -> Iterator[Background]:
    made = Background("tested")
    yield made
    made.close(nothing)


async def forever(log: list[str]) -> None:
    log.append("begun")
    try:
        await asyncio.Event().wait()
    finally:
        log.append("ended")


async def fail() -> None:
    raise OSError("it broke")


def test_run_returns_and_raises_what_the_work_does(background: Background) -> None:
    async def thread() -> str:
        return threading.current_thread().name

    assert background.run(thread()) == "tested"
    with pytest.raises(OSError, match="it broke"):
        background.run(fail())


def test_close_cancels_work_and_then_runs_the_last() -> None:
    background, log = Background("tested"), list[str]()

    async def last() -> None:
        while log != ["begun", "ended"]:
            await asyncio.sleep(0)
        log.append("last")

    future = background.start(forever(log))
    while not log:
        background.run(asyncio.sleep(0))
    background.close(last)
    background.close(last)
    assert log == ["begun", "ended", "last"]
    assert future.cancelled()
    assert not background.alive
    with pytest.raises(RuntimeError, match="closed"):
        background.start(nothing())


def test_outcomes_come_in_the_order_in_which_they_were_put(background: Background) -> None:
    outcomes = Outcomes[int](3)

    async def work() -> None:
        outcomes.put(2)
        outcomes.put(3)

    outcomes.put(1)
    outcomes.follow(background, work())
    assert list(outcomes) == [1, 2, 3]
    assert list(outcomes) == []


@pytest.mark.parametrize("grouped", [False, True])
def test_what_ends_the_work_is_raised_after_what_it_put(
    background: Background, grouped: bool
) -> None:
    outcomes = Outcomes[int](2)

    async def work() -> None:
        outcomes.put(1)
        if not grouped:
            await fail()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())
            tasks.create_task(forever([]))

    outcomes.follow(background, work())
    assert next(outcomes) == 1
    with pytest.raises(OSError, match="it broke"):
        next(outcomes)
    assert list(outcomes) == []


def test_work_that_ends_too_soon_is_no_silent_end(background: Background) -> None:
    outcomes = Outcomes[int](2)
    outcomes.follow(background, nothing())
    with pytest.raises(RuntimeError, match="2 results missing"):
        next(outcomes)


def test_closed_outcomes_cancel_the_work_and_are_at_their_end(background: Background) -> None:
    outcomes, log = Outcomes[int](2), list[str]()
    outcomes.follow(background, forever(log))
    while not log:
        background.run(asyncio.sleep(0))
    outcomes.close()
    assert list(outcomes) == []
    while log != ["begun", "ended"]:
        background.run(asyncio.sleep(0))


def test_outcomes_of_a_closed_background_say_so() -> None:
    background, outcomes = Background("tested"), Outcomes[int](1)
    outcomes.follow(background, forever([]))
    background.close(nothing)
    with pytest.raises(RuntimeError, match="closed"):
        next(outcomes)
