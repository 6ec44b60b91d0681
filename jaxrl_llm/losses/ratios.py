"""Log-ratios of token probabilities, per token and per sequence, and their safe exponential.

Every off-policy quantity of the method is a ratio of two policies' probabilities of one sampled
token: mismatch pi_old / mu, staleness pi / pi_old, and their product pi / mu (arXiv 2512.01374,
eq. 5). They are kept as logarithms, in nats, until the last moment. What this is not: a weight or a
mask; those are decisions, made in weights.py and clipping.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, assert_never

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import Array

Level = Literal["token", "sequence", "geometric"]

MAX_LOG_RATIO = 20.0
"""Nats at which a ratio saturates, at 4.9e8: far above any cap or bound, far below overflow."""


def log_ratio(logprobs: Array, behaviour_logprobs: Array, mask: Array) -> Array:
    """log(pi / behaviour) of the sampled tokens, exactly 0 off the mask.

    Both operands are replaced before the subtraction, so whatever stands off the mask (-inf of a
    masked logit, NaN of a padding row) reaches neither the value nor the gradient. On the mask
    nothing is hidden: a non-finite log-probability there gives a non-finite ratio.

    Args:
      logprobs: log-probabilities under the numerator, f32[B, S], nats.
      behaviour_logprobs: the same tokens' under the denominator, f32[B, S].
      mask: bool[B, S], True iff the target was sampled.

    Returns:
      f32[B, S], differentiable in both operands.
    """
    return jnp.where(mask, logprobs, 0.0) - jnp.where(mask, behaviour_logprobs, 0.0)


class LogRatios(NamedTuple):
    """The factors of arXiv 2512.01374, eq. 5, in nats: sampler = mismatch + staleness."""

    sampler: Array  # f32[B, S], pi / mu
    mismatch: Array  # f32[B, S], pi_old / mu
    staleness: Array  # f32[B, S], pi / pi_old


def log_ratios(logprobs: Array, old: Array, sampler: Array, mask: Array) -> LogRatios:
    """All three from log pi, log pi_old and log mu, each f32[B, S]; see `log_ratio`."""
    return LogRatios(
        sampler=log_ratio(logprobs, sampler, mask),
        mismatch=log_ratio(old, sampler, mask),
        staleness=log_ratio(logprobs, old, mask),
    )


def ratio(log_ratio: Array) -> Array:
    """exp(log_ratio), saturating at exp(MAX_LOG_RATIO) with zero gradient above it.

    The saturation keeps inf out of products: inf * 0 (a zero advantage, a masked token) is NaN.

    Args:
      log_ratio: f32[...], nats.

    Returns:
      f32[...] in [0, 4.9e8]; 1 exactly where log_ratio is 0.
    """
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def at_level(log_ratio: Array, mask: Array, segment_ids: Array, level: Level) -> Array:
    """The log-ratio of a token, or of the response it belongs to, on every sampled token.

    "token" itself;  "sequence" sum_t log(pi / behaviour) over the response, the ratio of whole
    sequences;  "geometric" that sum over the response's length, the sequence ratio s_i of GSPO
    (arXiv 2507.18071, eq. 7). Differentiable: under "sequence" each token receives all of the
    gradient, under "geometric" 1 / |y_i| of it.

    Args:
      log_ratio: f32[B, S], 0 off the mask; see `log_ratio`.
      mask: bool[B, S].
      segment_ids: i32[B, S], 1, 2, ... within a row, so at most S; 0 is padding.
      level: which.

    Returns:
      f32[B, S], 0 off the mask. A segment without sampled tokens has none to show.
    """
    values = jnp.where(mask, log_ratio, 0.0)
    match level:
        case "token":
            return values
        case "sequence":
            of_response = segment_totals(values, segment_ids)
        case "geometric":
            length = segment_totals(mask.astype(jnp.int32), segment_ids)
            of_response = segment_totals(values, segment_ids) / jnp.maximum(length, 1)
        case _:
            assert_never(level)
    return jnp.where(mask, jnp.take_along_axis(of_response, segment_ids, axis=1), 0.0)


def segment_totals(values: Array, segment_ids: Array) -> Array:
    """The sum of `values` over each segment of each row.

    Args:
      values: [B, S].
      segment_ids: i32[B, S], in [0, S].

    Returns:
      [B, S + 1], indexed by segment id (0 is the padding), the dtype of `values`; 0 for an id that
      the row does not have.
    """
    ids = values.shape[1] + 1
    return jax.vmap(lambda row, of: jax.ops.segment_sum(row, of, num_segments=ids))(
        values, segment_ids
    )
