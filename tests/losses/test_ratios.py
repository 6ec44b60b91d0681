import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.ratios import MAX_LOG_RATIO, at_level, log_ratio, ratio, segment_totals
from tests.losses.batches import MASK, SEGMENTS, poison, random_batch
from tests.reference import losses as reference


def test_log_ratio_is_the_difference_and_0_off_the_mask() -> None:
    logprobs, _, batch = random_batch(0)
    found = log_ratio(logprobs, batch.sampler_logprobs, MASK)
    wanted = logprobs[MASK].astype(np.float64) - batch.sampler_logprobs[MASK]
    np.testing.assert_allclose(found[MASK], wanted, atol=1e-6)
    np.testing.assert_array_equal(found[~MASK], 0.0)


def test_log_ratio_gradient_is_1_on_the_mask_whatever_stands_off_it() -> None:
    logprobs, _, batch = random_batch(0)
    for argument, sign in ((0, 1.0), (1, -1.0)):
        gradient = jax.grad(lambda *a: jnp.sum(log_ratio(*a, MASK)), argnums=argument)
        found = gradient(logprobs, batch.sampler_logprobs)
        np.testing.assert_array_equal(found, np.where(MASK, sign, 0.0))


def test_a_fault_on_the_mask_shows() -> None:
    values = np.array([[np.nan, -np.inf]], np.float32)
    found = log_ratio(values, np.zeros((1, 2)), np.ones((1, 2), bool))
    assert np.isnan(found[0, 0])
    assert found[0, 1] == -np.inf


def test_ratio_saturates_instead_of_overflowing() -> None:
    given = np.array([-np.inf, -200.0, 0.0, 0.5, 19.0, 21.0, 200.0, np.inf], np.float32)
    found = np.asarray(ratio(given))
    wanted = np.exp(np.minimum(given.astype(np.float64), MAX_LOG_RATIO))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-30)
    assert found[2] == 1.0
    assert np.isfinite(found).all()
    assert np.isnan(ratio(np.float32(np.nan)))


def test_ratio_gradient_is_the_ratio_and_0_where_saturated() -> None:
    given = np.array([-200.0, 0.0, 0.5, 21.0, 200.0], np.float32)
    found = jax.grad(lambda x: jnp.sum(ratio(x)))(given)
    np.testing.assert_allclose(found, [0.0, 1.0, np.exp(0.5), 0.0, 0.0], rtol=1e-6)


def test_a_zero_advantage_times_an_overflowing_ratio_is_0_and_not_nan() -> None:
    def loss(log_ratio):
        return jnp.sum(0.0 * ratio(log_ratio))

    value, gradient = jax.value_and_grad(loss)(np.array([1000.0, np.inf], np.float32))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0.0)


LEVELS = ["token", "sequence", "geometric"]


def slow_at_level(values: np.ndarray, level: str) -> np.ndarray:
    out = np.zeros(MASK.shape)
    for tokens in reference.responses(MASK, SEGMENTS):
        for t, value in reference.at_level({t: float(values[t]) for t in tokens}, level).items():
            out[t] = value
    return out


@pytest.mark.parametrize("level", LEVELS)
def test_levels_equal_the_reference(level) -> None:
    logprobs, _, batch = random_batch(1)
    per_token = np.asarray(log_ratio(logprobs, batch.sampler_logprobs, MASK))
    wanted = slow_at_level(per_token, level)
    for values in (per_token, poison(per_token, MASK)):
        np.testing.assert_allclose(at_level(values, MASK, SEGMENTS, level), wanted, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_of_levels_equal_finite_differences(level) -> None:
    """The objective is curved in the ratio, as GSPO's is."""
    logprobs, _, batch = random_batch(2)
    per_token = np.asarray(log_ratio(logprobs, batch.sampler_logprobs, MASK))
    tilt = np.random.default_rng(0).normal(size=MASK.shape)

    def objective(x):
        return jnp.sum(tilt * ratio(at_level(x, MASK, SEGMENTS, level)) * MASK)

    def slow(x):
        return np.sum(tilt * np.exp(slow_at_level(x, level)) * MASK)

    wanted = reference.finite_differences(slow, per_token.astype(np.float64))
    np.testing.assert_allclose(jax.grad(objective)(per_token), wanted, atol=1e-5)
    found = jax.grad(objective)(poison(per_token, MASK))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_segment_ids_reach_the_row_length() -> None:
    """S segments of one token each: nothing falls off the end of the table."""
    ids = np.array([[1, 2, 3, 4]], np.int32)
    values = np.array([[1.0, 2.0, 4.0, 8.0]], np.float32)
    np.testing.assert_array_equal(segment_totals(values, ids), [[0, 1, 2, 4, 8]])
    for level in LEVELS:
        found = at_level(values, np.ones((1, 4), bool), ids, level)
        np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("mask", [np.zeros_like(MASK), MASK & (SEGMENTS == 1)])
def test_the_geometric_mean_of_fully_masked_segments_is_0(mask) -> None:
    values = poison(np.ones(mask.shape), mask)
    np.testing.assert_array_equal(
        at_level(values, mask, SEGMENTS, "geometric"), mask.astype(np.float32)
    )
