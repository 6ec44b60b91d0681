"""Kernels of JAX's Pallas library inside the model's shard_map: attention and grouped products.

What it is: which kernel a backend gets, a refusal by name where one cannot run, and the border that
lets an untyped kernel into typed code. What it is not: a kernel, or the plain computation that each
of them must equal (layers.segment_attention, grouped.py).

A library's kernel does not say on which mesh axes its results differ, which shard_map checks. So it
runs in a shard_map of its own over KERNEL_AXIS, one device wide and unchecked, and has its gradient
there as well; outside, results have the types of the operands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jax.extend.core import jaxpr_as_fun
from jax.sharding import PartitionSpec

from jaxrl_llm.model.config import Attention
from jaxrl_llm.sharding import KERNEL_AXIS, Layout, varying

Array = jax.Array
Operands = tuple[Array, ...]

LANES = 128
"""What TPU kernels want sizes to be a multiple of."""

BLOCKS = (512, 256, LANES)
"""Positions that splash attention takes at a time, the first that divides; 512 is MaxText's choice.
Its own, 128, makes four times as many steps along each side."""


def choose_attention(wanted: Attention, layout: Layout, *, head_dim: int, length: int) -> Attention:
    """What "auto" stands for: the backend's kernel where it takes these sizes, else "plain".

    length: positions of a row.

    Raises ValueError where a kernel is asked for by name that this backend does not have, or for
    sizes that it does not take.
    """
    fits = head_dim % LANES == 0 and length % (LANES * layout.size(("context",))) == 0
    if wanted == "auto":
        return "splash" if layout.platform == "tpu" and fits else "plain"
    if wanted == "splash" and layout.platform == "gpu":
        raise ValueError(
            "compute.attention is splash, a kernel for TPUs (interpreted on CPUs), and this is a "
            "gpu; use auto or plain"
        )
    if wanted == "splash" and not fits:
        raise ValueError(
            f"compute.attention is splash, which needs model.head_dim ({head_dim}) and the "
            f"positions of a row on a device ({length} over {layout.size(('context',))}) to be "
            f"multiples of {LANES}; change learner.row_length, or use plain"
        )
    return wanted


def splash_attention(
    query: Array, key: Array, value: Array, segment_ids: Array, layout: Layout
) -> Array:
    """layers.segment_attention by JAX's splash attention kernel (a flash attention for TPUs).

    Args:
      query: [B, Q, H, P], this device's positions of the row.
      key, value: [B, S, KV, P], all positions.
      segment_ids: i32[B, S].
      layout: Q = S / context.

    Scores never reach HBM, and blocks that the causal mask hides are not computed.
    """
    _, count, heads, size = query.shape
    shards = layout.size(("context",))
    make = functools.partial(_splash, heads, count * shards, shards, layout.platform != "tpu")
    first = jax.lax.axis_index("context") if shards > 1 else 0

    def attend(operands: Operands, fixed: Operands) -> Array:
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in operands)
        segment_ids, first = fixed
        own = jax.lax.dynamic_slice_in_dim(segment_ids, first * count, count, axis=1)
        kernel = jax.vmap(_of_shard(make(), first, shards))
        output = kernel(query * size**-0.5, key, value, splash.SegmentIds(own, segment_ids))
        return jnp.swapaxes(output, 1, 2).astype(operands[0].dtype)

    fixed = (segment_ids, jnp.asarray(first, jnp.int32))
    return _library_kernel(attend, layout)((query, key, value), fixed)


def grouped_product(rows: Array, matrices: Array, sizes: Array, layout: Layout) -> Array:
    """rows[R, I] @ matrices[E, I, O], the first sizes[0] rows by matrix 0, and so on: [R, O].

    By JAX's megablox kernel, gradients too; the rows after the last group are undefined.
    """
    # Of the matrices as much at a time as fits on the chip; few rows at a time where there are few.
    tile = LANES if rows.shape[0] < 32 * LANES else 4 * LANES
    tiling = (tile, *(min(8 * LANES, size) for size in matrices.shape[1:]))
    padding = -rows.shape[0] % tile

    def product(operands: Operands, fixed: Operands) -> Array:
        rows, matrices = operands
        padded = jnp.pad(rows, [(0, padding), (0, 0)])
        output = gmm(
            padded,
            matrices,
            fixed[0],
            preferred_element_type=rows.dtype,
            tiling=tiling,
            interpret=layout.platform != "tpu",
        )
        return output[: rows.shape[0]]

    return _library_kernel(product, layout)((rows, matrices), (sizes,))


def ragged_product(rows: Array, matrices: Array, sizes: Array, layout: Layout) -> Array:
    """The same by XLA's own operation, which knows no types of explicit meshes either."""

    def product(operands: Operands, fixed: Operands) -> Array:
        rows, matrices = operands
        return jax.lax.ragged_dot(rows, matrices, fixed[0])

    return _library_kernel(product, layout)((rows, matrices), (sizes,))


def _splash(heads: int, length: int, shards: int, interpret: bool) -> Any:
    mask = masks.MultiHeadMask([masks.CausalMask((length, length), shard_count=shards)] * heads)
    queries, keys = (
        next(block for block in BLOCKS if size % block == 0) for size in (length // shards, length)
    )
    sizes = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
    )
    return splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=shards, interpret=interpret
    )


def _of_shard(kernel: Any, index: Array, shards: int) -> Any:
    """The kernel of one share of the queries: its part of what is known of the mask."""
    if shards == 1:
        return kernel
    mesh = jax.sharding.AbstractMesh((1, shards), ("heads", "queries"))
    specs = kernel.manual_sharding_spec(
        jax.sharding.NamedSharding(mesh, PartitionSpec("heads", "queries"))
    )

    def one(leaf: Any, spec: PartitionSpec) -> Any:
        for dimension, name in enumerate(spec):
            if name == "queries":
                size = leaf.shape[dimension] // shards
                leaf = jax.lax.dynamic_slice_in_dim(leaf, index * size, size, axis=dimension)
        return leaf

    return jax.tree.map(one, kernel, specs)


def _library_kernel(
    function: Callable[[Operands, Operands], Array], layout: Layout
) -> Callable[[Operands, Operands], Array]:
    """function(operands, fixed) for use in layout.shard(): differentiable by its operands."""
    if layout.mesh is None:
        return function

    @jax.custom_vjp
    def call(operands: Operands, fixed: Operands) -> Array:
        return _unchecked(function, operands, fixed)

    def forward(operands: Operands, fixed: Operands) -> tuple[Array, Any]:
        def push(operands: Operands, fixed: Operands) -> tuple[Array, Any]:
            return jax.vjp(lambda operands: function(operands, fixed), operands)

        return _unchecked(push, operands, fixed)

    def backward(pullback: Any, gradient: Array) -> tuple[Operands, None]:
        return _unchecked(lambda saved, gradient: saved(gradient)[0], pullback, gradient), None

    call.defvjp(forward, backward)
    return lambda operands, fixed: call(*_alike((operands, fixed)))


def _unchecked(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) where no types are checked; the results typed as the arguments are."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)

    def body(*arguments: Any) -> Any:
        # Traced on untyped shapes: the rules of a kernel's own gradient compare types.
        closed, result = jax.make_jaxpr(function, return_shape=True)(*shapes)
        flat = jaxpr_as_fun(closed)(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(result), flat)

    whole = PartitionSpec()
    alone = jax.shard_map(
        body, axis_names={KERNEL_AXIS}, in_specs=whole, out_specs=whole, check_vma=False
    )
    return _alike(alone(*arguments), arguments)


def _alike(tree: Any, other: Any = ()) -> Any:
    """The same values, all typed as different wherever one of them, or of the others, is."""
    axes = frozenset().union(*(varying(x) for x in jax.tree.leaves((tree, other))))

    def one(x: Array) -> Array:
        missing = tuple(axes - varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)
