"""The layers that every transformer has, as pure functions on arrays; the MoE's are in moe.py.

Shapes: B rows, S positions, D width, H query heads, KV key and value heads, P head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.sharding import alike

Array = jax.Array


def linear(x: Array, matrix: Array) -> Array:
    """x[..., I] @ matrix[I, O] in the dtype of x.

    Flattened to two dimensions, because CPU gradients of batched products are several times slower.
    """
    flat = _product(*alike((x.reshape(-1, x.shape[-1]), matrix.astype(x.dtype))))
    return flat.reshape(*x.shape[:-1], matrix.shape[-1])


@jax.custom_vjp
def _product(x: Array, matrix: Array) -> Array:
    return x @ matrix


_product.defvjp(
    lambda x, matrix: (x @ matrix, (x, matrix)),
    lambda factors, gradient: (gradient @ factors[1].T, transposed(factors[0]) @ gradient),
)


def alone(x: Array) -> Array:
    """x, which a CPU's compiler takes into no product or sum that uses it, nor that it comes from.

    Else it computes what leads to a factor, a transpose for example, again, or slowly, inside. With
    other loops it still fuses x.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def transposed(x: Array) -> Array:
    """x[N, I] as [I, N], the left factor of a matrix's gradient.

    CPUs multiply what lies so in memory a fifth faster than what they have to turn, if there are
    enough rows.
    """
    return alone(alone(x).T) if x.shape[0] >= 128 else x.T


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension, in float32; keeps x's dtype."""
    return _rms_norm(*alike((x, scale)), eps)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    return (wide * _inverse(wide, eps) * scale.astype(jnp.float32)).astype(x.dtype)


def _rms_norm_backward(
    eps: float, operands: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    """From x alone, which is kept anyway: autodiff would keep three arrays of its size."""
    x, scale = operands
    wide, pull = x.astype(jnp.float32), gradient.astype(jnp.float32)
    inverse = _inverse(wide, eps)
    unit, to_unit = wide * inverse, pull * scale.astype(jnp.float32)
    along = _mean(to_unit * unit)
    to_scale = jnp.sum(pull * unit, axis=tuple(range(x.ndim - 1)))
    return ((to_unit - unit * along) * inverse).astype(x.dtype), to_scale.astype(scale.dtype)


_rms_norm.defvjp(lambda x, scale, eps: (_rms_norm(x, scale, eps), (x, scale)), _rms_norm_backward)


def _inverse(x: Array, eps: float) -> Array:
    return jax.lax.rsqrt(_mean(jnp.square(x)) + eps)


def _mean(x: Array) -> Array:
    """Over the last dimension, kept; alone, since a pass that is fused with a sum is slower."""
    return alone(jnp.mean(x, axis=-1, keepdims=True))


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
    length = arrays[0].shape[1]
    if chunk == 0 or chunk >= length:
        return function(*arrays)
    step = jax.checkpoint(lambda parts: function(*parts), prevent_cse=False)
    return join_chunks(jax.lax.map(step, split_chunks(arrays, chunk)), length)


def split_chunks(tree: Any, chunk: int) -> Any:
    """Arrays [B, S, ...] to [chunks, B, chunk, ...], filled up with zeros."""

    def one(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    return jax.tree.map(one, tree)


def join_chunks(tree: Any, length: int) -> Any:
    """The inverse of split_chunks(), for so many positions."""

    def one(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(one, tree)


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """The gated MLP: (silu(x @ gate) * (x @ up)) @ down."""
    return linear(jax.nn.silu(linear(x, gate)) * linear(x, up), down)
