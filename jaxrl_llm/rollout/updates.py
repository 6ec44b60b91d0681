"""New weights for the servers: loaded, and proven by the probe before anyone relies on them.

What it is: the part of a publish behind the writing, and the same for one server that comes back.
What it is not: the HTTP calls of it (servers.py), or the comparison of probabilities (probe.py).
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterable, Mapping

from jaxrl_llm.rollout import wire
from jaxrl_llm.rollout.answers import read
from jaxrl_llm.rollout.background import Background
from jaxrl_llm.rollout.client import ServerError, as_object
from jaxrl_llm.rollout.engine import EngineError, EngineFailure, Params
from jaxrl_llm.rollout.journal import Journal
from jaxrl_llm.rollout.probe import Answer, Probe, Verdict
from jaxrl_llm.rollout.servers import OnPublish, Pool, Server, Weights


class Updates:
    """Which weights were published, and how the next ones are. publish() is the learner's."""

    def __init__(
        self,
        pool: Pool,
        probe: Probe,
        contract: wire.Contract,
        journal: Journal | None,
        *,
        mode: OnPublish,
        probe_seconds: float,
    ) -> None:
        """`contract` knows no version yet."""
        self.contract = contract  # with the versions of all labels published so far
        self.label = ""  # of the weights published last; "" before the first
        # Of the last publish alone. The label would not do: a learner that starts again publishes
        # under one for which responses of later weights, which outlived it, have left prefixes.
        self.cache_key = ""
        self.probe_error = 0.0  # nats, the largest among the servers after the last publish
        self._pool = pool
        self._probe = probe
        self._journal = journal
        self._mode: OnPublish = mode
        self._probe_seconds = probe_seconds

    def publish(self, params: Params, weights: Weights, background: Background) -> None:
        """Update and prove every server; `params` are what is in `weights`.

        Requests are held back meanwhile. If it raises, no server is in use afterwards.

        Raises EngineError if no server took the weights, if one samples from others, or if the
        journal cannot be written.
        """
        for leftover in weights.leftovers:
            self._pool.notes.event(leftover)
        background.run(self._pool.close_gate())
        self.cache_key = uuid.uuid4().hex
        try:
            verdicts = self._prove(params, weights, background)
            if self._journal is not None:
                self._journal.published(weights.label, weights.version)
        except BaseException:
            cause = f"version {weights.version} was published in vain"
            background.run(self._pool.abandon(cause))
            raise
        self.label = weights.label
        self.probe_error = max(verdict.error for verdict in verdicts.values())
        versions = {**self.contract.versions, weights.label: weights.version}
        self.contract = dataclasses.replace(self.contract, versions=versions)
        background.run(self._pool.open_gate(verdicts.keys(), weights, self._restore))

    def _prove(
        self, params: Params, weights: Weights, background: Background
    ) -> dict[str, Verdict]:
        """Update every server and ask it the probe; one with other weights is updated once more.

        Returns the verdicts on the servers that have the weights, by URL; others are taken out.

        Raises EngineError if no server took them, with every server's cause; or if one samples
        from other weights even now, with the version that each server holds.
        """
        pool = self._pool

        def judge(servers: Iterable[Server]) -> dict[str, Verdict]:
            answers = background.run(self._load(servers, weights))
            return self._probe.judge(params, weights, answers)

        verdicts = judge(pool.servers)
        wrong = [server for server in pool.servers if not _right(verdicts, server)]
        for server in wrong:
            words = verdicts.pop(server.url).describe(server.url)
            pool.notes.event(f"{words}: version {weights.version} is sent once more")
        verdicts |= judge(wrong)
        where = "; ".join(
            verdicts[s.url].describe(s.url) if s.url in verdicts else f"{s.url}: {s.cause}"
            for s in pool.servers
        )
        what = f"version {weights.version} ({weights.label})"
        if not all(_right(verdicts, server) for server in pool.servers):
            raise EngineError(
                f"{what} was published twice, but a server samples from other weights: {where}. "
                "Restart that server; or raise sglang.probe_tolerance if it serves the right "
                "weights in a lower precision"
            )
        if not verdicts:
            raise EngineError(f"no server took {what}: {where}")
        return verdicts

    async def _restore(self, server: Server, weights: Weights) -> None:
        """Try to bring a server that was taken out back into use, with weights proven before."""
        for url, answer in (await self._load([server], weights)).items():
            if self._probe.fits(url, weights, answer):
                self._pool.put_in_use(server, weights.label)
            else:
                self._pool.take_out(server, "it came back with other weights than it was sent")

    async def _load(self, servers: Iterable[Server], weights: Weights) -> dict[str, Answer]:
        """Update servers and ask each the probe: its answers by URL. Others are taken out."""
        answers: dict[str, Answer] = {}

        async def ask(server: Server) -> None:
            answers[server.url] = await self._ask(server, weights)

        loaded = await self._pool.load(servers, weights, self._mode)
        await self._pool.each("answer the probe", loaded, ask, self._probe_seconds)
        return answers

    async def _ask(self, server: Server, weights: Weights) -> Answer:
        """A server's answer to the probe, by these very weights; raises ServerError."""
        request, url = self._probe.request, f"{server.url}/generate"
        body = wire.payload(
            request,
            rid=uuid.uuid4().hex,
            routes=self.contract.routes,
            prompt_logprobs=True,
            cache_key=self.cache_key,
        )
        content = await self._pool.client.call(url, body, seconds=self._probe_seconds)
        versions = {weights.label: weights.version}
        contract = dataclasses.replace(self.contract, versions=versions)
        outcome = read(content, url, request, contract)
        if isinstance(outcome, EngineFailure):
            raise ServerError(outcome.cause, outcome.message)
        if outcome is None:
            raise ServerError("bad_answer", f"{url} aborted the probe")
        try:
            value, vocab_size = as_object(content, url), contract.model.vocab_size
            return Answer(outcome, wire.prompt_logprobs(value, request, vocab_size))
        except wire.BadAnswer as error:
            raise ServerError(error.cause, f"{url}: {error}") from error


def _right(verdicts: Mapping[str, Verdict], server: Server) -> bool:
    """False for a wrong verdict, not for none."""
    return server.url not in verdicts or verdicts[server.url].right
