"""What an alarm of the early warning does to a run: nothing more, stop, roll back or tighten.

What it is: the actions of learner.watch on a run's Progress, and the end of a run whose update
broke. What it is not: the rules (learner/watch.py), or the order of things in a step (loop.py).

All of it is a function of the log, the settings and the regular checkpoints, so a run that was
killed and resumed does the same. Regular are those of every checkpoint.every steps: one that a user
made by stopping the run is never rolled back to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_llm.assembly import Job, Progress
from jaxrl_llm.learner.checkpoint import CHECKPOINTS, CheckpointError, restore
from jaxrl_llm.learner.state import abstract_state
from jaxrl_llm.learner.watch import observe
from jaxrl_llm.processes import from_first


class Response(NamedTuple):
    """What the early warning makes of a step."""

    progress: Progress
    metrics: dict[str, float]  # watch/*
    events: tuple[str, ...]


def respond(job: Job, progress: Progress, metrics: Mapping[str, float]) -> Response:
    """Watch the metrics of the RL step that led to `progress`, and act on its alarms.

    Call it before the weights are published. Where progress.stop is set, the caller makes a
    checkpoint and ends the run. A roll back empties progress.buffer and frees the arrays of
    progress.state.
    """
    config = job.config.learner.watch
    watch, alarms, notices = observe(progress.watch, metrics, progress.step, config)
    progress = dataclasses.replace(progress, watch=watch)
    events = [*notices, *(alarm.message() for alarm in alarms)]
    held = len(progress.buffer)
    if alarms and config.action != "event":
        progress, done = _act(job, progress, min(alarm.since for alarm in alarms))
        events.append(done)
    actions = len(progress.watch.acted)
    return Response(
        progress,
        {
            "watch/alarms": float(len(alarms)),
            "watch/tightened": float(actions if config.action == "tighten" else 0),
            "watch/roll_backs": float(actions if config.action == "roll_back" else 0),
            "watch/dropped_groups": float(held - len(progress.buffer)),
        },
        tuple(events),
    )


def check_finite(step: int, values: Mapping[str, float], remedy: str) -> None:
    """ValueError for an update that broke: its weights must reach no engine and no checkpoint."""
    counts = {name: n for name, n in values.items() if name.startswith("nonfinite/") and n}
    norms = {name: values[name] for name in ("learner/loss", "learner/grad_norm")}
    counts |= {name: value for name, value in norms.items() if not np.isfinite(value)}
    if counts:
        found = ", ".join(f"{name} = {value:g}" for name, value in counts.items())
        raise ValueError(
            f"the update of step {step} is not finite ({found}); its weights were not published "
            "and not saved, the last checkpoint stands. The same command would repeat it: "
            f"{remedy}, with another --run-dir"
        )


def _act(job: Job, progress: Progress, since: int) -> tuple[Progress, str]:
    """The progress after the configured action, and what was done."""
    config = job.config.learner.watch
    if config.action == "stop":
        return _stopped(progress, since, "learner.watch.action is stop")
    if len(progress.watch.acted) >= config.max_actions:
        return _stopped(
            progress,
            since,
            f"learner.watch.max_actions is {config.max_actions}, and all have been taken",
        )
    if config.action == "roll_back":
        return _rolled_back(job, progress, since)
    watch = progress.watch.after_action(since, progress.step)
    progress = dataclasses.replace(progress, watch=watch)
    loss = job.loss(progress)
    return progress, (
        f"tightened, {len(watch.acted)} of {config.max_actions} times: importance.low "
        f"{loss.importance.low:.4g}, importance.high {loss.importance.high:.4g}, clip.low "
        f"{loss.clip.low:.4g}, clip.high {loss.clip.high:.4g} from the next step on"
    )


def _rolled_back(job: Job, progress: Progress, since: int) -> tuple[Progress, str]:
    """Weights and optimizer of before `since`; step, prompts and log go on."""
    job.checkpoints.wait()
    discarded, first_bad = progress.watch.acted, min(since, progress.watch.condemned or since)
    saved = job.saved_steps()
    good = [
        step
        for step in saved
        if job.checkpoints.due(step)
        and job.config.cold_start.steps <= step < first_bad
        # The checkpoint of the step of a roll back holds the weights it went back to.
        and not any(first <= step < last for first, last in discarded)
    ]
    if not good:
        return _stopped(
            progress,
            since,
            f"there is no checkpoint of RL from before step {first_bad} to roll back to, of "
            f"{list(saved)}",
        )
    # A second state would not fit beside a model that fills its devices.
    jax.tree.map(lambda leaf: leaf.delete(), progress.state)
    directory = job.config.directory / CHECKPOINTS
    checkpoint = restore(
        directory, abstract_state(job.config.model, job.optimizer, job.layout), max(good)
    )
    if checkpoint is None:
        raise CheckpointError(f"{directory} has vanished while the run went on; restore it")
    # What the condemned weights sampled goes too. Prompts without a whole group are asked for
    # again, and the journal would answer with the rollouts that are finished: their weights are
    # ones that this run went through.
    dropped = len(progress.buffer)
    progress.buffer.clear()
    job.under_way.cancel()
    # This version is not published yet: all that sampled anything are below it.
    from_first(lambda: job.forget(job.version(progress)))
    after = dataclasses.replace(
        progress,
        state=checkpoint.state,
        watch=progress.watch.after_action(since, progress.step),
    )
    return after, (
        f"rolled back: weights and optimizer are those of step {checkpoint.step}, {dropped} groups "
        "sampled ahead were dropped; steps, prompts and log go on"
    )


def _stopped(progress: Progress, since: int, reason: str) -> tuple[Progress, str]:
    """The run ends after this step's checkpoint, whose watch begins anew."""
    message = (
        f"the early warning stops the run after step {progress.step}: {reason}. The same command "
        "goes on from its checkpoint in spite of the alarm; other settings need another --run-dir"
    )
    condemned = progress.watch.condemned or since
    watch = dataclasses.replace(progress.watch.cleared(), condemned=condemned)
    return dataclasses.replace(progress, watch=watch, stop=message), message
