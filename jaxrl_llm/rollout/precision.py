"""The numerics of inference engines, simulated: values are put on a format's grid.

What it is: rounding of weights and activations to bfloat16, fp8, int8 and int4. Products are then
taken in float32 on values of the grid, as such hardware does: exact products, wide sums.
What it is not: fast or small, for arrays stay float32. It makes the mismatch mu / pi_old real at
any scale, and `precision` the dial of its size.

Every precision but float32 keeps the residual stream, embedding, norms, head and KV cache in
bfloat16, as production engines do, and puts the two factors of each linear layer on its own grid:
weights with one scale per output channel, once per publish (pack_weights), and activations with one
scale per token, in decode.py.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrl_llm.model.config import ModelConfig

Array = jax.Array
Weights = dict[str, Any]
"""Nested arrays: the learner's parameters, or what pack_weights makes of them."""

Precision = Literal["float32", "bfloat16", "int8", "fp8_e4m3", "fp8_e5m2", "int4"]
"""From the finest to the coarsest."""


@dataclasses.dataclass(frozen=True)
class FloatGrid:
    """Numbers sign * 1.m * 2^e with a few mantissa bits, subnormals below the least exponent."""

    mantissa_bits: int
    least_exponent: int  # of a normal number
    largest: float

    def round(self, x: Array) -> Array:
        """Nearest number of the grid, ties to even; exact for |x| up to `largest`.

        Not a cast to the narrow type and back, which the compiler may remove as excess precision.
        """
        step = 2.0 ** (self.least_exponent - self.mantissa_bits)
        normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=self.mantissa_bits)
        return jnp.where(jnp.abs(x) < 2.0**self.least_exponent, jnp.round(x / step) * step, normal)


@dataclasses.dataclass(frozen=True)
class IntegerGrid:
    """The integers from -largest to largest."""

    largest: float

    def round(self, x: Array) -> Array:
        """Nearest integer, ties to even."""
        return jnp.clip(jnp.round(x), -self.largest, self.largest)


GRIDS: dict[Precision, FloatGrid | IntegerGrid] = {
    "int8": IntegerGrid(127.0),
    "fp8_e4m3": FloatGrid(mantissa_bits=3, least_exponent=-6, largest=448.0),
    "fp8_e5m2": FloatGrid(mantissa_bits=2, least_exponent=-14, largest=57344.0),
    "int4": IntegerGrid(7.0),
}
"""Formats with a scale; float32 and bfloat16 have none."""


LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
"""Matrices [..., I, O] of linear layers, by their names; the routers' are a case of their own."""


def round_wide(x: Array, precision: Precision) -> Array:
    """What is kept between linear layers: x itself in float32, else x rounded to bfloat16."""
    if precision == "float32":
        return x
    # What reduce_precision gives, which a compiler for CPUs makes several times slower: it moves it
    # to where arrays lie in another order. To nearest, ties to even.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    even = (bits + (0x7FFF + ((bits >> 16) & 1))) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isnan(x), x, jax.lax.bitcast_convert_type(even, jnp.float32))


def quantize(x: Array, precision: Precision, *, axis: int) -> Array:
    """One factor of a linear layer, quantised and dequantised: f32 in, f32 of the same shape out.

    The scale maps the largest magnitude along `axis`, the one that the product sums over, to the
    grid's largest number. Where there is a NaN or an infinity, all of `axis` becomes NaN.
    """
    x = round_wide(x, precision)
    if precision in ("float32", "bfloat16"):
        return x
    grid = GRIDS[precision]
    peak = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    # Reciprocals are written out, since a compiler that introduced them itself would move ties. The
    # bound keeps the reciprocal of the scale of zeros finite.
    scale = jnp.maximum(peak * (1.0 / grid.largest), 2.0**-100)
    return grid.round(x * (1.0 / scale)) * scale


@dataclasses.dataclass(frozen=True)
class Numerics:
    """The model and how its forward pass is rounded; static under jit."""

    model: ModelConfig
    precision: Precision
    router_precision: Literal["same", "float32"]

    @property
    def router_grid(self) -> Precision:
        """What the routers' two factors are quantised to."""
        return "float32" if self.router_precision == "float32" else self.precision


def pack_weights(params: Weights, *, numerics: Numerics) -> Weights:
    """The parameters as the engine reads them: in float32 these very arrays, else rounded ones.

    Matrices of linear layers go on their grid with one scale per output channel (of each expert),
    embedding, norms and head become bfloat16.
    """
    return params if numerics.precision == "float32" else _rounded(params, numerics=numerics)


@partial(jax.jit, static_argnames="numerics")
def _rounded(params: Weights, *, numerics: Numerics) -> Weights:
    def one(path: tuple[jax.tree_util.DictKey, ...], leaf: Array) -> Array:
        name = path[-1].key
        if name == "router":
            return quantize(leaf, numerics.router_grid, axis=-2)
        if name in LINEAR:
            return quantize(leaf, numerics.precision, axis=-2)
        return round_wide(leaf, numerics.precision)

    return jax.tree_util.tree_map_with_path(one, params)
