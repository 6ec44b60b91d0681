"""Estimators of a KL divergence KL(p || q) from tokens sampled by p (Schulman, "Approximating KL
divergence", 2020).

With d = log p - log q of the sampled token, in nats:

    estimator   value           its gradient in log p    expected gradient over y ~ p
    k1          d               1                        0: as a loss it does nothing but add noise
    k2          d^2 / 2         d                        grad KL(p || q)
    k3          e^-d - 1 + d    1 - e^-d                 grad KL(q || p), the other direction

As a value, k1 is unbiased but may be negative, k2 is biased and at least 0, k3 is unbiased and at
least 0. As a loss, only k2 descends KL(p || q). So k1 and k3 are for reading, k2 is for descending.
Every function is exactly 0, in value and gradient, off the mask.
"""

from __future__ import annotations

from typing import Literal, assert_never

import jax.numpy as jnp

from jaxrl_llm.arrays import Array
from jaxrl_llm.losses.ratios import MAX_LOG_RATIO, log_ratio

Estimator = Literal["k1", "k2", "k3"]


def k1(logprobs: Array, other_logprobs: Array, mask: Array) -> Array:
    """log p - log q, f32[B, S]: the log-ratio itself."""
    return log_ratio(logprobs, other_logprobs, mask)


def k2(logprobs: Array, other_logprobs: Array, mask: Array) -> Array:
    """(log p - log q)^2 / 2, f32[B, S]."""
    return 0.5 * jnp.square(log_ratio(logprobs, other_logprobs, mask))


def k3(logprobs: Array, other_logprobs: Array, mask: Array) -> Array:
    """q / p - 1 - log(q / p), f32[B, S].

    log(q / p) saturates at MAX_LOG_RATIO, with zero gradient above. expm1 keeps the small values of
    nearly equal policies, which are differences of numbers near 1.
    """
    d = jnp.minimum(log_ratio(other_logprobs, logprobs, mask), MAX_LOG_RATIO)
    return jnp.expm1(d) - d


def kl_estimate(logprobs: Array, other_logprobs: Array, mask: Array, estimator: Estimator) -> Array:
    """The named estimator of KL(p || q), f32[B, S]."""
    match estimator:
        case "k1":
            return k1(logprobs, other_logprobs, mask)
        case "k2":
            return k2(logprobs, other_logprobs, mask)
        case "k3":
            return k3(logprobs, other_logprobs, mask)
        case _:
            assert_never(estimator)
