"""The whole job on a tiny model: reproducible, resumable, and every setting reaches its end."""

import dataclasses
import json
import re
import shutil
import types
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm import assembly, loop
from jaxrl_llm.config import RunConfig, load_config
from jaxrl_llm.data.prompts import DataConfig, load_prompts, prompt_indices
from jaxrl_llm.data.tokenizer import make_tokenizer
from jaxrl_llm.learner.checkpoint import CheckpointError
from jaxrl_llm.losses.advantages import AdvantageConfig
from jaxrl_llm.losses.clipping import ClipConfig
from jaxrl_llm.losses.kl import KLConfig
from jaxrl_llm.losses.rejection import RejectionConfig
from jaxrl_llm.losses.weights import ImportanceConfig
from jaxrl_llm.metrics import describe
from jaxrl_llm.model.config import ComputeConfig
from jaxrl_llm.rollout.buffer import BufferConfig
from jaxrl_llm.rollout.engine import EngineFailure, EngineReport, Params, Request
from jaxrl_llm.rollout.local import LocalEngine
from jaxrl_llm.runlog import StepRecord
from jaxrl_llm.sharding import MeshConfig
from jaxrl_llm.types import Rollout, RouteError, without_routes
from tests.tiny import COLD_STEPS, RL_STEPS, tiny_config, vary

CONFIGS = Path(__file__).parent.parent / "configs"


def run(config: RunConfig, *, stop_after: int | None = None) -> list[StepRecord]:
    """All records, or those until the generator is closed after so many of them."""
    records = loop.run(config)
    kept = []
    for record in records:
        kept.append(record)
        if len(kept) == stop_after:
            records.close()
    return kept


def logged(run_dir: Path) -> list[dict]:
    """metrics.jsonl without the timings."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "timings"} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, list[StepRecord]]:
    """A run from beginning to end."""
    config = tiny_config(tmp_path_factory.mktemp("finished") / "run")
    return config, run(config)


def test_a_run_yields_every_step_and_evaluation_in_order(finished) -> None:
    _, records = finished
    phases = [(record.phase, record.step) for record in records]
    assert phases == [
        ("sft", 1),
        ("sft", 2),
        ("sft", 3),
        ("eval", 3),
        ("rl", 4),
        ("rl", 5),
        ("eval", 5),
        ("rl", 6),
        ("rl", 7),
        ("eval", 7),
    ]


def test_records_are_in_the_log_and_every_name_is_documented(finished) -> None:
    config, records = finished
    for line, record in zip(logged(config.directory), records, strict=True):
        assert line["metrics"] == {name: float(v) for name, v in record.metrics.items()}
    names = {n for record in records for n in (*record.metrics, *record.timings)}
    assert {name for name in names if describe(name) is None} == set()
    rl = next(record for record in records if record.phase == "rl")
    required = {
        "rollout/reward_mean",
        "rollout/accuracy",
        "rollout/response_tokens",
        "policy/entropy",
        "policy/kl_sampler_old",
        "routing/agreement",
        "routing/replay_coverage",
        "is_weight/raw_mean",
        "is_weight/used_mean",
        "clip/high_fraction",
        "clip/low_fraction",
        "learner/grad_norm",
    }
    assert required <= set(rl.metrics)
    assert {"seconds/rollout", "seconds/score", "seconds/update"} <= set(rl.timings)
    assert {"rate/rollout_tokens_per_second", "rate/learner_tokens_per_second"} <= set(rl.timings)
    assert rl.metrics["routing/replay_coverage"] == 1.0
    assert not any(record.events for record in records)


def test_the_same_seed_gives_the_same_metrics_and_another_one_does_not(finished, tmp_path) -> None:
    config, _ = finished
    again = dataclasses.replace(config, run_dir=str(tmp_path / "again"))
    run(again)
    assert logged(again.directory) == logged(config.directory)
    other = dataclasses.replace(config, run_dir=str(tmp_path / "other"), seed=1)
    run(other, stop_after=1)
    assert logged(other.directory)[0] != logged(config.directory)[0]


@pytest.mark.parametrize("stop_after", [1, 3, 5, 6, 8])
def test_a_stopped_run_goes_on_bit_for_bit(finished, tmp_path, stop_after: int) -> None:
    config, _ = finished
    stopped = dataclasses.replace(config, run_dir=str(tmp_path / "stopped"))
    run(stopped, stop_after=stop_after)
    before = len(logged(stopped.directory))
    rest = run(stopped)
    # At most the evaluation of the step that was stopped after is already in the log.
    assert len(rest) == len(logged(config.directory)) - before
    assert logged(stopped.directory) == logged(config.directory)


def test_a_killed_run_goes_on_from_its_last_checkpoint(finished, tmp_path) -> None:
    """The log is ahead of the newest checkpoint and ends in the line that was being written."""
    config, _ = finished
    killed = dataclasses.replace(config, run_dir=str(tmp_path / "killed"))
    run(killed, stop_after=6)
    shutil.rmtree(killed.directory / "checkpoints" / str(COLD_STEPS + 2))
    with (killed.directory / "metrics.jsonl").open("a") as log:
        log.write('{"phase": "rl", "st')
    assert run(killed)[0].step == COLD_STEPS + 2
    assert logged(killed.directory) == logged(config.directory)


def test_groups_sampled_ahead_survive_a_stop(finished, tmp_path) -> None:
    config, _ = finished
    ahead = vary(config, "rollout", buffer=BufferConfig(max_staleness=1))
    whole = dataclasses.replace(ahead, run_dir=str(tmp_path / "whole"))
    stopped = dataclasses.replace(ahead, run_dir=str(tmp_path / "stopped"))
    records = run(whole)
    staleness = [r.metrics["rollout/staleness"] for r in records if r.phase == "rl"]
    assert staleness == [0.0] + [1.0] * (RL_STEPS - 1)
    run(stopped, stop_after=6)
    run(stopped)
    assert logged(stopped.directory) == logged(whole.directory)


def test_a_finished_run_started_again_does_nothing(finished) -> None:
    config, _ = finished
    before = logged(config.directory)
    assert run(config) == []
    assert logged(config.directory) == before


def test_a_directory_has_one_writer(finished, tmp_path) -> None:
    config = dataclasses.replace(finished[0], run_dir=str(tmp_path / "run"))
    first = loop.run(config)
    next(first)
    with pytest.raises(ValueError, match="another process is writing to"):
        run(config)
    first.close()
    assert len(run(config)) == len(finished[1]) - 1


def test_a_directory_with_other_settings_is_refused_by_name(finished) -> None:
    config, _ = finished
    other = vary(config, "loss", clip=ClipConfig(high=0.5))
    with pytest.raises(ValueError, match=r"loss\.clip\.high: 0\.27 != 0\.5.*--run-dir"):
        run(other)


def test_a_damaged_checkpoint_is_named_and_the_last_good_one_offered(finished, tmp_path) -> None:
    config, _ = finished
    broken = dataclasses.replace(config, run_dir=str(tmp_path / "broken"))
    shutil.copytree(config.directory, broken.directory)
    newest = broken.directory / "checkpoints" / str(COLD_STEPS + RL_STEPS)
    shutil.rmtree(newest / "state")
    with pytest.raises(CheckpointError, match=f"{newest}.*last good checkpoint is of step 6"):
        run(broken)
    shutil.rmtree(newest)
    assert run(broken)[0].step == COLD_STEPS + RL_STEPS
    assert logged(broken.directory) == logged(config.directory)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_run_without_a_cold_start_goes_on_bit_for_bit(finished, tmp_path, stop_after) -> None:
    config = vary(finished[0], "cold_start", steps=0)
    whole = dataclasses.replace(config, run_dir=str(tmp_path / "whole"), steps=2)
    stopped = dataclasses.replace(whole, run_dir=str(tmp_path / "stopped"))
    assert [(r.phase, r.step) for r in run(whole)][:2] == [("eval", 0), ("rl", 1)]
    run(stopped, stop_after=stop_after)
    run(stopped)
    assert logged(stopped.directory) == logged(whole.directory)


def test_a_log_without_its_checkpoints_is_not_erased(finished, tmp_path) -> None:
    config = dataclasses.replace(finished[0], run_dir=str(tmp_path / "run"))
    shutil.copytree(finished[0].directory, config.directory)
    shutil.rmtree(config.directory / "checkpoints")
    with pytest.raises(ValueError, match=r"log of 7 steps but no checkpoint.*--run-dir"):
        run(config)
    assert logged(config.directory) == logged(finished[0].directory)


def test_a_checkpoint_of_other_prompts_is_refused(finished, tmp_path) -> None:
    """The settings are equal, but a file of prompts has changed."""
    prompts = tmp_path / "prompts.jsonl"

    def write(first: int) -> None:
        rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(first, first + 40)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    config = vary(finished[0], "cold_start", steps=0)
    data = DataConfig(
        kind="jsonl", files=(str(prompts),), heldout_size=8, data_dir=str(tmp_path / "data")
    )
    task = dataclasses.replace(config.task, data=data)
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"), task=task, steps=2)
    write(first=10)
    run(config, stop_after=2)
    write(first=11)
    with pytest.raises(CheckpointError, match="other prompts"):
        run(config)


def test_mini_batches_hold_groups_in_the_order_of_their_prompts(finished) -> None:
    """Not of completion, which would sort them by length."""
    config, records = finished
    seen = [g.prompt.prompt_id for r in records if r.phase == "rl" for g in r.groups]
    tokenizer = make_tokenizer(config.task.tokenizer)
    train = load_prompts(config.task.data, tokenizer, "train")
    first = COLD_STEPS * config.cold_start.batch
    for step in range(RL_STEPS):
        count = config.rollout.groups
        order = prompt_indices(len(train), first + step * count, count, config.seed)
        expected = [train[int(index)].prompt_id for index in order]
        assert seen[step * count : (step + 1) * count] == expected


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("rollout", {"max_new_tokens": 21}, "need 29 tokens; rollout.engine.max_length is 28"),
        ("rollout", {"groups": 40}, "rollout.groups .* is 40, more than half of the 64"),
    ],
)
def test_sizes_that_cannot_work_are_refused_before_any_work(
    finished, tmp_path, part: str, settings: dict, message: str
) -> None:
    config = vary(finished[0], part, **settings)
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(config, run_dir=str(tmp_path / "run")))


LEARNERS = {
    "on-policy, no scoring pass": ("learner", {"mini_batches": 1, "old_logprobs": "none"}),
    "r2": ("learner", {"replay": "r2"}),
    "r3 with gate values": ("learner", {"replay_gates": True}),
    "no replay": ("learner", {"replay": "none"}),
    "k2 penalty": ("loss", {"kl": KLConfig(coefficient=0.1)}),
    "capped mismatch": (
        "loss",
        {"importance": ImportanceConfig(ratio="mismatch"), "clip": ClipConfig(anchor="sampler")},
    ),
    # Its infinite bound goes through config.json; its advantages and averaging are not the default.
    "sequence ratios over a constant, rejecting": (
        "loss",
        {
            "advantage": AdvantageConfig(scale="std", overlong="mask"),
            "form": "ratio",
            "importance": ImportanceConfig("staleness", level="geometric", high=np.inf),
            "clip": ClipConfig(level="geometric"),
            "rejection": RejectionConfig(veto=1e-4, negative_kl=0.5),
            "averaging": "constant",
            "averaging_length": 20.0,
        },
    ),
    "entropy and router losses": (
        "loss",
        {
            "entropy_coefficient": 0.01,
            "router_z_coefficient": 1e-3,
            "router_balance_coefficient": 1e-2,
        },
    ),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_kind_of_update_runs_and_resumes(finished, tmp_path, name: str) -> None:
    part, settings = LEARNERS[name]
    config = vary(finished[0], part, **settings)
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    first = run(config, stop_after=COLD_STEPS + 2)  # the first RL step
    rest = run(config)
    assert [r.phase for r in first + rest].count("rl") == RL_STEPS
    assert all(np.isfinite(v) for r in first + rest for v in r.metrics.values())


def test_packing_saves_micro_batches() -> None:
    """In a pod's config: rows are rounded up to eighths of the responses, and to the mesh."""
    config = load_config(CONFIGS / "qwen3_30b_a3b_v5p_64.py")

    def rows(config: RunConfig, lengths: Sequence[int]) -> int:
        """Of two mini-batches, the other one of the shortest responses."""
        parts = [[response(length) for length in each] for each in ([1] * len(lengths), lengths)]
        return loop._rows(types.SimpleNamespace(config=config), parts)

    # A row of 32,768 positions holds four responses of 8,000, or one of 20,000.
    assert rows(config, [32_768] * 1024) == 1024
    assert rows(config, [20_000] * 1024) == 1024
    assert rows(config, [8_000] * 1024) == 256
    assert rows(config, [8_000] * 1012 + [20_000] * 12) == 384  # of 262 that it needs
    assert rows(config, [10] * 1024) == 128
    assert [config.learner.micro_batches(rows) for rows in (1024, 256)] == [32, 8]
    assert rows(vary(config, "learner", pack=False), [8_000] * 1024) == 1024
    few = vary(config, "rollout", groups=4, samples=2)
    assert rows(few, [10] * 4) == 32, "a row for each device"


def response(positions: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(tokens=np.zeros(positions + 1, np.int8))


class Faulty:
    """The in-process engine, with a part of its answers spoiled."""

    def __init__(self, engine: LocalEngine, *, strip_routes: bool, fail: bool) -> None:
        self._engine, self._strip_routes, self._fail = engine, strip_routes, fail

    overlaps = False

    def generate(self, requests: Sequence[Request]) -> Generator[Rollout | EngineFailure]:
        for outcome in self._engine.generate(requests):
            assert isinstance(outcome, Rollout)
            if outcome.sample_index == 0 and self._strip_routes:
                yield without_routes(outcome)
            elif outcome.sample_index == 0 and self._fail:
                yield EngineFailure(outcome.prompt_id, 0, "not_finite", "made to fail")
            else:
                yield outcome

    def publish(self, params: Params, version: int) -> None:
        self._engine.publish(params, version)

    def report(self) -> EngineReport:
        return self._engine.report()

    def close(self) -> None:
        self._engine.close()


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (
            {"strip_routes": True, "fail": False},
            r"r3 is configured but (\d\d\.\d\d%) of the sampled tokens used the live router: \1 "
            r"because the engine reported no routes for their rollout, 0\.00% because",
        ),
        (
            {"strip_routes": False, "fail": True},
            r"failed 4 requests \(not_finite\), the first: made to fail",
        ),
    ],
)
def test_what_an_engine_leaves_out_is_counted_and_said(
    finished, tmp_path, monkeypatch, faults: dict, message: str
) -> None:
    def faulty(config: RunConfig, tokenizer: object, *_: object) -> Faulty:
        return Faulty(LocalEngine(config.rollout.engine, config.model, tokenizer.decode), **faults)

    monkeypatch.setattr(assembly, "make_engine", faulty)
    config = vary(finished[0], "learner", route_fallback="live")
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"), steps=1)
    record = next(r for r in run(config) if r.phase == "rl")
    assert len(record.events) == 1
    assert re.search(message, record.events[0])
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    stored = [json.loads(line) for line in lines]
    # With a failing engine the evaluations have events too.
    assert [e["message"] for e in stored if e["phase"] == "rl"] == list(record.events)


def test_a_rollout_without_routes_stops_r3_before_any_update(
    finished, tmp_path, monkeypatch
) -> None:
    """The default of learner.route_fallback."""

    def faulty(config: RunConfig, tokenizer: object, *_: object) -> Faulty:
        engine = LocalEngine(config.rollout.engine, config.model, tokenizer.decode)
        return Faulty(engine, strip_routes=True, fail=False)

    monkeypatch.setattr(assembly, "make_engine", faulty)
    config = dataclasses.replace(finished[0], run_dir=str(tmp_path / "run"), steps=1)
    with pytest.raises(RouteError, match=r"sample 0: (\d+) of its \1 positions have no routes"):
        run(config)
    assert {line["phase"] for line in logged(config.directory)} == {"sft", "eval"}


def test_a_replay_that_did_not_fire_is_said() -> None:
    """The forward pass used other experts than it was given: the passes must be broken."""
    config = tiny_config(Path("run"))
    job = types.SimpleNamespace(config=config)
    values = {
        "routing/replay_coverage": 0.75,
        "routing/fallback_fraction": 0.125,
        "routing/provenance_unreported": 0.0,
        "routing/provenance_missing": 0.125,
        "rollout/dropped_groups": 0.0,
    }
    fallback, lost = loop._warnings(job, values)
    assert "12.50% of the sampled tokens used the live router" in fallback
    assert "12.50% because their rollout has routes but they have none" in fallback
    assert "r3 did not fire: 12.50% of the sampled tokens were given routes" in lost
    fired = {"routing/replay_coverage": 1.0, "routing/fallback_fraction": 0.0}
    assert loop._warnings(job, values | fired) == ()


def test_an_update_that_is_not_finite_reaches_no_engine_and_no_checkpoint(
    finished, tmp_path, monkeypatch
) -> None:
    """The record that precedes it stands; the same command goes on from the checkpoint."""
    config = dataclasses.replace(finished[0], run_dir=str(tmp_path / "run"))
    real = assembly.Job.train_step

    def breaking(job, progress):
        step = real(job, progress)
        if job.version(progress) < 1:
            return step

        def broken(state, batch):
            nan = dataclasses.replace(batch, advantages=batch.advantages * np.nan)
            return step(state, nan)

        return broken

    monkeypatch.setattr(assembly.Job, "train_step", breaking)
    published = []
    publish = LocalEngine.publish
    monkeypatch.setattr(
        LocalEngine, "publish", lambda e, p, v: (published.append(v), publish(e, p, v))[1]
    )
    message = rf"update of step {COLD_STEPS + 2} is not finite .*grad_norm = nan.*roll_back, with"
    with pytest.raises(ValueError, match=message):
        run(config)
    assert published == [0, 1]
    assert [line["step"] for line in logged(config.directory) if line["phase"] == "rl"] == [
        COLD_STEPS + 1
    ]
    monkeypatch.undo()
    assert run(config)[-1].step == COLD_STEPS + RL_STEPS


def test_a_cold_start_that_diverges_ends_before_it_is_saved(tmp_path) -> None:
    config = tiny_config(tmp_path / "run")
    optimizer = dataclasses.replace(config.cold_start.optimizer, learning_rate=1e30)
    config = vary(config, "cold_start", optimizer=optimizer)
    with pytest.raises(ValueError, match=r"is not finite .*lower cold_start\.optimizer\.learning"):
        run(config)
    assert not list((config.directory / "checkpoints").glob("[0-9]*"))


# Last: a mesh of several CPU devices ends the use of the compilation cache.
@pytest.mark.parametrize(
    "settings",
    [
        {"pack": True, "row_length": 64},
        {"pack": True, "row_length": 64, "micro_batch_rows": 2},
        {"micro_batch_rows": 4},
        {"mesh": MeshConfig(data=2, fsdp=2, expert=2)},
        {"mesh": MeshConfig(tensor=2, expert=2), "compute": ComputeConfig(remat="block")},
    ],
    ids=[
        "packing",
        "packing-micro-batches",
        "micro-batches",
        "data-fsdp-expert",
        "expert-tensor-remat",
    ],
)
def test_layout_changes_nothing(finished, tmp_path, settings: dict) -> None:
    """Packing, micro-batches and sharding give the same run, to rounding, while it is not chaotic.

    Rounding in the weights can tip a sample, so only the first RL step is compared: its rollouts
    come from the cold start alone, whose steps agree to 1e-4.
    """
    config, records = finished
    changed = vary(config, "learner", **settings)
    changed = dataclasses.replace(changed, run_dir=str(tmp_path / "run"), steps=1)
    for left, right in zip(records[:5], run(changed), strict=False):
        assert (left.phase, left.step) == (right.phase, right.step)
        # Not additive: as a metric alone, the balance loss is the mean of the micro-batches'.
        for metric in left.metrics.keys() - {"router/balance_loss"}:
            value = left.metrics[metric]
            np.testing.assert_allclose(
                right.metrics[metric], value, rtol=2e-3, atol=2e-4, err_msg=metric
            )
