"""The supervised cold start: token-mean cross entropy on demonstrations.

It is the policy loss with every correction off and an advantage of 1 on each demonstrated token, so
it shares accumulation, router losses and optimizer update with RL (step.py).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxrl_llm.arrays import Metrics, TrainBatch
from jaxrl_llm.learner.state import Optimizer, TrainState
from jaxrl_llm.learner.step import LearnerConfig, TrainStep, jit_update, make_gradient
from jaxrl_llm.learner.update import apply_gradients
from jaxrl_llm.losses.clipping import ClipConfig
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.losses.weights import ImportanceConfig
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.sharding import Layout

METRICS = ("policy/entropy", "router/z_loss", "router/balance_loss")
"""Of the policy loss's metrics, those that mean something without a sampler."""


def make_sft_step(
    model: ModelConfig,
    learner: LearnerConfig,
    loss: LossConfig,
    optimizer: Optimizer,
    layout: Layout,
) -> TrainStep:
    """The jitted sft(state, batch) -> (state, metrics): one update, `state` donated.

    Args:
      model: the architecture.
      learner: mesh, micro_batch_rows and compute are read.
      loss: the router coefficients are read.
      optimizer: of the cold start.
      layout: the mesh, and what it splits.

    batch.loss_mask says which targets to learn; advantages, routes and log-probabilities are not
    read. learner/loss is the mean cross entropy in nats, plus the router losses.
    """
    supervised = LossConfig(
        importance=ImportanceConfig(ratio="off"),
        clip=ClipConfig(kind="none"),
        averaging="token",
        router_z_coefficient=loss.router_z_coefficient,
        router_balance_coefficient=loss.router_balance_coefficient,
    )
    alone = dataclasses.replace(
        learner, mini_batches=1, replay="none", replay_gates=False, old_logprobs="none"
    )
    gradient = make_gradient(model, alone, supervised, layout, temperature=1.0)

    def sft(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        batch = dataclasses.replace(
            batch,
            advantages=batch.loss_mask.astype(jnp.float32),
            old_logprobs=None,
            ref_logprobs=None,
            routes=None,
        )
        grads, output = gradient(state.params, batch)
        state, metrics = apply_gradients(state, grads, output.loss, optimizer)
        return state, {name: output.metrics[name] for name in METRICS} | metrics

    return jit_update(sft, model, optimizer, layout)
