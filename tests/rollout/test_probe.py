"""The probe's judgement: whose weights an answer shows, by numbers alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxrl_llm.rollout.probe import KEPT_VERSIONS, Answer, Probe, Verdict
from jaxrl_llm.types import NOT_SAMPLED, Rollout, SamplingParams, bind_routes
from tests.rollout.sglang_engines import Written, request

TOLERANCE = 0.1
PROMPT, SAMPLED = 12, 4
PROBE = dataclasses.replace(request(7, prompt_length=PROMPT), sampling=SamplingParams(SAMPLED))
URL = "http://server"
OTHER = "http://127.0.0.1:30001"


def truth(params: float, temperature: float = 1.0) -> np.ndarray:
    """The learner's log-probabilities of all tokens: a curve that `params` moves as a whole."""
    return np.float32(-2 - params - np.linspace(0, 1, PROMPT + SAMPLED - 1) / temperature)


def score(
    params: float, tokens: np.ndarray, routes: np.ndarray | None, temperature: float
) -> np.ndarray:
    assert tokens.size == PROMPT + SAMPLED
    return truth(params, temperature)


def answer(params: float, *, off: float = 0.0, response_off: float = 0.0) -> Answer:
    """Of a server with these params, whose prompt and response are off by so much."""
    logprobs, before = truth(params), PROMPT - 1
    mask = np.arange(logprobs.size) >= before
    rollout = Rollout(
        prompt_id=PROBE.prompt.prompt_id,
        sample_index=0,
        tokens=np.concatenate([PROBE.prompt.tokens, np.arange(SAMPLED, dtype=np.int32)]),
        loss_mask=mask,
        sampler_logprobs=np.where(mask, logprobs - np.float32(response_off), np.float32(0)),
        routes=None,
        weight_version=np.where(mask, 0, NOT_SAMPLED).astype(np.int32),
        text="",
        finish="length",
    )
    return Answer(rollout, logprobs[:before] + np.float32(off))


def weights(version: int) -> Written:
    return Written(version, f"v{version}", "")


def judge(probe: Probe, params: float, version: int, said: Answer) -> Verdict:
    return probe.judge(params, weights(version), {URL: said})[URL]


@pytest.fixture
def probe() -> Probe:
    return Probe(PROBE, score, TOLERANCE)


def test_the_right_weights(probe: Probe) -> None:
    assert judge(probe, 1.0, 0, answer(1.0)) == Verdict(0.0, True, weights(0))


@pytest.mark.parametrize("off", [{"off": 0.09}, {"off": -0.09}, {"response_off": 0.09}])
def test_a_discrepancy_within_the_tolerance(probe: Probe, off: dict[str, float]) -> None:
    verdict = judge(probe, 1.0, 0, answer(1.0, **off))
    assert verdict.right
    assert verdict.error == pytest.approx(0.09, abs=1e-6)


@pytest.mark.parametrize("off", [{"off": 0.11}, {"off": -0.11}, {"response_off": 0.11}])
def test_a_discrepancy_beyond_the_tolerance(probe: Probe, off: dict[str, float]) -> None:
    """Of the prompt or of the response alone, though not of their mean."""
    verdict = judge(probe, 1.0, 0, answer(1.0, **off))
    assert not verdict.right
    assert verdict.error == pytest.approx(0.11, abs=1e-6)


def test_a_server_left_on_weights_beyond_the_tolerance(probe: Probe) -> None:
    judge(probe, 1.0, 0, answer(1.0))
    verdict = judge(probe, 2.0, 1, answer(1.0))
    assert verdict == Verdict(pytest.approx(1.0), False, weights(0))
    assert verdict.describe(URL) == "http://server holds version 0 (v0), 1 nats off the learner"


def test_a_server_left_on_weights_within_the_tolerance_repeats_itself(probe: Probe) -> None:
    """It is right but for one thing: its answer is the old one to the last bit."""
    judge(probe, 1.0, 0, answer(1.0, off=0.01))
    verdict = judge(probe, 1.01, 1, answer(1.0, off=0.01))
    assert not verdict.right
    assert verdict.error < TOLERANCE
    assert judge(probe, 1.01, 1, answer(1.01, off=0.01)).right


def test_the_same_answer_is_right_when_the_learner_has_not_moved(probe: Probe) -> None:
    judge(probe, 1.0, 0, answer(1.0))
    assert judge(probe, 1.0, 1, answer(1.0)).right


def test_the_same_answer_of_another_server_says_nothing(probe: Probe) -> None:
    judge(probe, 1.0, 0, answer(1.0))
    said = {"http://other": answer(1.0)}
    assert probe.judge(1.01, weights(1), said)["http://other"].right


def test_weights_that_fit_no_publish(probe: Probe) -> None:
    verdict = judge(probe, 1.0, 0, answer(5.0))
    assert verdict.holds is None
    assert "holds no version that this run published, 4 nats off" in verdict.describe(URL)


def test_old_weights_are_named_up_to_some_publishes_ago(probe: Probe) -> None:
    for version in range(KEPT_VERSIONS):
        judge(probe, float(version), version, answer(float(version)))
    last = KEPT_VERSIONS
    assert judge(probe, float(last), last, answer(1.0)).holds == weights(1)
    assert judge(probe, float(last), last, answer(0.0)).holds is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_wrong(probe: Probe, value: float) -> None:
    verdict = judge(probe, 1.0, 0, answer(1.0, off=value))
    assert not verdict.right
    assert verdict.error == float("inf")


def test_a_response_is_scored_at_its_temperature_and_a_prompt_at_1() -> None:
    sampling = SamplingParams(SAMPLED, temperature=0.5)
    probe = Probe(dataclasses.replace(PROBE, sampling=sampling), score, TOLERANCE)
    said = answer(1.0)
    assert not judge(probe, 1.0, 0, said).right
    logprobs = np.where(said.rollout.loss_mask, truth(1.0, 0.5), np.float32(0))
    cooled = dataclasses.replace(said.rollout, sampler_logprobs=logprobs)
    assert judge(probe, 1.0, 0, Answer(cooled, said.prompt_logprobs)).error == 0


def test_servers_that_said_the_same_are_scored_once() -> None:
    calls = []

    def counting(
        params: float, tokens: np.ndarray, routes: np.ndarray | None, temperature: float
    ) -> np.ndarray:
        calls.append(routes)
        return truth(params)

    probe = Probe(PROBE, counting, TOLERANCE)
    said = answer(1.0)
    routes = np.zeros((PROMPT + SAMPLED - 1, 2, 2), np.int16)
    other = dataclasses.replace(said, rollout=bind_routes(said.rollout, routes))
    probe.judge(1.0, weights(0), {f"http://{i}": said for i in range(3)})
    assert len(calls) == 1
    probe.judge(1.0, weights(1), {"http://0": said, "http://1": other, "http://2": other})
    assert [routes is None for routes in calls] == [True, True, False]


def test_a_server_that_comes_back_is_judged_by_the_last_weights(probe: Probe) -> None:
    judge(probe, 1.0, 0, answer(1.0))
    judge(probe, 2.0, 1, answer(2.0))
    assert not probe.fits(URL, weights(1), answer(1.0))
    assert probe.fits(URL, weights(1), answer(2.0, off=0.09))


def test_a_server_that_comes_back_with_just_what_it_had_is_seen_within_the_tolerance(
    probe: Probe,
) -> None:
    judge(probe, 1.0, 0, answer(1.0))
    probe.judge(1.0 + 0.5 * TOLERANCE, weights(1), {OTHER: answer(1.0 + 0.5 * TOLERANCE)})
    assert not probe.fits(URL, weights(1), answer(1.0))
    assert probe.fits(OTHER, weights(1), answer(1.0))  # it never had them


def test_a_prompt_needs_a_token_with_a_log_probability() -> None:
    with pytest.raises(ValueError, match="prompt has 1 token"):
        Probe(request(0, prompt_length=1), score, TOLERANCE)


def test_a_score_of_another_shape_is_refused() -> None:
    probe = Probe(PROBE, lambda *_: np.zeros(3, np.float32), TOLERANCE)
    with pytest.raises(ValueError, match=r"scored 16 tokens as \(3,\)"):
        judge(probe, 1.0, 0, answer(1.0))
