"""Quantisation by real casts to the narrow types, one vector at a time."""

import ml_dtypes
import numpy as np

LARGEST = {"int8": 127.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "int4": 7.0}
NARROW = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}


def bfloat16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def quantize(x: np.ndarray, precision: str, axis: int) -> np.ndarray:
    """float32 of the same shape, on the grid of `precision` with one scale along `axis`."""
    if precision == "float32":
        return x
    if precision == "bfloat16":
        return bfloat16(x)
    return np.apply_along_axis(_quantize_vector, axis, bfloat16(x), precision)


def _quantize_vector(x: np.ndarray, precision: str) -> np.ndarray:
    if not np.any(x):
        return x
    scale = np.max(np.abs(x)) * np.float32(1 / LARGEST[precision])
    scaled = x * (np.float32(1) / scale)
    if precision in NARROW:
        return scaled.astype(NARROW[precision]).astype(np.float32) * scale
    return np.clip(np.rint(scaled), -LARGEST[precision], LARGEST[precision]) * scale
