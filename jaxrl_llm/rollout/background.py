"""A thread with an event loop, for an engine whose methods are synchronous and whose work is not.

What it is: the only place where threads and asyncio meet. Background runs coroutines; Outcomes is
what one of them hands over, as an iterator for another thread. What it is not: a pool of workers;
one thread runs every coroutine.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

POLL_SECONDS = 1.0
"""A thread that waits looks this often whether the loop that it waits for still runs."""

Result = TypeVar("Result")


class Background:
    """One daemon thread that runs coroutines until close()."""

    def __init__(self, name: str) -> None:
        started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._stop = asyncio.Event()
        self._begun: set[concurrent.futures.Future[Any]] = set()

        async def serve() -> None:
            started.set_result(asyncio.get_running_loop())
            await self._stop.wait()

        # asyncio.run cancels what is left at the end and joins the threads of asyncio.to_thread.
        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), name=name, daemon=True)
        self._thread.start()
        self._loop = started.result()

    @property
    def alive(self) -> bool:
        """False after close()."""
        return self._thread.is_alive()

    def start(self, work: Coroutine[Any, Any, Result]) -> concurrent.futures.Future[Result]:
        """Begin `work`; cancelling the future cancels it. Raises RuntimeError after close()."""
        if not self.alive:
            work.close()
            raise RuntimeError("it was closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._begun.add(future)
        future.add_done_callback(self._begun.discard)
        return future

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Begin `work` and wait for what it returns or raises; an interrupt cancels it.

        It waits as long as `work` takes: each coroutine has its own deadlines.
        """
        future = self.start(work)
        try:
            while not concurrent.futures.wait([future], timeout=POLL_SECONDS).done:
                if not self.alive:
                    raise RuntimeError("it was closed")
            return future.result()
        finally:
            future.cancel()  # nothing, if it has finished

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel all work, run `last` and end the thread. A second call does nothing."""
        if self.alive:
            for future in list(self._begun):
                future.cancel()
            self.run(last())
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()


class Outcomes(Generic[Result]):
    """A known number of results, in the order in which they are put; any thread may put one."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._queue: queue.SimpleQueue[Result | None] = queue.SimpleQueue()  # None: the work ended

    def put(self, result: Result) -> None:
        """Hand one over."""
        self._queue.put(result)

    def follow(self, background: Background, work: Coroutine[Any, Any, None]) -> None:
        """Begin the work that puts all that is still to come, or raises."""
        self._background = background
        self._work = background.start(work)
        self._work.add_done_callback(lambda _: self._queue.put(None))

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        """Waits for a result. Raises what ended the work, after the results that it had put."""
        while self._left:
            try:
                result = self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not self._background.alive:
                    raise RuntimeError("the engine was closed") from None
            else:
                if result is not None:
                    self._left -= 1
                    return result
                self._raise()
        raise StopIteration

    def close(self) -> None:
        """Cancel the work and drop what it has put."""
        self._left = 0
        self._work.cancel()

    def _raise(self) -> None:
        left, self._left = self._left, 0
        try:
            self._work.result()
        except ExceptionGroup as group:  # one task of several failed, and the others were cancelled
            raise group.exceptions[0] from None
        except concurrent.futures.CancelledError:
            raise RuntimeError("the engine was closed") from None
        raise RuntimeError(f"the work ended with {left} results missing")
