"""Assignments, each a token and one of its experts, put into rows and taken out of them again.

What it is: the order by expert, and the moves of tokens and gate values between [N, ...] and rows,
with gradients that are moves as well. What it is not: what happens to the rows (grouped.py), or
their way to other devices (exchange.py).

Shapes: N tokens, D width, E experts here, K experts per token, R rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moves:
    """Assignments (a token and one of its experts) put into rows, at most one in each."""

    source: Array  # i32[R], the assignment n * K + k in this row; N * K in an empty row
    row: Array  # i32[N, K], where the assignment went; R if it is in none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Order:
    """Assignments sorted by expert; those to no expert, and spare rows, are at the end."""

    moves: Moves
    sizes: Array  # i32[E], assignments of each expert
    ends: Array  # i32[E], the row after its last one


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


def sort_by_expert(experts: Array, num_experts: int, *, spare: int = 0) -> Order:
    """The order of experts i32[N, K], where the id E stands for none, with `spare` empty rows."""
    count, rows = experts.size, experts.size + spare
    expert, assignment = sorted_assignments(experts, num_experts + 1)
    sizes = jnp.sum(experts.reshape(-1, 1) == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    used = expert < num_experts
    row = jnp.where(used, jnp.arange(count, dtype=jnp.int32), rows)
    source = jnp.pad(jnp.where(used, assignment, count), (0, spare), constant_values=count)
    row = jnp.zeros_like(row).at[assignment].set(row)
    return Order(Moves(source, row.reshape(experts.shape)), sizes, jnp.cumsum(sizes))


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
    # In memory in this order: a CPU's compiler would read them across, one by one.
    index = jax.lax.optimization_barrier(moves.row.T)
    parts = (rows.at[row].get(mode="fill", fill_value=0).astype(jnp.float32) for row in index)
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
