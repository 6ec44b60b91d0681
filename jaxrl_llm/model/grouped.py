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
from jaxrl_llm.sharding import Layout, alike

Array = jax.Array
Experts = dict[str, Array]
"""Expert parameters of one layer: gate and up [E, D, F], down [E, F, D]."""

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
        spare, _ = _block_rows(experts.size, num_experts)
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


def _block_rows(assignments: int, num_experts: int) -> tuple[int, int]:
    """Rows of a large and of a small block: powers of two near half and an eighth of a mean load.

    Large ones make products efficient, small ones leave little of an expert's last one empty.
    """
    mean = max(assignments / num_experts, 1)
    small = 2 ** min(max(round(math.log2(mean / 8)), 3), 7)
    return 4 * small, small


@jax.custom_vjp
def _blocked(x: Array, weights: Array, params: Experts, order: Order) -> Array:
    """One expert after another on its rows, a block at a time, with loops as long as they need be.

    order has a large block of spare rows. What is read and written between two products stays in
    the cache: tokens are gathered when their block comes up. The last block of an expert may reach
    into the rows of the next one: there its gate values are 0, and what it writes is overwritten.
    """
    return _forward(x, weights, params, order)[0]


def _forward(x: Array, weights: Array, params: Experts, order: Order) -> tuple[Array, Array]:
    """The sum, [N, D], and what the experts' first product gave, [R, 2F]."""
    tokens, scales = _tokens(order), weights_of_rows(weights, order.moves)

    def one_expert(expert: Array, outputs: Any) -> Any:
        into, down = _matrices(params, expert)
        end = order.ends[expert]

        def block(first: Array, size: int, outputs: tuple[Array, Array]) -> tuple[Array, Array]:
            hidden = (x[_cut(tokens, first, size)] @ into).astype(x.dtype)
            gate, up = jnp.split(hidden.astype(jnp.float32), 2, axis=-1)
            inner = jax.nn.silu(gate) * up * _own(scales, first, size, end)[:, None]
            rows = inner.astype(x.dtype) @ down
            return _put(outputs[0], rows, first), _put(outputs[1], hidden, first)

        return _each_block(block, order, expert, params, outputs)

    shapes = (tokens.size, x.shape[1]), (tokens.size, 2 * params["down"].shape[1])
    outputs = alike(tuple(jnp.zeros(shape, x.dtype) for shape in shapes), (x, params))
    rows, hidden = jax.lax.fori_loop(0, order.sizes.size, one_expert, outputs)
    return from_rows(rows, order.moves), hidden


def _backward(
    saved: tuple[Array, Array, Experts, Order, Array], gradient: Array
) -> tuple[Array, Array, Experts, None]:
    x, weights, params, order, hidden = saved
    tokens, scales = _tokens(order), weights_of_rows(weights, order.moves)

    def one_expert(expert: Array, totals: tuple[Array, Array, Experts]) -> Any:
        # Transposed once, not for every block.
        into, down = (matrix.T for matrix in _matrices(params, expert))
        end = order.ends[expert]

        def block(first: Array, size: int, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            to_rows, to_scales, to_into, to_down = sums
            places = _cut(tokens, first, size)
            token, pull, scale = (
                x[places],
                gradient[places],
                _own(scales, first, size, end)[:, None],
            )
            gate, up = jnp.split(_cut(hidden, first, size).astype(jnp.float32), 2, axis=-1)
            share = jax.nn.sigmoid(gate)
            inner = share * gate * up
            to_inner = _wide(pull, down)
            to_scales = _put(to_scales, jnp.sum(to_inner * inner, axis=-1), first)
            to_inner *= scale
            to_gate = to_inner * up * share * (1 + gate * (1 - share))
            to_hidden = jnp.concatenate([to_gate, to_inner * share * gate], axis=-1).astype(x.dtype)
            to_into += _wide(token.T, to_hidden)
            to_down += _wide((inner * scale).astype(x.dtype).T, pull)
            return _put(to_rows, to_hidden @ into, first), to_scales, to_into, to_down

        to_rows, to_scales, to_params = totals
        zeros = [jnp.zeros_like(matrix.T, jnp.float32) for matrix in (into, down)]
        sums = _each_block(block, order, expert, params, (to_rows, to_scales, *zeros))
        to_rows, to_scales, to_into, to_down = sums
        new = dict(zip(("gate", "up"), jnp.split(to_into, 2, axis=-1), strict=True), down=to_down)
        new = {
            name: whole.at[expert].set(new[name].astype(x.dtype))
            for name, whole in to_params.items()
        }
        return to_rows, to_scales, new

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


def _matrices(params: Experts, expert: Array) -> tuple[Array, Array]:
    """gate and up of an expert side by side, [D, 2F], and down [F, D]."""
    gate, up, down = (params[name][expert] for name in ("gate", "up", "down"))
    return jnp.concatenate([gate, up], axis=-1), down


def _each_block(
    block: Callable[[Array, int, Any], Any],
    order: Order,
    expert: Array,
    params: Experts,
    carry: Any,
) -> Any:
    """block(first row, rows, carry) for the rows of one expert: large blocks, then small ones."""
    large, small = _block_rows(order.moves.row.size, params["gate"].shape[0])
    first = order.ends[expert] - order.sizes[expert]
    count = order.sizes[expert] // large
    carry = jax.lax.fori_loop(0, count, lambda i, c: block(first + i * large, large, c), carry)
    rest = first + count * large
    count = -(-(order.ends[expert] - rest) // small)
    return jax.lax.fori_loop(0, count, lambda i, c: block(rest + i * small, small, c), carry)


def _own(scales: Array, first: Array, size: int, end: Array) -> Array:
    """The gate values of a block's rows, 0 of those after the expert's last one."""
    return jnp.where(first + jnp.arange(size) < end, _cut(scales, first, size), 0)


def _cut(x: Array, first: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, first, size)


def _put(x: Array, part: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, first, axis=0)


def _wide(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)
