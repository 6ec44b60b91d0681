"""Estimators of a KL divergence KL(p || q) from tokens sampled by p (Schulman, "Approximating KL
divergence", 2020).

With d = log p - log q of the sampled token, in nats:

    estimator   value           its gradient in log p    expected gradient over y ~ p
    k1          d               1                        0: as a loss it does nothing but add noise
    k2          d^2 / 2         d                        grad KL(p || q)
    k3          e^-d - 1 + d    1 - e^-d                 grad KL(q || p), the other direction

As a value, k1 is unbiased but may be negative, k2 is biased and at least 0, k3 is unbiased and at
least 0. As a loss, only k2 descends KL(p || q). So k1 and k3 are for reading, k2 is for descending.

Tokens sampled by mu instead of p need an importance weight w = p / mu. How it enters decides what
descends (the weight is the loss's own: the table holds where importance.ratio is sampler or
mismatch, level token, and no bound cuts; under "staleness" or "off" the penalty is as blind to the
engine as the loss):

    weight        the penalty        its expected gradient over y ~ mu, per token
    "none"        k                  that of the table above, with mu in place of p: biased
    "importance"  sg(w) * k          that of the table above: grad KL(p || q) for k2
    "unbiased"    w * k              grad KL(p || q) for k1 and for k3, since w is differentiated

"unbiased" with k3 is the KL term of DeepSeek-V3.2 (arXiv 2512.02556): its gradient w * d is, token
by token, that of "importance" with k2; only the logged value differs. k1 has w * (d + 1), the same
in expectation with more noise.

Every function is exactly 0, in value and gradient, off the mask.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, assert_never

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import Array
from jaxrl_llm.losses.ratios import MAX_LOG_RATIO, log_ratio

Estimator = Literal["k1", "k2", "k3"]


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """The penalty that holds the policy to a frozen reference, KL(pi || reference)."""

    coefficient: float = 0.0  # above 0 the batch needs ref_logprobs
    estimator: Estimator = "k2"  # k1, k2 or k3; as a loss they descend different things (kl.py)
    # importance: times the loss's importance weight, a constant; unbiased: that weight is
    # differentiated too, which k1 and k3 need to descend KL(pi || reference); none: as if pi had
    # sampled the tokens (GRPO).
    weight: Literal["importance", "unbiased", "none"] = "importance"

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ValueError(f"kl.coefficient is {self.coefficient}; it must be 0 or more")
        if self.weight == "unbiased" and self.estimator == "k2":
            raise ValueError(
                "kl.weight unbiased with kl.estimator k2: k2 is no unbiased value of the KL, so "
                "differentiating its weight descends nothing; use k3, or weight importance"
            )


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


def kl_penalty(
    logprobs: Array, ref_logprobs: Array, weight: Array, mask: Array, cfg: KLConfig
) -> Array:
    """The penalty of each token before its coefficient, f32[B, S], nats.

    Args:
      logprobs: log pi, f32[B, S]; differentiated.
      ref_logprobs: f32[B, S], a constant.
      weight: f32[B, S], the importance weight; a constant.
      mask: bool[B, S].
      cfg: the settings.
    """
    kl = kl_estimate(logprobs, jax.lax.stop_gradient(ref_logprobs), mask, cfg.estimator)
    weight = jax.lax.stop_gradient(weight)
    match cfg.weight:
        case "none":
            return kl
        case "importance":
            return weight * kl
        case "unbiased":
            # Value and gradient apart: that of k3 is w * d, where the derivatives of w and of k3
            # nearly cancel in float32, and no longer do once k3 saturates.
            now, ref = jax.lax.stop_gradient((logprobs, ref_logprobs))
            slope = log_ratio(now, ref, mask) + (1.0 if cfg.estimator == "k1" else 0.0)
            return weight * (jax.lax.stop_gradient(kl) + slope * log_ratio(logprobs, now, mask))
        case _:
            assert_never(cfg.weight)
