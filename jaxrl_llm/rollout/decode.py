"""Prefill and KV-cache decode of the in-process engine: two jitted functions of fixed shapes.

What it is: a second forward pass of the model, over the same parameters, in an inference engine's
numerics (precision.py). It is written apart from the learner's on purpose: cached and
incremental, with every factor of a linear layer quantised. What it is not: a scheduler; which
request sits in which row is local.py's business.

Every expert meets every token, and a token's gate values are zero for the rest. At the sizes of
in-process experiments this is the fastest way; for large models it pays E / K times the arithmetic.

Shapes: B rows computed together, C tokens of each; R rows of the KV cache, M positions of each; D
width, H query heads, KV key and value heads, P head size, E experts, K experts per token, F width
of an expert, L MoE layers, n layers of a segment, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.layers import attend, rms_norm, rotary_table, rotate
from jaxrl_llm.model.moe import route
from jaxrl_llm.rollout.precision import Numerics, Precision, Weights, quantize, round_wide
from jaxrl_llm.rollout.sampling import Leaf, Samplers, sample

Array = jax.Array
Cache = dict[str, tuple[Array, Array]]
"""Keys and values of each segment, f32[n, R, M, KV, P] each."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What decode needs to know of each row of the cache. The host writes it before every call."""

    active: Leaf  # bool[R]
    token: Leaf  # i32[R], the next to be consumed
    position: Leaf  # i32[R], of that token
    end: Leaf  # i32[R], the position at which the row is full
    stops: Leaf  # i32[R, Z], stop ids, padded with -1
    samplers: Samplers  # leaves lead with R


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """What one decode call sampled; row r made counts[r] steps, all of them its first ones."""

    counts: Leaf  # i32[R]
    active: Leaf  # bool[R], the row goes on
    tokens: Leaf  # i32[steps, R]
    logprobs: Leaf  # f32[steps, R]; the last one of a row is not finite if its forward was not
    routes: Leaf  # i16[steps, R, L, K]


def empty_cache(model: ModelConfig, *, rows: int, length: int) -> Cache:
    """A KV cache of zeros for `rows` rows of `length` positions."""

    def zeros(layers: int) -> Array:
        return jnp.zeros((layers, rows, length, model.num_kv_heads, model.head_dim))

    return {
        f"{index:02}": (zeros(layers), zeros(layers))
        for index, (_, layers) in enumerate(model.segments)
    }


@partial(jax.jit, static_argnames="numerics", donate_argnames="cache")
def prefill(
    weights: Weights, cache: Cache, tokens: Array, start: Array, rows: Array, *, numerics: Numerics
) -> tuple[Cache, Array]:
    """Consume tokens of prompts without sampling.

    Args:
      tokens: i32[B, C]; columns beyond a prompt's end hold any token.
      start: i32[], position of the first column.
      rows: i32[B] of the cache; a row that does not exist drops its writes.

    What columns beyond the end leave in the cache is overwritten before it is ever seen.

    Returns:
      the cache and routes i16[B, C, L, K].
    """
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    cache, _, routes = extend(weights, cache, tokens, positions, rows, numerics=numerics)
    return cache, routes


@partial(jax.jit, static_argnames=("numerics", "steps"), donate_argnames="cache")
def decode(
    weights: Weights, cache: Cache, slots: Slots, enough: Array, *, numerics: Numerics, steps: int
) -> tuple[Cache, Decoded]:
    """Sample up to `steps` tokens for every active row.

    Ends early once `enough` (i32[]) rows have finished, so that others can take their place, or
    all have. A row finishes after a stop id, at its end, or when its log-probability is not
    finite. Rows at rest are computed along and change nothing that is ever read.
    """
    model = numerics.model
    size = slots.token.shape[0]
    began = jnp.count_nonzero(slots.active)
    made = (
        jnp.zeros((steps, size), jnp.int32),
        jnp.zeros((steps, size), jnp.float32),
        jnp.zeros((steps, size, model.num_moe_layers, model.moe.experts_per_token), jnp.int16),
    )

    def goes_on(carry: tuple[Any, ...]) -> Array:
        step, _, active, *_ = carry
        left = jnp.count_nonzero(active)
        return (step < steps) & (left > 0) & (began - left < enough)

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, cache, active, token, position, made = carry
        cache, hidden, routes = extend(
            weights, cache, token[:, None], position[:, None], None, numerics=numerics
        )
        logits = _product(hidden[:, 0], weights["head"])
        sampled, logprobs = sample(logits, position, slots.samplers)
        new = (sampled, logprobs, routes[:, 0])
        made = tuple(whole.at[step].set(part) for whole, part in zip(made, new, strict=True))
        token = jnp.where(active, sampled, token)
        position = position + active
        stopped = jnp.any(sampled[:, None] == slots.stops, axis=-1)
        active = active & ~stopped & (position < slots.end) & jnp.isfinite(logprobs)
        return step + 1, cache, active, token, position, made

    start = (0, cache, slots.active, slots.token, slots.position, made)
    _, cache, active, _, position, made = jax.lax.while_loop(goes_on, advance, start)
    return cache, Decoded(position - slots.position, active, *made)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where tokens [B, C] sit; the same for all layers."""

    rows: Array | None  # i32[B] of the cache; None: row b is b
    positions: Array  # i32[B, C]
    rotary: tuple[Array, Array]  # f32[B, C, P / 2] each


def extend(
    weights: Weights,
    cache: Cache,
    tokens: Array,
    positions: Array,
    rows: Array | None,
    *,
    numerics: Numerics,
) -> tuple[Cache, Array, Array]:
    """The model on tokens i32[B, C], which enter the cache and attend to it; not jitted.

    Args:
      positions: i32[B, C]; those before them are in the cache already.
      rows: i32[B] of the cache, a row that does not exist drops its writes; None: row b is b.

    Returns:
      the cache, hidden f32[B, C, D] after the final norm, and routes i16[B, C, L, K].
    """
    model, precision = numerics.model, numerics.precision
    place = _Place(rows, positions, rotary_table(positions, model.head_dim, model.rope_theta))

    def layer(carry: tuple[Array, Array, Array], xs: tuple[Array, Weights]) -> tuple[Any, Any]:
        hidden, keys, values = carry
        index, block = xs
        normed = _norm(hidden, block["attention_norm"], numerics)
        query, key, value = _project(normed, place.rotary, block, numerics)
        keys, values = _store(keys, key, index, place), _store(values, value, index, place)
        change = _attend(query, (keys[index], values[index]), place, block, precision)
        hidden = round_wide(hidden + change, precision)
        change, routes = _mlp(_norm(hidden, block["mlp_norm"], numerics), block, numerics)
        return (round_wide(hidden + change, precision), keys, values), routes

    hidden, routes = weights["embed"][tokens], []
    # Accelerators round float32 factors unless told not to; the grids are finer than that.
    with jax.default_matmul_precision("highest"):
        for name, blocks in weights["segments"].items():
            indices = jnp.arange(blocks["o"].shape[0])
            carry, chosen = jax.lax.scan(layer, (hidden, *cache[name]), (indices, blocks))
            hidden, keys, values = carry
            cache = {**cache, name: (keys, values)}
            routes += [] if chosen is None else [chosen]
    hidden = _norm(hidden, weights["final_norm"], numerics)
    return cache, hidden, jnp.moveaxis(jnp.concatenate(routes), 0, 2)


def _norm(x: Array, scale: Array, numerics: Numerics) -> Array:
    return round_wide(rms_norm(x, scale, numerics.model.norm_eps), numerics.precision)


def _project(
    x: Array, rotary: tuple[Array, Array], block: Weights, numerics: Numerics
) -> tuple[Array, Array, Array]:
    """Query [B, C, H, P], key and value [B, C, KV, P] of x[B, C, D]; the first two rotated."""
    model, precision = numerics.model, numerics.precision
    qkv = _linear(x, block["qkv"], precision).reshape(*x.shape[:-1], -1, model.head_dim)
    heads, kv_heads = model.num_heads, model.num_kv_heads
    query, key, value = jnp.split(qkv, (heads, heads + kv_heads), axis=-2)
    query = round_wide(rotate(_norm(query, block["q_norm"], numerics), rotary), precision)
    key = round_wide(rotate(_norm(key, block["k_norm"], numerics), rotary), precision)
    return query, key, value


def _store(stored: Array, new: Array, layer: Array, place: _Place) -> Array:
    """Put new [B, C, KV, P] at its place in one layer of the cache [n, R, M, KV, P]."""
    rows = jnp.arange(stored.shape[1]) if place.rows is None else place.rows
    return stored.at[layer, rows[:, None], place.positions].set(new, mode="drop")


def _attend(
    query: Array, stored: tuple[Array, Array], place: _Place, block: Weights, precision: Precision
) -> Array:
    """Grouped-query attention over one layer of the cache, and its output layer: [B, C, D]."""
    if place.rows is not None:
        stored = stored[0][place.rows], stored[1][place.rows]
    visible = jnp.arange(stored[0].shape[1]) <= place.positions[..., None]
    # Ahead of a row may lie an earlier occupant's NaN, which a mask and a share of 0 do not erase.
    reached = visible[:, -1, :, None, None]
    keys, values = (jnp.where(reached, part, 0.0) for part in stored)
    attended = attend(query, keys, values, visible)
    return _linear(attended.reshape(*attended.shape[:2], -1), block["o"], precision)


def _mlp(x: Array, block: Weights, numerics: Numerics) -> tuple[Array, Array | None]:
    """The dense or sparse MLP of x[B, C, D], and routes i16[B, C, K], None of a dense one."""
    moe, precision = numerics.model.moe, numerics.precision
    gate, up = jnp.split(_linear(x, block["gate_up"], precision), 2, axis=-1)
    inner = jax.nn.silu(gate) * up
    if "router" not in block:
        return _linear(inner, block["down"], precision), None
    logits = _product(quantize(x, numerics.router_grid, axis=-1), block["router"])
    router = route(logits, moe.experts_per_token, None, normalize=moe.normalize_weights)
    chosen = router.experts[..., None] == jnp.arange(moe.num_experts)
    weights = jnp.sum(jnp.where(chosen, router.weights[..., None], 0.0), axis=-2)
    # Every expert quantises its own inner values, as separate products would.
    inner = inner.reshape(*x.shape[:-1], moe.num_experts, moe.expert_width)
    inner = quantize(inner, precision, axis=-1) * weights[..., None]
    output = _product(inner.reshape(*x.shape[:-1], -1), block["down"])
    return round_wide(output, precision), router.experts.astype(jnp.int16)


def _linear(x: Array, matrix: Array, precision: Precision) -> Array:
    """A linear layer: x[..., I] is quantised per token, the matrix already is."""
    return round_wide(_product(quantize(x, precision, axis=-1), matrix), precision)


def _product(x: Array, matrix: Array) -> Array:
    """x[..., I] @ matrix[I, O] in float32, flattened to two dimensions: one large product."""
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), matrix, precision="highest")
    return flat.reshape(*x.shape[:-1], -1)
