"""Kernels of libraries inside the model's shard_map: attention and grouped products.

What it is: which kernel a backend gets, a refusal by name where one cannot run, and the border that
lets an untyped kernel into typed code. What it is not: a kernel, or the plain computation that each
of them must equal (attention.py, grouped.py).

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

from jaxrl_llm.model.attention import ATTENTION, BLOCK
from jaxrl_llm.model.config import Attention, ComputeConfig
from jaxrl_llm.sharding import KERNEL_AXIS, Layout, alike

Array = jax.Array
Operands = tuple[Array, ...]

LANES = 128
"""What TPU kernels want sizes to be a multiple of."""

BLOCKS = (512, 256, LANES)
"""Positions that splash attention takes at a time. 512 is what MaxText takes on all TPUs; JAX's own
128 mean sixteen times the steps."""


def check_attention(compute: ComputeConfig, layout: Layout, *, head_dim: int) -> None:
    """Raises ValueError where compute.attention names a kernel that cannot run here."""
    if obstacle := _obstacle(compute.attention, layout.platform, compute.dtype, head_dim):
        raise ValueError(
            f"learner.compute.attention is {compute.attention}, {obstacle}; use auto, or plain"
        )


def choose_attention(
    compute: ComputeConfig, layout: Layout, *, head_dim: int, length: int
) -> Attention:
    """What compute.attention stands for, in rows of so many positions.

    "auto" is the backend's kernel where it can run; on CPUs, blocks where a row has several.
    """
    if compute.attention != "auto":
        return compute.attention
    platform = layout.platform
    kernels: dict[str, Attention] = {"tpu": "splash", "gpu": "cudnn"}
    if platform not in kernels:
        return "blocked" if length > BLOCK else "plain"
    kernel = kernels[platform]
    return "plain" if _obstacle(kernel, platform, compute.dtype, head_dim) else kernel


def _obstacle(kernel: Attention, platform: str, dtype: str, head_dim: int) -> str:
    """Why a kernel cannot run; "" if it can."""
    if kernel == "splash":
        if platform == "gpu":
            return "a kernel for TPUs (interpreted on CPUs), and this is a gpu"
        if head_dim % LANES:
            return f"for heads as wide as a multiple of {LANES}, and model.head_dim is {head_dim}"
    if kernel == "cudnn":
        if platform != "gpu":
            return f"a library for NVIDIA GPUs, and this is a {platform}"
        if dtype == "float32":
            return "which computes in bfloat16, and learner.compute.dtype is float32"
        if head_dim % 8 or head_dim > LANES:
            return f"for heads as wide as 8, 16, ... {LANES}, and model.head_dim is {head_dim}"
    return ""


def splash_attention(
    query: Array, key: Array, value: Array, segment_ids: Array, layout: Layout
) -> Array:
    """attention.segment_attention by JAX's splash attention kernel (a flash attention for TPUs).

    Args:
      query: [B, Q, H, P], this device's positions of the row.
      key, value: [B, S, KV, P], all positions.
      segment_ids: i32[B, S].
      layout: Q = S / context.

    Scores never reach HBM, and blocks that the causal mask hides are not computed. Positions are
    padded to whole blocks. Where devices share a row, the end of it sees more than its beginning:
    each takes one part from the front and its mirror image from the back, so that all have as much
    to do, and returns what it computed for others.
    """
    shards, (_, count, *_) = layout.size(("context",)), query.shape
    if shards == 1 or count % 2:
        first = jax.lax.axis_index("context") if shards > 1 else 0
        return _splash_share(query, key, value, segment_ids, jnp.asarray(first), shards, layout)
    device, parts = jax.lax.axis_index("context"), 2 * shards
    outputs = []
    for side, half in enumerate(jnp.split(query, 2, axis=1)):  # parts 0, 2, 4 ...; 1, 3, 5 ...
        owners = [(source, _mirrored(2 * source + side, parts)) for source in range(shards)]
        part = jnp.where(device % 2 == side, device, parts - 1 - device)
        mine = jax.lax.ppermute(half, "context", owners)
        output = _splash_share(mine, key, value, segment_ids, part, parts, layout)
        home = [(owner, source) for source, owner in owners]
        outputs.append(jax.lax.ppermute(output, "context", home))
    return jnp.concatenate(outputs, axis=1)


def _mirrored(part: int, parts: int) -> int:
    """The device that computes one of so many parts of a row."""
    return min(part, parts - 1 - part)


def _splash_share(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    index: Array,
    shares: int,
    layout: Layout,
) -> Array:
    """Splash attention of one of equal shares of the positions, the queries being those."""
    _, count, heads, size = query.shape
    block = _block(count)
    full = -(-count // block) * block
    make = functools.partial(_splash, heads, full * shares, shares, block, layout.platform != "tpu")

    def attend(operands: Operands, fixed: Operands) -> Array:
        query, key, value = (
            jnp.swapaxes(_padded(x, parts, full), 1, 2)
            for x, parts in zip(operands, (1, shares, shares), strict=True)
        )
        segment_ids, index = fixed
        # Of no segment that there is: what no token sees.
        segment_ids = _padded(segment_ids, shares, full, fill=-1)
        own = jax.lax.dynamic_slice_in_dim(segment_ids, index * full, full, axis=1)
        kernel = jax.vmap(_of_shard(make(), index, shares))
        output = kernel(query * size**-0.5, key, value, splash.SegmentIds(own, segment_ids))
        return jnp.swapaxes(output, 1, 2)[:, :count].astype(operands[0].dtype)

    fixed = (segment_ids, index.astype(jnp.int32))
    return _library_kernel(attend, layout)((query, key, value), fixed)


def cudnn_attention(
    query: Array, key: Array, value: Array, segment_ids: Array, layout: Layout
) -> Array:
    """The same by cuDNN's flash attention, in bfloat16, on GPUs.

    Scores are never stored, but segments are a mask, of which JAX makes a bias [B, 1, Q, S]: 2 GiB
    for a row of 32,768 tokens, and as much for its gradient; a context axis shares it.
    """
    count = query.shape[1]
    shards, full = layout.size(("context",)), count + count % 2  # cuDNN wants an even number
    first = jax.lax.axis_index("context") if shards > 1 else 0

    def attend(operands: Operands, fixed: Operands) -> Array:
        query, key, value = (
            _padded(x, parts, full) for x, parts in zip(operands, (1, shards, shards), strict=True)
        )
        segment_ids, first = fixed
        segment_ids = _padded(segment_ids, shards, full, fill=-1)
        index = jnp.arange(shards * full)
        own, own_index = (
            jax.lax.dynamic_slice_in_dim(x, first * full, full, axis=-1)
            for x in (segment_ids, index)
        )
        visible = own[:, :, None] == segment_ids[:, None, :]
        visible &= index <= own_index[:, None]
        output = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=visible[:, None],
            is_causal=shards == 1,  # the mask says it; like this, cuDNN leaves half of it out
            implementation="cudnn",
        )
        return output[:, :count]

    fixed = (segment_ids, jnp.asarray(first, jnp.int32))
    return _library_kernel(attend, layout)((query, key, value), fixed)


def _padded(x: Array, parts: int, full: int, fill: int = 0) -> Array:
    """x[B, parts * count, ...] -> [B, parts * full, ...]: each part filled up at its end."""
    split = x.reshape(x.shape[0], parts, -1, *x.shape[2:])
    missing = (0, full - split.shape[2])
    widths = [(0, 0), (0, 0), missing, *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(split, widths, constant_values=fill).reshape(
        x.shape[0], parts * full, *x.shape[2:]
    )


def _block(count: int) -> int:
    """The largest block for so many positions of which not more than an eighth would be padding."""
    fitting = (block for block in BLOCKS if -count % block <= count // 8)
    return next(fitting, LANES)


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


def _splash(heads: int, length: int, shards: int, block: int, interpret: bool) -> Any:
    mask = masks.MultiHeadMask([masks.CausalMask((length, length), shard_count=shards)] * heads)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dq=block,
        block_kv_dq=block,
        block_q_dkv=block,
        block_kv_dkv=block,
    )
    return splash.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
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
    return lambda operands, fixed: call(*alike((operands, fixed)))


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
    return alike(alone(*arguments), arguments)
