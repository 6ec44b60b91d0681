"""The cold start: cross entropy on demonstrations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.learner.sft import make_sft_step
from jaxrl_llm.learner.state import (
    OptimizerConfig,
    TrainState,
    abstract_state,
    make_optimizer,
    shardings_of,
)
from jaxrl_llm.learner.step import LearnerConfig, make_policy
from jaxrl_llm.losses.kl import KLConfig
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.model.config import ComputeConfig
from tests.learner.tiny import MODEL, make_batch, make_params, make_routes, one_device, replace


def test_the_loss_is_the_mean_cross_entropy_and_falls() -> None:
    """Whatever a sampler left in the batch, and however RL is configured."""
    batch = make_batch()
    mask = np.asarray(batch.loss_mask)
    policy = jax.jit(make_policy(MODEL, ComputeConfig(), one_device(), temperature=1.0))
    logprobs, entropy, _ = policy(make_params(), batch, None)
    batch = replace(
        batch,
        sampler_logprobs=np.full(mask.shape, np.nan, np.float32),
        advantages=np.full(mask.shape, -1, np.float32),
        routes=make_routes(np.random.default_rng(0)),
    )
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.03), 1)
    learner = LearnerConfig(mini_batches=4, micro_batch_rows=8, replay="r2")
    loss = LossConfig(
        kl=KLConfig(coefficient=1.0), entropy_coefficient=1.0, averaging="response_sum"
    )
    step = make_sft_step(MODEL, learner, loss, optimizer, one_device())
    params = jax.tree.map(jnp.asarray, make_params())
    state = TrainState(jnp.int32(0), params, optimizer.transform.init(params))
    state = jax.device_put(state, shardings_of(abstract_state(MODEL, optimizer, one_device())))
    losses = []
    for update in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["learner/loss"].value()))
        if update == 0:
            entropies = np.asarray(entropy, np.float64)[mask]
            found = float(metrics["policy/entropy"].value())
            assert found == pytest.approx(entropies.mean(), rel=1e-5)
    assert losses[0] == pytest.approx(-np.asarray(logprobs, np.float64)[mask].mean(), rel=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    assert metrics.keys() == {
        "learner/loss",
        "learner/grad_norm",
        "learner/update_norm",
        "learner/learning_rate",
        "policy/entropy",
        "router/z_loss",
        "router/balance_loss",
    }
