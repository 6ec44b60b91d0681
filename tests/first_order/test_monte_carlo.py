"""The estimate from samples against the exact sums, and its error bars against their theory."""

import dataclasses

import numpy as np
import pytest

from jaxrl_llm.first_order.gradients import agreement
from jaxrl_llm.first_order.monte_carlo import (
    SampledAgreement,
    SampledGroups,
    sample_groups,
    sampled_agreement,
    sampled_surrogate,
    sampled_target,
)
from jaxrl_llm.learner.step import Replay
from jaxrl_llm.losses.advantages import AdvantageConfig
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.losses.weights import ImportanceConfig
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.rollout.local import LocalEngine, LocalEngineConfig
from jaxrl_llm.rollout.precision import Precision
from jaxrl_llm.types import Prompt, Rollout, SamplingParams
from tests.first_order.tiny import (
    LENGTH,
    MODEL,
    NO_CLIP,
    PARAMS,
    STOP,
    TEMPERATURE,
    behaviour,
    exact,
    moved,
    passes,
    responses,
    rewards,
    surrogate,
)

NAMES = [field.name for field in dataclasses.fields(SampledAgreement)]
NEW = moved(0.05)
BATCHES, SAMPLES = 12, 128


def reward(rollout: Rollout) -> float:
    """The reward of the row of the enumeration that holds this response."""
    start = int(np.argmax(rollout.loss_mask)) + 1
    response = rollout.tokens[start:].tolist()
    wanted = response + [-1] * (LENGTH - len(response))
    rows = (responses().responses == wanted).all(axis=1)
    (row,) = np.flatnonzero(rows & (responses().prompt == int(rollout.prompt_id)))
    return float(rewards()[row])


def draw(precision: Precision, params: Params, *, first_seed: int) -> list[SampledGroups]:
    """Independent batches of an engine that serves `params`."""
    config = LocalEngineConfig(precision, "same", slots=256, max_length=8, decode_steps=LENGTH)
    engine = LocalEngine(config, MODEL, lambda ids: "")
    engine.publish(params, 0)
    prompts = [
        Prompt(str(index), np.array(ids, np.int32), "", "")
        for index, ids in enumerate([[1], [2, 3]])
    ]
    sampling = SamplingParams(LENGTH, stop_token_ids=(STOP,), temperature=TEMPERATURE)
    return [
        sample_groups(engine, prompts, sampling, reward, samples=SAMPLES, seed=first_seed + batch)
        for batch in range(BATCHES)
    ]


@pytest.fixture(scope="module")
def coarse() -> list[SampledGroups]:
    return draw("fp8_e5m2", PARAMS, first_seed=0)


@pytest.fixture(scope="module")
def targets() -> np.ndarray:
    """f64[n, P], estimates of the sequence-level gradient at NEW."""
    drawn = draw("float32", NEW, first_seed=BATCHES)
    return np.array([sampled_target(passes(), NEW, groups) for groups in drawn])


def test_the_target_is_estimated_without_bias(targets: np.ndarray) -> None:
    wanted = exact(NEW)
    along = targets @ wanted / (wanted @ wanted)
    error = along.std(ddof=1) / np.sqrt(BATCHES)
    assert abs(along.mean() - 1) < 4 * error < 0.5


@pytest.mark.parametrize(
    ("cfg", "replay"),
    [
        (LossConfig(), "none"),
        (LossConfig(), "r3"),
        (LossConfig(importance=ImportanceConfig(ratio="off"), clip=NO_CLIP), "none"),
        (LossConfig(averaging="sequence", advantage=AdvantageConfig(scale="std")), "r2"),
    ],
)
def test_every_estimate_is_within_four_errors_of_the_exact_value(
    cfg: LossConfig, replay: Replay, coarse: list[SampledGroups], targets: np.ndarray
) -> None:
    surrogates = [
        sampled_surrogate(passes(), PARAMS, NEW, groups, replay, cfg) for groups in coarse
    ]
    found = sampled_agreement(np.array(surrogates), targets)
    wanted = agreement(surrogate(NEW, behaviour("fp8_e5m2"), cfg, replay), exact(NEW))
    for name in NAMES:
        estimate = getattr(found, name)
        assert abs(estimate.value - getattr(wanted, name)) < 4 * estimate.error, name
        assert 0 < estimate.error < 0.5, name


def test_a_mean_baseline_leaves_the_response_itself_out(coarse: list[SampledGroups]) -> None:
    """Else every gradient of groups of N would be 1 - 1 / N of the one that is meant."""
    found = [
        sampled_surrogate(
            passes(),
            PARAMS,
            NEW,
            coarse[0],
            "none",
            LossConfig(advantage=AdvantageConfig(baseline)),
        )
        for baseline in ("mean", "leave_one_out")
    ]
    np.testing.assert_array_equal(found[0], found[1])


def noisy(rng: np.random.Generator, count: int) -> SampledAgreement:
    """Two gradients at a cosine of 0.8, of length 2 and 1, in noise of length 1.4 each."""
    surrogates = np.array([1.6, 1.2, *[0.0] * 18]) + rng.normal(0, 0.3, (count, 20))
    targets = np.array([1.0, *[0.0] * 19]) + rng.normal(0, 0.3, (count, 20))
    return sampled_agreement(surrogates, targets)


def test_the_noise_of_a_batch_does_not_bias_and_error_bars_mean_what_they_say() -> None:
    """Over 300 repetitions: unbiased, the errors right on average, and 1 / sqrt(n) small."""
    rng = np.random.default_rng(0)
    exact_values = {"cosine": 0.8, "norm_ratio": 2.0, "projection": 1.6}
    typical: dict[tuple[str, int], float] = {}
    for count in (10, 40):
        found = [noisy(rng, count) for _ in range(300)]
        for name, wanted in exact_values.items():
            values = np.array([getattr(one, name).value for one in found])
            errors = np.array([getattr(one, name).error for one in found])
            spread = values.std(ddof=1)
            assert abs(values.mean() - wanted) < 0.3 * spread, name
            assert np.sqrt(np.mean(errors**2)) == pytest.approx(spread, rel=0.25), name
            typical[name, count] = float(np.median(errors))
    for name in exact_values:
        assert typical[name, 10] / typical[name, 40] == pytest.approx(2, rel=0.2), name


def test_leaving_a_batch_out_is_computed_as_it_reads() -> None:
    """The jackknife against estimates from arrays that lack a batch."""
    rng = np.random.default_rng(3)
    x = rng.normal(1, 0.4, (6, 5))
    y = rng.normal(1, 0.4, (6, 5))
    values = []
    for left_out in range(6):
        rest = [index for index in range(6) if index != left_out]
        values.append(sampled_agreement(x[rest], y[rest]).projection.value)
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    inner = np.mean([x[i] @ y[j] for i, j in pairs])
    length = np.mean([y[i] @ y[j] for i, j in pairs])
    found = sampled_agreement(x, y).projection
    assert found.value == pytest.approx(inner / length)
    assert found.error == pytest.approx(np.sqrt(5 / 6 * np.sum((values - np.mean(values)) ** 2)))


def test_too_little_data_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 batches"):
        sampled_agreement(np.ones((2, 5)), np.ones((2, 5)))
    opposed = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="3 batches cannot tell a gradient from 0"):
        sampled_agreement(np.ones((3, 2)), opposed)


def test_a_failed_request_is_no_smaller_batch() -> None:
    config = LocalEngineConfig("float32", slots=2, max_length=3)
    engine = LocalEngine(config, MODEL, lambda ids: "")
    engine.publish(PARAMS, 0)
    prompt = Prompt("0", np.array([1], np.int32), "", "")
    with pytest.raises(RuntimeError, match="max_length, 3"):
        sample_groups(engine, [prompt], SamplingParams(5), reward, samples=2, seed=0)
