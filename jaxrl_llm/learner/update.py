"""Gradients of any objective in micro-batches, and one optimizer update with them.

Shared by RL (step.py) and the supervised cold start (sft.py). An objective is a sum over tokens
whose weights were computed on the whole mini-batch, so micro-batches add up to it exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.arrays import Array, LossOutput, Mean
from jaxrl_llm.learner.state import Optimizer, TrainState
from jaxrl_llm.model.transformer import Params

Objective = Callable[[Params, Any], LossOutput]


def split_rows(tree: Any, micro_batches: int) -> Any:
    """Leaves [B, ...] to [micro_batches, B / micro_batches, ...], a row of every device at a time.

    Micro-batch m takes rows m, m + micro_batches, ...: each is spread over the devices as the whole
    batch was, and nothing moves between them. B must be a multiple of micro_batches.
    """

    def one(leaf: Array) -> Array:
        return jnp.moveaxis(leaf.reshape(-1, micro_batches, *leaf.shape[1:]), 1, 0)

    return jax.tree.map(one, tree)


def join_rows(parts: Array) -> Array:
    """[micro_batches, B / micro_batches, ...] back to [B, ...]: the inverse of split_rows."""
    return jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])


def accumulate_gradients(
    objective: Objective, params: Params, parts: Any
) -> tuple[Params, LossOutput]:
    """Gradient, loss and metrics of an objective summed over parts; its logprobs joined by rows.

    Args:
      objective: (params, part) -> LossOutput.
      params: differentiated, float32; so are the sums, which are split as they are.
      parts: what split_rows returns; one micro-batch is in memory at a time.
    """

    def loss(params: Params, part: Any) -> tuple[Array, LossOutput]:
        output = objective(params, part)
        return output.loss, output

    def add(total: Params, part: Any) -> tuple[Params, LossOutput]:
        (_, output), gradient = jax.value_and_grad(loss, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, total, gradient), output

    gradient, outputs = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
    logprobs = None if outputs.logprobs is None else join_rows(outputs.logprobs)
    outputs = dataclasses.replace(outputs, logprobs=None)
    summed: LossOutput = jax.tree.map(lambda x: jnp.sum(x, axis=0), outputs)
    return gradient, dataclasses.replace(summed, logprobs=logprobs)


def apply_gradients(
    state: TrainState, gradient: Params, loss: Array, optimizer: Optimizer
) -> tuple[TrainState, dict[str, Mean]]:
    """The next state and the learner/* metrics of the update."""
    updates, opt_state = optimizer.transform.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    values = {
        "learner/loss": loss,
        "learner/grad_norm": optax.tree.norm(gradient),
        "learner/update_norm": optax.tree.norm(updates),
        "learner/learning_rate": jnp.asarray(optimizer.schedule(state.step), jnp.float32),
    }
    one = jnp.ones((), jnp.float32)
    metrics = {name: Mean(value, one) for name, value in values.items()}
    return TrainState(state.step + 1, params, opt_state), metrics
