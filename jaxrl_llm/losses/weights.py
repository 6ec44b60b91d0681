"""Weights that multiply a token's loss: importance weights, and averaging rules as weights.

The two are independent. An importance weight corrects for who sampled the token. A token weight
says how tokens and responses are averaged; it is computed once over the GLOBAL batch, so that a
loss is sum(weights * x) and losses of micro-batches, rows or hosts simply add.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, assert_never

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import Array
from jaxrl_llm.losses.ratios import ratio, segment_totals

Averaging = Literal["response_sum", "token", "sequence", "constant"]


@dataclasses.dataclass(frozen=True)
class Off:
    """Every sampled token weighs 1: no correction."""


@dataclasses.dataclass(frozen=True)
class Truncate:
    """min(ratio, cap): truncated importance sampling, biased only where it cuts."""

    cap: float  # inf: only the saturation of `ratio` remains

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"cap is {self.cap}; it must be positive (inf for none)")


@dataclasses.dataclass(frozen=True)
class Band:
    """The ratio where low <= ratio <= high, else 0: tokens outside are rejected, not cut."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(f"band [{self.low}, {self.high}]; it needs 0 <= low <= high")


WeightRule = Off | Truncate | Band


def importance_weight(log_ratio: Array, mask: Array, rule: WeightRule) -> Array:
    """The importance weight of each sampled token, sg(w_t) in the paper; never differentiated.

    Args:
      log_ratio: f32[B, S], nats; see ratios.log_ratio.
      mask: bool[B, S].
      rule: Off, Truncate or Band.

    Returns:
      f32[B, S], 0 off the mask; finite (see ratios.ratio) but for NaN, which stays NaN under every
      rule but Off: a broken log-probability must not pass as a rejected token.
    """
    raw = ratio(jax.lax.stop_gradient(log_ratio))
    match rule:
        case Off():
            weight = jnp.ones_like(raw)
        case Truncate(cap):
            weight = jnp.minimum(raw, cap)
        case Band(low, high):
            weight = jnp.where((raw < low) | (raw > high), 0.0, raw)
        case _:
            assert_never(rule)
    return jnp.where(mask, weight, 0.0)


def token_weights(
    mask: Array, segment_ids: Array, *, per: Averaging, constant: float = 0.0
) -> Array:
    """An averaging rule as one weight per token: the loss is sum(token_weights * x).

    With n responses (segments with a sampled token) of lengths |y_i|, a sampled token of response i
    weighs
      "response_sum"  1 / n              the paper: sum over tokens, mean over responses
      "token"         1 / sum_i |y_i|    DAPO: all tokens alike
      "sequence"      1 / (n |y_i|)      GRPO: mean over tokens, then over responses
      "constant"      1 / (n constant)   Dr. GRPO, constant = the longest response allowed
    and any other token 0. Call it on the whole mini-batch, with the mask before any rejection, and
    split the result with the rows: it does not matter then how responses are packed, how many rows
    are padding, or how the rows are split.

    Args:
      mask: bool[B, S], True iff the target was sampled.
      segment_ids: i32[B, S], in [0, S]; 0 is padding. A response is one segment of one row.
      per: the rule.
      constant: the divisor of "constant", in tokens, positive; 0 for the other rules.

    Returns:
      f32[B, S]; all 0 if nothing was sampled.

    Raises:
      ValueError: if `constant` is not positive under "constant", or not 0 under another rule.
    """
    if constant < 0 or (constant > 0) != (per == "constant"):
        raise ValueError(f'constant is {constant} with per="{per}"; only "constant" has one, > 0')
    lengths = segment_totals(mask.astype(jnp.int32), segment_ids)  # integers: counted exactly
    responses = jnp.sum(lengths > 0)
    match per:
        case "response_sum":
            divisor = responses
        case "token":
            divisor = jnp.sum(mask)
        case "sequence":
            divisor = responses * jnp.take_along_axis(lengths, segment_ids, axis=1)
        case "constant":
            divisor = responses * constant
        case _:
            assert_never(per)
    return jnp.where(mask, 1.0, 0.0) / jnp.where(divisor == 0, 1, divisor)
