"""Causal attention within the segments of packed rows, in JAX alone: plain, and by blocks.

What it is: the plain computation, which all others equal wherever there is a token (kernels.py),
and one that computes only the blocks of scores that a token sees something of, holds a few of them
at a time, and has a gradient of its own. What it is not: the projections around it
(transformer.py).

Shapes: B rows, Q queries, S keys, H query heads, KV key and value heads, P head size. By blocks: n
blocks of queries, m of keys, and R = H / KV * BLOCK, the queries of a block that share a key head.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrl_llm.model.layers import map_chunks

Array = jax.Array

ATTENTION = "attention"
"""The name under which recomputation may keep what attention by blocks or by splash gave."""

BLOCK = 256
"""Positions of a block: large products, and at most half a block too much at the diagonal."""

HIDDEN = -1e30
"""The score of what a query does not see. Finite: a query that sees nothing gives a number."""

LOWEST = -1e20
"""Below all scores and above HIDDEN: where nothing is seen, every exponential is 0."""


def attend(query: Array, key: Array, value: Array, visible: Array) -> Array:
    """Grouped-query attention of query[B, Q, H, P] over key and value[B, S, KV, P] -> [B, Q, H, P].

    visible is bool[B, Q, S]. Scores are softmaxed in float32.
    """
    batch, queries, heads, size = query.shape
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))  # [B, KV, S, P]
    # The queries that share a key head are more rows of one product, not more products.
    rows = jnp.swapaxes(query, 1, 2).reshape(batch, key.shape[1], -1, size)
    scores = jnp.einsum("bkrp,bksp->bkrs", rows, key, preferred_element_type=jnp.float32)
    hidden = jnp.where(visible, 0.0, HIDDEN)[:, None]
    scores = scores.reshape(batch, heads, queries, -1) * size**-0.5 + hidden
    shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    shares = shares.reshape(batch, key.shape[1], -1, key.shape[2])
    attended = jnp.einsum("bkrs,bksp->bkrp", shares, value)
    return jnp.swapaxes(attended.reshape(batch, heads, queries, size), 1, 2)


def segment_attention(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    *,
    chunk: int,
    first: Array | int = 0,
) -> Array:
    """Causal attention within each segment of packed rows: attend() with segment_ids i32[B, S].

    Padding (id 0) sees padding only. Scores of `chunk` queries exist at a time; 0: of all. The
    queries may be those of some positions of the row only, from `first` on.
    """
    count = query.shape[1]
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    own_ids, own_index = (
        jax.lax.dynamic_slice_in_dim(x, first, count, axis=1) for x in (segment_ids, index)
    )

    def queries(part: Array, part_ids: Array, part_index: Array) -> Array:
        same = part_ids[:, :, None] == segment_ids[:, None, :]
        return attend(part, key, value, same & (index[:, None, :] <= part_index[:, :, None]))

    return map_chunks(queries, (query, own_ids, own_index), chunk=chunk)


def blocked_attention(
    query: Array, key: Array, value: Array, segment_ids: Array, first: Array | int = 0
) -> Array:
    """segment_attention() at the cost of the segments: blocks that no token sees are left out.

    query [B, Q, H, P], key and value [B, S, KV, P], segment_ids i32[B, S]; all typed alike. Padding
    (id 0) sees nothing and gets 0. Memory is linear in S, of the gradient too: scores are computed
    again there, from their log-sum-exp.
    """
    batch, count, heads, size = query.shape
    kv_heads = key.shape[2]
    own = jax.lax.dynamic_slice_in_dim(segment_ids, first, count, axis=1)
    places = _places(own, segment_ids, first)
    # [B, n, KV, R, P]: the queries that share a key head are more rows of one product.
    grouped = _blocks(query).reshape(batch, -1, BLOCK, kv_heads, heads // kv_heads, size)
    queries = jnp.moveaxis(grouped, 2, 4).reshape(
        batch, -1, kv_heads, heads // kv_heads * BLOCK, size
    )
    keys, values = (jnp.moveaxis(_blocks(x), 2, 3) for x in (key, value))  # [B, m, KV, BLOCK, P]
    output = _attended(queries, keys, values, places)
    output = output.reshape(batch, -1, kv_heads, heads // kv_heads, BLOCK, size)
    return jnp.moveaxis(output, 4, 2).reshape(batch, -1, heads, size)[:, :count]


class _Places(NamedTuple):
    """Where the tokens of each block are, and which blocks see which."""

    ids: Array  # i32[B, n, BLOCK], segments of the queries
    position: Array  # i32[B, n, BLOCK], theirs in the row
    key_ids: Array  # i32[B, m, BLOCK], segments of the keys
    start: Array  # i32[B, n], the first block of keys that a block of queries sees something of
    end: Array  # i32[B, n], the one after the last


def _places(own: Array, segment_ids: Array, first: Array | int) -> _Places:
    ids, key_ids = _blocks(own), _blocks(segment_ids)
    position = _blocks(jnp.broadcast_to(first + jnp.arange(own.shape[1]), own.shape))
    (lowest, highest), (key_lowest, key_highest) = _range(ids), _range(key_ids)
    starts = jnp.arange(key_ids.shape[1]) * BLOCK
    seen = (
        (lowest[:, :, None] <= key_highest[:, None, :])
        & (key_lowest[:, None, :] <= highest[:, :, None])
        & (starts <= jnp.max(position, axis=-1, keepdims=True))
    )
    start, back = (jnp.argmax(x, axis=-1) for x in (seen, seen[..., ::-1]))
    end = jnp.where(jnp.any(seen, axis=-1), seen.shape[-1] - back, 0)
    return _Places(ids, position, key_ids, start, end)


def _range(ids: Array) -> tuple[Array, Array]:
    """The lowest and the highest segment in each block; of padding alone, an empty range."""
    none = jnp.iinfo(ids.dtype).max
    return jnp.min(jnp.where(ids > 0, ids, none), axis=-1), jnp.max(ids, axis=-1)


def _blocks(x: Array) -> Array:
    """x[B, Q, ...] -> [B, n, BLOCK, ...], filled up with zeros."""
    padding = [(0, 0), (0, -x.shape[1] % BLOCK)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, padding).reshape(x.shape[0], -1, BLOCK, *x.shape[2:])


def _scores(
    query: Array, key: Array, row: Array, block: Array, other: Array, places: _Places
) -> Array:
    """f32[KV, R, BLOCK] of one block of queries, [KV, R, P], with one of keys, [KV, BLOCK, P]."""
    ids, position = places.ids[row, block], places.position[row, block]
    key_ids = places.key_ids[row, other]
    seen = (ids[:, None] == key_ids) & (ids > 0)[:, None]
    seen &= other * BLOCK + jnp.arange(BLOCK) <= position[:, None]
    scores = _product("krp,ksp->krs", query, key) * query.shape[-1] ** -0.5
    by_head = scores.reshape(key.shape[0], -1, BLOCK, BLOCK)
    return jnp.where(seen, by_head, HIDDEN).reshape(scores.shape)


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attended(queries: Array, keys: Array, values: Array, places: _Places) -> Array:
    return _forward(queries, keys, values, places)[0]


def _forward(queries: Array, keys: Array, values: Array, places: _Places) -> tuple[Array, Array]:
    """The output [B, n, KV, R, P], and the log-sum-exp of the scores f32[B, n, KV, R]."""
    blocks = queries.shape[1]

    def step(number: Array, outputs: tuple[Array, Array]) -> tuple[Array, Array]:
        row, block = number // blocks, number % blocks
        query = queries[row, block]

        def add(other: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, attended = sums
            scores = _scores(query, keys[row, other], row, block, other, places)
            new = jnp.maximum(largest, jnp.max(scores, axis=-1))
            shares, shrink = jnp.exp(scores - new[..., None]), jnp.exp(largest - new)
            more = _product("krs,ksp->krp", shares.astype(values.dtype), values[row, other])
            total = total * shrink + jnp.sum(shares, axis=-1)
            return new, total, attended * shrink[..., None] + more

        zeros = jnp.zeros_like(query, jnp.float32)
        start = (zeros[..., 0] + LOWEST, zeros[..., 0], zeros)
        bounds = places.start[row, block], places.end[row, block]
        largest, total, attended = jax.lax.fori_loop(*bounds, add, start)
        total = jnp.where(total > 0, total, 1.0)
        new = (attended / total[..., None]).astype(queries.dtype), largest + jnp.log(total)
        return jax.tree.map(lambda whole, part: whole.at[row, block].set(part), outputs, new)

    empty = jnp.zeros_like(queries), jnp.zeros_like(queries[..., 0], jnp.float32)
    return jax.lax.fori_loop(0, queries.shape[0] * blocks, step, empty)


def _backward(
    saved: tuple[Array, Array, Array, _Places, Array, Array], gradient: Array
) -> tuple[Array, Array, Array, None]:
    queries, keys, values, places, output, logsumexp = saved
    blocks, scale = queries.shape[1], queries.shape[-1] ** -0.5
    # Sums over queries are products whose left factor is small and lies transposed, made once.
    gradient = gradient.astype(queries.dtype)
    flipped, flipped_queries = (jnp.swapaxes(x, -1, -2) for x in (gradient, queries))
    wide = gradient.astype(jnp.float32) * output.astype(jnp.float32)
    inner = jnp.sum(wide, axis=-1, keepdims=True)  # [B, n, KV, R, 1]

    def step(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        row, block = number // blocks, number % blocks
        query, pull = queries[row, block], gradient[row, block]

        def add(other: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            to_query, to_keys, to_values = sums
            key, value = keys[row, other], values[row, other]
            scores = _scores(query, key, row, block, other, places)
            shares = jnp.exp(scores - logsumexp[row, block][..., None])
            to_shares = _product("krp,ksp->krs", pull, value)
            to_scores = (shares * (to_shares - inner[row, block]) * scale).astype(query.dtype)
            shares = shares.astype(query.dtype)
            more = _product("kpr,krs->kps", flipped_queries[row, block], to_scores)
            to_keys = to_keys.at[row, other].add(more)
            more = _product("kpr,krs->kps", flipped[row, block], shares)
            to_values = to_values.at[row, other].add(more)
            return to_query + _product("krs,ksp->krp", to_scores, key), to_keys, to_values

        to_queries, *others = sums
        start = (jnp.zeros_like(query, jnp.float32), *others)
        bounds = places.start[row, block], places.end[row, block]
        to_query, to_keys, to_values = jax.lax.fori_loop(*bounds, add, start)
        to_queries = to_queries.at[row, block].set(to_query.astype(queries.dtype))
        return to_queries, to_keys, to_values

    zeros = [jnp.zeros_like(jnp.swapaxes(x, -1, -2), jnp.float32) for x in (keys, values)]
    start = (jnp.zeros_like(queries), *zeros)
    to_queries, to_keys, to_values = jax.lax.fori_loop(0, queries.shape[0] * blocks, step, start)
    back = (jnp.swapaxes(x, -1, -2).astype(keys.dtype) for x in (to_keys, to_values))
    return to_queries, *back, None


def _attended_forward(
    queries: Array, keys: Array, values: Array, places: _Places
) -> tuple[Array, tuple[Array, Array, Array, _Places, Array, Array]]:
    output, logsumexp = checkpoint_name(_forward(queries, keys, values, places), ATTENTION)
    return output, (queries, keys, values, places, output, logsumexp)


_attended.defvjp(_attended_forward, _backward)
