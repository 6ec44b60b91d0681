"""Filling the buffer: overlap, filters, over-sampling, refills, and what a resumed run asks again.

The engine is a script of outcomes, so that each test says in which order and at which weights they
come; the job around it has real prompts and no model.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.assembly import Progress
from jaxrl_llm.collect import fill_buffer
from jaxrl_llm.config import RunConfig
from jaxrl_llm.data.prompts import load_prompts
from jaxrl_llm.data.rewards import Verdict
from jaxrl_llm.data.tokenizer import make_tokenizer
from jaxrl_llm.learner.watch import WatchState
from jaxrl_llm.rollout.buffer import BufferConfig, RolloutBuffer, UnderWay
from jaxrl_llm.rollout.engine import EngineError, EngineFailure, EngineReport, Request
from jaxrl_llm.rollout.statistics import group_metrics
from jaxrl_llm.types import NOT_SAMPLED, Rollout
from tests.tiny import tiny_config, vary

GROUPS, SAMPLES = 4, 4


class Script:
    """Outcomes of one generate call."""

    def __init__(self, engine: Scripted, requests: Sequence[Request]) -> None:
        self._engine, self._left = engine, list(requests)

    def __iter__(self) -> Iterator[Rollout | EngineFailure]:
        return self

    def __next__(self) -> Rollout | EngineFailure:
        if not self._left:
            raise StopIteration
        request = self._left.pop(self._engine.pick(self._left))
        self._engine.delivered += 1
        return self._engine.answer(request, self._engine.version)

    def close(self) -> None:
        self._engine.closed += len(self._left)
        self._left.clear()


class Scripted:
    """An engine that answers by a function, the last request first or as `pick` says."""

    def __init__(self, answer: Callable[..., Rollout | EngineFailure], *, overlaps: bool) -> None:
        self.answer, self.overlaps = answer, overlaps
        self.script: type[Script] = Script
        self.pick: Callable[[list[Request]], int] = lambda left: -1
        self.asked: list[Request] = []
        self.delivered = self.closed = self.version = 0

    def generate(self, requests: Sequence[Request]) -> Script:
        self.asked += requests
        return self.script(self, requests)

    def report(self) -> EngineReport:
        return EngineReport({"engine/retries": 2.0}, ("a server came back",))


def rollout(request: Request, version: int, text: str) -> Rollout:
    return Rollout(
        prompt_id=request.prompt.prompt_id,
        sample_index=request.sample_index,
        tokens=np.array([1, 2, 3], np.int32),
        loss_mask=np.array([False, True]),
        sampler_logprobs=np.array([0, -1], np.float32),
        routes=None,
        weight_version=np.array([NOT_SAMPLED, version], np.int32),
        text=text,
        finish="stop",
    )


def mixed(request: Request, version: int) -> Rollout:
    """One right answer in each group."""
    return rollout(request, version, request.prompt.answer if request.sample_index == 1 else "?")


class Judge:
    """A verifier that compares texts."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        return [Verdict(float(t == a), "correct" if t == a else "wrong") for t, a in pairs]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    made = tiny_config(tmp_path_factory.mktemp("collect") / "run")
    return dataclasses.replace(made, steps=5)


def make_job(config: RunConfig, engine: Scripted) -> Any:
    tokenizer = make_tokenizer(config.task.tokenizer)
    return types.SimpleNamespace(
        config=config,
        train=load_prompts(config.task.data, tokenizer, "train"),
        verifier=Judge(),
        engine=engine,
        under_way=UnderWay(),
        sampling=config.rollout.sampling(tokenizer.stop_token_ids),
        last_step=config.steps,
        version=lambda progress: progress.step,
        seed=lambda purpose, *counters: hash((purpose, *counters)) % 2**63,
    )


def begin(config: RunConfig) -> Progress:
    buffer = RolloutBuffer(config.rollout.buffer, drawn=0)
    return Progress(0, None, buffer, WatchState(), None)  # type: ignore[arg-type]


def step(job: Any, progress: Progress) -> tuple[list[int], dict[str, float], tuple[str, ...]]:
    """Fill, take and go on by one version; the ages of the groups, metrics and events."""
    metrics, events = fill_buffer(job, progress, {})
    groups = progress.buffer.take(GROUPS, progress.step)
    assert len(groups) == GROUPS
    ages = [progress.step - int(group.rollouts[0].weight_version[-1]) for group in groups]
    job.engine.version += 1
    return ages, metrics, events


def after(progress: Progress, steps: int = 1) -> Progress:
    return dataclasses.replace(progress, step=progress.step + steps)


def test_an_engine_that_overlaps_has_the_next_groups_under_way(config) -> None:
    """It is asked for two rollout batches at once, and waited for the first alone."""
    engine = Scripted(mixed, overlaps=True)
    engine.pick = lambda left: 0
    config = vary(config, "rollout", buffer=BufferConfig(max_staleness=1))
    job, progress = make_job(config, engine), begin(config)
    counts = []
    for _ in range(config.steps):
        step(job, progress)
        counts.append((len(engine.asked), engine.delivered))
        progress = after(progress)
    batch = GROUPS * SAMPLES
    assert counts == [(batch * min(n + 1, 5), batch * n) for n in (1, 2, 3, 4, 5)]
    assert {request.max_staleness for request in engine.asked} == {1}
    assert engine.closed == 0
    assert not progress.buffer.pending


def test_an_engine_that_does_not_overlap_samples_ahead_at_once(config) -> None:
    engine = Scripted(mixed, overlaps=False)
    config = vary(config, "rollout", buffer=BufferConfig(max_staleness=1))
    job, progress = make_job(config, engine), begin(config)
    assert step(job, progress)[0] == [0] * GROUPS
    assert engine.delivered == 2 * GROUPS * SAMPLES
    assert step(job, after(progress))[0] == [1] * GROUPS


def test_the_first_groups_drawn_are_waited_for_whatever_finishes_first(config) -> None:
    engine = Scripted(mixed, overlaps=True)
    config = vary(config, "rollout", buffer=BufferConfig(max_staleness=1))
    job, progress = make_job(config, engine), begin(config)
    fill_buffer(job, progress, {})
    taken = progress.buffer.take(GROUPS, 0)
    first = [request.prompt.prompt_id for request in engine.asked[: GROUPS * SAMPLES : SAMPLES]]
    assert [group.prompt.prompt_id for group in taken] == first
    # The last were answered first: all of them had to be taken.
    assert engine.delivered == 2 * GROUPS * SAMPLES
    assert len(progress.buffer) == GROUPS


def test_strictly_on_policy_the_surplus_is_finished_and_dropped(config) -> None:
    """All that was asked for is waited for; the next step drops and counts what was left over."""
    engine = Scripted(mixed, overlaps=True)
    engine.pick = lambda left: 0
    config = vary(config, "rollout", oversample=1.5)
    job, progress = make_job(config, engine), begin(config)
    batch = GROUPS * SAMPLES
    dropped = []
    for number in range(config.steps):
        ages, metrics, _ = step(job, progress)
        assert ages == [0] * GROUPS
        assert engine.delivered == len(engine.asked) == (number + 1) * 1.5 * batch
        assert not progress.buffer.pending
        dropped.append(metrics["rollout/dropped_groups"])
        progress = after(progress)
    assert dropped == [0, 2, 2, 2, 2]
    assert {request.max_staleness for request in engine.asked} == {0}


def in_order(config: RunConfig, pick: Callable[[list[Request]], int]) -> list[Any]:
    """Prompts, samples and metrics of each step, where responses arrive in this order."""

    def answer(request: Request, version: int) -> Rollout | EngineFailure:
        """By the request alone: a third of the prompts has equal rewards, and some fail."""
        if request.seed % 11 == 0:
            name = request.prompt.prompt_id
            return EngineFailure(name, request.sample_index, "timeout", "slow")
        equal = int(request.prompt.answer) % 3 == 0
        return rollout(request, version, "?") if equal else mixed(request, version)

    engine = Scripted(answer, overlaps=True)
    engine.pick = pick
    job, progress = make_job(config, engine), begin(config)
    job.seed = lambda purpose, draw, sample: 7 * draw + sample
    steps = []
    for _ in range(config.steps):
        metrics, _ = fill_buffer(job, progress, {})
        groups = progress.buffer.take(GROUPS, progress.step)
        taken = [(g.prompt.prompt_id, [r.sample_index for r in g.rollouts]) for g in groups]
        metrics |= group_metrics(groups, progress.step)
        steps.append((taken, metrics, progress.buffer.drawn))
        engine.version += 1
        progress = after(progress)
    return steps


@pytest.mark.parametrize("kept", ["none", "equal_rewards"])
def test_strictly_on_policy_the_order_of_arrival_changes_nothing(config, kept: str) -> None:
    """Else a faster server would make another run: other prompts, from the second step on."""
    config = vary(config, "rollout", oversample=1.5, refills=6, filter=kept)
    rng = np.random.default_rng(0)
    first, last, mixed_up = (
        in_order(config, pick)
        for pick in (lambda left: 0, lambda left: -1, lambda left: int(rng.integers(len(left))))
    )
    assert first == last == mixed_up
    totals = {
        name: sum(metrics[f"rollout/{name}"] for _, metrics, _ in first)
        for name in ("failures", "dropped_groups", "filtered_groups")
    }
    assert totals["failures"] > 0
    assert totals["dropped_groups"] > 0
    assert (totals["filtered_groups"] > 0) == (kept == "equal_rewards")


class Early(Script):
    """Responses that were finished as soon as they were asked for, and wait for the learner."""

    def __init__(self, engine: Scripted, requests: Sequence[Request]) -> None:
        super().__init__(engine, requests)
        self._finished = iter([engine.answer(request, engine.version) for request in requests])

    def __next__(self) -> Rollout | EngineFailure:
        return next(self._finished)


@pytest.mark.parametrize("oversample", [1.0, 1.25, 2.0])
def test_groups_that_waited_too_long_are_counted_and_replaced_at_once(config, oversample) -> None:
    """They are finished under old weights, and nobody looked at them before they were needed."""
    engine = Scripted(mixed, overlaps=True)
    engine.script = Early
    config = vary(config, "rollout", oversample=oversample, buffer=BufferConfig(max_staleness=1))
    job, progress = make_job(config, engine), begin(config)
    dropped = 0.0
    for number in range(config.steps):
        ages, metrics, _ = step(job, progress)  # GROUPS of them, at each step
        assert max(ages) <= 1
        dropped += metrics["rollout/dropped_groups"]
        buffer = progress.buffer
        used = GROUPS * (number + 1)
        assert buffer.drawn == used + dropped + len(buffer) + len(buffer.pending)
        progress = after(progress)
    assert (dropped > 0) == (oversample > 1)


def test_groups_too_stale_are_among_the_reasons_for_a_failure(config) -> None:
    engine = Scripted(lambda request, version: mixed(request, 0), overlaps=True)
    config = vary(config, "rollout", refills=0)
    job, progress = make_job(config, engine), begin(config)
    message = r"0 of 4 groups after 1 attempts \(1 \+ rollout.refills\): 4 groups were too stale"
    with pytest.raises(EngineError, match=message):
        fill_buffer(job, after(progress), {})


def test_the_last_step_leaves_nothing_under_way(config) -> None:
    engine = Scripted(mixed, overlaps=True)
    config = vary(config, "rollout", oversample=1.5, buffer=BufferConfig(max_staleness=1))
    job, progress = make_job(config, engine), begin(config)
    step(job, progress)
    engine.version = config.steps - 1
    step(job, after(progress, config.steps - 1))
    assert engine.delivered == len(engine.asked)
    assert not progress.buffer.pending
    assert not job.under_way.responses


def test_groups_of_equal_rewards_are_filtered_counted_and_refilled(config) -> None:
    engine = Scripted(mixed, overlaps=True)
    seen: list[str] = []

    def every_other(request: Request, version: int) -> Rollout:
        if request.prompt.prompt_id not in seen:
            seen.append(request.prompt.prompt_id)
        equal = seen.index(request.prompt.prompt_id) % 2 == 0
        return (
            rollout(request, version, request.prompt.answer) if equal else mixed(request, version)
        )

    engine.answer = every_other
    config = vary(config, "rollout", filter="equal_rewards", refills=6)
    job, progress = make_job(config, engine), begin(config)
    _, metrics, _ = step(job, progress)
    drawn, filtered = progress.buffer.drawn, metrics["rollout/filtered_groups"]
    assert filtered >= GROUPS // 2
    assert drawn == GROUPS + filtered
    # Every verified rollout is in the mean, those of filtered groups too.
    expected = (filtered + GROUPS / SAMPLES) / drawn
    assert metrics["rollout/sampled_reward_mean"] == pytest.approx(expected)
    kept = dataclasses.replace(config.rollout, filter="none")
    unfiltered = make_job(dataclasses.replace(config, rollout=kept), engine)
    assert step(unfiltered, begin(config))[1]["rollout/filtered_groups"] == 0


def test_refills_have_a_limit_and_the_error_says_what_was_lost(config) -> None:
    def equal(request: Request, version: int) -> Rollout | EngineFailure:
        if request.sample_index == 3:
            return EngineFailure(request.prompt.prompt_id, 3, "timeout", "server A was slow")
        return rollout(request, version, "?")

    engine = Scripted(equal, overlaps=True)
    config = vary(config, "rollout", filter="equal_rewards", refills=2)
    job, progress = make_job(config, engine), begin(config)
    message = (
        r"step 1 has 0 of 4 groups after 3 attempts .*12 requests \(timeout\), the first: server A "
        r"was slow; 12 groups were filtered \(equal_rewards\)"
    )
    with pytest.raises(EngineError, match=message):
        fill_buffer(job, progress, {})
    assert len(engine.asked) == 3 * GROUPS * SAMPLES


def test_losses_are_counted_in_the_step_they_happen_in(config) -> None:
    def failing(request: Request, version: int) -> Rollout | EngineFailure:
        if version == 0 and request.sample_index < 2:
            return EngineFailure(request.prompt.prompt_id, request.sample_index, "refused", "no")
        return mixed(request, version)

    engine = Scripted(failing, overlaps=True)
    job, progress = make_job(config, engine), begin(config)
    _, metrics, events = step(job, progress)
    assert metrics["rollout/failures"] == 2 * GROUPS
    assert metrics["engine/retries"] == 2
    assert events == ("the engine failed 8 requests (refused), the first: no", "a server came back")
    _, metrics, events = step(job, after(progress))
    assert metrics["rollout/failures"] == 0
    assert events == ("a server came back",)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_no_group_is_trained_on_beyond_the_bound(config, staleness: int) -> None:
    """Groups that sat in the buffer too long are dropped, counted, and others drawn for them."""
    engine = Scripted(mixed, overlaps=True)
    config = vary(config, "rollout", buffer=BufferConfig(max_staleness=staleness))
    job, progress = make_job(config, engine), begin(config)
    fill_buffer(job, progress, {})  # the last drawn are delivered first: all of them
    held = len(progress.buffer)
    assert held == GROUPS * (1 + staleness)
    engine.version = 2
    ages, metrics, _ = step(job, after(progress, 2))
    assert max(ages) <= staleness
    assert metrics["rollout/dropped_groups"] == (0 if staleness == 2 else held)


def test_a_resumed_run_asks_again_for_what_was_under_way(config) -> None:
    """A checkpoint has the finished groups and the draws that were pending: none is lost."""
    engine = Scripted(mixed, overlaps=True)
    engine.pick = lambda left: 0
    config = vary(config, "rollout", buffer=BufferConfig(max_staleness=1))
    job, progress = make_job(config, engine), begin(config)
    step(job, progress)
    stored = progress.buffer.to_json()
    assert stored["pending"] == [4, 5, 6, 7]

    other = Scripted(mixed, overlaps=True)
    other.version = 1
    resumed = RolloutBuffer.from_json(config.rollout.buffer, stored)
    again = dataclasses.replace(after(progress), buffer=resumed)
    step(make_job(config, other), again)
    batch = GROUPS * SAMPLES
    before = {(r.prompt.prompt_id, r.sample_index, r.seed) for r in engine.asked[batch:]}
    assert {(r.prompt.prompt_id, r.sample_index, r.seed) for r in other.asked[:batch]} == before
    assert resumed.drawn == 3 * GROUPS


def test_the_verifier_s_errors_are_one_event(config) -> None:
    engine = Scripted(mixed, overlaps=True)
    job, progress = make_job(config, engine), begin(config)
    job.verifier = types.SimpleNamespace(
        score=lambda pairs: [Verdict(0.0, "error", "SyntaxError") for _ in pairs]
    )
    _, _, events = step(job, progress)
    assert events[0] == "the verifier raised on 16 responses (reward 0), first SyntaxError"


def test_what_the_rollout_config_refuses(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(ValueError, match=r"rollout\.oversample is 0\.5; it must be at least 1"):
        vary(config, "rollout", oversample=0.5)
    with pytest.raises(ValueError, match=r"rollout\.refills is -1"):
        vary(config, "rollout", refills=-1)
