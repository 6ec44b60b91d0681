"""The pool of SGLang servers: which are in use, what they are asked, what becomes of a bad one.

What it is: HTTP calls with deadlines, the choice of a server, health checks, and the steps of a
weight update, as coroutines of one event loop. What it is not: the life of a request (sglang.py),
the format of an answer (wire.py), or the judgement of the weights behind it (probe.py).

A server is in use once it holds the published weights and the probe has shown it. One that fails a
health check, an update or too many requests in a row is taken out: its requests go elsewhere, and
nothing it said afterwards counts. It comes back by the same door, an update and a probe, since it
may have been restarted with other weights.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol

from jaxrl_llm.rollout.client import Client, ServerError, as_object
from jaxrl_llm.rollout.engine import EngineError, EngineReport

OnPublish = Literal["abort", "retract", "in_place"]
"""What becomes of the responses under way when new weights arrive; see SGLangConfig."""


class Weights(Protocol):
    """Weights in a folder that the servers can read; immutable and hashable."""

    @property
    def version(self) -> int: ...

    @property
    def label(self) -> str:
        """The servers' name of them, weight_version; other weights have another one."""
        ...

    @property
    def path(self) -> str:
        """The folder, as the servers see it."""
        ...

    @property
    def leftovers(self) -> tuple[str, ...]:
        """Older folders that should have been deleted and could not be, and why."""
        ...


@dataclasses.dataclass(eq=False)
class Server:
    """What the pool knows of one server."""

    url: str
    slots: asyncio.Semaphore  # bounds the requests sent at once
    in_use: bool = False
    cause: str = "no weights were published to it"  # why it is not in use
    load: int = 0  # requests assigned to it, those that wait for a slot included
    strikes: int = 0  # bad answers and failures in a row
    calls: set[asyncio.Task[bytes]] = dataclasses.field(default_factory=set)  # being generated
    update: asyncio.Task[bytes] | None = None  # the newest; it goes on when nobody waits any more


UPDATE_PATIENCE = 10
"""An update that has no answer after so many update_seconds has ended, or its server has."""

Restore = Callable[[Server, Weights], Awaitable[None]]
"""Tries to bring a server that was taken out back into use, with these weights."""


COUNTS = (
    "rollouts",
    "from_journal",
    "spanning",
    "resubmitted",
    "retries",
    "servers_lost",
    "update_retries",
)
"""Counts that every report has, as engine/*; engine/bad_answers_* come with their causes."""


class Notes:
    """Counts and events since the last report; any thread may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()
        self._events: list[str] = []

    def count(self, name: str) -> None:
        """One more of engine/`name`."""
        with self._lock:
            self._counts[name] += 1

    def event(self, text: str) -> None:
        """Something the run log should say."""
        with self._lock:
            self._events.append(text)

    def drain(self, now: Mapping[str, float]) -> EngineReport:
        """The report: counts, the values of `now`, and events."""
        with self._lock:
            counts = dict.fromkeys(COUNTS, 0) | self._counts
            events = tuple(self._events)
            self._counts.clear()
            self._events.clear()
        values = {name: float(value) for name, value in (*counts.items(), *now.items())}
        return EngineReport({f"engine/{name}": value for name, value in values.items()}, events)


class Pool:
    """The servers of a run. Every method runs in the event loop's thread."""

    def __init__(
        self,
        urls: Iterable[str],
        client: Client,
        notes: Notes,
        *,
        concurrency: int,
        attempts: int,
        health_seconds: float,
        update_seconds: float,
    ) -> None:
        """The numbers are those of SGLangConfig."""
        self.servers = [Server(url, asyncio.Semaphore(concurrency)) for url in urls]
        self.client = client
        self.notes = notes
        self.gate = asyncio.Event()  # closed while weights are being published
        self.publishes = 0  # times that the gate was closed
        self._concurrency = concurrency
        self._attempts = attempts
        self._health_seconds = health_seconds
        self._update_seconds = update_seconds
        self._pause_seconds = health_seconds / 10  # before asking the same server again
        self._change = asyncio.Event()  # replaced by a new one at every change
        self._watchers: list[asyncio.Task[None]] = []
        self._aborts: set[asyncio.Task[None]] = set()

    # Who serves a request.

    async def choose(self, *, avoid: Server | None = None, room: bool = False) -> Server:
        """The least loaded server in use; `avoid` only if it is the only one, after a pause.

        With `room`, waits for one with fewer requests than the concurrency. Raises EngineError,
        with every server's cause, after update_seconds without any server in use.
        """
        while True:
            await self.gate.wait()
            in_use = await self._some_in_use()
            others = [server for server in in_use if server is not avoid] or in_use
            free = [s for s in others if not room or s.load < self._concurrency]
            if free == [avoid]:
                avoid = None
                await asyncio.sleep(self._pause_seconds)
            elif free:
                return min(free, key=lambda server: server.load)
            else:
                await self._change.wait()  # whatever is under way has a deadline

    async def _some_in_use(self) -> list[Server]:
        """The servers in use, as soon as there are any; see choose for how long it waits."""
        try:
            async with asyncio.timeout(self._update_seconds):
                while not (found := [server for server in self.servers if server.in_use]):
                    await self._change.wait()
                return found
        except TimeoutError:
            seconds = f"{self._update_seconds:g} s"
            raise EngineError(f"no server was in use for {seconds}: {self.causes()}") from None

    @contextlib.contextmanager
    def assigned(self, server: Server) -> Iterator[None]:
        """Counts one request of the server while the block runs."""
        server.load += 1
        try:
            yield
        finally:
            server.load -= 1
            self._changed()

    async def generate(self, server: Server, body: Mapping[str, Any], *, seconds: float) -> bytes:
        """POST /generate to a server in use.

        Raises ServerError, also when the server is taken out meanwhile. Whenever there is no
        answer, the server is told to abort the request's "rid".
        """
        call = asyncio.create_task(
            self.client.call(f"{server.url}/generate", body, seconds=seconds)
        )
        server.calls.add(call)
        try:
            await asyncio.wait({call})
            if call.cancelled():
                raise ServerError("unreachable", f"{server.url} was taken out: {server.cause}")
            return call.result()
        except (ServerError, asyncio.CancelledError):
            call.cancel()
            abort = asyncio.create_task(self._abort(server, body["rid"]))
            self._aborts.add(abort)
            abort.add_done_callback(self._aborts.discard)
            raise
        finally:
            server.calls.discard(call)

    async def _abort(self, server: Server, rid: str) -> None:
        # A server that cannot be told has nothing left to abort, or drops it with the connection.
        with contextlib.suppress(ServerError):
            await self._call(server, "/abort_request", {"rid": rid})

    def check_in_use(self, server: Server) -> None:
        """Raises ServerError if it was taken out."""
        if not server.in_use:
            raise ServerError("unreachable", f"{server.url} was taken out: {server.cause}")

    def causes(self) -> str:
        """Why each server is not in use."""
        return "; ".join(f"{s.url}: {s.cause}" for s in self.servers if not s.in_use)

    # In use, or taken out.

    def put_in_use(self, server: Server, label: str) -> None:
        """From now on it is sent requests."""
        if not server.in_use:
            server.in_use, server.strikes = True, 0
            self.notes.event(f"{server.url} is in use, with the weights {label}")
            self._changed()

    def take_out(self, server: Server, cause: str) -> None:
        """Send it no more requests and give those it has to others."""
        server.cause = cause
        if server.in_use:
            server.in_use = False
            self.notes.count("servers_lost")
            self.notes.event(f"{server.url} was taken out: {cause}")
            for call in server.calls:
                call.cancel()
            self._changed()

    def strike(self, server: Server, cause: str) -> None:
        """One more bad answer or failure; too many in a row take the server out."""
        server.strikes += 1
        if server.in_use and server.strikes >= self._attempts:
            self.take_out(server, f"{server.strikes} failed requests in a row, the last: {cause}")

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    # Health.

    async def _check(self, server: Server, label: str = "") -> None:
        """Take the server out unless it is healthy and, if asked, holds the weights `label`."""
        publishes = self.publishes
        try:
            await self._call(server, "/health")
            if label:
                await self._expect_label(server, label)
        except ServerError as error:
            if publishes == self.publishes:  # a paused server is neither healthy nor ill
                self.take_out(server, f"health check: {error}")

    async def failed(self, server: Server, error: ServerError) -> None:
        """Draw the conclusions from a request that a server failed."""
        if error.cause == "wrong_version":
            self.take_out(server, str(error))
        elif error.cause != "refused":
            self.strike(server, str(error))
        if error.cause == "unreachable" and server.in_use:
            await self.gate.wait()
            await self._check(server)

    async def _watch(self, server: Server, weights: Weights, restore: Restore) -> None:
        while True:
            await asyncio.sleep(self._health_seconds)
            if server.in_use:
                await self._check(server, weights.label)
            else:
                await restore(server, weights)

    # Weights.

    async def close_gate(self) -> None:
        """Hold back new requests, the judgement of answers, health checks and restorations."""
        self.gate.clear()
        self.publishes += 1
        await self._stop_watching()

    async def open_gate(self, proven: Collection[str], weights: Weights, restore: Restore) -> None:
        """Let requests through to the servers with these URLs, and watch every server."""
        for server in self.servers:
            if server.url in proven:
                self.put_in_use(server, weights.label)
        self.gate.set()
        self._watchers = [
            asyncio.create_task(self._watch(server, weights, restore)) for server in self.servers
        ]

    async def abandon(self, cause: str) -> None:
        """Open the gate with no server in use: nobody knows what they would sample from."""
        for server in self.servers:
            if server.in_use:  # others have a cause of their own
                self.take_out(server, cause)
        self.gate.set()

    async def load(
        self, servers: Iterable[Server], weights: Weights, mode: OnPublish
    ) -> list[Server]:
        """Pause the servers, update them, and continue once all have the weights.

        Returns those that hold them now; the others are taken out with their cause. Takes at most
        update_seconds for the update and health_seconds each to pause and to continue.
        """

        def pause(server: Server) -> Awaitable[None]:
            return self._pause(server, mode)

        def update(server: Server) -> Awaitable[None]:
            return self._update(server, weights, mode)

        paused = await self.each("pause", servers, pause, self._health_seconds)
        what = f"load version {weights.version}"
        updated = await self.each(what, paused, update, self._update_seconds)
        return await self.each("continue", updated, self._continue, self._health_seconds)

    async def each(
        self,
        what: str,
        servers: Iterable[Server],
        step: Callable[[Server], Awaitable[None]],
        seconds: float,
    ) -> list[Server]:
        """Do `step` with all servers at once; those where it fails or lasts longer are taken out.

        Returns the others.
        """

        async def one(server: Server) -> bool:
            try:
                async with asyncio.timeout(seconds):
                    await step(server)
            except ServerError as error:
                self.take_out(server, f"it did not {what}: {error}")
                return False
            except TimeoutError:
                self.take_out(server, f"it did not {what} within {seconds:g} s")
                return False
            return True

        servers = list(servers)
        passed = await asyncio.gather(*(one(server) for server in servers))
        return [server for server, good in zip(servers, passed, strict=True) if good]

    async def _pause(self, server: Server, mode: OnPublish) -> None:
        await self._call(server, "/pause_generation", {"mode": mode})

    async def _continue(self, server: Server) -> None:
        await self._call(server, "/continue_generation", {})

    async def _update(self, server: Server, weights: Weights, mode: OnPublish) -> None:
        """Load the weights; an update can be repeated, whatever the last one left behind."""
        body = {
            "model_path": weights.path,
            "weight_version": weights.label,
            # Cached keys and values are the old weights'. In place they are kept on purpose, and
            # the server would refuse to flush while requests hold them.
            "flush_cache": mode != "in_place",
        }
        for attempt in range(1, self._attempts + 1):
            try:
                await self._update_once(server, body)
                await self._expect_label(server, weights.label)
            except ServerError as error:
                if attempt == self._attempts or not error.answered:
                    raise
                self.notes.count("update_retries")
                if server.in_use:  # or a lost server's vain returns would fill the log
                    self.notes.event(f"repeating an update: {error}")
                await asyncio.sleep(self._pause_seconds)
                # "The cache was not flushed": something ran all the same, so pause again.
                await self._pause(server, mode)
            else:
                return

    async def _update_once(self, server: Server, body: Mapping[str, Any]) -> None:
        """Send an update as soon as the one before has ended: two at once end a server's process.

        One that was sent goes on at the server, whoever gives up waiting for it.
        """
        if server.update is not None:
            await asyncio.wait({server.update})  # how it ended does not matter
        url = f"{server.url}/update_weights_from_disk"
        call = self.client.call(url, body, seconds=UPDATE_PATIENCE * self._update_seconds)
        server.update = asyncio.create_task(call)
        # Or asyncio would complain about one that fails when nobody waits any more.
        server.update.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(server.update)

    async def _expect_label(self, server: Server, label: str) -> None:
        """Raises ServerError unless the server says that it holds the weights `label`."""
        found = (await self.facts(server, "/model_info")).get("weight_version")
        if found != label:
            raise ServerError(
                "wrong_version", f"{server.url} says weights {found!r} instead of {label!r}"
            )

    async def wake(self, server: Server) -> None:
        """Is it healthy? It may have been left paused by a learner that was killed.

        Raises ServerError.
        """
        await self._continue(server)
        await self._call(server, "/health")

    async def facts(self, server: Server, path: str) -> dict[str, Any]:
        """GET a JSON object within health_seconds; raises ServerError."""
        return as_object(await self._call(server, path), server.url + path)

    async def _call(self, server: Server, path: str, body: object = None) -> bytes:
        """A call that any healthy server answers within health_seconds; raises ServerError."""
        return await self.client.call(server.url + path, body, seconds=self._health_seconds)

    # The end.

    async def close(self) -> None:
        """End what runs, within health_seconds, and close every connection.

        The requests have been cancelled; what is waited for is that servers are told.
        """
        try:
            await self._stop_watching()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._health_seconds):
                    while any(server.load for server in self.servers):
                        await self._change.wait()
                    await asyncio.gather(*self._aborts)
        finally:
            for server in self.servers:
                if server.update is not None:
                    server.update.cancel()
            await self.client.close()

    async def _stop_watching(self) -> None:
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            watcher.cancel()
        for outcome in await asyncio.gather(*watchers, return_exceptions=True):
            if isinstance(outcome, Exception):  # no ServerError, so a mistake of ours
                raise outcome
