"""The terminal display of a run, driven by hand-made records."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from jaxrl_llm.display import Display, summary
from jaxrl_llm.runlog import RunLogConfig, RunWriter, StepRecord
from tests.tiny import COLD_STEPS, tiny_config

COLD = StepRecord("sft", 1, {"learner/loss": 2.5, "policy/entropy": 1.25}, {})
STEP = StepRecord(
    "rl",
    COLD_STEPS + 1,
    {"rollout/reward_mean": 0.5, "policy/entropy": 0.75, "policy/kl_sampler_old": 0.002},
    {},
    events=("routing replay r3 is configured but [something] was missing",),
)


def evaluation(step: int, accuracy: float) -> StepRecord:
    metrics = {"eval/avg_at_k": accuracy, "eval/avg_at_k_low": 0.1, "eval/avg_at_k_high": 0.9}
    return StepRecord("eval", step, metrics, {})


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_shows_progress_accuracy_and_events(tmp_path: Path, terminal: bool) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=200, no_color=True)
    with Display(tiny_config(tmp_path), console) as display:
        for record in (COLD, evaluation(COLD_STEPS, 0.25), STEP):
            display.show(record)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())  # without styles
    for text in (
        "loss 2.5",
        "25.0% [10.0%, 90.0%] sampled",
        "reward 0.5",
        "KL 0.002",
        "held-out accuracy 25.0%",
        "routing replay r3 is configured but [something] was missing",
    ):
        assert text in shown, text
    assert ("left" in shown) == terminal


def test_the_summary_sets_the_first_beside_the_last(tmp_path: Path) -> None:
    with RunWriter(tmp_path, RunLogConfig(tensorboard=False)) as log:
        for record in (COLD, evaluation(1, 0.25), evaluation(2, 0.5), evaluation(3, 0.75)):
            log.write(record)
    output = io.StringIO()
    Console(file=output, width=120).print(summary(tmp_path))
    row = next(line for line in output.getvalue().splitlines() if "accuracy, sampled" in line)
    assert "25.0%" in row
    assert "75.0%" in row
    assert "50.0%" not in row
