"""Weights that multiply a token's loss: importance weights, and averaging rules as weights.

The two are independent. An importance weight corrects for who sampled the token. A token weight
says how tokens and responses are averaged; it is computed once over the GLOBAL batch, so that a
loss is sum(weights * x) and losses of micro-batches, rows or hosts simply add.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, assert_never

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import Array
from jaxrl_llm.losses.ratios import Level, LogRatios, at_level, ratio, segment_totals

Averaging = Literal["response_sum", "token", "sequence", "constant"]


@dataclasses.dataclass(frozen=True)
class ImportanceConfig:
    """The importance weight w: of which ratio, over what, bounded how; the paper's by default."""

    # sampler = pi/mu, the paper's; mismatch = bounded pi_old/mu, times an unbounded pi/pi_old (TIS,
    # IcePop, decoupled PPO); staleness = pi/pi_old, uncorrected for the engine (PPO); off = 1.
    ratio: Literal["sampler", "mismatch", "staleness", "off"] = "sampler"
    level: Level = "token"  # ratio of the token, the sequence (product) or its geometric mean
    # clip: min(max(ratio, low), high), truncation. band: 0 outside low to high (IcePop).
    rule: Literal["clip", "band"] = "clip"
    low: float = 0.0  # lower bound of the ratio itself, not its distance from 1
    high: float = 5.0  # upper bound of the ratio itself; inf for none

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high or self.high == 0:
            raise ValueError(
                f"importance.low is {self.low} and importance.high {self.high}; they bound a "
                "ratio: 0 <= low <= high, and high above 0 (inf for none)"
            )


class Importance(NamedTuple):
    """The weight w = correction * ratio of each sampled token, 0 off the mask; constants."""

    correction: Array  # f32[B, S], the bounded pi_old / mu of "mismatch", else 1
    ratio: Array  # f32[B, S], the rest of the weight
    bounded: Array  # bool[B, S], True where a bound changed the weight

    @property
    def weight(self) -> Array:
        """f32[B, S]"""
        return self.correction * self.ratio


def importance_weight(
    ratios: LogRatios, mask: Array, segment_ids: Array, cfg: ImportanceConfig, *, level: Level
) -> Importance:
    """The importance weight of each sampled token, sg(w_t) in the paper; never differentiated.

    Truncation is biased only where it cuts (TIS). A band rejects the token instead (IcePop,
    arXiv 2510.18855); so does a product that leaves its band reject every token of the response.
    Clipping from both sides is CISPO's weight (arXiv 2506.13585): with low 0 it never lifts a
    weight, and `high` is MiniMax-M1's 1 + epsilon_high.

    Args:
      ratios: see ratios.log_ratios.
      mask: bool[B, S].
      segment_ids: i32[B, S].
      cfg: the settings.
      level: of the staleness factor that "mismatch" multiplies with; the clip mask's.

    Returns:
      Importance. Finite (see ratios.ratio) but for NaN, which stays NaN under every setting but
      "off": a broken log-probability must not pass as a rejected token.
    """
    ratios = jax.lax.stop_gradient(ratios)
    one, nowhere = jnp.where(mask, 1.0, 0.0), jnp.zeros_like(mask)

    def bounded(log_ratio: Array) -> tuple[Array, Array]:
        raw = ratio(at_level(log_ratio, mask, segment_ids, cfg.level))
        used = bound(raw, cfg)
        return jnp.where(mask, used, 0.0), mask & (used != raw) & ~jnp.isnan(raw)

    match cfg.ratio:
        case "sampler":
            return Importance(one, *bounded(ratios.sampler))
        case "mismatch":
            correction, changed = bounded(ratios.mismatch)
            moved = ratio(at_level(ratios.staleness, mask, segment_ids, level))
            return Importance(correction, jnp.where(mask, moved, 0.0), changed)
        case "staleness":
            return Importance(one, *bounded(ratios.staleness))
        case "off":
            return Importance(one, one, nowhere)
        case _:
            assert_never(cfg.ratio)


def bound(ratio: Array, cfg: ImportanceConfig) -> Array:
    """The ratio f32[B, S] clipped to low and high, or 0 outside them; a ratio at a bound is in."""
    if cfg.rule == "clip":
        return jnp.clip(ratio, cfg.low, cfg.high)
    return jnp.where((ratio < cfg.low) | (ratio > cfg.high), 0.0, ratio)


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
