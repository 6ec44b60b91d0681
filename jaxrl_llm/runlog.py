"""The run directory: what a run writes while it goes and what everyone reads afterwards.

    RUN/config.json                 the whole RunConfig as plain JSON
    RUN/metrics.jsonl               one line per StepRecord: phase, step, metrics, timings
    RUN/events.jsonl                warnings and other happenings: phase, step, message
    RUN/rollouts/step_000012.jsonl  sampled groups of RL step 12, one group a line
    RUN/rollouts/eval_000012.jsonl  groups sampled by the evaluation at step 12
    RUN/tensorboard/                the metrics and timings again, as event files

What it is: a writer that is safe to kill at any moment, and a reader that returns columns. What it
is not: a checkpoint (learner/checkpoint.py), a logger with levels and handlers, or the meaning of
the names (metrics.py). It never imports jax.

Steps are one counter over the whole run, cold start first and RL after it: the checkpoint's step.
After resume(n) the files hold exactly what an uninterrupted run had written when it saved the
checkpoint of step n, so the resumed run's metrics equal the uninterrupted one's; timings do not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from jaxrl_llm.types import Group, group_from_json, group_to_json, group_without_routes

Phase = Literal["sft", "rl", "eval"]
PHASES: tuple[Phase, ...] = ("sft", "rl", "eval")  # in the order in which a run meets them


@dataclasses.dataclass(frozen=True)
class RunLogConfig:
    """How much a run leaves behind."""

    tensorboard: bool = True  # write TensorBoard event files too
    rollouts_every: int = 1  # RL steps between written rollouts; 0 writes none, of evaluations too
    groups_per_step: int = 4  # groups written of a step or an evaluation; 0 writes all
    rollout_routes: bool = False  # keep the routes in written rollouts: S x L x K numbers each

    def __post_init__(self) -> None:
        for name in ("rollouts_every", "groups_per_step"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"log.{name} is {value}; use 0 or a positive number")


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """All that one step of the loop has to report."""

    phase: Phase
    step: int  # over the whole run, from 1; an evaluation has the step it follows
    metrics: Mapping[str, float]  # reproducible: the same seed gives the same values
    timings: Mapping[str, float]  # seconds/* and rate/*
    events: tuple[str, ...] = ()  # warnings of this step, for the reader of the log
    groups: tuple[Group, ...] = ()  # what was sampled, rewards included


class RunWriter:
    """Appends StepRecords to a run directory; see the module for its layout.

    A directory that already has a log refuses to be written until resume() has said what of it
    to keep. One process writes; on several hosts, the first.
    """

    def __init__(self, run_dir: Path, config: RunLogConfig) -> None:
        self._paths = _Paths(Path(run_dir))
        self._config = config
        self._last: tuple[int, Phase] | None = None  # see last
        self._ready = not (self._paths.metrics.exists() or self._paths.events.exists())
        self._tensorboard: Any = None
        self._paths.rollouts.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def last(self) -> tuple[int, Phase] | None:
        """Step and phase of the newest record; None before the first."""
        return self._last

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Replaces config.json; values must be plain JSON."""
        _replace(self._paths.config, json.dumps(config, indent=2, allow_nan=False) + "\n")

    def resume(self, step: int | None) -> int:
        """Keeps what was written up to and including `step`; None keeps nothing.

        Call it with the step of the restored checkpoint, or None where there is none. The loop
        saves the checkpoint of a step after writing all records of that step, evaluation
        included, so what is cut here is exactly what will be written again.

        Returns:
          The number of records cut from metrics.jsonl, a torn last line included.

        Raises:
          ValueError: the log ends before `step`, so it is not the log of this checkpoint.
        """
        lines = _lines(self._paths.metrics)
        kept = [(line, record) for line, record in lines if record is not None]
        kept = [(line, record) for line, record in kept if _within(record, step)]
        last = kept[-1][1] if kept else None
        if step and (last is None or last["step"] != step):
            raise ValueError(
                f"{self._paths.metrics} ends at step {last['step'] if last else 0} but the "
                f"checkpoint is of step {step}: they are not of one run; restore the file or "
                "choose an empty run directory"
            )
        for path in self._paths.root.rglob(f"*{_PARTIAL}"):
            path.unlink()
        for path in self._paths.rollouts.glob("*.jsonl"):
            if step is None or int(path.stem.rpartition("_")[2]) > step:
                path.unlink()
        events = [line for line, event in _lines(self._paths.events) if _within(event, step)]
        _replace(self._paths.events, "".join(events))
        _replace(self._paths.metrics, "".join(line for line, _ in kept))
        self._last = (last["step"], last["phase"]) if last else None
        self._ready = True
        return len(lines) - len(kept)

    def write(self, record: StepRecord) -> None:
        """Appends one step and returns once it is on the disk.

        Raises:
          ValueError: the directory holds a log and resume() was not called, or the step is not
            after the last one written.
        """
        self._check_ready()
        self._check_order(record)
        # The line in metrics.jsonl comes last: once it is there, everything of its step is.
        self._write_rollouts(record)
        for message in record.events:
            self.event(record.phase, record.step, message)
        line = {
            "phase": record.phase,
            "step": record.step,
            "metrics": {name: _encode(value) for name, value in record.metrics.items()},
            "timings": {name: _encode(value) for name, value in record.timings.items()},
        }
        _append(self._paths.metrics, line)
        self._last = (record.step, record.phase)
        if self._config.tensorboard:
            self._write_tensorboard(record)

    def event(self, phase: Phase, step: int, message: str) -> None:
        """Appends to events.jsonl something worth telling that is no metric."""
        self._check_ready()
        _append(self._paths.events, {"phase": phase, "step": step, "message": message})

    def close(self) -> None:
        """Closes the event files; the rest is on the disk already."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _check_ready(self) -> None:
        if not self._ready:
            raise ValueError(
                f"{self._paths.root} holds a run log: call resume() with the step of the "
                "checkpoint to go on from (None starts over), or choose an empty run directory"
            )

    def _check_order(self, record: StepRecord) -> None:
        if self._last is None:
            return
        step, phase = self._last
        follows = record.phase == "eval" and phase != "eval" and record.step == step
        if not (record.step > step or follows):
            raise ValueError(
                f"record {record.phase!r} of step {record.step} comes after {phase!r} of step "
                f"{step}: steps count up over the whole run, and an evaluation follows its step"
            )

    def _write_rollouts(self, record: StepRecord) -> None:
        every = self._config.rollouts_every
        if not record.groups or every == 0 or (record.phase != "eval" and record.step % every):
            return
        groups = record.groups[: self._config.groups_per_step or None]
        if not self._config.rollout_routes:
            groups = tuple(group_without_routes(group) for group in groups)
        text = "".join(json.dumps(group_to_json(group)) + "\n" for group in groups)
        _replace(self._paths.rollouts_of(record.phase, record.step), text)

    def _write_tensorboard(self, record: StepRecord) -> None:
        if self._tensorboard is None:
            # Imported here: readers of a run directory need no TensorBoard.
            import tensorboardX

            # purge_step hides what a killed run had written past the checkpoint.
            self._tensorboard = tensorboardX.SummaryWriter(
                logdir=str(self._paths.tensorboard), purge_step=record.step
            )
        # The cold start logs some names of RL too, on another scale: it gets its own charts.
        prefix = "sft/" if record.phase == "sft" else ""
        for name, value in (*record.metrics.items(), *record.timings.items()):
            self._tensorboard.add_scalar(prefix + name, float(value), record.step)
        self._tensorboard.flush()


class RunReader:
    """Reads a run directory, finished or still running."""

    def __init__(self, run_dir: Path) -> None:
        self._paths = _Paths(Path(run_dir))
        if not self._paths.metrics.exists():
            raise ValueError(f"{run_dir} is no run directory: it has no {self._paths.metrics.name}")

    def config(self) -> dict[str, Any]:
        """config.json as written; empty if the run wrote none."""
        if not self._paths.config.exists():
            return {}
        config: dict[str, Any] = json.loads(self._paths.config.read_text())
        return config

    def metrics(self, phase: Phase) -> dict[str, np.ndarray]:
        """Columns of a phase: "step" i64[n], every metric f64[n], NaN where a step lacks it."""
        return self._columns(phase, "metrics")

    def timings(self, phase: Phase) -> dict[str, np.ndarray]:
        """Columns of a phase: "step" i64[n], every timing f64[n], NaN where a step lacks it."""
        return self._columns(phase, "timings")

    def events(self) -> list[dict[str, Any]]:
        """All events in order, each with "phase", "step" and "message"."""
        return [event for _, event in _lines(self._paths.events) if event is not None]

    def rollout_steps(self, phase: Phase = "rl") -> list[int]:
        """Steps of which rollouts were written, ascending."""
        names = (path.stem.rpartition("_") for path in self._paths.rollouts.glob("*.jsonl"))
        return sorted(int(step) for name, _, step in names if name == _ROLLOUT_NAMES[phase])

    def rollouts(self, step: int, phase: Phase = "rl") -> list[Group]:
        """Groups written of a step; ValueError naming the steps there are if it has none."""
        path = self._paths.rollouts_of(phase, step)
        if not path.exists():
            steps = self.rollout_steps(phase)
            raise ValueError(f"no {phase} rollouts of step {step} in {path.parent}; of {steps}")
        return [group_from_json(json.loads(line)) for line in path.read_text().splitlines()]

    def _columns(self, phase: Phase, part: str) -> dict[str, np.ndarray]:
        records = [record for _, record in _lines(self._paths.metrics) if record is not None]
        records = [record for record in records if record["phase"] == phase]
        names = dict.fromkeys(name for record in records for name in record[part])
        columns = {"step": np.array([record["step"] for record in records], np.int64)}
        for name in names:
            values = [float(record[part].get(name, math.nan)) for record in records]
            columns[name] = np.array(values, np.float64)
        return columns


_PARTIAL = ".partial"  # ends the name of a file that is still being written
_ROLLOUT_NAMES: dict[Phase, str] = {"sft": "sft", "rl": "step", "eval": "eval"}


@dataclasses.dataclass(frozen=True)
class _Paths:
    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def rollouts_of(self, phase: Phase, step: int) -> Path:
        return self.rollouts / f"{_ROLLOUT_NAMES[phase]}_{step:06d}.jsonl"


def _encode(value: float) -> float | str:
    """A number as JSON. NaN and infinities, which JSON lacks, as text that float() reads back."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _append(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, text: str) -> None:
    """Writes the whole file at once: a reader or a kill sees the old file or the new one."""
    temporary = path.with_name(path.name + _PARTIAL)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _lines(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """(line, its value) of a JSONL file; the value of a torn last line is None.

    Only a line without its newline can be torn, by a kill in the middle of an append. Anything
    else that does not parse is damage, and a ValueError naming the line.
    """
    if not path.exists():
        return []
    return list(_parse(path, path.read_text(encoding="utf-8", errors="replace")))


def _parse(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any] | None]]:
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            yield line, None
            continue
        try:
            yield line, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is damaged ({error}); remove the line or restore the file"
            ) from error


def _within(record: Mapping[str, Any] | None, step: int | None) -> bool:
    return record is not None and step is not None and record["step"] <= step
