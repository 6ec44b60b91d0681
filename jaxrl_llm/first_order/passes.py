"""Forward and backward passes over a whole enumeration, a bounded number of rows at a time.

What it is: the learner's policy (learner/step.py) and the inference engine's (rollout/decode.py)
on the same rows, and the gradient of anything that is a function of token log-probabilities. What
it is not: an objective (gradients.py).

Rows hold one sequence each, from position 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.arrays import NO_ROUTE, Array, LossOutput, ReplayedRoutes, TrainBatch
from jaxrl_llm.learner.step import make_policy
from jaxrl_llm.learner.update import accumulate_gradients, join_rows, split_rows
from jaxrl_llm.model.config import ComputeConfig, ModelConfig
from jaxrl_llm.model.logprobs import token_logprobs
from jaxrl_llm.model.transformer import Params, unembed
from jaxrl_llm.rollout.decode import by_layer, empty_cache, extend
from jaxrl_llm.rollout.precision import Numerics, pack_weights
from jaxrl_llm.sharding import MeshConfig, make_layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What one policy says of every row."""

    logprobs: Array  # f32[B, S], of the targets, nats
    entropy: Array  # f32[B, S], nats
    routes: Array  # int16[B, S, L, K], experts used; NO_ROUTE on padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cotangent:
    """Derivatives of a scalar by the log-probabilities and entropies of a policy."""

    logprobs: Array  # f32[B, S]
    entropy: Array  # f32[B, S]


Score = Callable[[Params, TrainBatch], Scores]


class Passes(NamedTuple):
    """The learner's jitted passes, with numpy results.

    batch.routes are replayed where they are not NO_ROUTE; None lets the router decide everywhere.
    """

    score: Score
    pull_back: Callable[[Params, TrainBatch, Cotangent], Params]  # gradient by the parameters
    # (params, batch, values f32[B]) -> sum over rows of values * pi(response), and its gradient
    expectation: Callable[[Params, TrainBatch, Array], tuple[Array, Params]]


@functools.cache
def make_passes(
    model: ModelConfig, compute: ComputeConfig, *, temperature: float = 1.0, rows: int = 8192
) -> Passes:
    """The learner's passes on one device, over at most `rows` rows at a time.

    Asked again for the same settings it returns the same functions, compiled as they are.
    """
    layout = make_layout(MeshConfig())
    policy = make_policy(model, compute, layout, temperature=temperature)

    def score_part(params: Params, batch: TrainBatch) -> Scores:
        logprobs, entropy, router = policy(params, batch, _replayed(batch))
        return Scores(logprobs, entropy, _kept(jnp.moveaxis(router.experts, 0, 2), batch))

    def product(params: Params, part: tuple[TrainBatch, Cotangent]) -> LossOutput:
        batch, by = part
        logprobs, entropy, _ = policy(params, batch, _replayed(batch))
        return LossOutput(jnp.sum(by.logprobs * logprobs + by.entropy * entropy), {})

    def weighted(params: Params, part: tuple[TrainBatch, Array]) -> LossOutput:
        batch, values = part
        logprobs = policy(params, batch, _replayed(batch))[0]
        return LossOutput(jnp.sum(values * response_probabilities(logprobs, batch.loss_mask)), {})

    def gradient(objective: Any, params: Params, tree: Any) -> tuple[Array, Params]:
        parts = _split(tree, rows)
        grads, output = accumulate_gradients(objective, params, parts)
        return output.loss, grads

    return Passes(
        score=_on_host(lambda params, batch: _map_rows(partial(score_part, params), batch, rows)),
        pull_back=_on_host(lambda params, *tree: gradient(product, params, tree)[1]),
        expectation=_on_host(lambda params, *tree: gradient(weighted, params, tree)),
    )


def _replayed(batch: TrainBatch) -> ReplayedRoutes | None:
    return None if batch.routes is None else ReplayedRoutes(batch.routes)


@functools.cache
def make_sampler_score(numerics: Numerics, *, temperature: float = 1.0, rows: int = 8192) -> Score:
    """The inference engine's jitted pass: its log-probabilities and routes, teacher-forced, numpy.

    The forward pass is the engine's own, in its numerics; only the tokens are given instead of
    sampled. batch.routes are not read.
    """

    def part(weights: Any, batch: TrainBatch) -> Scores:
        count, length = batch.inputs.shape
        positions = jnp.broadcast_to(jnp.arange(length), (count, length))
        cache = empty_cache(numerics.model, rows=count, length=length)
        _, hidden, routes = extend(weights, cache, batch.inputs, positions, numerics=numerics)
        head = unembed(weights, numerics.model)
        logprobs, entropy = token_logprobs(
            hidden, head, batch.targets, temperature=temperature, chunk=256
        )
        return Scores(logprobs, entropy, _kept(routes, batch))

    def score(params: Params, batch: TrainBatch) -> Scores:
        weights = by_layer(pack_weights(params, numerics=numerics))
        return _map_rows(partial(part, weights), batch, rows)

    return _on_host(score)


def response_probabilities(logprobs: Array, mask: Array) -> Array:
    """The probability of each row's response, f32[B], from log-probabilities f32[B, S]."""
    return jnp.exp(jnp.sum(jnp.where(mask, logprobs, 0.0), axis=1))


def flat(params: Params) -> np.ndarray:
    """All parameters, or a gradient, as one vector f64[P]: inner products lose no digits."""
    leaves = jax.tree.leaves(jax.device_get(params))
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])


def _on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """jax.jit(function), its results fetched: arrays that are all of one kind compile it once."""
    compiled = jax.jit(function)
    return lambda *arguments: jax.device_get(compiled(*arguments))


def _kept(routes: Array, batch: TrainBatch) -> Array:
    """int16 routes, NO_ROUTE on padding."""
    real = (batch.segment_ids > 0)[..., None, None]
    return jnp.where(real, routes, NO_ROUTE).astype(jnp.int16)


def _split(tree: Any, rows: int) -> Any:
    """Leaves [B, ...] to [parts, at most `rows`, ...], filled up with rows of zeros: padding."""
    total = jax.tree.leaves(tree)[0].shape[0]
    parts = -(-total // rows)

    def fill(leaf: Array) -> Array:
        return jnp.pad(leaf, [(0, -total % parts)] + [(0, 0)] * (leaf.ndim - 1))

    return split_rows(jax.tree.map(fill, tree), parts)


def _map_rows(function: Callable[[TrainBatch], Scores], batch: TrainBatch, rows: int) -> Scores:
    """function on at most `rows` rows at a time."""
    outputs = jax.lax.map(function, _split(batch, rows))
    return jax.tree.map(lambda leaf: join_rows(leaf)[: batch.inputs.shape[0]], outputs)
