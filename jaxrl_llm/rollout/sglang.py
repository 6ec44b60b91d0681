"""The inference engine of the paper's setting: SGLang servers over HTTP, on machines of their own.

What it is: the life of a request and of a publish, whatever happens to a server meanwhile. What it
is not: HTTP (client.py), the choice and health of servers (servers.py), how they get new weights
(updates.py, probe.py), or the format of an answer (wire.py). It never imports jax.

    the learner's thread                one background thread with an event loop
    generate(requests) ---------------> one task a request: a server, its answer, the checks
      next(outcomes) <------ queue ---- Rollout or EngineFailure, as they finish
    publish(params, version)
      write the weights, then --------> hold requests back; pause, update, continue every server
      score the probe  <--------------- what each server answers to the probe
      all right, then ----------------> let requests through

A token's weight version comes from the label in the server's own answer, never from what was
published last, and an answer that arrives during a publish is read after it.

How long things take at most, in fields of SGLangConfig:
    a server is killed or hangs       2 health_seconds until its requests go elsewhere
    it says it is well, yet errs      `attempts` requests in a row, each up to request_seconds
    it was taken out                  every health_seconds it is updated and probed, to come back
    no server is in use               update_seconds, then EngineError with every server's cause
    a publish, the writing apart      2 health_seconds + update_seconds + request_seconds; twice
                                      that if a server shows other weights than it was sent
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import urllib.parse
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.rollout import wire
from jaxrl_llm.rollout.answers import failure, read
from jaxrl_llm.rollout.background import Background, Outcomes
from jaxrl_llm.rollout.client import Client, ServerError
from jaxrl_llm.rollout.engine import EngineFailure, EngineReport, Params, Request, refusal
from jaxrl_llm.rollout.inspection import inspect
from jaxrl_llm.rollout.journal import Journal
from jaxrl_llm.rollout.probe import Probe, Score
from jaxrl_llm.rollout.servers import Notes, OnPublish, Pool, Server, Weights
from jaxrl_llm.rollout.updates import Updates
from jaxrl_llm.types import Rollout


@dataclasses.dataclass(frozen=True)
class SGLangConfig:
    """The servers, and how patient the learner is with them."""

    servers: tuple[str, ...] = ()  # http://HOST:PORT, no gateway before them; none: in process
    api_key_env: str = "SGLANG_API_KEY"  # the environment variable with the servers' API key
    max_length: int = 512  # longest prompt plus response, in tokens
    concurrency: int = 64  # requests under way at each server
    request_seconds: float = 600.0  # deadline of a response
    attempts: int = 3  # tries of a request and of an update; failures in a row a server may have
    health_seconds: float = 30.0  # between health checks; deadline of any answer but a response
    update_seconds: float = 600.0  # deadline of loading weights, and of waiting for some server
    # What becomes of responses under way when weights are published: "abort" starts them again;
    # "retract" continues them after their prefix was computed anew, "in_place" over the keys and
    # values of the old weights. Their tokens then have two versions and no forward pass in common.
    on_publish: OnPublish = "abort"
    keep_spanning_routes: bool = False  # replay the routes of such responses all the same
    probe_tolerance: float = 0.05  # nats; mean |server - learner| over the probe's tokens
    # Keep finished rollouts on disk for a learner that is killed. Without it, those of an
    # unfinished step are sampled again.
    journal: bool = True

    def __post_init__(self) -> None:
        for url in self.servers:
            if "@" in url:  # and is not printed
                raise ValueError(
                    "sglang.servers has an address with a secret before an @; write "
                    f"http://HOST:PORT, and the API key into ${self.api_key_env}"
                )
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or url != f"{parts.scheme}://{parts.netloc}":
                raise ValueError(
                    f"sglang.servers has {url!r}; write http://HOST:PORT with nothing behind it"
                )
        if len(set(self.servers)) < len(self.servers):
            raise ValueError(f"sglang.servers, {self.servers}, names a server twice")
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"sglang.{name} is {value}; it must be positive")


@dataclasses.dataclass(frozen=True)
class LearnerSide:
    """What the engine asks of the learner, in the thread that calls publish()."""

    write: Callable[[Any, int], Weights]  # (params, version): to where the servers can read it
    score: Score  # the learner's log-probabilities of a rollout
    probe: Request  # what every server is asked after each publish; without stop tokens


class SGLangEngine:
    """An Engine (see engine.py) on SGLang servers. It holds a thread and connections: close it."""

    def __init__(
        self,
        config: SGLangConfig,
        model: ModelConfig,
        decode_text: Callable[[Sequence[int]], str],
        *,
        learner: LearnerSide,
        routes: bool,
        journal: Journal | None,
    ) -> None:
        """Asks every server whether it can serve this run.

        Args:
          decode_text: response tokens -> Rollout.text; the tokenizer's decode.
          routes: whether rollouts need the sampler's routes.
          journal: where finished rollouts are kept and looked for; None: nowhere.

        Raises EngineError naming every server that is unreachable or unfit, and why.
        """
        if not config.servers:
            raise ValueError("sglang.servers is empty; name at least one, as http://HOST:PORT")
        self._config = config
        self._model = model
        self._learner = learner
        self._journal = journal
        self._notes = Notes()
        self._pool = Pool(
            config.servers,
            Client(os.environ.get(config.api_key_env, "").strip()),
            self._notes,
            concurrency=config.concurrency,
            attempts=config.attempts,
            health_seconds=config.health_seconds,
            update_seconds=config.update_seconds,
        )
        self._updates = Updates(
            self._pool,
            Probe(learner.probe, learner.score, config.probe_tolerance),
            wire.Contract(model, {}, routes, config.keep_spanning_routes, decode_text),
            journal,
            mode=config.on_publish,
            probe_seconds=config.request_seconds,
        )
        self._background = Background("sglang")
        try:
            self._background.run(inspect(self._pool, routes=routes, max_length=config.max_length))
        except BaseException:
            self.close()
            raise

    @property
    def overlaps(self) -> bool:
        """True: the servers sample while the learner learns."""
        return True

    def publish(self, params: Params, version: int) -> None:
        """See Engine.publish. If it raises after the writing, no server is in use.

        Raises EngineError if no server took the weights; or if one samples from others although it
        was updated twice: the message says which version each server holds.
        """
        weights = self._learner.write(params, version)  # while the servers go on sampling
        self._updates.publish(params, weights, self._background)

    def generate(self, requests: Sequence[Request]) -> Outcomes[Rollout | EngineFailure]:
        """See Engine.generate. What the journal has is not sampled again."""
        if not self._updates.label:
            raise RuntimeError("the engine has no weights; call publish() before generate()")
        outcomes: Outcomes[Rollout | EngineFailure] = Outcomes(len(requests))
        unknown = []
        for request in requests:
            known = self._without_a_server(request)
            if known is None:
                unknown.append(request)
            else:
                outcomes.put(known)
        outcomes.follow(self._background, self._sample_all(unknown, outcomes))
        return outcomes

    def report(self) -> EngineReport:
        """Counts and events since the last call. No secret is among them."""
        in_use = sum(server.in_use for server in self._pool.servers)
        return self._notes.drain({"servers": in_use, "probe_error": self._updates.probe_error})

    def close(self) -> None:
        """Abort what is under way, within health_seconds, and end the thread. Idempotent."""
        self._background.close(self._pool.close)

    def _without_a_server(self, request: Request) -> Rollout | EngineFailure | None:
        """The outcome of a request that needs no server, or None."""
        vocab_size, max_length = self._model.vocab_size, self._config.max_length
        refused = refusal(request, vocab_size=vocab_size, max_length=max_length)
        if refused is not None:
            return refused
        if reason := wire.unscorable(request.sampling):
            return failure(request, "unscorable", reason)
        rollout = None if self._journal is None else self._journal.find(request)
        if rollout is not None:
            self._notes.count("from_journal")
        return rollout

    # From here on, coroutines of the background thread.

    async def _sample_all(
        self, requests: Sequence[Request], outcomes: Outcomes[Rollout | EngineFailure]
    ) -> None:
        """Sample every request, those of one prompt on one server: it computes the prompt once."""

        async def sample(request: Request, server: Server) -> None:
            outcomes.put(await self._sample(request, server))

        async with asyncio.TaskGroup() as tasks:
            for _, samples in itertools.groupby(requests, lambda r: r.prompt.prompt_id):
                server = await self._pool.choose(room=True)
                for request in samples:
                    tasks.create_task(sample(request, server))
                await asyncio.sleep(0)  # they begin, and count as the server's load

    async def _sample(self, request: Request, server: Server) -> Rollout | EngineFailure:
        """Try until a server has given an answer, or `attempts` tries have failed.

        A response changes nothing on a server, so a try that brought none may be repeated. An
        answer that arrived whole and is wrong, such as NaN, is not asked for again: where responses
        are left out for what is in them, the others are no sample of the policy.
        """
        failed = 0
        while True:
            server = server if server.in_use else await self._pool.choose()
            try:
                outcome = await self._attempt(request, server)
            except ServerError as error:
                failed += 1
                await self._pool.failed(server, error)
                if error.cause == "refused" or failed == self._config.attempts:
                    return failure(request, error.cause, f"{error} (attempt {failed})")
                self._notes.count("retries")
                server = await self._pool.choose(avoid=server)
            else:
                if outcome is not None:
                    return outcome

    async def _attempt(self, request: Request, server: Server) -> Rollout | EngineFailure | None:
        """One try at one server.

        None if a publish aborted it, or if the server was taken out before it could be sent.

        Raises ServerError if there was no answer, or one by weights that nobody published.
        """
        pool = self._pool
        with pool.assigned(server):
            async with server.slots:
                await pool.gate.wait()
                if not server.in_use:
                    return None
                publishes = pool.publishes
                oldest = self._updates.contract.versions[self._updates.label]
                body = wire.payload(
                    request,
                    rid=uuid.uuid4().hex,
                    routes=self._updates.contract.routes,
                    cache_key=self._updates.cache_key,  # no prefix that other weights left
                )
                content = await pool.generate(server, body, seconds=self._config.request_seconds)
            await pool.gate.wait()  # weights that are being published are proven, or not, only then
            pool.check_in_use(server)
            # In a thread: an answer with routes has tens of megabytes.
            outcome = await asyncio.to_thread(self._read, request, server, content, oldest)
        if outcome is None:
            if publishes == pool.publishes:
                words = f"{server.url} aborted a request though not asked to"
                raise ServerError("bad_answer", words)
            self._notes.count("resubmitted")
        if isinstance(outcome, Rollout):
            server.strikes = 0
            self._notes.count("rollouts")
            if np.unique(outcome.weight_version[outcome.loss_mask]).size > 1:
                self._notes.count("spanning")
        if isinstance(outcome, EngineFailure):
            self._notes.count(f"bad_answers_{outcome.cause}")
            if outcome.cause == "wrong_version":
                raise ServerError("wrong_version", outcome.message)
            pool.strike(server, outcome.message)
        return outcome

    def _read(
        self, request: Request, server: Server, content: bytes, oldest: int
    ) -> Rollout | EngineFailure | None:
        """What the answer says, see answers.read; a rollout is in the journal from now on.

        `oldest` is the version that was current when the request was sent. Tokens of older ones,
        though the run's own, are of a server that was started again with what it once had.
        """
        contract = self._updates.contract
        versions = {label: v for label, v in contract.versions.items() if v >= oldest}
        contract = dataclasses.replace(contract, versions=versions)
        outcome = read(content, server.url, request, contract)
        if isinstance(outcome, Rollout) and self._journal is not None:
            self._journal.add(request, outcome)
        return outcome
