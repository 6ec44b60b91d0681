"""What a step asks of the engine: rollouts for the buffer, and evaluations.

What it is: everything between "the weights are published" and "the learner may take its groups":
prompts sent, rewards, whole groups, with what was lost on the way counted. What it is not: sampling
(rollout/), verifying (data/rewards.py) or learning (loop.py).

An engine that overlaps goes on with the groups asked for ahead while the learner updates. What is
under way is in no checkpoint, but which prompts are is: a run that goes on asks for them again.
Where nothing may be asked for ahead, a step waits for all that it asked for, so that what is
learned, and what is drawn next, does not depend on which responses were finished first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence

from jaxrl_llm.assembly import Job, Progress
from jaxrl_llm.data.prompts import prompt_indices
from jaxrl_llm.evaluate import evaluate
from jaxrl_llm.processes import from_first
from jaxrl_llm.rollout.engine import EngineError, Request
from jaxrl_llm.runlog import StepRecord
from jaxrl_llm.types import Group

Timings = dict[str, float]
"""seconds/* and rate/* of a step, as they add up."""


@dataclasses.dataclass
class Tally:
    """What a step's sampling came to, before anything was filtered or dropped."""

    tokens: int = 0  # sampled, in finished groups
    rewards: list[float] = dataclasses.field(default_factory=list)  # of every verified rollout
    filtered: int = 0  # groups
    raised: list[str] = dataclasses.field(default_factory=list)  # what the verifier said


def fill_buffer(
    job: Job, progress: Progress, timings: Timings
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Sample and verify until progress.buffer holds this step's groups, none of them too stale.

    An engine that does not overlap also samples those asked for ahead. Returns what was lost as
    metrics, and why as events. Raises EngineError where the groups cannot be had.
    """
    rollout, buffer, under_way = job.config.rollout, progress.buffer, job.under_way
    ahead = min(rollout.buffer.max_staleness, job.last_step - progress.step - 1)
    wanted = rollout.groups * (1 + ahead)
    overlapped = ahead > 0 and job.engine.overlaps
    needed = rollout.groups if overlapped else wanted
    timings |= {"seconds/rollout": 0.0, "seconds/reward": 0.0}
    stale_before = buffer.dropped_stale
    buffer.drop_stale(job.version(progress))
    tally = Tally()
    _ask(job, sorted(buffer.pending - under_way.assembler.draws))
    for _ in range(1 + rollout.refills):
        missing = wanted - len(buffer) - len(buffer.pending)
        if missing > 0:
            _ask(job, buffer.draw(math.ceil(missing * rollout.oversample)))
        while under_way.responses and not (overlapped and buffer.ready(needed)):
            _receive(job, progress, timings, tally)
        if buffer.ready(needed):
            break
    losses = under_way.assembler.take_losses()
    failures = [
        f"the engine failed {count} requests ({cause}), the first: {losses.messages[cause]}"
        for cause, count in losses.failures.items()
    ]
    stale = buffer.dropped_stale - stale_before
    if len(buffer) < rollout.groups:
        lost = {f"filtered ({rollout.filter})": tally.filtered, "too stale": stale}
        reasons = [f"{count} groups were {what}" for what, count in lost.items() if count]
        raise EngineError(
            f"step {progress.step + 1} has {len(buffer)} of {rollout.groups} groups after "
            f"{1 + rollout.refills} attempts (1 + rollout.refills): "
            f"{'; '.join(failures + reasons)}"
        )
    report = job.engine.report()
    timings["rate/rollout_tokens_per_second"] = tally.tokens / max(timings["seconds/rollout"], 1e-9)
    metrics = {
        "rollout/failures": float(sum(losses.failures.values())),
        "rollout/dropped_groups": float(losses.dropped_groups + stale),
        "rollout/filtered_groups": float(tally.filtered),
        **report.metrics,
    }
    if tally.rewards:
        metrics["rollout/sampled_reward_mean"] = math.fsum(tally.rewards) / len(tally.rewards)
    raised = [
        f"the verifier raised on {len(tally.raised)} responses (reward 0), first {message}"
        for message in tally.raised[:1]
    ]
    return metrics, (*raised, *failures, *report.events)


def _ask(job: Job, draws: Sequence[int]) -> None:
    """Request the responses to these draws, ascending and all of them pending in the buffer."""
    if not draws:
        return
    rollout, first = job.config.rollout, draws[0]
    span = prompt_indices(len(job.train), first, draws[-1] - first + 1, job.config.seed)
    requests = []
    for draw in draws:
        prompt = job.train[int(span[draw - first])]
        job.under_way.assembler.expect(draw, prompt, rollout.samples)
        for sample in range(rollout.samples):
            seed = job.seed("rollout", draw, sample)
            stalest = rollout.buffer.max_staleness
            requests.append(Request(prompt, sample, seed, job.sampling, stalest))
    job.under_way.responses.append(job.engine.generate(requests))


def _receive(job: Job, progress: Progress, timings: Timings, tally: Tally) -> None:
    """Take the next outcome of those asked for first; with a prompt's last one, settle its draw."""
    responses = job.under_way.responses
    with timed(timings, "seconds/rollout"):
        outcome = next(responses[0], None)
    if outcome is None:
        responses.popleft()
        return
    finished = job.under_way.assembler.add(outcome)
    if finished is None:
        return
    group = finished.group
    if group is not None:
        with timed(timings, "seconds/reward"):
            group = _verified(job, group, tally)
        tally.tokens += sum(rollout.response_length for rollout in group.rollouts)
        if _filtered(job, group):
            tally.filtered += 1
            group = None
    progress.buffer.settle(finished.draw, group, job.version(progress))


def _verified(job: Job, group: Group, tally: Tally) -> Group:
    """The group with rewards and verdicts."""
    verdicts = job.verifier.score([(r.text, group.prompt.answer) for r in group.rollouts])
    tally.rewards += [verdict.reward for verdict in verdicts]
    tally.raised += [verdict.message for verdict in verdicts if verdict.cause == "error"]
    rollouts = [
        dataclasses.replace(rollout, reward=verdict.reward, verdict=verdict.cause)
        for rollout, verdict in zip(group.rollouts, verdicts, strict=True)
    ]
    return Group(group.prompt, tuple(rollouts))


def _filtered(job: Job, group: Group) -> bool:
    """Whether the configured filter keeps the group from the learner."""
    equal = len({rollout.reward for rollout in group.rollouts}) == 1
    return equal and job.config.rollout.filter == "equal_rewards"


def evaluated(job: Job, progress: Progress) -> tuple[list[StepRecord], Progress]:
    """The record of the evaluation due after this step, if one is; a failure in the progress."""
    if progress.failure:
        return [], progress
    try:
        records = from_first(lambda: _evaluation(job, progress), share=_without_groups)
        return records, progress
    except EngineError as failure:
        return [], dataclasses.replace(progress, failure=failure)


def _evaluation(job: Job, progress: Progress) -> list[StepRecord]:
    """The evaluation due after this step, if one is; before and after RL there always is one."""
    done, every = progress.step - job.config.cold_start.steps, job.config.evaluation.every
    due = done in (0, job.config.steps) or (every > 0 and done % every == 0)
    if not due:
        return []
    timings: Timings = {}
    with timed(timings, "seconds/evaluate"):
        result = evaluate(
            job.engine,
            job.heldout,
            job.verifier,
            sampling=job.sampling,
            config=job.config.evaluation,
            seed=job.seed("evaluation"),
        )
    events = [
        f"evaluation: the engine failed {n} requests ({c})" for c, n in result.failures.items()
    ]
    if raised := result.verdicts.get("error"):
        events.append(f"evaluation: the verifier raised on {raised} responses (reward 0)")
    record = StepRecord(
        "eval", progress.step, result.metrics(), timings, tuple(events), result.groups
    )
    return [record]


def _without_groups(records: list[StepRecord]) -> list[StepRecord]:
    """For the processes that have no log."""
    return [dataclasses.replace(record, groups=()) for record in records]


@contextlib.contextmanager
def timed(timings: Timings, name: str) -> Iterator[None]:
    """Adds the seconds its block took."""
    start = time.perf_counter()
    yield
    timings[name] = timings.get(name, 0.0) + time.perf_counter() - start
