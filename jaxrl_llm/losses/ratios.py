"""Log-ratios of token probabilities, per token and per sequence, and their safe exponential.

Every off-policy quantity of the method is a ratio of two policies' probabilities of one sampled
token: mismatch pi_old / mu, staleness pi / pi_old, and their product pi / mu (arXiv 2512.01374,
eq. 5). They are kept as logarithms, in nats, until the last moment. What this is not: a weight or a
mask; those are decisions, made in weights.py and clipping.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import Array

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


def ratio(log_ratio: Array) -> Array:
    """exp(log_ratio), saturating at exp(MAX_LOG_RATIO) with zero gradient above it.

    The saturation keeps inf out of products: inf * 0 (a zero advantage, a masked token) is NaN.

    Args:
      log_ratio: f32[...], nats.

    Returns:
      f32[...] in [0, 4.9e8]; 1 exactly where log_ratio is 0.
    """
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def sequence_log_ratio(log_ratio: Array, mask: Array, segment_ids: Array) -> Array:
    """The length-normalised log-ratio of each response, on every sampled token of it.

    s_i = (1 / |y_i|) sum_t log(pi / behaviour), the sequence ratio of GSPO (arXiv 2507.18071, eq.
    7). It is differentiable: each token receives 1 / |y_i| of the gradient.

    Args:
      log_ratio: f32[B, S], 0 off the mask; see `log_ratio`.
      mask: bool[B, S].
      segment_ids: i32[B, S], 1, 2, ... within a row, so at most S; 0 is padding.

    Returns:
      f32[B, S], 0 off the mask. A segment without sampled tokens has none to show.
    """
    total = segment_totals(jnp.where(mask, log_ratio, 0.0), segment_ids)
    length = segment_totals(mask.astype(jnp.int32), segment_ids)
    mean = jnp.take_along_axis(total / jnp.maximum(length, 1), segment_ids, axis=1)
    return jnp.where(mask, mean, 0.0)


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
