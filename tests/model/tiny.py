"""A model of every kind of layer, small, with sizes that divide over eight devices."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxrl_llm.model.config import ModelConfig, MoEConfig
from jaxrl_llm.model.transformer import Params, init_params

TINY = ModelConfig(
    vocab_size=16,
    width=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope_theta=1e3,
    moe=MoEConfig(
        num_experts=8, experts_per_token=2, expert_width=8, dense_layers=(1,), dense_width=8
    ),
)


@functools.cache
def params(config: ModelConfig = TINY) -> Params:
    """Random parameters; norm scales away from 1, so that one left out is noticed."""

    def disturb(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if "norm" not in jax.tree_util.keystr(path):
            return leaf
        return leaf + 0.3 * jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape)

    @jax.jit
    def make() -> Params:
        return jax.tree_util.tree_map_with_path(disturb, init_params(config, jax.random.key(0)))

    return make()


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (rows, length), np.int32)


def one_segment(inputs: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """inputs, positions and segment ids of rows that hold one sequence each, without padding."""
    positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    return inputs, positions, np.ones(inputs.shape, np.int32)


def some_routes(rows: int, length: int, config: ModelConfig = TINY, seed: int = 0) -> np.ndarray:
    """Random distinct experts for every token, int16[B, S, L, K]."""
    shape = (rows, length, config.num_moe_layers, config.moe.num_experts)
    order = np.argsort(np.random.default_rng(seed).random(shape), axis=-1)
    return order[..., : config.moe.experts_per_token].astype(np.int16)


def some_gates(rows: int, length: int, config: ModelConfig = TINY, seed: int = 0) -> np.ndarray:
    """Random positive gate values that sum to no particular number, f32[B, S, L, K]."""
    shape = (rows, length, config.num_moe_layers, config.moe.experts_per_token)
    return np.random.default_rng(seed).uniform(0.1, 0.9, shape).astype(np.float32)


def assert_close(found: Any, wanted: Any, tolerance: float) -> None:
    """Every array of a tree equals the other's to within `tolerance` of its largest entry."""

    def compare(path: tuple[Any, ...], a: Any, b: Any) -> None:
        largest = np.max(np.abs(b), initial=0.0)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, found, wanted)


def array_shapes(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[tuple[int, ...]]:
    """The shape of everything a program computes, inside its loops and custom gradients too."""
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values())):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from array_shapes(value)
