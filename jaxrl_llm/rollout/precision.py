"""The numerics of inference engines, simulated: values are put on a format's grid.

What it is: rounding of weights and activations to bfloat16, fp8, int8 and int4. Products are then
taken in float32 on values of the grid, as such hardware does: exact products, wide sums.
What it is not: fast or small, for arrays stay float32. It makes the mismatch mu / pi_old real at
any scale, and `precision` the dial of its size.

Every precision but float32 keeps the residual stream, embedding, norms, head and KV cache in
bfloat16, as production engines do, and puts the two factors of each linear layer on its own grid:
weights with one scale per output channel, activations with one scale per token.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array

Precision = Literal["float32", "bfloat16", "int8", "fp8_e4m3", "fp8_e5m2", "int4"]


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


def round_wide(x: Array, precision: Precision) -> Array:
    """What is kept between linear layers: x itself in float32, else x rounded to bfloat16."""
    if precision == "float32":
        return x
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def quantize(x: Array, precision: Precision, *, axis: int) -> Array:
    """One factor of a linear layer, quantised and dequantised: f32 in, f32 of the same shape out.

    The scale maps the largest magnitude along `axis`, the one that the product sums over, to the
    grid's largest number. NaN and infinity come out as NaN.
    """
    x = round_wide(x, precision)
    if precision in ("float32", "bfloat16"):
        return x
    grid = GRIDS[precision]
    peak = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scale = jnp.where(peak == 0, 1.0, peak / grid.largest)
    return grid.round(x / scale) * scale
