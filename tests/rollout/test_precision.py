"""Grids against real narrow types, and quantisation against the reference, bit for bit."""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rollout.precision import GRIDS, Precision, quantize, round_wide
from tests.reference import precision as reference

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@pytest.mark.parametrize("precision", ["fp8_e4m3", "fp8_e5m2"])
def test_float_grids_equal_the_cast_on_every_value_and_tie(precision: Precision) -> None:
    narrow, largest = reference.NARROW[precision], GRIDS[precision].largest
    values = np.arange(256, dtype=np.uint8).view(narrow).astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    assert values[-1] == largest
    ties = (values[1:] + values[:-1]) / 2
    spread = np.exp(np.random.default_rng(0).uniform(-16, 6, 20_000)).astype(np.float32)
    x = np.concatenate(
        [values, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), spread, -spread]
    ).astype(np.float32)
    rounded = jax.jit(GRIDS[precision].round)(x)
    np.testing.assert_array_equal(rounded, x.astype(narrow).astype(np.float32))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integer_grids_round_ties_to_even_and_saturate(precision: Precision) -> None:
    x = np.array([0.5, 1.5, -2.5, 0.49, 1e6, -1e6], np.float32)
    top = GRIDS[precision].largest
    np.testing.assert_array_equal(jax.jit(GRIDS[precision].round)(x), [0, 2, -2, 0, top, -top])


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantize_equals_the_reference_bit_for_bit(precision: Precision, axis: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 50, 40)) * np.exp(rng.uniform(-6, 6, (3, 50, 1)))
    x[1, 7], x[2, :, 9] = 0.0, 0.0  # vectors of zeros along either axis
    x = x.astype(np.float32)
    ours = jax.jit(partial(quantize, precision=precision, axis=axis))(x)
    np.testing.assert_array_equal(ours, reference.quantize(x, precision, axis))


@pytest.mark.parametrize("precision", ["int8", "fp8_e4m3", "fp8_e5m2", "int4"])
def test_quantize_keeps_the_peak_and_bounds_the_error(precision: Precision) -> None:
    x = reference.bfloat16(np.random.default_rng(2).standard_normal((20, 64)).astype(np.float32))
    quantized = np.asarray(quantize(jnp.asarray(x), precision, axis=-1))
    peak = np.argmax(np.abs(x), axis=-1)[:, None]
    kept = (np.take_along_axis(a, peak, axis=-1) for a in (quantized, x))
    np.testing.assert_allclose(*kept, rtol=1e-6)
    # Half a step at the top of the grid: of an integer grid everywhere, of fp8 from 2^k on.
    half_step = {"int8": 0.5 / 127, "int4": 0.5 / 7, "fp8_e4m3": 16 / 448, "fp8_e5m2": 4096 / 57344}
    error = np.max(np.abs(quantized - x) / np.abs(x).max(axis=-1, keepdims=True))
    assert 0.5 * half_step[precision] < error <= half_step[precision] * (1 + 1e-5)


@pytest.mark.parametrize("precision", ["int8", "fp8_e4m3", "fp8_e5m2", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_own_vector_only(precision: Precision, bad: float) -> None:
    x = np.ones((2, 4), np.float32)
    x[0, 1] = bad
    quantized = np.asarray(quantize(jnp.asarray(x), precision, axis=-1))
    assert np.all(np.isnan(quantized[0]))
    np.testing.assert_allclose(quantized[1], 1.0, rtol=1e-6)


def test_round_wide_is_bfloat16_even_where_the_compiler_may_fuse() -> None:
    x = np.random.default_rng(3).standard_normal(1000).astype(np.float32)
    # A cast there and back is what the compiler is free to drop in the middle of a computation.
    doubled = jax.jit(lambda a: round_wide(a * 1.7, "int4") * 3.0)(x)
    wide = reference.bfloat16(x * np.float32(1.7))
    np.testing.assert_array_equal(doubled, wide * np.float32(3.0))
    np.testing.assert_array_equal(round_wide(jnp.asarray(x), "float32"), x)


def test_round_wide_equals_reduce_precision_on_all_kinds_of_numbers() -> None:
    halves = np.arange(2**16, dtype=np.uint32) << 16  # every bfloat16, and what lies around a tie
    bits = np.concatenate([halves + offset for offset in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    x = bits.astype(np.uint32).view(np.float32)
    expected = jax.lax.reduce_precision(jnp.asarray(x), exponent_bits=8, mantissa_bits=7)
    np.testing.assert_array_equal(round_wide(jnp.asarray(x), "bfloat16"), expected)
