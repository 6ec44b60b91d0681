"""What a run shows in the terminal: a progress bar while it runs, a table when it has ended.

Numbers come from StepRecords and from the run directory; nothing is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn
from rich.table import Table

from jaxrl_llm.config import RunConfig
from jaxrl_llm.runlog import RunReader, StepRecord

SHOWN = {
    "sft": {"loss": "learner/loss", "entropy": "policy/entropy"},
    "rl": {
        "reward": "rollout/reward_mean",
        "entropy": "policy/entropy",
        "KL": "policy/kl_sampler_old",
    },
}
"""Label -> metric shown beside the bar of a phase."""

PLAIN_EVERY = 20
"""Where the output is no terminal, a line is printed every so many steps instead of a bar."""


class Display:
    """A bar for the cold start and one for RL; held-out accuracy beside both."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        self._console = console
        self._accuracy = ""
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeftColumn(),
            TextColumn("{task.fields[values]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._cold_steps = config.cold_start.steps
        self._tasks: dict[str, TaskID] = {}
        for phase, name, total in (
            ("sft", "cold start", config.cold_start.steps),
            ("rl", "RL", config.steps),
        ):
            if total:
                self._tasks[phase] = self._bars.add_task(name, total=total, values="", start=False)

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def show(self, record: StepRecord) -> None:
        """Update the display with a record."""
        for event in record.events:
            self._console.print(f"step {record.step}: {event}", style="yellow", markup=False)
        if record.phase == "eval":
            accuracy = record.metrics["eval/avg_at_k"]
            self._accuracy = f"  held-out accuracy {accuracy:.1%}"
            self._console.print(f"step {record.step}: held-out accuracy {_evaluation(record)}")
            return
        values = _values(SHOWN[record.phase], record.metrics)
        done = record.step - (self._cold_steps if record.phase == "rl" else 0)
        task = self._tasks[record.phase]
        self._bars.start_task(task)
        self._bars.update(task, completed=done, values=values + self._accuracy)
        if not self._console.is_terminal and (done == 1 or done % PLAIN_EVERY == 0):
            total = self._bars.tasks[list(self._tasks.values()).index(task)].total
            name = "cold start" if record.phase == "sft" else "RL"
            self._console.print(f"{name} {done}/{total:.0f}  {values}{self._accuracy}")


def summary(run_dir: Path) -> Table:
    """What RL changed: held-out accuracy, and the training metrics of its first and last steps."""
    reader = RunReader(run_dir)
    table = Table("", "before RL", "after RL", title=f"Outcome of {run_dir}")
    evaluations, steps = reader.metrics("eval"), reader.metrics("rl")
    for label, name in (
        ("held-out accuracy, sampled", "eval/avg_at_k"),
        ("held-out pass@k", "eval/pass_at_k"),
        ("held-out accuracy, greedy", "eval/greedy_accuracy"),
    ):
        if name in evaluations:
            ends = (_with_interval(evaluations, name, index) for index in (0, -1))
            table.add_row(label, *ends)
    table.add_section()
    for label, name in (
        ("training reward", "rollout/reward_mean"),
        ("response length, tokens", "rollout/response_tokens"),
        ("entropy, nats per token", "policy/entropy"),
        ("KL(mu || pi_old), nats per token", "policy/kl_sampler_old"),
        ("route agreement", "routing/agreement"),
        ("importance weight", "is_weight/used_mean"),
    ):
        if name in steps:
            table.add_row(label, f"{steps[name][0]:.4g}", f"{steps[name][-1]:.4g}")
    return table


def _with_interval(columns: Mapping[str, np.ndarray], name: str, index: int) -> str:
    value, low, high = (columns[name + end][index] for end in ("", "_low", "_high"))
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"


def _evaluation(record: StepRecord) -> str:
    metrics = record.metrics
    low, high = metrics["eval/avg_at_k_low"], metrics["eval/avg_at_k_high"]
    text = f"{metrics['eval/avg_at_k']:.1%} \\[{low:.1%}, {high:.1%}] sampled"
    greedy = metrics.get("eval/greedy_accuracy", math.nan)
    return text if math.isnan(greedy) else f"{text}, {greedy:.1%} greedy"


def _values(shown: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{label} {metrics[name]:.3g}" for label, name in shown.items())
