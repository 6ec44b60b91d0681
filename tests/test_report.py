"""The report: complete, self-contained, safe against what a policy writes."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.report import write_report
from jaxrl_llm.report.page import token_texts
from jaxrl_llm.report.plots import moving_mean, phase_seconds
from jaxrl_llm.runlog import RunLogConfig, RunReader, RunWriter, StepRecord
from jaxrl_llm.types import Group, Prompt
from tests.synthetic_run import decode, encode, make_rollout, rl_record, write_synthetic_run

QUIET = RunLogConfig(tensorboard=False)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_run(tmp_path_factory.mktemp("runs") / "synthetic")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    path = write_report(run_dir, decode=decode)
    assert path == run_dir / "report/index.html"
    return path.read_text(encoding="utf-8")


def write(run_dir: Path, *records: StepRecord) -> str:
    """The page of a run with these records."""
    with RunWriter(run_dir, QUIET) as writer:
        for record in records:
            writer.write(record)
    return write_report(run_dir).read_text(encoding="utf-8")


def test_the_page_embeds_the_very_plots_that_lie_beside_it(run_dir: Path, page: str) -> None:
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    files = {path.read_bytes() for path in (run_dir / "report").glob("*.png")}
    assert {base64.b64decode(data) for data in embedded} == files
    assert all(data.startswith(b"\x89PNG") for data in files)
    names = {path.stem for path in (run_dir / "report").glob("*.png")}
    curves = {"accuracy", "entropy", "kl", "is_weight", "clip", "routing", "grad_norm", "length"}
    curves |= {"effective_sample", "attribution"}
    assert names == curves | {"groups", "cold_start", "rate", "time"}


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "http" not in page
    assert "<script" not in page


def test_the_outcome_compares_the_first_and_the_last_evaluation(page: str) -> None:
    rows = [re.sub("<[^>]+>", "|", row) for row in re.findall("<tr>.*?</tr>", page)]
    sampled = next(row for row in rows if "avg@8" in row)
    assert re.findall(r"[+\d.]+(?:%| points)", sampled) == [
        *("29.0%", "25.0%", "33.0%", "87.0%", "83.0%", "91.0%"),
        "+58.0 points",
    ]
    assert "first evaluation (step 40)" in page
    assert "last evaluation (step 100)" in page
    assert "128 held-out prompts" in page


def test_equal_events_are_told_once(page: str) -> None:
    assert page.count("replay r3 covered 0.93 of the trained tokens") == 1
    assert "3x in steps 60 to 100" in page


def test_every_metric_has_its_last_value_and_meaning(run_dir: Path, page: str) -> None:
    reader = RunReader(run_dir)
    last = reader.metrics("rl")["learner/grad_norm"][-1]
    assert f"<td>learner/grad_norm</td><td>{last:.5g}</td><td>global gradient norm" in page
    assert "not documented" not in page


def test_text_of_prompts_responses_and_settings_is_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert('x')</script>"
    prompt = Prompt(hostile, encode("1+1="), hostile, hostile)
    rollout = make_rollout(prompt, 0, "12", correct=True)
    rollout = dataclasses.replace(rollout, text=f"<{hostile[1:2]}", verdict=hostile)
    record = dataclasses.replace(
        rl_record(1, progress=0.0), groups=(Group(prompt, (rollout,)),), events=(hostile,)
    )
    record = dataclasses.replace(record, metrics={**record.metrics, hostile: 1.0})
    with RunWriter(tmp_path / "<b>run", QUIET) as writer:
        writer.write_config({hostile: hostile})
        writer.write(record)
    for decoder in (None, lambda _: hostile):
        page = write_report(tmp_path / "<b>run", decode=decoder).read_text(encoding="utf-8")
        assert "<script" not in page
        assert "<b>run" not in page
        assert page.count("&lt;script&gt;alert") >= 6
    # Nor can a value leave its attribute.
    tokens = re.findall(r'<span style="[^"]*" title="[^"]*">', page)
    assert len(tokens) == 2 + rollout.response_length


def test_tokens_are_shown_by_the_decoder_by_characters_or_by_ids() -> None:
    prompt = Prompt("p", encode("1+1="), "1+1=", "2")
    rollout = make_rollout(prompt, 0, "#2", correct=True)
    assert token_texts(rollout, decode) == ["#", "2", "⟨14⟩"]
    assert token_texts(rollout, None) == ["#", "2", "⟨14⟩"]
    words = dataclasses.replace(rollout, text="the answer is 2")
    assert token_texts(words, None) == ["12 ", "2 ", "14 "]
    cut = dataclasses.replace(rollout, text="#2;", finish="length")
    assert token_texts(cut, None) == ["#", "2", ";"]


def test_a_token_is_coloured_by_its_own_logprob(tmp_path: Path) -> None:
    """The logprob of s belongs to targets[s]: a shift by one would colour the wrong token."""
    prompt = Prompt("p", encode("1+1="), "1+1=", "2")
    rollout = make_rollout(prompt, 0, "#2", correct=True)
    logprobs = np.array([0, 0, 0, -0.5, -4.0, -1.0], np.float32)
    rollout = dataclasses.replace(rollout, sampler_logprobs=logprobs)
    group = Group(prompt, (rollout,))
    page = write(tmp_path, dataclasses.replace(rl_record(1, progress=0.0), groups=(group,)))
    found = re.findall(r'title="id (\d+) · log p (-[\d.]+) · p ([\d.]+)">([^<]+)<', page)
    assert found == [
        ("12", "-0.500", "0.607", "#"),
        ("2", "-4.000", "0.018", "2"),
        ("14", "-1.000", "0.368", "⟨14⟩"),
    ]


def test_long_responses_are_cut_and_counted(tmp_path: Path) -> None:
    prompt = Prompt("p", encode("1+1="), "1+1=", "2")
    group = Group(prompt, (make_rollout(prompt, 0, "2" * 1999, correct=False),))
    page = write(tmp_path, dataclasses.replace(rl_record(1, progress=0.0), groups=(group,)))
    assert "1,400 more tokens" in page
    assert page.count('title="id') == 600


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    page = write(tmp_path / "sft", StepRecord("sft", 1, {"learner/loss": 2.0}, {}))
    assert "No evaluation and no RL step yet." in page
    assert "The run wrote no rollouts." in page
    assert page.count("<figure>") == 1
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metrics.jsonl").touch()
    assert "<figure>" not in write_report(tmp_path / "empty").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="is no run directory"):
        write_report(tmp_path)


def test_a_diverged_run_still_has_a_page(tmp_path: Path) -> None:
    """NaN, infinities, and values that a log scale cannot show."""
    values = (math.nan, math.inf, -0.1, 0.0)
    records = []
    for step, value in enumerate(values, start=1):
        record = rl_record(step, progress=0.0)
        metrics = dict.fromkeys(record.metrics, value)
        records.append(dataclasses.replace(record, metrics=metrics))
    page = write(tmp_path, *records)
    assert page.count("<figure>") == 12
    assert page == write_report(tmp_path).read_text(encoding="utf-8")


def test_the_moving_mean_leaves_out_what_is_unknown() -> None:
    values = np.random.default_rng(0).random(20)
    values[[3, 4, 5, 11]] = math.nan
    found = moving_mean(values, 3)
    for index in range(20):
        near = values[max(0, index - 1) : index + 2]
        near = near[np.isfinite(near)]
        expected = near.mean() if near.size else math.nan
        np.testing.assert_allclose(found[index], expected, rtol=1e-12)


def test_phases_add_up_to_the_logged_time(run_dir: Path) -> None:
    seconds = phase_seconds(RunReader(run_dir))
    assert next(iter(seconds)) == "cold start"
    np.testing.assert_allclose(sum(seconds.values()), 40 * 0.2 + 60 * 0.97 + 2 * 2.1)
    np.testing.assert_allclose(seconds["rest of the step"], 60 * 0.03)
