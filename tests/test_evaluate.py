"""Evaluation: the statistics against enumeration, and evaluate() against a scripted engine."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.data.rewards import RewardConfig, Verifier
from jaxrl_llm.evaluate import (
    EvaluationConfig,
    EvaluationResult,
    avg_at_k,
    bootstrap,
    evaluate,
    pass_at_k,
    request_seed,
)
from jaxrl_llm.metrics import describe
from jaxrl_llm.rollout.engine import EngineFailure, Params, Request
from jaxrl_llm.types import Prompt, Rollout, SamplingParams
from tests.synthetic_run import encode, make_rollout

SAMPLING = SamplingParams(max_new_tokens=12, stop_token_ids=(14,), temperature=0.7)
CONFIG = EvaluationConfig(samples=4, pass_k=2, resamples=200, top_p=0.9)

Script = Callable[[Request], bool | None]


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", encode(f"{i}+1="), f"{i}+1=", str(i + 1)) for i in range(count)]


@dataclasses.dataclass
class ScriptedEngine:
    """Answers right (True) or wrong (False), or fails (None), as the script says; last first."""

    script: Script
    requests: list[Request] = dataclasses.field(default_factory=list)
    calls: list[int] = dataclasses.field(default_factory=list)  # requests of each

    def generate(self, requests: Sequence[Request]) -> Iterator[Rollout | EngineFailure]:
        self.requests += requests
        self.calls.append(len(requests))
        for request in reversed(requests):
            right = self.script(request)
            prompt, index = request.prompt, request.sample_index
            if right is None:
                yield EngineFailure(prompt.prompt_id, index, "too_long", "it does not fit")
            else:
                text = f"#{prompt.answer}" if right else "#0"
                rollout = make_rollout(prompt, index, text, correct=False)
                yield dataclasses.replace(rollout, reward=None, verdict="")

    def publish(self, params: Params, version: int) -> None:
        raise AssertionError("an evaluation publishes nothing")

    def close(self) -> None:
        raise AssertionError("the engine belongs to the caller")


def run(script: Script, prompts: int, config: EvaluationConfig = CONFIG) -> EvaluationResult:
    engine = ScriptedEngine(script)
    with Verifier(RewardConfig()) as verifier:
        return evaluate(
            engine, make_prompts(prompts), verifier, sampling=SAMPLING, config=config, seed=5
        )


# Statistics.


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples(
    correct: list[bool], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(correct)))
    exact = np.mean([any(chosen) for chosen in itertools.combinations(correct, k)])
    found = pass_at_k(np.array([sum(correct)]), np.array([len(correct)]), k)
    np.testing.assert_allclose(found, [exact], atol=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    found = pass_at_k(np.array([1, 0, 5000]), np.array([10_000] * 3), 5000)
    np.testing.assert_allclose(found, [0.5, 0.0, 1.0], rtol=1e-12)


def test_pass_at_1_is_the_average() -> None:
    correct, samples = np.array([0, 1, 3, 4]), np.array([4, 4, 4, 4])
    np.testing.assert_allclose(pass_at_k(correct, samples, 1), avg_at_k(correct, samples))
    np.testing.assert_allclose(avg_at_k(correct, samples), [0, 0.25, 0.75, 1])


def test_a_prompt_with_too_few_samples_has_no_estimate() -> None:
    found = pass_at_k(np.array([1, 2, 0]), np.array([1, 2, 0]), 2)
    np.testing.assert_array_equal(found, [math.nan, 1.0, math.nan])
    np.testing.assert_array_equal(avg_at_k(np.array([1, 0]), np.array([1, 0])), [1.0, math.nan])


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="more correct samples than samples"):
        pass_at_k(np.array([3]), np.array([2]), 1)
    with pytest.raises(ValueError, match=r"\(2,\) and samples \(3,\)"):
        avg_at_k(np.zeros(2, int), np.zeros(3, int))
    with pytest.raises(ValueError, match="k of at least 1"):
        pass_at_k(np.array([1]), np.array([2]), 0)


def test_the_bootstrap_interval_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).random(400)
    found = bootstrap(values, confidence=0.95, resamples=2000, seed=1)
    reach = 1.96 * values.std() / math.sqrt(values.size)
    assert found.value == values.mean()
    np.testing.assert_allclose([found.value - found.low, found.high - found.value], reach, rtol=0.1)
    narrow = bootstrap(values, confidence=0.5, resamples=2000, seed=1)
    np.testing.assert_allclose(narrow.high - narrow.low, 2 * reach * 0.6745 / 1.96, rtol=0.1)


def test_the_bootstrap_is_reproducible_and_its_seed_matters() -> None:
    values = np.random.default_rng(0).random(50)
    first, again, other = (
        bootstrap(values, confidence=0.9, resamples=100, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_the_bootstrap_leaves_out_prompts_without_an_estimate() -> None:
    found = bootstrap(np.array([1.0, math.nan]), confidence=0.9, resamples=100, seed=0)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    empty = bootstrap(np.array([math.nan]), confidence=0.9, resamples=100, seed=0)
    assert all(map(math.isnan, dataclasses.astuple(empty)))


# evaluate().


def test_the_numbers_of_a_scripted_engine() -> None:
    """p0: all right, p1: one of four, p2: none; greedy right on p1 alone."""

    def script(request: Request) -> bool:
        if request.sample_index == CONFIG.samples:
            return request.prompt.prompt_id == "p1"
        return request.sample_index < {"p0": 4, "p1": 1, "p2": 0}[request.prompt.prompt_id]

    result = run(script, 3)
    np.testing.assert_allclose(result.avg_at_k.value, (1 + 0.25 + 0) / 3)
    np.testing.assert_allclose(result.pass_at_k.value, (1 + 0.5 + 0) / 3)
    assert result.greedy_accuracy is not None
    np.testing.assert_allclose(result.greedy_accuracy.value, 1 / 3)
    assert result.verdicts == {"correct": 5, "wrong": 7}
    assert result.failures == {}
    assert [group.prompt.prompt_id for group in result.groups] == ["p0", "p1", "p2"]
    assert [r.reward for r in result.groups[1].rollouts] == [1.0, 0.0, 0.0, 0.0]
    assert [r.sample_index for r in result.groups[1].rollouts] == [0, 1, 2, 3]
    assert [r.routes for group in result.groups for r in group.rollouts] == [None] * 12


def test_the_run_log_documents_everything_an_evaluation_reports() -> None:
    result = run(lambda request: request.sample_index != 1, 3)
    metrics = result.metrics()
    assert metrics["eval/avg_at_k"] == result.avg_at_k.value == 0.75
    assert metrics["eval/avg_at_k_low"] == result.avg_at_k.low
    assert metrics["eval/avg_at_k_high"] == result.avg_at_k.high
    assert metrics["eval/pass_at_k"] == result.pass_at_k.value == 1.0
    assert metrics["eval/greedy_accuracy"] == 1.0
    assert metrics["eval/verdict_correct"] == 9
    assert (metrics["eval/prompts"], metrics["eval/samples"], metrics["eval/pass_k"]) == (3, 4, 2)
    assert metrics["eval/response_tokens"] == 3  # marker, digit, stop
    assert [name for name in metrics if describe(name) is None] == []
    config = dataclasses.replace(CONFIG, greedy=False)
    without = run(lambda request: request.sample_index != 1, 3, config).metrics()
    assert set(metrics) - set(without) == {n for n in metrics if "greedy" in n}


def test_failures_are_counted_and_are_not_wrong_answers() -> None:
    """p0 loses three of four samples, too many for pass@2; p1 loses its greedy one."""

    def script(request: Request) -> bool | None:
        if request.prompt.prompt_id == "p0":
            return True if request.sample_index in (0, CONFIG.samples) else None
        return None if request.sample_index == CONFIG.samples else request.sample_index == 0

    result = run(script, 2)
    assert result.failures == {"too_long": 4}
    np.testing.assert_allclose(result.avg_at_k.value, (1 + 0.25) / 2)
    np.testing.assert_allclose(result.pass_at_k.value, 0.5)  # of p1 alone
    assert result.greedy_accuracy is not None
    assert result.greedy_accuracy.value == 1.0  # of p0 alone
    assert result.metrics()["eval/failures"] == 4


def test_an_engine_that_fails_everything_leaves_no_number() -> None:
    result = run(lambda _: None, 2)
    assert math.isnan(result.avg_at_k.value)
    assert math.isnan(result.metrics()["eval/response_tokens"])
    assert result.failures == {"too_long": 10}


def test_requests_differ_in_seed_and_the_greedy_ones_come_apart() -> None:
    engine = ScriptedEngine(lambda _: True)
    with Verifier(RewardConfig()) as verifier:
        evaluate(engine, make_prompts(3), verifier, sampling=SAMPLING, config=CONFIG, seed=5)
    requests = engine.requests
    assert len({request.seed for request in requests}) == len(requests) == 15
    greedy = SamplingParams(max_new_tokens=12, stop_token_ids=(14,), temperature=0.0)
    truncated = dataclasses.replace(SAMPLING, top_p=0.9)
    assert [r.sampling for r in requests] == [truncated] * 12 + [greedy] * 3
    assert engine.calls == [12, 3]  # the greedy ones once the others have their answers
    assert {r.max_staleness for r in requests} == {0}  # of the weights that are evaluated alone


def test_a_prompt_keeps_its_seeds_in_another_selection() -> None:
    assert request_seed(5, "p1", 2) == request_seed(5, "p1", 2)
    others = [(6, "p1", 2), (5, "p2", 2), (5, "p1", 3)]
    assert request_seed(5, "p1", 2) not in [request_seed(*other) for other in others]
    assert 0 <= request_seed(5, "p1", 2) < 2**63
    seeds = []
    for prompts in (make_prompts(3), make_prompts(3)[1:]):
        engine = ScriptedEngine(lambda _: True)
        with Verifier(RewardConfig()) as verifier:
            evaluate(engine, prompts, verifier, sampling=SAMPLING, config=CONFIG, seed=5)
        seeds.append([r.seed for r in engine.requests if r.prompt.prompt_id == "p1"])
    assert seeds[0] == seeds[1]


def test_a_number_of_prompts_takes_the_first_ones() -> None:
    result = run(lambda _: True, 5, dataclasses.replace(CONFIG, prompts=2))
    assert [group.prompt.prompt_id for group in result.groups] == ["p0", "p1"]
    assert len(run(lambda _: True, 3, dataclasses.replace(CONFIG, prompts=9)).groups) == 3


def test_prompts_must_exist_and_be_distinct() -> None:
    engine = ScriptedEngine(lambda _: True)
    with Verifier(RewardConfig()) as verifier:
        for prompts, message in (
            ([], "no prompts"),
            (make_prompts(2) + make_prompts(1), r"unique ids; repeated: \['p0'\]"),
        ):
            with pytest.raises(ValueError, match=message):
                evaluate(engine, prompts, verifier, sampling=SAMPLING, config=CONFIG, seed=5)


def test_an_engine_that_loses_requests_is_an_error() -> None:
    class Forgetful(ScriptedEngine):
        def generate(self, requests: Sequence[Request]) -> Iterator[Rollout | EngineFailure]:
            yield from itertools.islice(super().generate(requests), len(requests) - 1)

    engine = Forgetful(lambda _: True)
    with (
        Verifier(RewardConfig()) as verifier,
        pytest.raises(ValueError, match="answered 8 of 10 requests and failed 0"),
    ):
        evaluate(engine, make_prompts(2), verifier, sampling=SAMPLING, config=CONFIG, seed=5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("every", -1, "evaluation.every is -1; it must be at least 0"),
        ("prompts", -1, "evaluation.prompts is -1; it must be at least 0"),
        ("samples", 0, "evaluation.samples is 0; it must be at least 1"),
        ("pass_k", 0, "evaluation.pass_k is 0; it must be at least 1"),
        ("pass_k", 5, "evaluation.pass_k is 5 but only 4 samples"),
        ("resamples", 10, "evaluation.resamples is 10; it must be at least 100"),
        ("confidence", 1.0, r"evaluation.confidence is 1.0; it must be in \(0, 1\)"),
    ],
)
def test_contradictory_settings_are_refused(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{field: value})
