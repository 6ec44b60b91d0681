import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.arrays import RouterOutput
from jaxrl_llm.losses.router import balance_loss, expert_load, router_loss, z_loss
from jaxrl_llm.losses.weights import token_weights
from tests.losses.batches import SEGMENTS
from tests.reference import losses as reference

LAYERS, EXPERTS, SLOTS = 2, 5, 2
REAL = SEGMENTS > 0
WEIGHTS = np.asarray(token_weights(REAL, SEGMENTS, per="token"))


def random_router(seed: int, *, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(logits, experts), the logits rubbish where there is no token."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(LAYERS, *REAL.shape, EXPERTS)) * spread
    experts = np.argsort(-logits, axis=-1)[..., :SLOTS].astype(np.int32)
    rubbish = rng.choice([np.nan, np.inf, -np.inf], logits.shape)
    return np.where(REAL[..., None], logits, rubbish).astype(np.float32), experts


def clean(logits: np.ndarray) -> np.ndarray:
    return np.where(REAL[..., None], logits, 0).astype(np.float64)


def test_z_loss_equals_the_reference() -> None:
    logits, _ = random_router(0)
    value, gradient = jax.jit(jax.value_and_grad(z_loss))(logits, WEIGHTS)
    np.testing.assert_allclose(value, reference.z_loss(clean(logits), WEIGHTS), rtol=1e-5)
    wanted = reference.finite_differences(lambda x: reference.z_loss(x, WEIGHTS), clean(logits))
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


def test_expert_load_equals_the_reference() -> None:
    _, experts = random_router(1)
    load = jax.jit(expert_load, static_argnames="num_experts")(
        experts, WEIGHTS, num_experts=EXPERTS
    )
    np.testing.assert_allclose(load, reference.expert_load(experts, WEIGHTS, EXPERTS), rtol=1e-5)
    np.testing.assert_allclose(np.sum(load, axis=-1), 1.0, rtol=1e-6)


def test_balance_loss_equals_the_reference() -> None:
    logits, experts = random_router(2)
    load = reference.expert_load(experts, WEIGHTS, EXPERTS)
    value, gradient = jax.jit(jax.value_and_grad(balance_loss))(
        logits, load.astype(np.float32), WEIGHTS
    )

    def slow(x):
        return reference.balance_loss(x, load, WEIGHTS)

    np.testing.assert_allclose(value, slow(clean(logits)), rtol=1e-5)
    wanted = reference.finite_differences(slow, clean(logits))
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


def test_balance_loss_is_1_at_balance_and_the_number_of_experts_at_collapse() -> None:
    uniform = np.zeros((1, 1, EXPERTS, EXPERTS), np.float32)
    weights = np.full((1, EXPERTS), 1 / EXPERTS, np.float32)
    experts = np.arange(EXPERTS).reshape(1, 1, EXPERTS, 1)
    load = expert_load(experts, weights, num_experts=EXPERTS)
    np.testing.assert_allclose(balance_loss(uniform, load, weights), 1.0, rtol=1e-6)
    collapsed = uniform + 100 * np.eye(EXPERTS, dtype=np.float32)[0]
    load = expert_load(0 * experts, weights, num_experts=EXPERTS)
    np.testing.assert_allclose(balance_loss(collapsed, load, weights), EXPERTS, rtol=1e-6)


def test_descending_the_balance_loss_unloads_the_loaded_expert() -> None:
    logits, _ = random_router(3, spread=0.1)
    experts = np.zeros((LAYERS, *REAL.shape, 1), np.int32)
    load = expert_load(experts, WEIGHTS, num_experts=EXPERTS)
    gradient = np.asarray(jax.jit(jax.grad(balance_loss))(logits, load, WEIGHTS))
    assert (gradient[:, REAL, 0] > 0).all()
    assert (gradient[:, REAL, 1:] < 0).all()


def test_the_load_carries_no_gradient() -> None:
    logits, experts = random_router(4)

    def through_load(weights):
        return jnp.sum(expert_load(experts, weights, num_experts=EXPERTS))

    np.testing.assert_array_equal(jax.grad(through_load)(WEIGHTS), 0.0)
    load = np.full((LAYERS, EXPERTS), 0.2, np.float32)
    by_load = jax.grad(balance_loss, argnums=1)(logits, load, WEIGHTS)
    np.testing.assert_array_equal(by_load, 0.0)


@jax.jit
def loss_of(logits, experts, weights, load=None):
    router = RouterOutput(logits, experts, weights=experts)
    return router_loss(router, weights, z_coefficient=0.1, balance_coefficient=0.2, load=load)


def test_router_loss_adds_both_and_reports_each() -> None:
    logits, experts = random_router(5)
    out = loss_of(logits, experts, WEIGHTS)
    load = reference.expert_load(experts, WEIGHTS, EXPERTS)
    z = reference.z_loss(clean(logits), WEIGHTS)
    balance = reference.balance_loss(clean(logits), load, WEIGHTS)
    np.testing.assert_allclose(out.loss, 0.1 * z + 0.2 * balance, rtol=1e-5)
    np.testing.assert_allclose(out.metrics["router/z_loss"].value(), z, rtol=1e-5)
    np.testing.assert_allclose(out.metrics["router/balance_loss"].value(), balance, rtol=1e-5)


def test_with_the_load_of_the_whole_batch_micro_batches_add() -> None:
    logits, experts = random_router(6)
    load = expert_load(experts, WEIGHTS, num_experts=EXPERTS)
    parts = [
        loss_of(logits[:, b : b + 1], experts[:, b : b + 1], WEIGHTS[b : b + 1], load)
        for b in range(REAL.shape[0])
    ]
    whole = loss_of(logits, experts, WEIGHTS, load)
    np.testing.assert_allclose(sum(part.loss for part in parts), whole.loss, rtol=1e-5)
    np.testing.assert_allclose(whole.loss, loss_of(logits, experts, WEIGHTS).loss, rtol=1e-6)
    for name, mean in whole.metrics.items():
        added = parts[0].metrics[name] + parts[1].metrics[name] + parts[2].metrics[name]
        np.testing.assert_allclose(added.value(), mean.value(), rtol=1e-5)


def test_without_it_they_add_to_the_mean_of_their_own_switch_losses() -> None:
    logits, experts = random_router(7)
    parts, wanted = [], 0.0
    for b in range(REAL.shape[0]):
        rows = slice(b, b + 1)
        parts.append(loss_of(logits[:, rows], experts[:, rows], WEIGHTS[rows]).metrics)
        share = WEIGHTS[rows].sum()
        if share:
            own = WEIGHTS[rows] / share
            load = reference.expert_load(experts[:, rows], own, EXPERTS)
            wanted += share * reference.balance_loss(clean(logits)[:, rows], load, own)
    found = sum(part["router/balance_loss"].total for part in parts)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("case", ["no tokens", "no MoE layers"])
def test_nothing_to_balance_costs_nothing(case) -> None:
    logits, experts = random_router(8)
    weights = np.zeros_like(WEIGHTS) if case == "no tokens" else WEIGHTS
    layers = 0 if case == "no MoE layers" else LAYERS

    def loss(x):
        return loss_of(x, experts[:layers], weights).loss

    value, gradient = jax.value_and_grad(loss)(logits[:layers])
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_coefficients_of_0_leave_the_metrics_and_no_loss() -> None:
    logits, experts = random_router(9)
    router = RouterOutput(logits, experts, weights=experts)
    out = router_loss(router, WEIGHTS, z_coefficient=0.0, balance_coefficient=0.0)
    assert out.loss == 0.0
    assert all(mean.value() > 0 for mean in out.metrics.values())
