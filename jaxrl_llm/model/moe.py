"""The mixture of experts, in two functions: route() chooses experts, dispatch() computes them.

Routing replay enters at route() as an argument and the choices leave it as a value; nothing else
in the model knows about it. dispatch() is dropless and exact: every token meets every expert it
was given, and all implementations agree with the dense sum in values and gradients.

Shapes: N tokens, D width, E experts, K experts per token, F width inside one expert.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxrl_llm.arrays import NO_ROUTE, ReplayedRoutes, RouterOutput
from jaxrl_llm.model.config import Dispatch
from jaxrl_llm.sharding import BATCH_AXES

Array = jax.Array
Experts = dict[str, Array]
"""Expert parameters of one layer: gate and up [E, D, F], down [E, F, D]."""

Implementation = Literal["dense", "blocked", "ragged"]

FEW_TOKENS = 64
"""Up to this many tokens, "auto" on an accelerator computes all experts rather than sort."""


def route(
    logits: Array, k: int, replayed: ReplayedRoutes | None, *, normalize: bool
) -> RouterOutput:
    """Choose k experts per token and give each its gate value.

    Args:
      logits: f32[..., E] of the live router.
      replayed: fields [..., k]; a token whose ids are NO_ROUTE, and every token if None, takes the
        k experts with the highest logits, best first, and their live gate values.
      normalize: make the gate values of a token sum to 1; replayed ones are used as they are.

    Without replayed gates only the choice is replayed. Gate values are then the softmax of the live
    logits at the chosen ids, so the router keeps learning under replay (R2 and R3 of arXiv
    2512.01374). Replayed gates are constants: at such a token nothing depends on the logits.
    """
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(logits), k)
    if replayed is not None:
        live = replayed.experts == NO_ROUTE
        experts = jnp.where(live, experts, replayed.experts.astype(jnp.int32))
    shares = jax.nn.softmax(logits, axis=-1)
    # A comparison and a sum instead of an index: its gradient is no scatter.
    chosen = experts[..., None] == jnp.arange(logits.shape[-1])
    weights = jnp.sum(jnp.where(chosen, shares[..., None, :], 0.0), axis=-1)
    if normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    if replayed is not None and replayed.gates is not None:
        weights = jnp.where(live, weights, jax.lax.stop_gradient(replayed.gates))
    return RouterOutput(logits, experts, weights)


def router_logits(x: Array, router: Array) -> Array:
    """x[..., D] @ router[D, E] in float32 -> f32[..., E]; a rounded logit flips choices."""
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    logits = jnp.matmul(flat, router, precision=jax.lax.Precision.HIGHEST)
    return logits.reshape(*x.shape[:-1], router.shape[-1])


def dispatch(
    x: Array,
    experts: Array,
    weights: Array,
    expert_params: Experts,
    *,
    implementation: Dispatch,
    mesh: Mesh | None = None,
) -> Array:
    """Sum over k of weights[n, k] * swiglu of expert experts[n, k] on x[n]: [N, D] -> [N, D].

    Args:
      x: [N, D] in the compute dtype.
      experts: i32[N, K], ids in 0 .. E-1.
      weights: f32[N, K], gate values.
      expert_params: gate and up [E, D, F], down [E, F, D]; cast to the dtype of x.
      implementation: "dense" computes all experts for all tokens (small batches); "blocked" sorts
        tokens by expert into padded blocks and multiplies block by block (CPU); "ragged" is one
        ragged product over the sorted tokens (GPU, TPU); "auto" picks.
      mesh: if given, tokens are split over data and fsdp, experts over expert and F over tensor,
        and each device sums what its experts add for its tokens.

    Raises ValueError where N, E or F does not divide over its mesh axes.
    """
    if mesh is None:
        chosen = _resolve(implementation, x.shape[0], jax.default_backend())
        return _dispatch_local(x, experts, weights, expert_params, chosen)
    num_experts, _, width = expert_params["gate"].shape
    parts = mesh.shape
    _check_divides("tokens", x.shape[0], parts["data"] * parts["fsdp"])
    _check_divides("experts", num_experts, parts["expert"])
    _check_divides("expert width", width, parts["tensor"])
    tokens_per_device = x.shape[0] // (parts["data"] * parts["fsdp"])
    chosen = _resolve(implementation, tokens_per_device, mesh.devices.flat[0].platform)

    def shard(x: Array, experts: Array, weights: Array, params: Experts) -> Array:
        # Every operand is first made to vary over every axis. The sums over devices that the
        # gradient needs then stand at this border. Left inside, they depend on which values JAX
        # takes to be equal on all devices, and it takes argsort's result to be, silently.
        x, experts, weights = _vary((x, experts, weights), ("expert", "tensor"))
        params = _vary(params, BATCH_AXES)
        count = params["gate"].shape[0]
        local = experts - jax.lax.axis_index("expert") * count
        local = jnp.where((local < 0) | (local >= count), count, local)
        output = _dispatch_local(x, local, weights, params, chosen)
        return jax.lax.psum(output, ("expert", "tensor"))

    tokens = PartitionSpec(BATCH_AXES)
    inward, outward = PartitionSpec("expert", None, "tensor"), PartitionSpec("expert", "tensor")
    specs = (tokens, tokens, tokens, {"gate": inward, "up": inward, "down": outward})
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=tokens)
    return sharded(x, experts, weights, expert_params)


def _vary(tree: Any, axes: tuple[str, ...]) -> Any:
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree)


def _check_divides(name: str, size: int, parts: int) -> None:
    if size % parts:
        raise ValueError(
            f"{size} {name} do not divide over {parts} devices; change the mesh or the number"
        )


def _resolve(implementation: Dispatch, tokens: int, platform: str) -> Implementation:
    """What "auto" stands for. On CPU, blocks won at every size measured."""
    if implementation != "auto":
        return implementation
    if platform == "cpu":
        return "blocked"
    return "dense" if tokens <= FEW_TOKENS else "ragged"


def _dispatch_local(
    x: Array, experts: Array, weights: Array, params: Experts, implementation: Implementation
) -> Array:
    """dispatch() on one device; the expert id E stands for an expert that another device has."""
    if implementation == "dense":
        return _dense(x, experts, weights, params)
    num_experts = params["gate"].shape[0]
    block = _block_size(experts.size, num_experts) if implementation == "blocked" else 1
    order = _sort_by_expert(experts, num_experts, block)
    rows = _to_rows(x, order)
    if implementation == "blocked":
        rows = _blocked(rows, params, order)
    else:  # the product of rows past the last expert's is undefined, but nothing reads it
        rows = _swiglu(rows, params, partial(jax.lax.ragged_dot, group_sizes=order.sizes))
    combined = jnp.einsum("nkd,nk->nd", _from_rows(rows, order), weights)
    return combined.astype(x.dtype)


def _swiglu(
    x: Array, params: Experts, product: Callable[[Array, Array], Array] = jnp.matmul
) -> Array:
    gate, up, down = (params[name].astype(x.dtype) for name in ("gate", "up", "down"))
    return product(jax.nn.silu(product(x, gate)) * product(x, up), down)


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
class _Order:
    """Assignments (a token and one of its experts) sorted by expert into rows.

    The rows of an expert are padded to whole blocks, so that a block has one expert. R, the number
    of rows, is the most that any routing needs; rows past the last used block stay empty.
    """

    source: Array  # i32[R], the assignment n * K + k in this row; N * K in an empty row
    row: Array  # i32[N, K], where the assignment went; R if its expert is another device's
    sizes: Array  # i32[E], assignments of each expert
    block_expert: Array  # i32[R / block]
    num_blocks: Array  # i32[], blocks in use


def _block_size(assignments: int, num_experts: int) -> int:
    """A power of two near an eighth of an expert's mean load: little padding, large products."""
    mean = assignments / num_experts
    return 2 ** min(max(round(math.log2(max(mean, 1) / 8)), 3), 8)


def _sort_by_expert(experts: Array, num_experts: int, block: int) -> _Order:
    count = experts.size
    if (num_experts + 1) * count >= 2**31:
        raise ValueError(
            f"{count} assignments to {num_experts} experts overflow a 32-bit sort key; "
            "use more micro-batches"
        )
    # One integer per assignment holds expert and index: stable, and faster to sort than a pair.
    flat = experts.reshape(-1)
    index = jnp.arange(count, dtype=jnp.int32)
    keys = jnp.sort(flat * count + index)
    expert, assignment = keys // count, keys % count

    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    block_ends = jnp.cumsum(-(-sizes // block))
    shift = (block_ends - -(-sizes // block)) * block - (jnp.cumsum(sizes) - sizes)
    capacity = (count + num_experts * (block - 1)) // block
    here = expert < num_experts
    row = jnp.where(here, index + shift.at[expert].get(mode="clip"), capacity * block)
    block_expert = jnp.sum(jnp.arange(capacity)[:, None] >= block_ends, axis=1)
    return _Order(
        source=jnp.full(capacity * block, count, jnp.int32).at[row].set(assignment, mode="drop"),
        row=jnp.zeros(count, jnp.int32).at[assignment].set(row).reshape(experts.shape),
        sizes=sizes,
        block_expert=jnp.minimum(block_expert, num_experts - 1),
        num_blocks=block_ends[-1],
    )


# The two moves below are each other's transpose. Left to autodiff, the gradient of a gather is a
# scatter-add; since both directions of the order are known, it can be a gather again.


@jax.custom_vjp
def _to_rows(x: Array, order: _Order) -> Array:
    """x[N, D] -> [R, D]: every row gets the token of its assignment, empty rows 0."""
    return x.at[order.source // order.row.shape[1]].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _from_rows(rows: Array, order: _Order) -> Array:
    """rows[R, D] -> [N, K, D]: every assignment gets its row, 0 if it has none here."""
    return rows.at[order.row].get(mode="fill", fill_value=0)


def _to_rows_backward(order: _Order, gradient: Array) -> tuple[Array, None]:
    return jnp.sum(_from_rows(gradient, order), axis=1), None


def _from_rows_backward(order: _Order, gradient: Array) -> tuple[Array, None]:
    flat = gradient.reshape(-1, gradient.shape[-1])
    return flat.at[order.source].get(mode="fill", fill_value=0), None


_to_rows.defvjp(lambda x, order: (_to_rows(x, order), order), _to_rows_backward)
_from_rows.defvjp(lambda rows, order: (_from_rows(rows, order), order), _from_rows_backward)


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
