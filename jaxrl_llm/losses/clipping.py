"""The clip mask: which tokens may still move the policy.

PPO's clipping, written as MiniRL writes it: as a mask M_t that switches a token off once its ratio
has left the trust band in the direction its advantage pushes it. What this is not: a bound on the
importance weight (weights.py).
"""

from __future__ import annotations

from jaxrl_llm.arrays import Array


def clip_mask(ratio: Array, advantages: Array, *, low: float, high: float) -> Array:
    """True where a token's gradient passes (PAPER, M_t).

    Closed iff  A > 0 and ratio > 1 + high,  or  A < 0 and ratio < 1 - low.  Both inequalities are
    strict, so a ratio exactly at a bound (the bound rounded to the ratio's dtype) is open, as is
    every token with advantage 0. A NaN ratio is open: a fault must not pass for a closed mask.

    Args:
      ratio: pi over the anchor, f32[B, S]: pi / pi_old in the paper, pi / mu in DPPO.
      advantages: f32[B, S].
      low: width of the band below 1, at least 0; 1 or more never closes.
      high: width of the band above 1, at least 0; inf never closes.

    Returns:
      bool[B, S]. It is piecewise constant: no gradient flows through it.
    """
    too_likely = (advantages > 0) & (ratio > 1 + high)
    too_unlikely = (advantages < 0) & (ratio < 1 - low)
    return ~(too_likely | too_unlikely)
