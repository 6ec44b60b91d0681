"""A device's experts on the tokens it has: the sum that dispatch() of moe.py promises, locally.

The implementations agree in values and gradients: dense computes all experts for all tokens; the
others sort the tokens by expert and multiply each group by its expert's matrices.

Shapes: N tokens, D width, E experts here, K experts per token, F width inside one expert, R rows,
one for each assignment of an expert to a token and some spare ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrl_llm.model.assignments import Order, from_rows, sort_by_expert, to_rows, weights_of_rows
from jaxrl_llm.model.kernels import grouped_product, ragged_product
from jaxrl_llm.model.layers import transposed
from jaxrl_llm.sharding import Layout, alike

Array = jax.Array
Experts = dict[str, Array]
"""Expert parameters of one layer: gate and up [E, D, F], down [E, F, D]."""

NAMES = ("gate", "up", "down")

Implementation = Literal["dense", "blocked", "ragged", "megablox"]


def expert_sum(
    x: Array,
    experts: Array,
    weights: Array,
    params: Experts,
    implementation: Implementation,
    layout: Layout,
) -> Array:
    """Sum over k of weights[n, k] * swiglu of expert experts[n, k] on x[n]: [N, D] -> [N, D].

    experts: i32[N, K]; the id E stands for none, and adds nothing.
    """
    if implementation == "dense":
        return _dense(x, experts, weights, params)
    num_experts = params["gate"].shape[0]
    if implementation == "blocked":
        params = {name: matrices.astype(x.dtype) for name, matrices in params.items()}
        spare = _block_rows(experts.size, num_experts)[0]
        return _blocked(x, weights, params, sort_by_expert(experts, num_experts, spare=spare))
    order = sort_by_expert(experts, num_experts)
    rows, scales = to_rows(x, order.moves), weights_of_rows(weights, order.moves)[:, None]
    # The product of rows past the last expert's is undefined, but nothing reads it.
    product = grouped_product if implementation == "megablox" else ragged_product
    rows = _scaled_swiglu(rows, scales, params, partial(product, sizes=order.sizes, layout=layout))
    return from_rows(rows, order.moves)


def _scaled_swiglu(
    x: Array, scales: Array, params: Experts, product: Callable[[Array, Array], Array]
) -> Array:
    """scales[R, 1] times the swiglu of x[R, D], as few passes over arrays as wide as D as can be.

    gate and up are one product: x is read once, and its gradient is written once. The scales meet
    the narrower array inside, of which they are a factor as well.
    """
    gate, up, down = (params[name].astype(x.dtype) for name in ("gate", "up", "down"))
    gate, up = jnp.split(product(x, jnp.concatenate([gate, up], axis=-1)), 2, axis=-1)
    return product((jax.nn.silu(gate) * up * scales).astype(x.dtype), down)


def _dense(x: Array, experts: Array, weights: Array, params: Experts) -> Array:
    """All experts for all tokens; the gate value, mostly 0, scales what an expert contributes."""
    num_experts, width, inner = params["gate"].shape
    chosen = experts[..., None] == jnp.arange(num_experts)
    scales = jnp.sum(jnp.where(chosen, weights[..., None], 0.0), axis=1).astype(x.dtype)  # [N, E]
    gate, up = (
        jnp.moveaxis(params[name].astype(x.dtype), 0, 1).reshape(width, num_experts * inner)
        for name in ("gate", "up")
    )
    hidden = (jax.nn.silu(x @ gate) * (x @ up)).reshape(-1, num_experts, inner)
    scaled = (hidden * scales[..., None]).reshape(-1, num_experts * inner)
    return scaled @ params["down"].astype(x.dtype).reshape(num_experts * inner, width)


def _block_rows(assignments: int, num_experts: int) -> tuple[int, ...]:
    """Rows of blocks, the largest first: powers of two near a mean load, its half and its eighth.

    Large ones make products efficient, small ones leave little of an expert's last one empty. Below
    32 rows that is worth less than a pass over the sums of an expert's three gradients, which each
    block takes.
    """
    mean = assignments / num_experts
    large = 2 ** min(max(round(math.log2(mean)), 4), 9)
    return large, large // 2, max(large // 8, min(large // 2, 32))


@jax.custom_vjp
def _blocked(x: Array, weights: Array, params: Experts, order: Order) -> Array:
    """One expert after another on its rows, a block at a time, with loops as long as they need be.

    order has a large block of spare rows. What is read and written between two products stays in
    the cache: tokens are gathered when their block comes up. The last block of an expert may reach
    into the rows of the next one: there its gate values are 0, and what it writes is overwritten.
    """
    return _forward(x, weights, params, order)[0]


def _forward(
    x: Array, weights: Array, params: Experts, order: Order
) -> tuple[Array, tuple[Array, Array]]:
    """The sum, [N, D], and the products with gate and up, [R, F] each."""
    tokens, scales = _tokens(order), weights_of_rows(weights, order.moves)

    def one_expert(expert: Array, outputs: Any) -> Any:
        gate, up, down = (params[name][expert] for name in NAMES)
        end = order.ends[expert]

        def block(first: Array, size: int, outputs: Any) -> Any:
            token = x[_cut(tokens, first, size)]
            hidden = token @ gate, token @ up
            by_gate, by_up = (part.astype(jnp.float32) for part in hidden)
            inner = jax.nn.silu(by_gate) * by_up * _own(scales, first, size, end)[:, None]
            new = inner.astype(x.dtype) @ down, *hidden
            return tuple(_put(whole, part, first) for whole, part in zip(outputs, new, strict=True))

        return _each_block(block, order, expert, params, outputs)

    widths = x.shape[1], *(params["down"].shape[1],) * 2
    outputs = tuple(jnp.zeros((tokens.size, width), x.dtype) for width in widths)
    outputs = alike(outputs, (x, params))
    rows, *hidden = jax.lax.fori_loop(0, order.sizes.size, one_expert, outputs)
    return from_rows(rows, order.moves), tuple(hidden)


def _backward(
    saved: tuple[Array, Array, Experts, Order, tuple[Array, Array]], gradient: Array
) -> tuple[Array, Array, Experts, None]:
    x, weights, params, order, hidden = saved
    tokens, scales = _tokens(order), weights_of_rows(weights, order.moves)

    def one_expert(expert: Array, totals: tuple[Array, Array, Experts]) -> Any:
        matrices = [params[name][expert] for name in NAMES]
        gate, up, down = matrices
        end = order.ends[expert]

        def block(first: Array, size: int, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            to_rows, to_scales, *to_matrices = sums
            places = _cut(tokens, first, size)
            token, pull = x[places], gradient[places]
            scale = _own(scales, first, size, end)[:, None]
            by_gate, by_up = (_cut(part, first, size).astype(jnp.float32) for part in hidden)
            share = jax.nn.sigmoid(by_gate)
            inner = share * by_gate * by_up
            to_inner = _wide(pull, down.T)
            to_scales = _put(to_scales, jnp.sum(to_inner * inner, axis=-1), first)
            to_inner *= scale
            to_gate = to_inner * by_up * share * (1 + by_gate * (1 - share))
            to_up = to_inner * share * by_gate
            to_gate, to_up, inner = (
                part.astype(x.dtype) for part in (to_gate, to_up, inner * scale)
            )
            to_rows = _put(to_rows, to_gate @ gate.T + to_up @ up.T, first)
            columns = transposed(token)
            new = _wide(columns, to_gate), _wide(columns, to_up), _wide(transposed(inner), pull)
            return to_rows, to_scales, *map(jnp.add, to_matrices, new)

        to_rows, to_scales, to_params = totals
        zeros = [jnp.zeros_like(matrix, jnp.float32) for matrix in matrices]
        sums = _each_block(block, order, expert, params, (to_rows, to_scales, *zeros))
        to_rows, to_scales, *new = sums
        to_params = {
            name: to_params[name].at[expert].set(one.astype(x.dtype))
            for name, one in zip(NAMES, new, strict=True)
        }
        return to_rows, to_scales, to_params

    zeros = jnp.zeros((tokens.size, x.shape[1]), x.dtype), jnp.zeros(tokens.size)
    totals = (*alike(zeros, (x, params)), jax.tree.map(jnp.zeros_like, params))
    loop = jax.lax.fori_loop(0, order.sizes.size, one_expert, totals)
    to_rows, to_scales, to_params = loop
    to_weights = to_scales.at[order.moves.row].get(mode="fill", fill_value=0)
    return from_rows(to_rows, order.moves), to_weights, to_params, None


def _blocked_forward(x: Array, weights: Array, params: Experts, order: Order) -> Any:
    output, hidden = _forward(x, weights, params, order)
    return output, (x, weights, params, order, hidden)


_blocked.defvjp(_blocked_forward, _backward)


def _tokens(order: Order) -> Array:
    """i32[R], the token of each row; of a spare one, any."""
    count, chosen = order.moves.row.shape
    return jnp.minimum(order.moves.source // chosen, count - 1)


def _each_block(
    block: Callable[[Array, int, Any], Any],
    order: Order,
    expert: Array,
    params: Experts,
    carry: Any,
) -> Any:
    """block(first row, rows, carry) for the rows of one expert, the largest blocks first."""
    *larger, smallest = _block_rows(order.moves.row.size, params["gate"].shape[0])
    first = order.ends[expert] - order.sizes[expert]

    def blocks(size: int, first: Array, count: Array, carry: Any) -> Any:
        return jax.lax.fori_loop(0, count, lambda i, c: block(first + i * size, size, c), carry)

    for size in larger:
        count = (order.ends[expert] - first) // size
        carry = blocks(size, first, count, carry)
        first += count * size
    return blocks(smallest, first, -(-(order.ends[expert] - first) // smallest), carry)


def _own(scales: Array, first: Array, size: int, end: Array) -> Array:
    """The gate values of a block's rows, 0 of those after the expert's last one."""
    return jnp.where(first + jnp.arange(size) < end, _cut(scales, first, size), 0)


def _cut(x: Array, first: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, first, size)


def _put(x: Array, part: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, first, axis=0)


def _wide(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)
