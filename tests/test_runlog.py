"""The run directory: exact round trips, and a log that survives being killed anywhere."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxrl_llm.metrics import METRICS, describe
from jaxrl_llm.runlog import RunLogConfig, RunReader, RunWriter, StepRecord
from tests.synthetic_run import evaluation_record, make_group, rl_record

QUIET = RunLogConfig(tensorboard=False, groups_per_step=0, rollout_routes=True)


def records(first: int, last: int) -> list[StepRecord]:
    """RL steps, each with groups, an event every second step, an evaluation every third."""
    found = []
    for step in range(first, last + 1):
        events = (f"something at step {step}",) if step % 2 == 0 else ()
        found.append(dataclasses.replace(rl_record(step, progress=step / 10), events=events))
        if step % 3 == 0:
            found.append(evaluation_record(step, 0.1 * step))
    return found


def write(run_dir: Path, items: list[StepRecord], config: RunLogConfig = QUIET) -> None:
    with RunWriter(run_dir, config) as writer:
        for record in items:
            writer.write(record)


def contents(run_dir: Path) -> dict[str, bytes]:
    """Every file below the directory, by its relative path."""
    files = (path for path in run_dir.rglob("*") if path.is_file())
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


def test_columns_come_back_exactly(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, float(np.float32(0.1)), -1e-300, math.nan, math.inf, -math.inf]
    items = [
        StepRecord("rl", step, {"policy/entropy": value}, {"seconds/step": 1.5})
        for step, value in enumerate(values, start=1)
    ]
    items.append(StepRecord("rl", 8, {"learner/loss": 2.0}, {}))
    write(tmp_path, items)
    columns = RunReader(tmp_path).metrics("rl")
    assert list(columns) == ["step", "policy/entropy", "learner/loss"]
    np.testing.assert_array_equal(columns["step"], np.arange(1, 9))
    np.testing.assert_array_equal(columns["policy/entropy"], [*values, math.nan])
    np.testing.assert_array_equal(columns["learner/loss"], [math.nan] * 7 + [2.0])
    timings = RunReader(tmp_path).timings("rl")
    np.testing.assert_array_equal(timings["seconds/step"], [1.5] * 7 + [math.nan])
    # Strict JSON: any other reader copes with it.
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_phases_are_read_apart(tmp_path: Path) -> None:
    items = [
        StepRecord("sft", 1, {"learner/loss": 3.0}, {}),
        evaluation_record(1, 0.25),
        StepRecord("rl", 2, {"learner/loss": 0.5}, {}),
    ]
    write(tmp_path, items)
    reader = RunReader(tmp_path)
    assert reader.metrics("sft")["learner/loss"].tolist() == [3.0]
    assert reader.metrics("rl")["learner/loss"].tolist() == [0.5]
    assert reader.metrics("eval")["eval/avg_at_k"].tolist() == [0.25]
    assert list(RunReader(tmp_path).metrics("rl")) == ["step", "learner/loss"]


def test_rollouts_and_config_come_back(tmp_path: Path) -> None:
    with RunWriter(tmp_path, QUIET) as writer:
        writer.write_config({"seed": 3, "loss": {"clip_high": 0.27}})
        writer.write(rl_record(1, progress=0.0))
        record = evaluation_record(1, 0.5)
        writer.write(dataclasses.replace(record, groups=(make_group(9),)))
    reader = RunReader(tmp_path)
    assert reader.config() == {"seed": 3, "loss": {"clip_high": 0.27}}
    assert reader.rollout_steps() == [1]
    assert reader.rollout_steps("eval") == [1]
    (stored,) = reader.rollouts(1, "eval")
    wanted = make_group(9)
    assert stored.prompt.text == wanted.prompt.text
    for found, rollout in zip(stored.rollouts, wanted.rollouts, strict=True):
        assert found.routes is not None
        np.testing.assert_array_equal(found.routes, rollout.routes)
        np.testing.assert_array_equal(found.sampler_logprobs, rollout.sampler_logprobs)
        assert (found.text, found.reward, found.verdict) == (
            rollout.text,
            rollout.reward,
            rollout.verdict,
        )
    with pytest.raises(ValueError, match=r"no rl rollouts of step 7.*\[1\]"):
        reader.rollouts(7)


def test_settings_thin_out_the_rollouts(tmp_path: Path) -> None:
    config = RunLogConfig(tensorboard=False, rollouts_every=2, groups_per_step=1)
    evaluation = dataclasses.replace(evaluation_record(5, 0.5), groups=(make_group(9),))
    write(tmp_path, [*records(1, 4), evaluation], config)
    reader = RunReader(tmp_path)
    assert reader.rollout_steps() == [2, 4]
    assert reader.rollout_steps("eval") == [5]  # evaluations are few, and all of them count
    (group,) = reader.rollouts(2)
    assert [rollout.routes for rollout in group.rollouts] == [None] * 4
    write(tmp_path / "none", records(1, 2), dataclasses.replace(config, rollouts_every=0))
    assert RunReader(tmp_path / "none").rollout_steps() == []


@pytest.mark.parametrize("checkpoint", [2, 3, 6])
@pytest.mark.parametrize("torn", [False, True])
def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(
    tmp_path: Path, checkpoint: int, torn: bool
) -> None:
    """Killed after step 6 or while it wrote step 7; the last checkpoint was older."""
    write(tmp_path / "whole", records(1, 9))
    write(tmp_path / "killed", records(1, 6))
    if torn:
        for name in ("metrics.jsonl", "events.jsonl"):
            with (tmp_path / "killed" / name).open("a") as file:
                file.write('{"phase": "rl", "step": 7, "metr')
        (tmp_path / "killed/rollouts/step_000007.jsonl").write_text("half a step")
        (tmp_path / "killed/rollouts/eval_000003.jsonl.partial").write_text("half a file")
    with RunWriter(tmp_path / "killed", QUIET) as writer:
        cut = writer.resume(checkpoint)
        for record in records(checkpoint + 1, 9):
            writer.write(record)
    assert cut == len(records(checkpoint + 1, 6)) + torn
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_kill_at_any_byte_of_a_line_is_survived(tmp_path: Path) -> None:
    write(tmp_path, records(1, 2))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    kept = whole.index(b"\n") + 1
    for size in range(kept, len(whole), 37):
        path.write_bytes(whole[:size])
        assert RunReader(tmp_path).metrics("rl")["step"].tolist() == [1]
        RunWriter(tmp_path, QUIET).resume(1)
        assert path.read_bytes() == whole[:kept]


def test_without_a_checkpoint_nothing_is_kept(tmp_path: Path) -> None:
    write(tmp_path, [evaluation_record(0, 0.2), *records(1, 2)])
    with RunWriter(tmp_path, QUIET) as writer:
        assert writer.resume(None) == 3
        writer.write(evaluation_record(0, 0.2))
    reader = RunReader(tmp_path)
    assert reader.metrics("eval")["step"].tolist() == [0]
    assert reader.metrics("rl")["step"].tolist() == []
    assert reader.events() == []
    assert reader.rollout_steps() == []


def test_an_existing_log_is_not_appended_to_by_accident(tmp_path: Path) -> None:
    write(tmp_path, records(1, 2))
    before = contents(tmp_path)
    writer = RunWriter(tmp_path, QUIET)
    with pytest.raises(ValueError, match="holds a run log: call resume"):
        writer.write(records(3, 3)[0])
    with pytest.raises(ValueError, match="holds a run log: call resume"):
        writer.event("rl", 3, "a message")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("step", [3, 5])
def test_a_log_that_ends_before_the_checkpoint_is_refused(tmp_path: Path, step: int) -> None:
    write(tmp_path, records(1, 2))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"ends at step 2 but the checkpoint is of step {step}"):
        RunWriter(tmp_path, QUIET).resume(step)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("phase", "step"),
    [("rl", 3), ("rl", 2), ("eval", 3), ("eval", 2)],
)
def test_steps_only_count_up(tmp_path: Path, phase: str, step: int) -> None:
    with RunWriter(tmp_path, QUIET) as writer:
        for record in records(1, 3):  # step 3 has been evaluated
            writer.write(record)
        wrong = dataclasses.replace(evaluation_record(step, 0.5), phase=phase)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="steps count up"):
            writer.write(wrong)
    assert RunReader(tmp_path).metrics("eval")["step"].tolist() == [3]


def test_order_is_checked_across_a_resume(tmp_path: Path) -> None:
    write(tmp_path, records(1, 3))
    with RunWriter(tmp_path, QUIET) as writer:
        writer.resume(3)
        with pytest.raises(ValueError, match="steps count up"):
            writer.write(records(3, 3)[0])


def test_damage_is_named_and_not_skipped(tmp_path: Path) -> None:
    write(tmp_path, records(1, 3))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:40] + "\n" + "".join(lines[2:]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        RunReader(tmp_path).metrics("rl")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        RunWriter(tmp_path, QUIET).resume(1)


def test_a_directory_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run directory"):
        RunReader(tmp_path)


def scalars(run_dir: Path) -> tuple[dict[tuple[str, int], float], list[int]]:
    """{(tag, step): value} of all event files, and the steps from which earlier values are void."""
    values, restarts = {}, []
    for path in sorted((run_dir / "tensorboard").glob("events.*")):
        data = path.read_bytes()
        while data:
            size = struct.unpack("<Q", data[:8])[0]
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            values |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            if event.HasField("session_log"):
                restarts.append(event.step)
    return values, restarts


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    config = RunLogConfig(rollouts_every=0)
    items = [StepRecord("sft", 1, {"learner/loss": 3.0}, {"seconds/step": 0.25}), *records(2, 4)]
    write(tmp_path, items, config)
    values, _ = scalars(tmp_path)
    assert values["sft/learner/loss", 1] == 3.0
    assert values["sft/seconds/step", 1] == 0.25
    columns = RunReader(tmp_path).metrics("rl")
    for name in ("policy/entropy", "learner/grad_norm"):
        found = [values[name, step] for step in (2, 3, 4)]
        np.testing.assert_array_equal(found, columns[name].astype(np.float32))
    assert ("eval/avg_at_k", 3) in values
    with RunWriter(tmp_path, config) as writer:
        writer.resume(2)
        writer.write(records(3, 3)[0])
    assert scalars(tmp_path)[1][-1] == 3  # TensorBoard drops what was written from step 3 on


def test_every_name_states_its_unit() -> None:
    for name, text in METRICS.items():
        assert text.endswith("]"), name
        assert " [" in text, name
    for record in (rl_record(1, progress=0.5), evaluation_record(1, 0.5)):
        for name in (*record.metrics, *record.timings):
            assert describe(name), name


def test_a_prefix_documents_all_below_it_and_nothing_else() -> None:
    assert describe("rollout/verdict_timeout") == METRICS["rollout/verdict_*"]
    assert describe("rollout/verdict") is None
    assert describe("rollout/reward_means") is None


@pytest.mark.parametrize("name", ["rollouts_every", "groups_per_step"])
def test_negative_settings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"log.{name} is -1"):
        dataclasses.replace(QUIET, **{name: -1})


def test_reading_needs_neither_jax_nor_tensorboard() -> None:
    code = (
        "import sys, jaxrl_llm.runlog\n"
        "assert not {'jax', 'tensorboardX', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
