"""The clip mask: which tokens may still move the policy.

PPO's clipping, written as MiniRL writes it: as a mask M_t that switches a token off once its ratio
has left the trust band in the direction its advantage pushes it; and DPPO's, whose band is one of
probabilities instead of ratios. What this is not: a bound on the importance weight (weights.py), or
the removal of whole responses (rejection.py).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, assert_never

import jax.numpy as jnp

from jaxrl_llm.arrays import Array
from jaxrl_llm.losses.ratios import LogRatios, at_level, ratio


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Which tokens are masked once the policy has moved; the defaults are those of the paper."""

    # ratio: the band 1 - low to 1 + high of pi / anchor. tv, kl: low and high bound the binary
    # total variation or KL (nats) between pi and the anchor, DPPO's. none: no mask.
    kind: Literal["ratio", "tv", "kl", "none"] = "ratio"
    anchor: Literal["old", "sampler"] = "old"  # moved from what: pi_old, or mu
    # geometric: the ratio is the geometric mean over the response, GSPO's; only with kind ratio.
    level: Literal["token", "geometric"] = "token"
    low: float = 0.2  # on the side where a token with A < 0 is pushed
    high: float = 0.27  # on the side where a token with A > 0 is pushed
    dual: float = float("inf")  # a token with A < 0 is masked above this ratio too (dual clip)

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = vars(self)[name]
            if not value >= 0:
                raise ValueError(f"clip.{name} is {value}; it must be 0 or more")
        if not self.dual > 1:
            raise ValueError(f"clip.dual is {self.dual}; it must be above 1 (inf for none)")
        if self.kind != "ratio" and (self.level != "token" or self.dual != float("inf")):
            raise ValueError(
                f"clip.kind is {self.kind}, for which clip.level {self.level} and clip.dual "
                f"{self.dual} mean nothing; set kind to ratio, or level to token and dual to inf"
            )


def clip_mask(
    ratio: Array, advantages: Array, *, low: float, high: float, dual: float = float("inf")
) -> Array:
    """True where a token's gradient passes: M_t of arXiv 2512.01374, PPO's clip (1707.06347).

    Closed iff  A > 0 and ratio > 1 + high,  or  A < 0 and ratio < 1 - low,  or  A < 0 and
    ratio > dual (dual clip, arXiv 1912.09729). The inequalities are strict, so a ratio exactly at a
    bound (the bound rounded to the ratio's dtype) is open, as is every token with advantage 0. A
    NaN ratio is open: a fault must not pass for a closed mask.

    Args:
      ratio: pi over the anchor, f32[B, S]: pi / pi_old in the paper.
      advantages: f32[B, S].
      low: width of the band below 1, at least 0; 1 or more never closes.
      high: width of the band above 1, at least 0; inf never closes.
      dual: bound for A < 0 from above, above 1; inf never closes.

    Returns:
      bool[B, S]. It is piecewise constant: no gradient flows through it.
    """
    too_likely = (advantages > 0) & (ratio > 1 + high)
    too_unlikely = (advantages < 0) & ((ratio < 1 - low) | (ratio > dual))
    return ~(too_likely | too_unlikely)


def clip_ratio(
    ratio: Array, advantages: Array, *, low: float, high: float, dual: float = float("inf")
) -> Array:
    """The ratio that PPO's clipped objective multiplies A with: the bound where the mask is closed.

    clip_ratio * A = min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), and for A < 0 at least
    dual * A. It equals `ratio` just where clip_mask is open. Arguments as there; f32[B, S].
    """
    above = jnp.minimum(ratio, 1 + high)
    below = jnp.clip(ratio, 1 - low, dual)
    return jnp.where(advantages > 0, above, jnp.where(advantages < 0, below, ratio))


def binary_divergence(
    logprobs: Array, anchor_logprobs: Array, mask: Array, *, kind: Literal["tv", "kl"]
) -> Array:
    """Divergence of the anchor from pi when all that counts is whether the token is this one.

    With p = anchor's and q = pi's probability of the sampled token (arXiv 2602.04879):
    "tv" |p - q|;  "kl" p log(p / q) + (1 - p) log((1 - p) / (1 - q)), nats.

    Args:
      logprobs: log pi, f32[B, S].
      anchor_logprobs: log of the anchor, f32[B, S].
      mask: bool[B, S].

    Returns:
      f32[B, S], at least 0; 0 off the mask. Infinite for "kl" where q is 1 and p is not.
    """
    q, p = (jnp.where(mask, x, 0.0) for x in (logprobs, anchor_logprobs))
    if kind == "tv":
        return jnp.abs(jnp.exp(p) - jnp.exp(q))
    log_other_p, log_other_q = (jnp.log(-jnp.expm1(x)) for x in (p, q))
    chosen = jnp.exp(p) * (p - q)
    others = -jnp.expm1(p) * (log_other_p - log_other_q)
    others = jnp.where(jnp.expm1(p) == 0, 0.0, others)  # 0 log 0, for p = 1
    return jnp.maximum(chosen + others, 0.0)


def divergence_mask(
    divergence: Array, log_ratio: Array, advantages: Array, *, low: float, high: float
) -> Array:
    """True where a token's gradient passes under DPPO (arXiv 2602.04879).

    Closed iff the divergence is above its bound AND the advantage pushes further away: A > 0 and
    pi above the anchor (bound high), or A < 0 and pi below it (bound low). Strict, and open for
    NaN, as clip_mask.

    Args:
      divergence: f32[B, S], see binary_divergence.
      log_ratio: log(pi / anchor), f32[B, S].
      advantages: f32[B, S].
      low, high: bounds, at least 0.

    Returns:
      bool[B, S].
    """
    away_up = (advantages > 0) & (log_ratio > 0) & (divergence > high)
    away_down = (advantages < 0) & (log_ratio < 0) & (divergence > low)
    return ~(away_up | away_down)


def trust_mask(
    ratios: LogRatios,
    logprobs: Array,
    advantages: Array,
    mask: Array,
    segment_ids: Array,
    cfg: ClipConfig,
) -> Array:
    """The mask M_t as configured, bool[B, S]; True off the loss mask."""
    log_ratio = ratios.staleness if cfg.anchor == "old" else ratios.sampler
    match cfg.kind:
        case "ratio":
            moved = ratio(at_level(log_ratio, mask, segment_ids, cfg.level))
            return clip_mask(moved, advantages, low=cfg.low, high=cfg.high, dual=cfg.dual)
        case "tv" | "kl":
            anchor = logprobs - log_ratio
            divergence = binary_divergence(logprobs, anchor, mask, kind=cfg.kind)
            return divergence_mask(divergence, log_ratio, advantages, low=cfg.low, high=cfg.high)
        case "none":
            return jnp.ones_like(mask)
        case _:
            assert_never(cfg.kind)
