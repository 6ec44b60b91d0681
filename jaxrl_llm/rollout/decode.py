"""Prefill and KV-cache decode of the in-process engine: jitted functions of fixed shapes.

What it is: a second forward pass of the model, over the same parameters, in an inference engine's
numerics (precision.py). It is written apart from the learner's on purpose: cached and
incremental, with every factor of a linear layer quantised. What it is not: a scheduler; which
request sits in which row is local.py's business.

Layers are written out one by one, and their weights are cut apart before (by_layer): a compiler for
CPUs copies what a program cuts out of a stack of matrices before it multiplies. A few rows of every
expert are one product, what is left goes expert by expert in blocks of rows; in small models every
expert meets every token. Attention reads the cache in blocks of positions, up to the last one that
any row needs.

Shapes: R rows of the KV cache, C tokens of each computed together; D width, H query heads, KV key
and value heads, P head size, E experts, K experts per token, F width of an expert, L MoE layers, V
vocabulary, B any number of rows.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.model.assignments import (
    Moves,
    Order,
    from_rows,
    sort_by_expert,
    weights_of_rows,
)
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.layers import rms_norm, rotary_table, rotate
from jaxrl_llm.model.moe import route
from jaxrl_llm.model.transformer import unembed
from jaxrl_llm.rollout.precision import Numerics, Precision, Weights, quantize, round_wide
from jaxrl_llm.rollout.sampling import Leaf, Samplers, sample

Array = jax.Array
Stored = list[tuple[Array, Array]]
"""Of each block of S positions keys f32[R, KV, P, S] and values f32[R, KV, S, P]: right factors of
products as they lie."""

Cache = list[Stored]
"""Of each layer."""

BLOCKS = 8
"""Blocks of the cache, at most: each is written out in the program of every layer."""

BLOCK = 64
"""Positions of a block of the cache, or a multiple of it, unless one block holds all: products with
other numbers of columns are slow on CPUs."""

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


def empty_cache(
    model: ModelConfig, *, rows: int, length: int, positions: int | None = None
) -> Cache:
    """A KV cache of zeros for `rows` rows of `length` positions.

    Args:
      positions: leave out all blocks but those that so many need, rounded up to a power of two,
        since each number of blocks compiles.
    """
    size = min(length, BLOCK * -(-length // (BLOCK * BLOCKS)))
    blocks = -(-length // size)
    if positions is not None:
        blocks = min(blocks, 2 ** (-(-positions // size) - 1).bit_length())
    lead = rows, model.num_kv_heads
    return [
        [
            (jnp.zeros((*lead, model.head_dim, size)), jnp.zeros((*lead, size, model.head_dim)))
            for _ in range(blocks)
        ]
        for _ in range(model.num_layers)
    ]


def by_layer(weights: Weights) -> Weights:
    """The weights as this module reads them: "layers", a list, takes the place of "segments".

    Layers are new arrays: of a stack a program copies what it multiplies, in every step.
    """
    rest = {name: leaf for name, leaf in weights.items() if name != "segments"}
    return {**rest, "layers": _layers(weights["segments"])}


@jax.jit
def _layers(segments: Weights) -> list[Weights]:
    return [
        jax.tree.map(lambda leaf, at=index: leaf[at], stacked)
        for stacked in segments.values()
        for index in range(stacked["mlp_norm"].shape[0])
    ]


@jax.jit
def take_rows(cache: Cache, rows: Array) -> Cache:
    """The cache of some rows, i32[B]; the others are lost."""
    return jax.tree.map(lambda stored: stored[rows], cache)


@partial(jax.jit, donate_argnames="cache")
def enter(cache: Cache, prompts: Cache, slots: Array) -> Cache:
    """Copy each row of a cache of prompts, which has the first blocks alone, to its slot, i32[B].

    A slot that does not exist drops its row.
    """

    def copy(stored: Array, new: Array) -> Array:
        return stored.at[slots].set(new, mode="drop")

    return [
        [*jax.tree.map(copy, stored[: len(new)], new), *stored[len(new) :]]
        for stored, new in zip(cache, prompts, strict=True)
    ]


@partial(jax.jit, static_argnames="numerics", donate_argnames="cache")
def prefill(
    weights: Weights, cache: Cache, tokens: Array, start: Array, *, numerics: Numerics
) -> tuple[Cache, Array]:
    """Consume tokens of prompts without sampling.

    Args:
      tokens: i32[R, C]; -1 in columns beyond a prompt's end.
      start: i32[], position of the first column.

    Returns:
      the cache and routes i16[R, C, L, K].
    """
    positions = jnp.where(tokens < 0, -1, start + jnp.arange(tokens.shape[1]))
    cache, _, routes = extend(weights, cache, tokens, positions, numerics=numerics)
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
        cache, hidden, routes = extend(weights, cache, token[:, None], place, numerics=numerics)
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


def extend(
    weights: Weights, cache: Cache, tokens: Array, positions: Array, *, numerics: Numerics
) -> tuple[Cache, Array, Array]:
    """The model on tokens i32[R, C], which enter the cache and attend to it; not jitted.

    Args:
      weights: of by_layer().
      positions: i32[R, C]; those before them are in the cache already. -1 where there is no token:
        nothing is written for it, and what comes out for it means nothing.

    Returns:
      the cache, hidden f32[R, C, D] after the final norm, and routes i16[R, C, L, K].
    """
    model, precision = numerics.model, numerics.precision
    length = sum(keys.shape[-1] for keys, _ in cache[0])
    # A constant: a compiler for CPUs would compute the cosines again in every layer for every head.
    with jax.ensure_compile_time_eval():
        table = rotary_table(jnp.arange(length), model.head_dim, model.rope_theta)
    rotary = table[0][positions], table[1][positions]

    hidden, routes, cache = weights["embed"][tokens], [], list(cache)
    # Accelerators round float32 factors unless told not to; the grids are finer than that.
    with jax.default_matmul_precision("highest"):
        for depth, layer in enumerate(weights["layers"]):
            block = layer["attention"]
            normed = _norm(hidden, layer["attention_norm"], numerics)
            query, key, value = _project(normed, rotary, block, numerics)
            cache[depth] = _store(cache[depth], key, value, positions)
            attended = _attend(query, cache[depth], positions)
            change = _linear(attended, block["o"], precision)
            hidden = round_wide(hidden + change, precision)
            normed = _norm(hidden, layer["mlp_norm"], numerics)
            change, chosen = _mlp(normed, positions >= 0, layer["mlp"], numerics)
            hidden = round_wide(hidden + change, precision)
            routes += [] if chosen is None else [chosen]
    return cache, _norm(hidden, weights["final_norm"], numerics), jnp.stack(routes, axis=2)


def _norm(x: Array, scale: Array, numerics: Numerics) -> Array:
    return round_wide(rms_norm(x, scale, numerics.model.norm_eps), numerics.precision)


def _project(
    x: Array, rotary: tuple[Array, Array], block: Weights, numerics: Numerics
) -> tuple[Array, Array, Array]:
    """Query [R, C, H, P], key and value [R, C, KV, P] of x[R, C, D]; the first two rotated."""
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


def _store(stored: Stored, key: Array, value: Array, positions: Array) -> Stored:
    """Put keys and values [R, C, KV, P] at their positions in one layer of the cache."""
    # A share of 0 does not erase a NaN, which a later occupant of the row would find ahead. Keys
    # may have one: they spoil those alone who look at them.
    sound = jnp.all(jnp.isfinite(value), axis=-1, keepdims=True)
    key, value = jnp.where(sound, key, jnp.nan), jnp.where(sound, value, 0.0)
    rows, _, _, size = stored[0][0].shape
    row, offset = jnp.arange(rows)[:, None], positions % size

    def put(index: int, keys: Array, values: Array) -> tuple[Array, Array]:
        here = (positions >= 0) & (positions // size == index)
        line = jnp.where(here, row, rows)  # one that does not exist
        return (
            keys.at[line, :, :, offset].set(key, mode="drop"),
            values.at[line, :, offset].set(value, mode="drop"),
        )

    return [put(index, *block) for index, block in enumerate(stored)]


def _attend(query: Array, stored: Stored, positions: Array) -> Array:
    """Grouped-query attention of query[R, C, H, P] over one layer of the cache: [R, C, H P].

    Block after block of positions up to the last one that any row needs. A block that a row does
    not need changes not a bit of its result.
    """
    batch, columns, _, size = query.shape
    _, kv_heads, _, block_size = stored[0][0].shape
    # The queries that share a key head are rows of one product.
    queries = jnp.moveaxis(query.reshape(batch, columns, kv_heads, -1, size), 1, 3)
    queries = queries.reshape(batch, kv_heads, -1, size) * size**-0.5

    def block(
        index: int, keys: Array, values: Array, carry: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        top, total, attended = carry
        ahead = index * block_size + jnp.arange(block_size)
        visible = (ahead <= positions[..., None])[:, None, None]
        scores = jnp.einsum("bkqp,bkps->bkqs", queries, keys)
        scores = scores.reshape(batch, kv_heads, -1, columns, block_size)
        scores = jnp.where(visible, scores, -1e30).reshape(batch, kv_heads, -1, block_size)
        highest = jnp.maximum(top, jnp.max(scores, axis=-1))
        shares, decay = jnp.exp(scores - highest[..., None]), jnp.exp(top - highest)
        attended = attended * decay[..., None] + jnp.einsum("bkqs,bksp->bkqp", shares, values)
        return highest, total * decay + jnp.sum(shares, axis=-1), attended

    start = jnp.full(queries.shape[:-1], -1e30), jnp.zeros(queries.shape[:-1])
    carry = block(0, *stored[0], (*start, jnp.zeros_like(queries)))
    last = jnp.max(positions)
    for index, (keys, values) in enumerate(stored[1:], start=1):
        compute = partial(block, index, keys, values)
        carry = jax.lax.cond(index * block_size <= last, compute, lambda same: same, carry)
    _, total, attended = carry
    attended = (attended / total[..., None]).reshape(batch, kv_heads, -1, columns, size)
    return jnp.moveaxis(attended, 3, 1).reshape(batch, columns, -1)


def _mlp(
    x: Array, present: Array, block: Weights, numerics: Numerics
) -> tuple[Array, Array | None]:
    """The dense or sparse MLP of x[R, C, D], and routes i16[R, C, K], None of a dense one."""
    moe, precision = numerics.model.moe, numerics.precision
    flat = quantize(x, precision, axis=-1).reshape(-1, x.shape[-1])
    if "router" not in block:
        inner = _inner(flat @ block["gate"], flat @ block["up"], precision)
        return round_wide(inner @ block["down"], precision).reshape(x.shape), None
    logits = _product(quantize(x, numerics.router_grid, axis=-1), block["router"])
    router = route(logits, moe.experts_per_token, None, normalize=moe.normalize_weights)
    experts = jnp.where(present[..., None], router.experts, moe.num_experts)
    chosen = [a.reshape(-1, moe.experts_per_token) for a in (experts, router.weights)]
    compute = _all_experts if flat.size * moe.num_experts * moe.expert_width <= FEW else _blocked
    output = compute(flat, chosen[0], chosen[1], block, precision)
    return round_wide(output, precision).reshape(x.shape), router.experts.astype(jnp.int16)


def _inner(gate: Array, up: Array, precision: Precision) -> Array:
    """What an MLP's second product takes, of what its first two gave."""
    gate, up = round_wide(gate, precision), round_wide(up, precision)
    return quantize(jax.nn.silu(gate) * up, precision, axis=-1)


def _all_experts(
    x: Array, experts: Array, weights: Array, block: Weights, precision: Precision
) -> Array:
    """Like _blocked, with every expert on every token: a token's weights are 0 for the rest."""
    chosen = experts[..., None] == jnp.arange(block["router"].shape[-1])
    scales = jnp.sum(jnp.where(chosen, weights[..., None], 0.0), axis=-2)
    gate, up = (jnp.einsum("nd,edf->nef", x, block[name]) for name in ("gate", "up"))
    inner = _inner(gate, up, precision) * scales[..., None]
    return inner.reshape(x.shape[0], -1) @ block["down"].reshape(-1, x.shape[1])


def _blocked(
    x: Array, experts: Array, weights: Array, block: Weights, precision: Precision
) -> Array:
    """The sum over each token's experts: of [N, D], experts i32[N, K] and weights f32[N, K].

    Assignments are sorted by expert. The first few of every expert are one product of all; the
    others come block by block, of which the last of an expert reaches into the rows of the next,
    which overwrites what is left there.
    """
    num_experts, width = block["router"].shape[-1], x.shape[-1]
    matrices = [block[name] for name in ("gate", "up", "down")]
    few, size = _block_rows(experts.size, num_experts)
    order = sort_by_expert(experts, num_experts, spare=size)
    moves, start = _few_first(order, experts, few), num_experts * few
    tokens = jnp.minimum(moves.source // experts.shape[1], x.shape[0] - 1)
    scales = weights_of_rows(weights, moves)[:, None]

    def compute(tokens: Array, scales: Array, gate: Array, up: Array, down: Array) -> Array:
        return (_inner(x[tokens] @ gate, x[tokens] @ up, precision) * scales) @ down

    blocks = -(-jnp.maximum(order.sizes - few, 0) // size)
    ends = jnp.cumsum(blocks)

    def more(index: Array, output: Array) -> Array:
        owner = jnp.sum(index >= ends)
        rest = start + order.ends[owner] - order.sizes[owner] + few
        first = rest + (index - ends[owner] + blocks[owner]) * size
        mine = (jax.lax.dynamic_slice_in_dim(part, first, size) for part in (tokens, scales))
        new = compute(*mine, *(matrix[owner] for matrix in matrices))
        return jax.lax.dynamic_update_slice_in_dim(output, new, first, axis=0)

    def others(output: Array) -> Array:
        output = jnp.pad(output, ((0, tokens.size - start), (0, 0)))
        return from_rows(jax.lax.fori_loop(0, ends[-1], more, output), moves)

    if few == 0:
        return others(jnp.zeros((0, width)))
    first = (part[:start].reshape(num_experts, few, *part.shape[1:]) for part in (tokens, scales))
    output = compute(*first, *matrices).reshape(start, width)
    return jax.lax.cond(ends[-1] > 0, others, lambda output: from_rows(output, moves), output)


def _block_rows(assignments: int, num_experts: int) -> tuple[int, int]:
    """Rows of every expert in the one product of all, 0 if there is none, and rows of a block.

    Twice a mean load holds nearly all. Where loads are large, blocks have fewer empty rows; where
    few experts are chosen at all, the product would read the others for nothing.
    """
    if num_experts <= 2 * assignments <= 32 * num_experts:
        few = 8 * -(-assignments // (4 * num_experts))
        return few, few
    return 0, 16 if assignments <= 16 * num_experts else 64


def _few_first(order: Order, experts: Array, few: int) -> Moves:
    """The order's rows after `few` of every expert, which the first of its assignments go to."""
    count, firsts, place = experts.size, order.ends - order.sizes, jnp.arange(few)
    source = order.moves.source[firsts[:, None] + place]
    source = jnp.where(place < order.sizes[:, None], source, count).reshape(-1)
    expert = jnp.minimum(experts, firsts.size - 1)
    rank = order.moves.row - firsts[expert]
    row = jnp.where(rank < few, expert * few + rank, source.size + order.moves.row)
    return Moves(jnp.concatenate([source, order.moves.source]), row)


def _linear(x: Array, matrix: Array, precision: Precision) -> Array:
    """A linear layer: x[..., I] is quantised per token, the matrix already is."""
    return round_wide(_product(quantize(x, precision, axis=-1), matrix), precision)


def _product(x: Array, matrix: Array) -> Array:
    """x[..., I] @ matrix[I, O] in float32, flattened to two dimensions: one large product."""
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), matrix, precision="highest")
    return flat.reshape(*x.shape[:-1], -1)
