import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.kl import KLConfig, k1, k2, k3, kl_estimate, kl_penalty
from tests.losses.batches import MASK, random_batch
from tests.reference import losses as reference

ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
ONE = np.ones((1, 1), bool)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_values_and_gradients_equal_the_reference(name) -> None:
    logprobs, _, batch = random_batch(0)
    found = kl_estimate(logprobs, batch.ref_logprobs, MASK, name)
    np.testing.assert_array_equal(found, ESTIMATORS[name](logprobs, batch.ref_logprobs, MASK))
    np.testing.assert_array_equal(found[~MASK], 0.0)

    def slow(values):
        pairs = zip(values[MASK], batch.ref_logprobs[MASK], strict=True)
        return sum(reference.kl(name, float(p), float(q)) for p, q in pairs)

    at = np.where(MASK, logprobs, 0).astype(np.float64)
    np.testing.assert_allclose(jnp.sum(found), slow(at), rtol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(kl_estimate(x, batch.ref_logprobs, MASK, name)))
    wanted = reference.finite_differences(slow, at)
    np.testing.assert_allclose(gradient(logprobs), wanted, atol=1e-5)


def test_expected_values_and_gradients_are_those_of_the_table() -> None:
    """Summed over a whole vocabulary instead of sampled: which divergence does each descend?"""
    rng = np.random.default_rng(0)
    p_logits, q_logits = jnp.asarray(rng.normal(size=(2, 1, 5)), jnp.float32)
    log_q = jax.nn.log_softmax(q_logits)
    everything = np.ones((1, 5), bool)

    def expected_gradient(estimator):
        p = jax.nn.softmax(p_logits)  # who sampled: a constant

        def loss(logits):
            return jnp.sum(p * estimator(jax.nn.log_softmax(logits), log_q, everything))

        return loss(p_logits), jax.grad(loss)(p_logits)

    def divergence(logits):
        log_p = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    def other_direction(logits):
        return jnp.sum(jnp.exp(log_q) * (log_q - jax.nn.log_softmax(logits)))

    k1_value, k1_gradient = expected_gradient(k1)
    _, k2_gradient = expected_gradient(k2)
    k3_value, k3_gradient = expected_gradient(k3)
    np.testing.assert_allclose([k1_value, k3_value], divergence(p_logits), rtol=1e-5)
    np.testing.assert_allclose(k1_gradient, 0.0, atol=1e-6)
    np.testing.assert_allclose(k2_gradient, jax.grad(divergence)(p_logits), atol=1e-6)
    np.testing.assert_allclose(k3_gradient, jax.grad(other_direction)(p_logits), atol=1e-6)


PENALTIES = [
    ("k2", "importance"),
    ("k1", "unbiased"),
    ("k3", "unbiased"),
    ("k1", "importance"),
    ("k3", "none"),
]


@pytest.mark.parametrize(("estimator", "weight"), PENALTIES)
def test_what_a_penalty_on_the_samplers_tokens_descends(estimator, weight) -> None:
    """In expectation over mu, summed over a whole vocabulary; the docstring's second table."""
    rng = np.random.default_rng(1)
    p_logits, q_logits, mu_logits = jnp.asarray(rng.normal(size=(3, 1, 5)), jnp.float32)
    log_q, log_mu = jax.nn.log_softmax(q_logits), jax.nn.log_softmax(mu_logits)
    everything = np.ones((1, 5), bool)
    cfg = KLConfig(coefficient=1.0, estimator=estimator, weight=weight)
    importance = jnp.exp(jax.nn.log_softmax(p_logits) - log_mu)

    def penalty(logits):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(log_mu) * kl_penalty(logprobs, log_q, importance, everything, cfg))

    def divergence(logits):
        log_p = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    found, wanted = jax.grad(penalty)(p_logits), jax.grad(divergence)(p_logits)
    if (estimator, weight) in PENALTIES[:3]:
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    else:  # k1 descends nothing, and unweighted k3 something else
        assert np.abs(found - wanted).max() > 0.03
    if weight != "none" and estimator != "k2":
        np.testing.assert_allclose(penalty(p_logits), divergence(p_logits), rtol=1e-5)


def test_the_unbiased_k3_has_the_gradient_of_the_weighted_k2() -> None:
    """Token by token; only the value tells them apart."""
    logprobs, _, batch = random_batch(2)
    weight = np.where(MASK, np.random.default_rng(0).uniform(0.5, 2, MASK.shape), 0)

    def penalty(logprobs, estimator, kind):
        cfg = KLConfig(coefficient=1.0, estimator=estimator, weight=kind)
        return jnp.sum(kl_penalty(logprobs, batch.ref_logprobs, weight, MASK, cfg))

    k2_gradient = jax.grad(penalty)(logprobs, "k2", "importance")
    k3_gradient = jax.grad(penalty)(logprobs, "k3", "unbiased")
    np.testing.assert_allclose(k3_gradient, k2_gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(k3_gradient[~MASK], 0.0)
    assert abs(penalty(logprobs, "k2", "importance") - penalty(logprobs, "k3", "unbiased")) > 0.01


@pytest.mark.parametrize("d", [-25.0, -16.0, 3.0])
def test_the_unbiased_k3_pulls_towards_the_reference_from_any_distance(d: float) -> None:
    """Its gradient is w * d, also where k3 saturates and its derivative with that of w cancels."""
    cfg = KLConfig(coefficient=1.0, estimator="k3", weight="unbiased")

    def penalty(logprobs):
        return kl_penalty(logprobs, np.float32([[-30.0]]), np.float32([[2.0]]), ONE, cfg)[0, 0]

    gradient = jax.grad(penalty)(np.float32([[d - 30.0]]))
    np.testing.assert_allclose(gradient, [[2 * d]], rtol=1e-5)


def test_k3_saturates_instead_of_overflowing() -> None:
    def loss(logprobs):
        return k3(logprobs, np.zeros((1, 1), np.float32), ONE)[0, 0]

    value, gradient = jax.value_and_grad(loss)(np.float32([[-1000.0]]))
    assert value == pytest.approx(np.exp(20.0), rel=1e-6)
    assert gradient[0, 0] == 0.0


def test_k3_keeps_the_small_divergence_of_nearly_equal_policies() -> None:
    """exp(d) - 1 - d in float32 would return noise of 6e-8 around 5e-9, negative half the time."""
    d = np.float32(1e-4)
    found = k3(np.float32([[0.0]]), np.float32([[d]]), ONE)
    np.testing.assert_allclose(found, [[d * d / 2]], rtol=1e-2)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_policies_have_no_divergence(name) -> None:
    logprobs, _, _ = random_batch(0)
    np.testing.assert_array_equal(kl_estimate(logprobs, logprobs, MASK, name), 0.0)
