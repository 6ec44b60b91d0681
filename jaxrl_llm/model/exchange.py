"""Expert parallelism: tokens travel to the devices that have their experts, and back.

Each device of the expert axis has its own tokens and E / P of the experts. Arrays have fixed sizes
and routing is free, so the tokens travel in rounds of an all-to-all: in each, a device sends every
other up to C of the tokens it has for it. There are as many rounds as the fullest pair of devices
anywhere needs, one where the load is even to within SLACK: nothing is ever dropped, and memory
does not grow with the imbalance, only time.

Shapes: N tokens here, D width, K experts per token, P devices of the axis, C rows for each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxrl_llm.model.assignments import (
    Moves,
    from_rows,
    sorted_assignments,
    to_rows,
    weights_of_rows,
)
from jaxrl_llm.model.grouped import Experts, Implementation, expert_sum
from jaxrl_llm.sharding import Layout, varying

Array = jax.Array

AXIS = "expert"
"""The mesh axis."""

SLACK = 1.25
"""How many times the mean load of a pair of devices fits into one round."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Plan:
    """Assignments (a token and one of its experts) in the order in which they are sent."""

    assignment: Array  # i32[N * K], sorted by device, then by expert
    expert: Array  # i32[N * K], theirs
    start: Array  # i32[P], where those for a device begin in that order
    end: Array  # i32[P], where they end
    device: Array  # i32[N, K], to which an assignment goes
    rank: Array  # i32[N, K], its place among those that go there
    rounds: Array  # i32[], the same on all devices


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def exchange(
    implementation: Implementation,
    layout: Layout,
    x: Array,
    experts: Array,
    weights: Array,
    params: Experts,
) -> Array:
    """Sum over k of weights[n, k] * swiglu of expert experts[n, k] on x[n]: [N, D] -> f32[N, D].

    Inside jax.shard_map, all of it typed as different on the devices of the axis. experts i32[N, K]
    are ids among all experts, params those of this device: gate and up [E / P, D, F].

    The gradient makes the rounds once more: reverse-mode differentiation of a loop whose length is
    not known would have to store each of them.
    """
    plan, capacity = _plan(experts, params)
    compute = partial(expert_sum, implementation=implementation, layout=layout)

    def add(index: Array, total: Array) -> Array:
        return total + _round(compute, plan, capacity, index, x, weights, params)

    return jax.lax.fori_loop(0, plan.rounds, add, jnp.zeros_like(x, jnp.float32))


def _forward(
    implementation: Implementation,
    layout: Layout,
    x: Array,
    experts: Array,
    weights: Array,
    params: Experts,
) -> tuple[Array, tuple[Array, Array, Array, Experts]]:
    output = exchange(implementation, layout, x, experts, weights, params)
    return output, (x, experts, weights, params)


def _backward(
    implementation: Implementation,
    layout: Layout,
    saved: tuple[Array, Array, Array, Experts],
    gradient: Array,
) -> tuple[Array, None, Array, Experts]:
    x, experts, weights, params = saved
    plan, capacity = _plan(experts, params)
    compute = partial(expert_sum, implementation=implementation, layout=layout)

    def add(index: Array, totals: tuple[Array, Array, Experts]) -> tuple[Array, Array, Experts]:
        contribution = partial(_round, compute, plan, capacity, index)
        _, pullback = jax.vjp(contribution, x, weights, params)
        return jax.tree.map(jnp.add, totals, pullback(gradient.astype(x.dtype)))

    operands = (x, weights, params)
    wide = jax.tree.map(partial(jnp.zeros_like, dtype=jnp.float32), operands)
    totals = jax.lax.fori_loop(0, plan.rounds, add, wide)
    to_x, to_weights, to_params = jax.tree.map(lambda t, o: t.astype(o.dtype), totals, operands)
    return to_x, None, to_weights, to_params


exchange.defvjp(_forward, _backward)


def _plan(experts: Array, params: Experts) -> tuple[_Plan, int]:
    """Who goes where, and C."""
    devices, here, count = jax.lax.axis_size(AXIS), params["gate"].shape[0], experts.size
    capacity = min(count, -(-int(SLACK * count) // (8 * devices)) * 8)
    expert, assignment = sorted_assignments(experts, devices * here)
    flat, index = experts.reshape(-1), jnp.arange(count, dtype=jnp.int32)
    sizes = jnp.sum(flat[:, None] // here == jnp.arange(devices), axis=0, dtype=jnp.int32)
    end = jnp.cumsum(sizes)
    start = end - sizes
    rank = jnp.zeros_like(flat).at[assignment].set(index - start[expert // here])
    rounds = -(-jnp.max(sizes) // capacity)
    plan = _Plan(
        assignment=assignment,
        expert=expert,
        start=start,
        end=end,
        device=experts // here,
        rank=rank.reshape(experts.shape),
        rounds=jax.lax.pmax(rounds, varying(rounds)),
    )
    return plan, capacity


def _round(
    compute: Callable[..., Array],
    plan: _Plan,
    capacity: int,
    index: Array,
    x: Array,
    weights: Array,
    params: Experts,
) -> Array:
    """What the assignments of one round add to the output: [N, D]."""
    devices, here = plan.start.shape[0], params["gate"].shape[0]
    first = index * capacity
    place = plan.start[:, None] + first + jnp.arange(capacity)  # [P, C], in the plan's order
    used = place < plan.end[:, None]
    source = jnp.where(used, plan.assignment.at[place].get(mode="clip"), plan.assignment.size)
    ids = plan.expert.at[place].get(mode="clip") - here * jnp.arange(devices)[:, None]
    ids = jnp.where(used, ids, here)  # an empty row has no expert
    now = (plan.rank >= first) & (plan.rank < first + capacity)
    row = jnp.where(now, plan.device * capacity + plan.rank - first, devices * capacity)
    moves = Moves(source.reshape(-1), row)

    travel = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)
    scales = weights_of_rows(weights, moves)[:, None]
    received, ids, scales = map(travel, (to_rows(x, moves), ids.reshape(-1, 1), scales))
    return from_rows(travel(compute(received, ids, scales, params)), moves)
