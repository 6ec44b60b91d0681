"""What the early warning does to a run: stop, roll back, tighten; each resumable bit for bit."""

import dataclasses
import json
import shutil
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxrl_llm import assembly, loop
from jaxrl_llm.config import RunConfig
from jaxrl_llm.data.tokenizer import Tokenizer
from jaxrl_llm.learner.checkpoint import CHECKPOINTS, CheckpointConfig, restore
from jaxrl_llm.learner.state import abstract_state, make_optimizer
from jaxrl_llm.learner.watch import EarlyStop, ThresholdConfig, WatchConfig
from jaxrl_llm.losses.clipping import ClipConfig
from jaxrl_llm.main import STOPPED_EARLY, main
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.rollout.buffer import BufferConfig
from jaxrl_llm.rollout.engine import EngineFailure, EngineReport, Request
from jaxrl_llm.rollout.journal import Journal
from jaxrl_llm.rollout.local import LocalEngine
from jaxrl_llm.runlog import StepRecord
from jaxrl_llm.sharding import make_layout
from jaxrl_llm.types import Rollout
from tests.test_loop import logged, run
from tests.tiny import COLD_STEPS, even_lengths, tiny_config, vary

ALWAYS = ThresholdConfig(**{f.name: 0.0 for f in dataclasses.fields(ThresholdConfig)})
ALWAYS = dataclasses.replace(ALWAYS, kl_high=1e-12)
"""Holds at every RL step: the fp8 engine is never the learner."""


@pytest.fixture(scope="module", autouse=True)
def _rewards() -> Iterator[None]:
    with even_lengths():
        yield


STEPS = 6
"""RL steps of the runs here: 4 to 9. With patience 2 there are alarms at 5, 7 and 9."""


def watched(run_dir: Path, *, action: str, **settings: int) -> RunConfig:
    """The tiny run with an early warning that speaks at every second RL step."""
    config = dataclasses.replace(tiny_config(run_dir), steps=STEPS)
    watch = WatchConfig(action=action, patience=2, thresholds=ALWAYS, **settings)  # type: ignore[arg-type]
    config = vary(config, "checkpoint", every=1, keep_last=5)
    config = vary(config, "evaluation", every=0)
    return vary(config, "learner", watch=watch)


def until_stopped(config: RunConfig) -> tuple[list[StepRecord], str]:
    """Its records up to the EarlyStop that must end it, and that one's message."""
    records: list[StepRecord] = []
    with pytest.raises(EarlyStop) as stopped:
        records.extend(loop.run(config))
    return records, str(stopped.value)


def rl(records: Sequence[StepRecord], metric: str) -> list[float]:
    """A metric at each RL step."""
    return [record.metrics[metric] for record in records if record.phase == "rl"]


def without_watch(run_dir: Path) -> list[dict]:
    """metrics.jsonl without timings and watch/*."""
    return [
        line | {"metrics": {k: v for k, v in line["metrics"].items() if k[:6] != "watch/"}}
        for line in logged(run_dir)
    ]


def events(config: RunConfig) -> list[dict]:
    return [json.loads(x) for x in (config.directory / "events.jsonl").read_text().splitlines()]


def saved(config: RunConfig, step: int) -> tuple[Params, Any]:
    """Parameters and optimizer state of the checkpoint of a step."""
    optimizer = make_optimizer(config.learner.optimizer, STEPS * config.learner.mini_batches)
    abstract = abstract_state(config.model, optimizer, make_layout(config.learner.mesh))
    checkpoint = restore(config.directory / CHECKPOINTS, abstract, step)
    assert checkpoint is not None
    return checkpoint.state.params, checkpoint.state.opt_state


def equal(left: object, right: object) -> bool:
    """Whether all leaves of two trees are the same bits."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, list[StepRecord]]:
    """A run that only logs its alarms."""
    config = watched(tmp_path_factory.mktemp("listening") / "run", action="event")
    return config, run(config)


def elsewhere(config: RunConfig, directory: Path) -> RunConfig:
    return dataclasses.replace(config, run_dir=str(directory))


def test_an_event_says_what_and_why(listening) -> None:
    config, records = listening
    # Once, at the second step: the rule then holds to the end.
    assert rl(records, "watch/alarms") == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    (event,) = events(config)
    assert (event["phase"], event["step"]) == ("rl", COLD_STEPS + 2)
    assert event["message"].startswith("early warning kl_high: policy/kl_sampler_old_k3 is ")
    assert f"since step {COLD_STEPS + 1}" in event["message"]


def test_a_stop_saves_says_how_to_go_on_and_the_same_command_does(listening, tmp_path) -> None:
    config = watched(tmp_path / "run", action="stop")
    config = vary(config, "checkpoint", every=0)
    records, message = until_stopped(config)
    assert records[-1].step == COLD_STEPS + 2
    assert "stops the run after step 5: learner.watch.action is stop" in message
    assert "The same command goes on" in message
    assert events(config)[-1]["message"] == message
    assert [r for r in records if r.phase == "rl"][-1].events[-1] == message
    assert [path.name for path in (config.directory / CHECKPOINTS).iterdir()] == ["5"]
    for step in (7, 9):  # the watch begins anew each time
        assert until_stopped(config)[0][-1].step == step
    assert run(config) == []
    assert without_watch(config.directory) == without_watch(listening[0].directory)


def test_the_command_line_reports_a_stop_with_a_status_of_its_own(tmp_path, capsys) -> None:
    path = tmp_path / "config.py"
    path.write_text(
        "from pathlib import Path\nfrom tests.test_recovery import watched\n"
        f"def get_config():\n    return watched(Path({str(tmp_path / 'run')!r}), action='stop')\n"
    )
    assert main(["train", str(path)]) == STOPPED_EARLY
    printed = " ".join(capsys.readouterr().out.split())
    assert "the early warning stops the run after step 5" in printed


class Spy:
    """The in-process engine, and the weights published to it by version."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self.published: dict[int, Params] = {}

    overlaps = False

    def generate(self, requests: Sequence[Request]) -> Generator[Rollout | EngineFailure]:
        return self._engine.generate(requests)

    def publish(self, params: Params, version: int) -> None:
        self.published[version] = jax.tree.map(np.array, params)
        self._engine.publish(params, version)

    def report(self) -> EngineReport:
        return self._engine.report()

    def close(self) -> None:
        self._engine.close()


class Rolled(NamedTuple):
    config: RunConfig
    records: list[StepRecord]
    published: dict[int, Params]


@pytest.fixture(scope="module")
def rolled(tmp_path_factory: pytest.TempPathFactory) -> Rolled:
    """A run that rolls back at steps 5, 7 and 9, with groups sampled ahead."""
    config = watched(tmp_path_factory.mktemp("rolled") / "run", action="roll_back")
    config = vary(config, "rollout", buffer=BufferConfig(max_staleness=1))
    spies = []

    def spy(config: RunConfig, tokenizer: Tokenizer, *_: object) -> Spy:
        spies.append(Spy(LocalEngine(config.rollout.engine, config.model, tokenizer.decode)))
        return spies[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "make_engine", spy)
        records = run(config)
    return Rolled(config, records, spies[0].published)


def test_a_roll_back_goes_on_in_steps_prompts_and_log(rolled) -> None:
    config, records, _ = rolled
    steps = [record.step for record in records if record.phase == "rl"]
    assert steps == list(range(COLD_STEPS + 1, COLD_STEPS + STEPS + 1))
    assert rl(records, "watch/roll_backs") == [0.0, 1.0, 1.0, 2.0, 2.0, 3.0]
    # Sampled ahead, and dropped before they could be trained on; the last step samples none.
    assert rl(records, "watch/dropped_groups") == [0.0, 4.0, 0.0, 4.0, 0.0, 0.0]
    assert rl(records, "rollout/dropped_groups") == [0.0] * STEPS
    done = [event["message"] for event in events(config) if "rolled back" in event["message"]]
    # Step 4 held the rule already; the checkpoint of step 5 is of the weights of step 3 again.
    targets = [f"are those of step {step}, " for step in (3, 5, 7)]
    assert [target in message for target, message in zip(targets, done, strict=True)] == [True] * 3
    assert "4 groups sampled ahead were dropped" in done[0]
    prompts = [g.prompt.prompt_id for r in records if r.phase == "rl" for g in r.groups]
    assert len(set(prompts)) == len(prompts) == STEPS * config.rollout.groups


class Servers(Spy):
    """Samples at once what it is asked for, into a journal, and gives what that already has."""

    overlaps = True

    def __init__(self, engine: LocalEngine, journal: Journal) -> None:
        super().__init__(engine)
        self._journal = journal

    def publish(self, params: Params, version: int) -> None:
        super().publish(params, version)
        self._journal.published(f"v{version}", version)

    def generate(self, requests: Sequence[Request]) -> Generator[Rollout | EngineFailure]:
        known = [self._journal.find(request) for request in requests]
        new = [request for request, found in zip(requests, known, strict=True) if found is None]
        outcomes = [rollout for rollout in known if rollout is not None]
        for outcome in self._engine.generate(new):
            assert isinstance(outcome, Rollout)
            named = (outcome.prompt_id, outcome.sample_index)
            (asked,) = (r for r in new if (r.prompt.prompt_id, r.sample_index) == named)
            self._journal.add(asked, outcome)
            outcomes.append(outcome)
        return (outcome for outcome in outcomes)


def test_what_condemned_weights_had_finished_does_not_come_back(tmp_path, monkeypatch) -> None:
    """Neither from what was under way, nor from the journal when that is asked for again."""
    config = watched(tmp_path / "run", action="roll_back")
    config = vary(config, "rollout", buffer=BufferConfig(max_staleness=1))
    config = dataclasses.replace(config, steps=4)

    journal = Journal(tmp_path / "journal")

    def servers(config: RunConfig, tokenizer: Tokenizer, *_: object) -> Servers:
        engine = LocalEngine(config.rollout.engine, config.model, tokenizer.decode)
        return Servers(engine, journal)

    monkeypatch.setattr(assembly, "make_journal", lambda config: journal)
    monkeypatch.setattr(assembly, "make_engine", servers)
    records = run(config)
    assert rl(records, "watch/roll_backs") == [0.0, 1.0, 1.0, 2.0]
    # Of a step of its own weights, and of the previous ones where those were not condemned.
    assert rl(records, "rollout/staleness") == [0.0, 1.0, 0.0, 1.0]


def test_weights_that_were_rolled_back_from_are_not_returned_to(tmp_path) -> None:
    """Step 6 is regular and before the alarm of steps 8 and 9, but held that of 6 and 7."""
    config = watched(tmp_path / "run", action="roll_back")
    config = vary(config, "checkpoint", every=3, keep_last=3)
    run(config)
    done = [event["message"] for event in events(config) if "rolled back" in event["message"]]
    assert ["are those of step 3, " in message for message in done] == [True] * 3


def test_weights_and_optimizer_are_the_old_ones_and_published(rolled) -> None:
    config, _, published = rolled
    assert equal(published[2], published[0])
    assert not equal(published[1], published[0])
    assert equal(saved(config, 7), saved(config, 5))
    assert not equal(saved(config, 6), saved(config, 5))
    parameters, moments = saved(config, 5)
    assert equal(parameters, published[0])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(moments))  # of the beginning of RL


@pytest.mark.parametrize("stop_after", [6, 7])
def test_a_stopped_run_that_rolls_back_goes_on_bit_for_bit(rolled, tmp_path, stop_after) -> None:
    config = elsewhere(rolled[0], tmp_path / "run")
    run(config, stop_after=stop_after)
    run(config)
    assert logged(config.directory) == logged(rolled[0].directory)
    assert events(config) == events(rolled[0])


@pytest.mark.parametrize("lost", [1, 2])
def test_a_killed_run_that_rolled_back_does_it_again(rolled, tmp_path, lost: int) -> None:
    """Killed after the roll back at step 5, its newest checkpoints not yet on disk."""
    config = elsewhere(rolled[0], tmp_path / "run")
    run(config, stop_after=6)
    for step in range(6 - lost, 6):
        shutil.rmtree(config.directory / CHECKPOINTS / str(step))
    assert run(config)[0].step == 6 - lost
    assert logged(config.directory) == logged(rolled[0].directory)
    assert events(config) == events(rolled[0])


def test_a_checkpoint_made_by_a_stop_is_not_rolled_back_to(tmp_path) -> None:
    """Else a run that was stopped would go another way than one that was not."""

    def config(name: str) -> RunConfig:
        config = watched(tmp_path / name, action="roll_back")
        watch = dataclasses.replace(config.learner.watch, patience=1)
        late = dataclasses.replace(ALWAYS, kl_high=0.0, reward_drop=0.0, gradient_rise=1e-9)
        watch = dataclasses.replace(watch, window=4, thresholds=late)  # holds from the fifth step
        config = vary(config, "learner", watch=watch)
        return vary(config, "checkpoint", every=3, keep_last=3)

    whole, stopped = config("whole"), config("stopped")
    records = run(whole)
    assert rl(records, "watch/roll_backs") == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert any("are those of step 6" in event["message"] for event in events(whole))
    run(stopped, stop_after=6)  # after step 5
    run(stopped, stop_after=2)  # after step 7, just before the alarm
    run(stopped)
    assert logged(stopped.directory) == logged(whole.directory)
    assert events(stopped) == events(whole)


def test_without_a_checkpoint_to_go_back_to_the_run_stops(tmp_path) -> None:
    """The first alarm comes before RL has a checkpoint; that of the cold start is none."""
    config = watched(tmp_path / "run", action="roll_back")
    config = vary(config, "checkpoint", every=2, keep_last=3)
    records, message = until_stopped(config)
    assert records[-1].step == COLD_STEPS + 2
    assert "no checkpoint of RL from before step 4 to roll back to, of [2, 4]" in message
    assert rl(records, "watch/roll_backs") == [0.0, 0.0]
    # Gone on with in spite of the alarm: step 4's weights are still those that it condemned.
    records, message = until_stopped(config)
    assert records[-1].step == COLD_STEPS + 4
    assert "no checkpoint of RL from before step 4 to roll back to, of [2, 4" in message


@pytest.mark.parametrize("action", ["roll_back", "tighten"])
def test_the_alarm_after_the_last_action_stops(tmp_path, action: str) -> None:
    config = tightening(tmp_path / "run", action, max_actions=1)
    records, message = until_stopped(config)
    assert records[-1].step == COLD_STEPS + 4
    assert "max_actions is 1" in message


def tightening(run_dir: Path, action: str, **settings: int) -> RunConfig:
    """A clip so narrow that it acts on many tokens of a second mini-batch."""
    config = watched(run_dir, action=action, **settings)
    return vary(config, "loss", clip=ClipConfig(low=2e-3, high=2e-3))


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, list[StepRecord]]:
    config = tightening(tmp_path_factory.mktemp("tight") / "run", "tighten")
    return config, run(config)


def test_tightening_reaches_the_next_update_and_is_counted(tight, tmp_path) -> None:
    config, records = tight
    assert rl(records, "watch/tightened") == [0.0, 1.0, 1.0, 2.0, 2.0, 3.0]
    done = [event["message"] for event in events(config) if "tightened" in event["message"]]
    assert "tightened, 1 of 3 times: importance.low 0, importance.high 3, clip.low 0.001" in done[0]
    loose = tightening(tmp_path / "loose", "event")
    free = run(loose)
    masked = [
        np.add(rl(r, "clip/low_fraction"), rl(r, "clip/high_fraction")) for r in (records, free)
    ]
    # Steps 4 and 5 are the same; step 6 has the same rollouts and half the bounds.
    np.testing.assert_array_equal(masked[0][:2], masked[1][:2])
    assert masked[0][2] > masked[1][2] > 0
    left, right = rl(records, "rollout/response_tokens"), rl(free, "rollout/response_tokens")
    assert left[2] == right[2]


@pytest.mark.parametrize("stop_after", [6, 7])
def test_a_tightened_run_resumes_tightened(tight, tmp_path, stop_after: int) -> None:
    config = elsewhere(tight[0], tmp_path / "run")
    run(config, stop_after=stop_after)
    run(config)
    assert logged(config.directory) == logged(tight[0].directory)
    assert events(config) == events(tight[0])


def test_actions_without_what_they_need_are_refused(tmp_path) -> None:
    config = watched(tmp_path / "run", action="roll_back")
    for every, keep_last, least in ((0, 5, 1), (1, 4, 5), (20, 2, 3)):
        settings = CheckpointConfig(every=every, keep_last=keep_last)
        with pytest.raises(ValueError, match=rf"keep_last at least {least}"):
            dataclasses.replace(config, checkpoint=settings)
    tight = watched(tmp_path / "run", action="tighten")
    unbounded = dataclasses.replace(
        tight.loss,
        clip=ClipConfig(kind="none"),
        importance=dataclasses.replace(tight.loss.importance, high=float("inf")),
    )
    with pytest.raises(ValueError, match="no bound to tighten"):
        dataclasses.replace(tight, loss=unbounded)
