"""A step's rollouts: prompts sent to the engine, rewards, and whole groups in the buffer.

What it is: everything between "the weights are published" and "the learner may take its groups",
with what was lost on the way counted. What it is not: sampling (rollout/), verifying
(data/rewards.py) or learning (loop.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

from jaxrl_llm.assembly import Job, Progress
from jaxrl_llm.data.prompts import prompt_indices
from jaxrl_llm.rollout.buffer import GroupAssembler
from jaxrl_llm.rollout.engine import Request
from jaxrl_llm.types import Group

Timings = dict[str, float]
"""seconds/* and rate/* of a step, as they add up."""

MAX_REFILLS = 4
"""Attempts to fill a rollout batch whose requests fail, before the run stops with an error."""


def fill_buffer(
    job: Job, progress: Progress, timings: Timings
) -> tuple[Progress, dict[str, float], tuple[str, ...]]:
    """Sample and verify until the buffer holds this step's groups and those sampled ahead.

    Returns the progress after it, what was lost as metrics, and why as events.
    """
    rollout, buffer = job.config.rollout, progress.buffer
    ahead = min(rollout.buffer.max_staleness, job.last_step - progress.step - 1)
    wanted = rollout.groups * (1 + ahead)
    timings |= {"seconds/rollout": 0.0, "seconds/reward": 0.0}
    stale_before = buffer.dropped_stale
    buffer.drop_stale(job.version(progress))
    assembler, tokens, events = GroupAssembler(), 0, []
    for _ in range(MAX_REFILLS):
        missing = wanted - len(buffer)
        if missing <= 0:
            break
        requests = _requests(job, progress.cursor, missing, assembler)
        progress = dataclasses.replace(progress, cursor=progress.cursor + missing)
        with timed(timings, "seconds/rollout"):
            outcomes = [assembler.add(outcome) for outcome in job.engine.generate(requests)]
        groups = _in_order([group for group in outcomes if group is not None], requests)
        tokens += sum(r.response_length for group in groups for r in group.rollouts)
        with timed(timings, "seconds/reward"):
            verified, raised = _verified(job, groups)
        events += raised
        for group in verified:
            buffer.put(group)
    failures = [
        f"the engine failed {count} requests ({cause}), the first: {assembler.messages[cause]}"
        for cause, count in assembler.failures.items()
    ]
    if len(buffer) < rollout.groups:
        raise ValueError(
            f"step {progress.step + 1} has {len(buffer)} of {rollout.groups} groups after "
            f"{MAX_REFILLS} attempts: {'; '.join(failures)}"
        )
    timings["rate/rollout_tokens_per_second"] = tokens / max(timings["seconds/rollout"], 1e-9)
    stale = buffer.dropped_stale - stale_before
    lost = {
        "rollout/failures": float(assembler.failures.total()),
        "rollout/dropped_groups": float(assembler.dropped_groups + stale),
    }
    return progress, lost, (*events, *failures)


def _in_order(groups: Sequence[Group], requests: Sequence[Request]) -> list[Group]:
    """The groups in the order in which they were asked for.

    In the order of completion the short responses would fill the first mini-batch and the long ones
    the last, where the policy has moved most: length would correlate with staleness.
    """
    places = {request.prompt.prompt_id: place for place, request in enumerate(requests)}
    return sorted(groups, key=lambda group: places[group.prompt.prompt_id])


def _requests(job: Job, cursor: int, count: int, assembler: GroupAssembler) -> list[Request]:
    """The requests of the next `count` prompts; the assembler then awaits their outcomes."""
    samples = job.config.rollout.samples
    requests = []
    for offset, index in enumerate(prompt_indices(len(job.train), cursor, count, job.config.seed)):
        prompt = job.train[int(index)]
        assembler.expect(prompt, samples)
        for sample in range(samples):
            seed = job.seed("rollout", cursor + offset, sample)
            requests.append(Request(prompt, sample, seed, job.sampling))
    return requests


def _verified(job: Job, groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """The groups with rewards and verdicts, and an event if the verifier raised."""
    texts = [(r.text, group.prompt.answer) for group in groups for r in group.rollouts]
    scored = job.verifier.score(texts)
    raised = [verdict.message for verdict in scored if verdict.cause == "error"]
    events = (
        [f"the verifier raised on {len(raised)} responses (reward 0), first {raised[0]}"]
        if raised
        else []
    )
    verdicts = iter(scored)
    verified = [
        Group(
            group.prompt,
            tuple(
                dataclasses.replace(rollout, reward=verdict.reward, verdict=verdict.cause)
                for rollout, verdict in zip(group.rollouts, verdicts, strict=False)
            ),
        )
        for group in groups
    ]
    return verified, events


@contextlib.contextmanager
def timed(timings: Timings, name: str) -> Iterator[None]:
    """Adds the seconds its block took."""
    start = time.perf_counter()
    yield
    timings[name] = timings.get(name, 0.0) + time.perf_counter() - start
