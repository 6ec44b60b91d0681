"""A device's experts on the tokens it has: the sum that dispatch() of moe.py promises, locally.

The implementations agree in values and gradients: dense computes all experts for all tokens; the
others sort the tokens by expert and multiply each group by its expert's matrices.

Shapes: N tokens, D width, E experts here, K experts per token, F width inside one expert.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_llm.model.kernels import grouped_product, ragged_product
from jaxrl_llm.sharding import Layout

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
    block = _block_size(experts.size, num_experts) if implementation == "blocked" else 1
    order = sort_by_expert(experts, num_experts, block)
    rows, scales = to_rows(x, order.moves), weights_of_rows(weights, order.moves)[:, None]
    if implementation == "blocked":
        rows = _blocked(rows, params, order) * scales
    else:  # the product of rows past the last expert's is undefined, but nothing reads it
        product = grouped_product if implementation == "megablox" else ragged_product
        rows = _scaled_swiglu(
            rows, scales, params, partial(product, sizes=order.sizes, layout=layout)
        )
    return from_rows(rows.astype(x.dtype), order.moves)


def _swiglu(x: Array, params: Experts) -> Array:
    gate, up, down = (params[name].astype(x.dtype) for name in ("gate", "up", "down"))
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moves:
    """Assignments (a token and one of its experts) put into rows, at most one in each."""

    source: Array  # i32[R], the assignment n * K + k in this row; N * K in an empty row
    row: Array  # i32[N, K], where the assignment went; R if it is in none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Order:
    """Assignments sorted by expert.

    The rows of an expert are padded to whole blocks, so that a block has one expert. R, the number
    of rows, is the most that any routing needs; rows past the last used block stay empty.
    """

    moves: Moves
    sizes: Array  # i32[E], assignments of each expert
    block_expert: Array  # i32[R / block]
    num_blocks: Array  # i32[], blocks in use


def _block_size(assignments: int, num_experts: int) -> int:
    """A power of two near an eighth of an expert's mean load: little padding, large products."""
    mean = assignments / num_experts
    return 2 ** min(max(round(math.log2(max(mean, 1) / 8)), 3), 8)


def sorted_assignments(experts: Array, num_experts: int) -> tuple[Array, Array]:
    """The experts of all assignments, ascending, and these assignments, n * K + k: i32[N * K] each.

    experts: i32[N, K], below num_experts. Raises ValueError for more than 32 bits can tell apart.
    """
    count = experts.size
    if num_experts * count >= 2**31:
        raise ValueError(
            f"{count} assignments to {num_experts} experts overflow a 32-bit sort key; "
            "use smaller micro-batches, learner.micro_batch_rows"
        )
    # One integer holds expert and assignment: stable, faster to sort than a pair, and typed in a
    # shard_map as what it is made of, where argsort's result is not.
    keys = jnp.sort(experts.reshape(-1) * count + jnp.arange(count, dtype=jnp.int32))
    return keys // count, keys % count


def sort_by_expert(experts: Array, num_experts: int, block: int) -> _Order:
    count, flat = experts.size, experts.reshape(-1)
    index = jnp.arange(count, dtype=jnp.int32)
    expert, assignment = sorted_assignments(experts, num_experts + 1)
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    block_ends = jnp.cumsum(-(-sizes // block))
    shift = (block_ends - -(-sizes // block)) * block - (jnp.cumsum(sizes) - sizes)
    capacity = (count + num_experts * (block - 1)) // block
    here = expert < num_experts
    row = jnp.where(here, index + shift.at[expert].get(mode="clip"), capacity * block)
    block_expert = jnp.sum(jnp.arange(capacity)[:, None] >= block_ends, axis=1)
    source = jnp.full(capacity * block, count, jnp.int32).at[row].set(assignment, mode="drop")
    return _Order(
        moves=Moves(source, jnp.zeros_like(index).at[assignment].set(row).reshape(experts.shape)),
        sizes=sizes,
        block_expert=jnp.minimum(block_expert, num_experts - 1),
        num_blocks=block_ends[-1],
    )


# The two moves below are each other's transpose. Left to autodiff, the gradient of a gather is a
# scatter-add; since both directions of the order are known, it can be a gather again.


@jax.custom_vjp
def to_rows(x: Array, moves: Moves) -> Array:
    """x[N, D] -> [R, D]: every row gets the token of its assignment, an empty row any token."""
    return x.at[moves.source // moves.row.shape[1]].get(mode="clip")


@jax.custom_vjp
def from_rows(rows: Array, moves: Moves) -> Array:
    """rows[R, D] -> [N, D]: every token gets the sum of the rows of its assignments, added up in
    float32; what empty rows hold is nowhere in it."""
    there = (moves.row < rows.shape[0])[..., None]
    # All first assignments, then all second ones ...: sums of such parts are sums of whole arrays,
    # where those along K of [N, K, D] would be sums inside of tiles.
    taken = jnp.split(rows.at[moves.row.T.reshape(-1)].get(mode="clip"), moves.row.shape[1])
    parts = (jnp.where(there[:, k], part.astype(jnp.float32), 0) for k, part in enumerate(taken))
    return sum(parts, jnp.float32(0)).astype(rows.dtype)


@jax.custom_vjp
def weights_of_rows(weights: Array, moves: Moves) -> Array:
    """f32[N, K] -> f32[R]: the gate value of each row's assignment, 0 for an empty row."""
    return weights.reshape(-1).at[moves.source].get(mode="fill", fill_value=0)


def _weights_backward(moves: Moves, gradient: Array) -> tuple[Array, None]:
    return gradient.at[moves.row].get(mode="fill", fill_value=0), None


to_rows.defvjp(
    lambda x, moves: (to_rows(x, moves), moves),
    lambda moves, gradient: (from_rows(gradient, moves), None),
)
from_rows.defvjp(
    lambda rows, moves: (from_rows(rows, moves), moves),
    lambda moves, gradient: (to_rows(gradient, moves), None),
)
weights_of_rows.defvjp(
    lambda weights, moves: (weights_of_rows(weights, moves), moves), _weights_backward
)


@jax.custom_vjp
def _blocked(rows: Array, params: Experts, order: _Order) -> Array:
    """The expert of each block on its rows, block after block: [R, D] -> [R, D].

    The gradient is a second such loop that adds each block's share to the slice of its expert.
    Autodiff of the first would make an array of the size of all parameters for every block.
    """
    block = rows.shape[0] // order.block_expert.shape[0]

    def step(index: Array, output: Array) -> Array:
        x = jax.lax.dynamic_slice_in_dim(rows, index * block, block)
        y = _swiglu(x, _expert(params, order.block_expert[index]))
        return jax.lax.dynamic_update_slice_in_dim(output, y, index * block, 0)

    return jax.lax.fori_loop(0, order.num_blocks, step, jnp.zeros_like(rows))


def _expert(params: Experts, index: Array) -> Experts:
    return {name: matrices[index] for name, matrices in params.items()}


def _blocked_backward(
    saved: tuple[Array, Experts, _Order], gradient: Array
) -> tuple[Array, Experts, None]:
    rows, params, order = saved
    block = rows.shape[0] // order.block_expert.shape[0]

    def step(index: Array, sums: tuple[Array, Experts]) -> tuple[Array, Experts]:
        to_rows, to_params = sums
        expert = order.block_expert[index]
        x, dy = (jax.lax.dynamic_slice_in_dim(a, index * block, block) for a in (rows, gradient))
        _, pullback = jax.vjp(_swiglu, x, _expert(params, expert))
        dx, dparams = pullback(dy)
        to_rows = jax.lax.dynamic_update_slice_in_dim(to_rows, dx, index * block, 0)
        return to_rows, {name: to_params[name].at[expert].add(dparams[name]) for name in dparams}

    zeros = (jnp.zeros_like(rows), jax.tree.map(jnp.zeros_like, params))
    return *jax.lax.fori_loop(0, order.num_blocks, step, zeros), None


_blocked.defvjp(
    lambda rows, params, order: (_blocked(rows, params, order), (rows, params, order)),
    _blocked_backward,
)
