"""The whole job on SGLang servers: the same loop, whatever becomes of learner, servers and weights.

The servers are fake ones that compute the published weights a second time, in float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrl_llm import loop
from jaxrl_llm.config import RunConfig
from jaxrl_llm.data.prompts import load_prompts, prompt_indices
from jaxrl_llm.data.tokenizer import make_tokenizer
from jaxrl_llm.learner.publish import PublishError
from jaxrl_llm.metrics import describe
from jaxrl_llm.rollout.buffer import BufferConfig, group_version
from jaxrl_llm.rollout.engine import EngineError
from jaxrl_llm.rollout.local import LocalEngineConfig
from jaxrl_llm.rollout.sglang import SGLangConfig
from jaxrl_llm.runlog import RunReader, StepRecord
from tests.rollout.fake_faults import EVERY, Fault
from tests.rollout.fake_samplers import ModelSampler
from tests.rollout.fake_sglang import FakeServer
from tests.rollout.sglang_engines import sampling_bodies, wait_until
from tests.sglang_runs import (
    HalfLoading,
    checkpoints,
    elsewhere,
    full,
    journaled,
    learner,
    read_only,
    replaced_by_a_file,
    served,
    trained,
    written_rollouts,
)
from tests.test_loop import logged, run
from tests.tiny import COLD_STEPS, RL_STEPS, even_lengths, tiny_config, vary

UPDATE = "/update_weights_from_disk"
LAST = COLD_STEPS + RL_STEPS
# What one server is asked by a run that is never stopped: the probe of each version, 24 responses
# for the evaluations before versions 0, 2 and 4 go on, and 16 rollouts of each.
EVALUATED, BATCH = 24, 16

Finished = tuple[RunConfig, list[StepRecord]]


@pytest.fixture(scope="module", autouse=True)
def _rewards() -> Iterator[None]:
    with even_lengths():
        yield


@pytest.fixture(scope="module")
def both() -> Iterator[list[FakeServer]]:
    """Two servers, at the same ports in all tests: their addresses are settings of the run."""
    sampler = ModelSampler(tiny_config(Path("unused")).model, max_length=48)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(FakeServer(sampler, context=48, chunk=20)) for _ in range(2)]


@pytest.fixture(autouse=True)
def _fresh(both: list[FakeServer]) -> None:
    for server in both:
        restarted(server)
        server.requests.clear()


def restarted(server: FakeServer) -> None:
    server.clear_faults()
    server.stop()
    server.restart()


@pytest.fixture(scope="module")
def finished(both: list[FakeServer], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run on one server from beginning to end."""
    config = served(tmp_path_factory.mktemp("finished") / "run", both[:1])
    return config, run(config)


@pytest.fixture
def config(finished: Finished, tmp_path: Path) -> RunConfig:
    """The same on one server, in a directory of its own."""
    return elsewhere(finished[0], tmp_path / "run")


@pytest.fixture
def on_both(config: RunConfig, both: list[FakeServer]) -> RunConfig:
    """The same on two servers."""
    urls = tuple(server.url for server in both)
    sglang = dataclasses.replace(config.rollout.sglang, servers=urls)
    return vary(config, "rollout", sglang=sglang)


def until(config: RunConfig, kind: type[Exception]) -> tuple[list[StepRecord], str]:
    """Its records up to the error that must end it, and that one's message."""
    records: list[StepRecord] = []
    with pytest.raises(kind) as caught:
        records.extend(loop.run(config))
    return records, str(caught.value)


def rl(records: Sequence[StepRecord], metric: str) -> list[float]:
    """A metric at each RL step."""
    return [record.metrics[metric] for record in records if record.phase == "rl"]


def check_the_same(config: RunConfig, finished: Finished) -> None:
    """What was learned, and from which groups, are those of the run that nothing happened to."""
    assert trained(config.directory) == trained(finished[0].directory)
    assert written_rollouts(config.directory) == written_rollouts(finished[0].directory)


# --- the same loop


def test_a_run_on_a_server_learns_from_what_the_published_weights_sampled(
    finished: Finished,
) -> None:
    config, records = finished
    assert [r.step for r in records if r.phase == "rl"] == list(range(COLD_STEPS + 1, LAST + 1))
    assert [r.step for r in records if r.phase == "eval"] == [COLD_STEPS, COLD_STEPS + 2, LAST]
    names = {name for record in records for name in (*record.metrics, *record.timings)}
    assert {name for name in names if describe(name) is None} == set()
    for record in records:
        if record.phase != "rl":
            continue
        assert all(np.isfinite(value) for value in record.metrics.values())
        version = record.step - COLD_STEPS - 1
        rollouts = [rollout for group in record.groups for rollout in group.rollouts]
        assert len(rollouts) == BATCH
        assert all(np.all(r.weight_version[r.loss_mask] == version) for r in rollouts)
        # The second engine is the learner to rounding, so what it sampled from was published whole.
        assert abs(record.metrics["policy/kl_sampler_old"]) < 1e-6
        assert record.metrics["mismatch/ratio_min"] > 0.9999
        assert record.metrics["mismatch/ratio_max"] < 1.0001
        assert record.metrics["routing/replay_coverage"] == 1
        assert record.metrics["routing/agreement"] > 0.999
        assert record.metrics["learner/grad_norm"] > 0.01
        assert record.metrics["engine/servers"] == 1
        assert 0 < record.metrics["engine/probe_error"] < 1e-5
    assert rl(records, "engine/rollouts") == [EVALUATED + BATCH, BATCH] * 2
    quiet = ("from_journal", "spanning", "resubmitted", "retries", "servers_lost", "update_retries")
    for name in quiet:
        assert rl(records, f"engine/{name}") == [0.0] * RL_STEPS
    first, *rest = (record.events for record in records if record.phase == "rl")
    assert [re.sub("-.*", "", event) for event in first] == [
        f"{config.rollout.sglang.servers[0]} is in use, with the weights v0"
    ]
    assert not any(rest)


def test_the_same_run_again_is_the_same_bit_for_bit(finished: Finished, config: RunConfig) -> None:
    run(config)
    assert logged(config.directory) == logged(finished[0].directory)
    check_the_same(config, finished)


def test_two_servers_give_the_run_of_one(
    finished: Finished, on_both: RunConfig, both: list[FakeServer]
) -> None:
    records = run(on_both)
    check_the_same(on_both, finished)
    assert rl(records, "engine/servers") == [2.0] * RL_STEPS
    shares = [len(sampling_bodies(server)) for server in both]
    assert sum(shares) == RL_STEPS * BATCH + 3 * EVALUATED
    assert min(shares) > sum(shares) / 4


def test_the_engine_in_process_gives_the_run_of_a_server(
    finished: Finished, config: RunConfig
) -> None:
    """To rounding, and so only while rounding has not tipped a sample."""
    local = LocalEngineConfig(precision="float32", slots=8, max_length=28)
    config = vary(config, "rollout", sglang=SGLangConfig(), engine=local)
    for left, right in zip(finished[1][:5], run(config, stop_after=5), strict=True):
        assert (left.phase, left.step) == (right.phase, right.step)
        for ours, theirs in zip(left.groups, right.groups, strict=True):
            for one, other in zip(ours.rollouts, theirs.rollouts, strict=True):
                np.testing.assert_array_equal(one.tokens, other.tokens)
        for name in (name for name in left.metrics if not name.startswith("engine/")):
            np.testing.assert_allclose(
                left.metrics[name], right.metrics[name], rtol=1e-3, atol=1e-5, err_msg=name
            )


# --- a learner that is killed


def kill_learner(
    config: RunConfig, server: FakeServer, folder: Path, *, held: int, after: int
) -> None:
    """Start it as a process; kill it when so many responses are held, with none that runs beside
    them, and a checkpoint of `after` is there.

    The server then has nothing to do, and obeys again.
    """
    with learner(config, folder) as process:
        deadline = time.monotonic() + 300  # it may have everything to compile
        while not server.only_held(held):
            assert process.poll() is None, (folder / "output").read_text()
            assert time.monotonic() < deadline, (folder / "output").read_text()
            time.sleep(0.01)
        wait_until(lambda: after in checkpoints(config.directory))
    server.clear_faults()
    server.release()
    wait_until(lambda: server.running == 0)


def test_a_killed_learner_goes_on_and_samples_only_what_was_unfinished(
    finished: Finished, config: RunConfig, both: list[FakeServer], tmp_path: Path
) -> None:
    server, done = both[0], 12
    before = EVALUATED + BATCH + BATCH + EVALUATED  # of versions 0, 1, and 2
    # After three probes and `done` responses two are under way.
    server.hold(tokens=2, call=3 + before + done + 2)
    kill_learner(config, server, tmp_path, held=2, after=COLD_STEPS + 1)
    assert checkpoints(config.directory) == [2, COLD_STEPS + 1]
    step = COLD_STEPS + 1  # of the checkpoint; version 1 is sampled again, and version 2 was cut
    batch = written_rollouts(finished[0].directory)[f"step_{step + 2:06}.jsonl"]
    left = [entry for entry in journaled(config.directory) if entry[2] == {2}][EVALUATED:]
    assert all(f'"{prompt_id}"' in batch for prompt_id, _, _ in left)
    assert done <= len(left) < BATCH  # so at least one whole group
    asked = len(sampling_bodies(server))

    records = run(config)
    check_the_same(config, finished)
    assert records[0].step == step + 1
    again = sampling_bodies(server)[asked:]
    assert len(again) == BATCH - len(left) + BATCH + EVALUATED
    seeds = [body["sampling_params"]["sampling_seed"] for body in again]
    assert not {seed for _, seed, _ in left} & set(seeds)
    assert rl(records, "engine/from_journal") == [BATCH, EVALUATED + len(left), 0]
    assert rl(records, "engine/rollouts") == [0, BATCH - len(left), BATCH]


def test_a_learner_killed_while_it_sampled_ahead_trains_on_every_group_once(
    config: RunConfig, both: list[FakeServer], tmp_path: Path
) -> None:
    server = both[0]
    config = vary(config, "rollout", buffer=BufferConfig(max_staleness=1))
    server.hold(tokens=17, call=90)  # the probes have 16
    # One is enough: the last of an evaluation's sampled responses has no other beside it.
    kill_learner(config, server, tmp_path, held=1, after=COLD_STEPS + 1)
    version = checkpoints(config.directory)[-1] - COLD_STEPS
    usable = [entry for entry in journaled(config.directory) if entry[2] == {version}]
    assert usable
    asked = len(sampling_bodies(server))

    records = run(config)
    assert records[-1].step == LAST
    check_every_draw_is_used_once(config)
    again = sampling_bodies(server)[asked:]
    seeds = {body["sampling_params"]["sampling_seed"] for body in again}
    drawn = set(prompts_in_order(config))
    assert not {seed for prompt_id, seed, _ in usable if prompt_id in drawn} & seeds
    assert sum(rl(records, "engine/from_journal")) > 0


def test_groups_sampled_ahead_are_each_trained_on_once(
    config: RunConfig, both: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a learner slower than the server: all that was asked for is there before its update."""
    config = vary(config, "rollout", buffer=BufferConfig(max_staleness=1))
    score = loop._score

    def slow(job: Any, progress: Any, batches: Any) -> Any:
        version = job.version(progress)
        asked = BATCH * min(version + 2, RL_STEPS) + EVALUATED * (version // 2 + 1)
        both[0].wait_requests("/generate", asked + version + 1)  # with the probes
        wait_until(lambda: both[0].running == 0)
        return score(job, progress, batches)

    monkeypatch.setattr(loop, "_score", slow)
    records = run(config)
    check_every_draw_is_used_once(config)
    assert rl(records, "rollout/staleness") == [0.0] + [1.0] * (RL_STEPS - 1)
    assert rl(records, "engine/resubmitted") == [0.0] * RL_STEPS


def prompts_in_order(config: RunConfig) -> list[str]:
    """prompt_id of every draw that RL may use."""
    train = load_prompts(config.task.data, make_tokenizer(config.task.tokenizer), "train")
    count = RL_STEPS * config.rollout.groups
    indices = prompt_indices(len(train), config.cold_start.prompts, count, config.seed)
    return [train[int(index)].prompt_id for index in indices]


def check_every_draw_is_used_once(config: RunConfig) -> None:
    """In order, none too stale, by the newest log; no server failed, so that nothing is dropped."""
    reader, used = RunReader(config.directory), []
    for step in range(COLD_STEPS + 1, LAST + 1):
        groups = reader.rollouts(step)
        used += [group.prompt.prompt_id for group in groups]
        staleness = [step - COLD_STEPS - 1 - group_version(group) for group in groups]
        assert 0 <= min(staleness) <= max(staleness) <= config.rollout.buffer.max_staleness
    assert used == prompts_in_order(config)
    for name in ("dropped_groups", "filtered_groups", "failures"):
        assert not reader.metrics("rl")[f"rollout/{name}"].any()


# --- servers that are killed


def kill_at(
    both: Sequence[FakeServer], victims: Sequence[FakeServer], *, version: int, answer: int
) -> None:
    """Some of the servers die with so many answers given by a version, those to probes left out."""
    given = itertools.count(1)

    def edit(value: dict[str, Any], _: object) -> None:
        meta = value["meta_info"]
        if not meta["weight_version"].startswith(f"v{version}-") or meta["input_token_logprobs"]:
            return
        if next(given) == answer:
            for victim in victims:
                threading.Thread(target=victim.stop).start()

    for server in both:
        server.add(Fault("/generate", "edit", edit=edit))


def test_a_run_goes_on_with_the_servers_that_are_left(
    finished: Finished, on_both: RunConfig, both: list[FakeServer]
) -> None:
    kill_at(both, both[1:], version=1, answer=6)
    records = run(on_both)
    check_the_same(on_both, finished)
    assert sum(rl(records, "engine/servers_lost")) == 1
    assert rl(records, "engine/servers") == [2.0, 1.0, 1.0, 1.0]
    assert sum(rl(records, "engine/retries")) >= 1
    events = " ".join(event for record in records for event in record.events)
    assert f"{both[1].url} was taken out: " in events


@pytest.mark.parametrize(
    ("answer", "phase", "step"),
    [(10, "eval", COLD_STEPS + 2), (EVALUATED + 10, "rl", COLD_STEPS + 3)],
    ids=["evaluation", "rollouts"],
)
def test_without_any_server_the_run_ends_saved_and_goes_on_when_they_are_back(
    finished: Finished,
    on_both: RunConfig,
    both: list[FakeServer],
    answer: int,
    phase: str,
    step: int,
) -> None:
    kill_at(both, both, version=2, answer=answer)
    records, message = until(on_both, EngineError)
    assert "no server was in use for 3 s: " in message
    for server in both:
        assert f"{server.url}: " in message
    assert logged(on_both.directory)[-1]["step"] == records[-1].step == COLD_STEPS + 2
    assert checkpoints(on_both.directory)[-1] == COLD_STEPS + 2
    with pytest.raises(EngineError, match=both[0].url):  # they are still gone
        run(on_both)
    for server in both:
        restarted(server)
    first = run(on_both)[0]
    assert (first.phase, first.step) == (phase, step)
    check_the_same(on_both, finished)


# --- weights that cannot be written, or do not arrive


@pytest.mark.parametrize(
    ("fault", "step"),
    [(replaced_by_a_file, COLD_STEPS), (full, COLD_STEPS + 2), (read_only, LAST)],
    ids=["replaced, first weights", "full", "read-only, last weights"],
)
def test_weights_that_cannot_be_written_end_the_run_behind_the_step_that_made_them(
    finished: Finished,
    config: RunConfig,
    both: list[FakeServer],
    fault: Callable[[Path], Any],
    step: int,
) -> None:
    folder = config.directory / "weights"
    records = loop.run(config)
    while next(records).step < step - 1:
        pass
    version = step - COLD_STEPS
    with fault(folder), pytest.raises(PublishError, match=rf"^{folder}: version {version} of the "):
        list(records)
    assert logged(config.directory)[-1]["step"] == checkpoints(config.directory)[-1] == step
    updates = len(both[0].bodies(UPDATE))
    run(config)
    check_the_same(config, finished)
    assert len(both[0].bodies(UPDATE)) == updates + LAST - step + 1


@pytest.mark.parametrize("half", [False, True], ids=["old", "half new"])
def test_a_server_with_other_weights_than_it_says_ends_the_run_until_it_obeys(
    finished: Finished,
    on_both: RunConfig,
    both: list[FakeServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    half: bool,
) -> None:
    records = loop.run(on_both)
    while next(records).phase != "rl":
        pass
    if half:
        monkeypatch.setattr(both[1], "_sampler", HalfLoading(both[1], tmp_path))
    else:
        both[1].add(Fault(UPDATE, "keep_weights", calls=EVERY))
    with pytest.raises(EngineError) as caught:
        list(records)
    message = str(caught.value)
    held = "no version that this run published" if half else r"version 1 \(v1-\w+\)"
    assert message.startswith("version 2 (v2-")
    assert re.search(rf"{both[1].url} holds {held}, ", message)
    assert re.search(rf"{both[0].url} holds version 2 \(v2-\w+\), ", message)
    assert both[1].weight_version == both[0].weight_version  # by their own account
    assert logged(on_both.directory)[-1]["step"] == COLD_STEPS + 2
    assert checkpoints(on_both.directory)[-1] == COLD_STEPS + 2
    with pytest.raises(EngineError, match=f"{both[1].url} holds "):
        run(on_both)
    monkeypatch.undo()
    both[1].clear_faults()
    run(on_both)
    check_the_same(on_both, finished)
