"""The layers that every transformer has, as pure functions on arrays; the MoE's are in moe.py.

Shapes: B rows, S positions, D width, H query heads, KV key and value heads, P head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def linear(x: Array, matrix: Array) -> Array:
    """x[..., I] @ matrix[I, O] in the dtype of x.

    Flattened to two dimensions, because CPU gradients of batched products are several times slower.
    """
    flat = x.reshape(-1, x.shape[-1]) @ matrix.astype(x.dtype)
    return flat.reshape(*x.shape[:-1], matrix.shape[-1])


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension, in float32; keeps x's dtype."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def rotary_table(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines, f32[..., P / 2] each, of the rotary angles at integer positions[...]."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions[..., None].astype(jnp.float32) * theta**-exponents
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, rotary: tuple[Array, Array]) -> Array:
    """Rotary embedding of x[..., H, P] by a table of f32[..., P / 2].

    Dimension i turns together with i + P / 2, as in the released Qwen and Llama weights.
    """
    cos, sin = (jnp.tile(table, 2)[..., None, :] for table in rotary)
    # (first, second) -> (-second, first), exactly: a product moves halves of vectors faster than
    # slices do, which leave half of a TPU's lanes empty.
    swap = np.kron([[0, 1], [-1, 0]], np.eye(x.shape[-1] // 2))
    turned = jnp.matmul(
        x,
        jnp.asarray(swap, x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def map_chunks(function: Callable[..., Any], arrays: tuple[Array, ...], *, chunk: int) -> Any:
    """function(*arrays), computed on `chunk` positions (dimension 1) at a time to save memory.

    Only sound for a function that treats positions independently. Each chunk is recomputed in the
    gradient. A chunk of 0, or one that holds all positions, is a plain call.
    """
    batch, length = arrays[0].shape[:2]
    if chunk == 0 or chunk >= length:
        return function(*arrays)
    padding = -length % chunk

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :length]

    step = jax.checkpoint(lambda parts: function(*parts), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(step, tuple(split(x) for x in arrays)))


def attend(query: Array, key: Array, value: Array, visible: Array) -> Array:
    """Grouped-query attention of query[B, Q, H, P] over key and value[B, S, KV, P] -> [B, Q, H, P].

    visible is bool[B, Q, S]. Scores are softmaxed in float32.
    """
    batch, queries, heads, size = query.shape
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))  # [B, KV, S, P]
    # The queries that share a key head are more rows of one product, not more products.
    rows = jnp.swapaxes(query, 1, 2).reshape(batch, key.shape[1], -1, size)
    scores = jnp.einsum("bkrp,bksp->bkrs", rows, key, preferred_element_type=jnp.float32)
    # Finite, so that a query which sees nothing gives a number and not NaN.
    hidden = jnp.where(visible, 0.0, -1e30)[:, None]
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


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """The gated MLP: (silu(x @ gate) * (x @ up)) @ down."""
    return linear(jax.nn.silu(linear(x, gate)) * linear(x, up), down)
