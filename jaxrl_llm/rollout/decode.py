"""Prefill and KV-cache decode of the in-process engine: two jitted functions of fixed shapes.

What it is: a second forward pass of the model, over the same parameters, in an inference engine's
numerics (precision.py). It is written apart from the learner's on purpose: cached and
incremental, with every factor of a linear layer quantised. What it is not: a scheduler; which
request sits in which row is local.py's business.

The weights are read as the learner has them (precision.pack_weights). Tokens are sorted by expert,
and each expert multiplies its own in blocks of rows; in small models every expert meets every
token. Attention reads the cache in blocks of positions, up to the last one that any row needs.

Shapes: B rows computed together, C tokens of each; R rows of the KV cache, M positions of each; D
width, H query heads, KV key and value heads, P head size, E experts, K experts per token, F width
of an expert, L MoE layers, n layers of a segment, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.model.assignments import (
    Order,
    from_rows,
    sort_by_expert,
    to_rows,
    weights_of_rows,
)
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.layers import rms_norm, rotary_table, rotate
from jaxrl_llm.model.moe import route
from jaxrl_llm.model.transformer import unembed
from jaxrl_llm.rollout.precision import Numerics, Precision, Weights, quantize, round_wide
from jaxrl_llm.rollout.sampling import Leaf, Samplers, sample

Array = jax.Array
Cache = dict[str, tuple[Array, Array]]
"""Of each segment keys f32[n, Z, R, KV, P, S] and values f32[n, Z, R, KV, S, P]: Z blocks of S
positions, each in one piece of memory, whose rows are the right factors of products as they lie."""

BLOCK = 64
"""Positions of a block of the cache."""

FEW = 2**24
"""Up to so many products of a token's value with an expert's column all experts meet all tokens: a
loop over the experts' blocks takes longer for its many small steps. Reckoned for CPUs."""


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

    block = min(length, BLOCK)
    blocks = -(-length // block)

    def zeros(layers: int, *last: int) -> Array:
        return jnp.zeros((layers, blocks, rows, model.num_kv_heads, *last))

    return {
        f"{index:02}": (
            zeros(layers, model.head_dim, block),
            zeros(layers, block, model.head_dim),
        )
        for index, (_, layers) in enumerate(model.segments)
    }


@partial(jax.jit, static_argnames="numerics", donate_argnames="cache")
def prefill(
    weights: Weights, cache: Cache, tokens: Array, start: Array, rows: Array, *, numerics: Numerics
) -> tuple[Cache, Array]:
    """Consume tokens of prompts without sampling.

    Args:
      tokens: i32[B, C]; -1 in columns beyond a prompt's end.
      start: i32[], position of the first column.
      rows: i32[B] of the cache; a row that does not exist drops its writes.

    Returns:
      the cache and routes i16[B, C, L, K].
    """
    positions = jnp.where(tokens < 0, -1, start + jnp.arange(tokens.shape[1]))
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
        place = jnp.where(active, position, -1)[:, None]
        cache, hidden, routes = extend(
            weights, cache, token[:, None], place, None, numerics=numerics
        )
        logits = _product(hidden[:, 0], unembed(weights, model))
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
    positions: Array  # i32[B, C], -1 where there is no token
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
      positions: i32[B, C]; those before them are in the cache already. -1 where there is no token:
        nothing is written for it, and what comes out for it means nothing.
      rows: i32[B] of the cache, a row that does not exist drops its writes; None: row b is b.

    Returns:
      the cache, hidden f32[B, C, D] after the final norm, and routes i16[B, C, L, K].
    """
    model, precision = numerics.model, numerics.precision
    place = _Place(rows, positions, rotary_table(positions, model.head_dim, model.rope_theta))

    def layers(blocks: Weights, carry: tuple[Any, ...], index: Array) -> tuple[Any, Any]:
        hidden, stored = carry
        block = _at(blocks["attention"], index)
        normed = _norm(hidden, blocks["attention_norm"][index], numerics)
        query, key, value = _project(normed, place.rotary, block, numerics)
        stored = _store(stored, (key, value), index, place)
        change = _linear(_attend(query, stored, index, place), block["o"], precision)
        hidden = round_wide(hidden + change, precision)
        normed = _norm(hidden, blocks["mlp_norm"][index], numerics)
        change, routes = _mlp(normed, positions >= 0, blocks["mlp"], index, numerics)
        return (round_wide(hidden + change, precision), stored), routes

    hidden, routes = weights["embed"][tokens], []
    # Accelerators round float32 factors unless told not to; the grids are finer than that.
    with jax.default_matmul_precision("highest"):
        for name, blocks in weights["segments"].items():
            # Not slices of the weights as the loop's inputs: each would be copied whole.
            indices = jnp.arange(blocks["mlp_norm"].shape[0])
            carry, chosen = jax.lax.scan(partial(layers, blocks), (hidden, cache[name]), indices)
            hidden, cache = carry[0], {**cache, name: carry[1]}
            routes += [] if chosen is None else [chosen]
    hidden = _norm(hidden, weights["final_norm"], numerics)
    return cache, hidden, jnp.moveaxis(jnp.concatenate(routes), 0, 2)


def _at(tree: Weights, index: Array) -> Weights:
    return {name: leaf[index] for name, leaf in tree.items()}


def _norm(x: Array, scale: Array, numerics: Numerics) -> Array:
    return round_wide(rms_norm(x, scale, numerics.model.norm_eps), numerics.precision)


def _project(
    x: Array, rotary: tuple[Array, Array], block: Weights, numerics: Numerics
) -> tuple[Array, Array, Array]:
    """Query [B, C, H, P], key and value [B, C, KV, P] of x[B, C, D]; the first two rotated."""
    precision = numerics.precision
    x = quantize(x, precision, axis=-1)
    query, key, value = (
        round_wide(_product(x, block[name]), precision).reshape(
            *x.shape[:-1], -1, numerics.model.head_dim
        )
        for name in "qkv"
    )
    query = round_wide(rotate(_norm(query, block["q_norm"], numerics), rotary), precision)
    key = round_wide(rotate(_norm(key, block["k_norm"], numerics), rotary), precision)
    return query, key, value


def _store(
    stored: tuple[Array, Array], new: tuple[Array, Array], layer: Array, place: _Place
) -> tuple[Array, Array]:
    """Put keys and values [B, C, KV, P] at their place in one layer of the cache."""
    keys, values = stored
    _, blocks, rows, _, _, size = keys.shape
    row = (jnp.arange(rows) if place.rows is None else place.rows)[:, None]
    block = jnp.where(place.positions < 0, blocks, place.positions // size)  # that does not exist
    offset = place.positions % size
    return (
        keys.at[layer, block, row, :, :, offset].set(new[0], mode="drop"),
        values.at[layer, block, row, :, offset].set(new[1], mode="drop"),
    )


def _attend(query: Array, stored: tuple[Array, Array], layer: Array, place: _Place) -> Array:
    """Grouped-query attention of query[B, C, H, P] over one layer of the cache: [B, C, H P].

    Block after block of positions up to the last one that any row needs. A block that a row does
    not need changes not a bit of its result.
    """
    keys, values = stored
    batch, columns, _, size = query.shape
    _, blocks, _, kv_heads, _, block_size = keys.shape
    # The queries that share a key head are rows of one product.
    queries = jnp.moveaxis(query.reshape(batch, columns, kv_heads, -1, size), 1, 3)
    queries = queries.reshape(batch, kv_heads, -1, size) * size**-0.5
    last = jnp.max(place.positions, axis=1)

    def block(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, attended = carry
        here = (layer, index) if place.rows is None else (layer, index, place.rows)
        ahead = index * block_size + jnp.arange(block_size)
        # Ahead of a row may lie an earlier occupant's NaN, which a share of 0 does not erase.
        reached = (ahead <= last[:, None])[:, None, :, None]
        value = jnp.where(reached, values[here], 0.0)
        visible = (ahead <= place.positions[..., None])[:, None, None]
        scores = jnp.einsum("bkqp,bkps->bkqs", queries, keys[here])
        scores = scores.reshape(batch, kv_heads, -1, columns, block_size)
        scores = jnp.where(visible, scores, -1e30).reshape(batch, kv_heads, -1, block_size)
        highest = jnp.maximum(top, jnp.max(scores, axis=-1))
        shares, decay = jnp.exp(scores - highest[..., None]), jnp.exp(top - highest)
        attended = attended * decay[..., None] + jnp.einsum("bkqs,bksp->bkqp", shares, value)
        return highest, total * decay + jnp.sum(shares, axis=-1), attended

    count = 1 if blocks == 1 else jnp.max(last) // block_size + 1
    start = jnp.full(queries.shape[:-1], -1e30), jnp.zeros(queries.shape[:-1])
    _, total, attended = jax.lax.fori_loop(0, count, block, (*start, jnp.zeros_like(queries)))
    attended = (attended / total[..., None]).reshape(batch, kv_heads, -1, columns, size)
    return jnp.moveaxis(attended, 3, 1).reshape(batch, columns, -1)


def _mlp(
    x: Array, present: Array, stacked: Weights, layer: Array, numerics: Numerics
) -> tuple[Array, Array | None]:
    """The dense or sparse MLP of x[B, C, D], and routes i16[B, C, K], None of a dense one."""
    moe, precision = numerics.model.moe, numerics.precision
    flat = quantize(x, precision, axis=-1).reshape(-1, x.shape[-1])
    if "router" not in stacked:
        block = _at(stacked, layer)
        inner = _inner(flat @ block["gate"], flat @ block["up"], precision)
        return round_wide(inner @ block["down"], precision).reshape(x.shape), None
    logits = _product(quantize(x, numerics.router_grid, axis=-1), stacked["router"][layer])
    router = route(logits, moe.experts_per_token, None, normalize=moe.normalize_weights)
    experts = jnp.where(present[..., None], router.experts, moe.num_experts)
    chosen = [a.reshape(-1, moe.experts_per_token) for a in (experts, router.weights)]
    compute = _all_experts if flat.size * moe.num_experts * moe.expert_width <= FEW else _blocked
    output = compute(flat, chosen[0], chosen[1], stacked, layer, precision)
    return round_wide(output, precision).reshape(x.shape), router.experts.astype(jnp.int16)


def _inner(gate: Array, up: Array, precision: Precision) -> Array:
    """What an MLP's second product takes, of what its first two gave."""
    gate, up = round_wide(gate, precision), round_wide(up, precision)
    return quantize(jax.nn.silu(gate) * up, precision, axis=-1)


def _all_experts(
    x: Array, experts: Array, weights: Array, stacked: Weights, layer: Array, precision: Precision
) -> Array:
    """Like _blocked, with every expert on every token: a token's weights are 0 for the rest."""
    count = stacked["router"].shape[-1]
    chosen = experts[..., None] == jnp.arange(count)
    scales = jnp.sum(jnp.where(chosen, weights[..., None], 0.0), axis=-2)
    gate, up = (jnp.einsum("nd,edf->nef", x, stacked[name][layer]) for name in ("gate", "up"))
    inner = _inner(gate, up, precision) * scales[..., None]
    return inner.reshape(x.shape[0], -1) @ stacked["down"][layer].reshape(-1, x.shape[1])


def _blocked(
    x: Array, experts: Array, weights: Array, stacked: Weights, layer: Array, precision: Precision
) -> Array:
    """The sum over each token's experts: of [N, D], experts i32[N, K] and weights f32[N, K].

    Assignments are sorted by expert, and each expert computes its rows block by block.
    """
    num_experts = stacked["router"].shape[-1]
    size = 16 if experts.size <= 16 * num_experts else 64
    order = sort_by_expert(experts, num_experts, spare=size)
    gate, up = _products(to_rows(x, order.moves), stacked, ("gate", "up"), layer, order)
    scales = weights_of_rows(weights, order.moves)[:, None]
    inner = _inner(gate, up, precision) * scales
    return from_rows(_products(inner, stacked, ("down",), layer, order)[0], order.moves)


def _products(
    rows: Array, stacked: Weights, names: Sequence[str], layer: Array, order: Order
) -> tuple[Array, ...]:
    """rows[R, I] times the named matrices [I, O] of each row's expert in one layer: [R, O] each.

    The last block of an expert reaches into the rows of the next, which overwrites what is left
    there. A block has as many rows as the order has spare ones.
    """
    num_experts, count = order.sizes.size, order.moves.row.size
    size = rows.shape[0] - count
    blocks = -(-order.sizes // size)
    ends = jnp.cumsum(blocks)
    index = jnp.arange(count // size + num_experts)
    owner = jnp.minimum(jnp.sum(index[:, None] >= ends, axis=1), num_experts - 1)
    first = (order.ends - order.sizes)[owner] + (index - (ends - blocks)[owner]) * size

    def block(index: Array, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
        mine = jax.lax.dynamic_slice_in_dim(rows, first[index], size)
        products = (mine @ stacked[name][layer, owner[index]] for name in names)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(output, product, first[index], axis=0)
            for output, product in zip(outputs, products, strict=True)
        )

    outputs = tuple(jnp.zeros((rows.shape[0], stacked[name].shape[-1])) for name in names)
    return jax.lax.fori_loop(0, ends[-1], block, outputs)


def _linear(x: Array, matrix: Array, precision: Precision) -> Array:
    """A linear layer: x[..., I] is quantised per token, the matrix already is."""
    return round_wide(_product(quantize(x, precision, axis=-1), matrix), precision)


def _product(x: Array, matrix: Array) -> Array:
    """x[..., I] @ matrix[I, O] in float32, flattened to two dimensions: one large product."""
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), matrix, precision="highest")
    return flat.reshape(*x.shape[:-1], -1)
