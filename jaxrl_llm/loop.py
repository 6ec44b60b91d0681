"""The job: cold start, then sample, verify, score, update, publish; as a generator of StepRecord.

What it is: the order of things, top to bottom. `for record in run(config)` is the whole experiment;
the command line only adds a progress bar. What it is not: the method (losses/, learner/step.py),
the sampling (rollout/) or the making and the checkpoints of the parts (assembly.py).

One RL step with the weights of version v:

    prompts -> rollouts (engine) -> rewards (verifier) -> group advantages -> N mini-batches
    -> old log-probabilities and routes (score) -> N updates (train) -> publish version v + 1

A record is yielded once it is in the run log, and a step's checkpoint is made after its records. So
a notebook can stop after any record, and the same call goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial

import jax
import numpy as np

from jaxrl_llm.arrays import Metrics, TrainBatch
from jaxrl_llm.assembly import Job, Progress, assemble, published, resume, save, start_rl
from jaxrl_llm.collect import Timings, evaluated, fill_buffer, timed
from jaxrl_llm.config import RunConfig
from jaxrl_llm.data.collate import collate, collate_demonstrations, rows_needed
from jaxrl_llm.data.demonstrations import make_demonstrations
from jaxrl_llm.data.prompts import prompt_indices
from jaxrl_llm.learner.state import TrainState
from jaxrl_llm.learner.step import prepare
from jaxrl_llm.learner.watch import EarlyStop
from jaxrl_llm.losses.advantages import response_advantages
from jaxrl_llm.losses.diagnostics import pool
from jaxrl_llm.metrics import METRICS
from jaxrl_llm.processes import anywhere, from_first, outline
from jaxrl_llm.recovery import check_finite, respond
from jaxrl_llm.rollout.engine import EngineError
from jaxrl_llm.rollout.statistics import group_metrics
from jaxrl_llm.runlog import StepRecord
from jaxrl_llm.types import Group, Rollout, group_without_routes


class Stopped(Exception):
    """The run was asked to stop, in this process or another one; it can go on from a checkpoint."""


def run(config: RunConfig, stop: Callable[[], bool] = lambda: False) -> Generator[StepRecord]:
    """Run the experiment, or go on with the one in config.directory; yields every record.

    Every process of a job runs this and gets records with the same metrics; rollouts are in those
    of the first alone, and timings are each process's own. A generator that is closed writes a last
    checkpoint, if its process is the only one: a checkpoint is work of all of them.

    Args:
      config: of the experiment, the same in all processes.
      stop: asked after every step in every process; where one says True, they all end.

    Raises ValueError, before any work, for a directory that holds another experiment, and
    CheckpointError for a damaged checkpoint. With all records yielded and a checkpoint made, raises
    Stopped where stop() ends the run, EarlyStop where the early warning does, EngineError where its
    servers do, and PublishError where weights cannot be written for them.
    """
    with contextlib.ExitStack() as stack:
        job = assemble(config, stack)
        progress = start = resume(job)
        if start.failure:
            raise start.failure
        try:
            for records, progress in _steps(job, start):
                from_first(partial(_log, job, records))
                asked = anywhere(stop())
                ended = asked or progress.step == job.last_step or progress.stop or progress.failure
                if ended or job.checkpoints.due(progress.step):
                    save(job, progress)
                yield from records
                if asked or progress.stop:
                    break
        except GeneratorExit:
            if jax.process_count() == 1:
                save(job, progress)
            raise
        except EngineError:
            # An engine fails before the update it was to serve: the last step's state is whole.
            save(job, progress)
            raise
        if progress.failure:
            raise progress.failure
        if progress.stop:
            raise EarlyStop(progress.stop)
        if progress.step < job.last_step:
            raise Stopped


def _log(job: Job, records: Sequence[StepRecord]) -> None:
    for record in records:
        job.log.write(record)


def _steps(job: Job, progress: Progress) -> Iterator[tuple[list[StepRecord], Progress]]:
    """All steps still to do, each with its records and the progress after it."""
    cold_steps = job.config.cold_start.steps
    last = from_first(lambda: job.log.last)
    if progress.step >= cold_steps and last != (progress.step, "eval"):
        # Without a cold start, or where the engine failed when the run last ended.
        records, progress = evaluated(job, progress)
        if records or progress.failure:
            yield records, progress
    while progress.step < job.last_step and not progress.failure:
        cold = progress.step < cold_steps
        record, progress = (_cold_start_step if cold else _rl_step)(job, progress)
        if progress.step < cold_steps:
            yield [record], progress
        else:
            progress = start_rl(job, progress) if cold else progress
            records, progress = evaluated(job, progress)
            yield [record, *records], progress


def _cold_start_step(job: Job, progress: Progress) -> tuple[StepRecord, Progress]:
    """One supervised update on demonstrations."""
    config = job.config.cold_start
    timings: Timings = {}
    start = time.perf_counter()
    drawn = progress.step * config.batch
    indices = prompt_indices(len(job.train), drawn, config.batch, job.config.seed)
    demonstrations = make_demonstrations(
        [job.train[int(index)] for index in indices],
        job.tokenizer,
        corrupted_share=config.corrupted_share,
        seed=job.seed("demonstrations", drawn),
    )
    batch = collate_demonstrations(
        demonstrations, rows=job.config.rows(config.batch), length=job.config.row_length, pack=False
    )
    with timed(timings, "seconds/update"):
        state, metrics = job.steps.sft(progress.state, job.to_devices(batch))
        values = pool([metrics])
    check_finite(progress.step + 1, values, "lower cold_start.optimizer.learning_rate")
    timings["rate/learner_tokens_per_second"] = _tokens([batch]) / timings["seconds/update"]
    timings["seconds/step"] = time.perf_counter() - start
    after = dataclasses.replace(progress, step=progress.step + 1, state=state)
    return StepRecord("sft", after.step, values, timings), after


def _rl_step(job: Job, progress: Progress) -> tuple[StepRecord, Progress]:
    """One rollout batch and the updates made from it."""
    timings: Timings = {}
    start = time.perf_counter()
    # If the engine fails, the step begins anew and counts all: what is finished is in the journal.
    progress = dataclasses.replace(progress, buffer=progress.buffer.copy())
    before = progress
    sampled = from_first(lambda: _sample(job, before, timings), share=_outline)

    with timed(timings, "seconds/spread"):
        collated = [job.to_devices(batch) for batch in sampled.batches]
        jax.block_until_ready(collated)
    sampled = _without_arrays(job, sampled)
    with timed(timings, "seconds/score"):
        batches, scores = _score(job, progress, collated)
    state, updates = _update(job, progress, collated[-1], batches, timings)
    values = pool(scores) | updates | sampled.metrics
    after = dataclasses.replace(progress, step=progress.step + 1, state=state)
    after, watched, heard = respond(job, after, values)
    values |= watched
    if after.state is state:  # not rolled back
        remedy = "lower learner.optimizer.learning_rate, or set learner.watch.action to roll_back"
        if job.config.learner.watch.action == "roll_back":
            remedy = f"{after.stop}; lower learner.optimizer.learning_rate"
        check_finite(after.step, values, remedy)
    with timed(timings, "seconds/publish"):
        after = published(job, after)

    learning = timings["seconds/score"] + timings["seconds/update"]
    timings["rate/learner_tokens_per_second"] = sampled.tokens / learning
    timings["seconds/step"] = time.perf_counter() - start
    events = sampled.events + _warnings(job, values) + heard
    return StepRecord("rl", after.step, values, timings, events, sampled.groups), after


@dataclasses.dataclass(frozen=True)
class _Sampled:
    """A rollout batch."""

    groups: tuple[Group, ...]
    batches: list[TrainBatch]  # the mini-batches, on the host
    metrics: dict[str, float]
    events: tuple[str, ...]
    tokens: int  # in the mini-batches, padding left out


def _sample(job: Job, progress: Progress, timings: Timings) -> _Sampled:
    counts, events = fill_buffer(job, progress, timings)
    version = job.version(progress)
    groups = progress.buffer.take(job.config.rollout.groups, version)
    batches = _mini_batches(job, groups, version)
    metrics = group_metrics(groups, version) | counts
    return _Sampled(groups, batches, metrics, events, _tokens(batches))


def _outline(sampled: _Sampled) -> _Sampled:
    """What processes that sample nothing know of it: they get their rows of the batches later."""
    return dataclasses.replace(sampled, groups=(), batches=outline(sampled.batches))


def _without_arrays(job: Job, sampled: _Sampled) -> _Sampled:
    """Once they are on the devices: routes of long rollouts are tens of gigabytes on the host."""
    keep = job.config.log.rollout_routes
    groups = sampled.groups if keep else tuple(map(group_without_routes, sampled.groups))
    return dataclasses.replace(sampled, groups=groups, batches=[])


def _mini_batches(job: Job, groups: Sequence[Group], version: int) -> list[TrainBatch]:
    """The rollout batch as N mini-batches of whole groups, all of one shape."""
    learner = job.config.learner
    size = len(groups) // learner.mini_batches
    parts = [groups[start : start + size] for start in range(0, len(groups), size)]
    rollouts = [[r for group in part for r in group.rollouts] for part in parts]
    rows = _rows(job, rollouts)
    return [
        collate(
            part_rollouts,
            np.concatenate([_advantages(job, group) for group in part]),
            step=version,
            rows=rows,
            length=job.config.row_length,
            pack=learner.pack,
            route_fallback=learner.route_fallback if learner.replay == "r3" else "live",
        )
        for part, part_rollouts in zip(parts, rollouts, strict=True)
    ]


def _rows(job: Job, parts: Sequence[Sequence[Rollout]]) -> int:
    """Rows of every mini-batch; few different numbers, since each one compiles the steps anew."""
    unpacked = job.config.responses
    if not job.config.learner.pack:
        return job.config.rows(unpacked)
    lengths = [[r.tokens.size - 1 for r in part] for part in parts]
    needed = max(rows_needed(part, length=job.config.row_length, pack=True) for part in lengths)
    eighth = max(1, unpacked // 8)
    return job.config.rows(-(-needed // eighth) * eighth)


def _advantages(job: Job, group: Group) -> np.ndarray:
    """f32[N] of one group."""
    rewards = np.array([[rollout.reward for rollout in group.rollouts]], np.float32)
    truncated = np.array([[rollout.finish == "length" for rollout in group.rollouts]])
    valid = np.ones_like(truncated)
    return response_advantages(rewards, valid, truncated, job.config.loss.advantage)[0]


def _score(
    job: Job, progress: Progress, batches: Sequence[TrainBatch]
) -> tuple[list[TrainBatch], list[Metrics]]:
    """Every mini-batch with its old_logprobs, ref_logprobs and routes to replay.

    All are scored before the first update: pi_old is the policy at the weights the update
    starts from.
    """
    learner = job.config.learner
    scored, metrics = [], []
    for batch in batches:
        if progress.reference is not None:
            logprobs = job.steps.score_reference(progress.reference, batch).logprobs
            batch = dataclasses.replace(batch, ref_logprobs=logprobs)
        if learner.old_logprobs == "score":
            score = job.steps.score(progress.state.params, batch)
            batch = prepare(batch, score, learner.replay)
            metrics.append(score.metrics)
        scored.append(batch)
    jax.block_until_ready(scored)
    return scored, metrics


def _update(
    job: Job,
    progress: Progress,
    last_collated: TrainBatch,
    batches: Sequence[TrainBatch],
    timings: Timings,
) -> tuple[TrainState, dict[str, float]]:
    """The updates on the scored mini-batches; the state after them, and what they saw.

    Every few steps the last mini-batch, for which the policy has moved most, is also examined for
    what moved its importance weights: as it was collated, with the sampler's routes in it.
    """
    state, metrics, train = progress.state, [], job.train_step(progress)
    every, attribution = job.config.learner.watch.attribution_every, job.steps.attribution
    due = every > 0 and (job.version(progress) + 1) % every == 0
    if due:
        with timed(timings, "seconds/attribution"):
            old_passes = attribution.before(state.params, last_collated)
            jax.block_until_ready(old_passes)
    with timed(timings, "seconds/update"):
        for batch in batches[:-1]:
            state, seen = train(state, batch)
            metrics.append(seen)
        if due:  # what is timed next must not wait for these
            jax.block_until_ready(state)
    if due:
        with timed(timings, "seconds/attribution"):
            metrics.append(jax.block_until_ready(attribution.after(state.params, old_passes)))
    with timed(timings, "seconds/update"):
        state, seen = train(state, batches[-1])
        return state, pool([*metrics, seen])


def _warnings(job: Job, values: Mapping[str, float]) -> tuple[str, ...]:
    """What a reader of the run log must not overlook about this step."""
    replay, fallback = job.config.learner.replay, values["routing/fallback_fraction"]
    warnings = []
    if replay != "none" and fallback:
        unreported, missing = (values[f"routing/provenance_{n}"] for n in ("unreported", "missing"))
        warnings.append(
            f"routing replay {replay} is configured but {fallback:.2%} of the sampled tokens used "
            f"the live router: {unreported:.2%} because the engine reported no routes for their "
            f"rollout, {missing:.2%} because their rollout has routes but they have none"
        )
    if replay != "none" and (lost := 1 - fallback - values["routing/replay_coverage"]) > 1e-5:
        warnings.append(
            f"routing replay {replay} did not fire: {lost:.2%} of the sampled tokens were given "
            "routes but their forward pass used other experts; do not trust this step"
        )
    if dropped := values["rollout/dropped_groups"]:
        warnings.append(f"{dropped:.0f} groups were dropped: {METRICS['rollout/dropped_groups']}")
    return tuple(warnings)


def _tokens(batches: Sequence[TrainBatch]) -> int:
    """Tokens consumed in the batches, padding left out."""
    return sum(int(np.count_nonzero(batch.segment_ids)) for batch in batches)
