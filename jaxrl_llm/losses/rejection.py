"""Rejection: whole responses that no importance weight can save, taken out of the gradient.

A response is rejected when its sampler and its policy disagree by more than a bound. Its tokens
then leave the policy gradient and a weighted KL penalty (an unweighted one and the entropy bonus
know no sampler and keep them). They still count in every denominator, since token weights come from
the mask before any rejection: rejecting one response does not make the others heavier. What this is
not: the band of a single token's weight (weights.py) or the clip mask (clipping.py).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import Array
from jaxrl_llm.losses.ratios import LogRatios, at_level, ratio, segment_totals


@dataclasses.dataclass(frozen=True)
class RejectionConfig:
    """Bounds beyond which a response is rejected; all are off by default.

    The first four judge one ratio of every response. The last is the off-policy sequence masking of
    DeepSeek-V3.2 (arXiv 2512.02556).
    """

    ratio: Literal["mismatch", "sampler"] = "mismatch"  # judged: pi_old / mu, or pi / mu
    geometric_low: float = 0.0  # least geometric mean of the ratio; 0: off
    geometric_high: float = float("inf")  # greatest geometric mean of the ratio; inf: off
    k3: float = float("inf")  # greatest mean of ratio - 1 - log ratio, nats per token; inf: off
    veto: float = 0.0  # one token with a ratio below this is enough (1e-4 is usual); 0: off
    # Greatest mean of log(anchor / pi), nats per token, of a response with A < 0; inf: off.
    negative_kl: float = float("inf")
    negative_anchor: Literal["sampler", "old"] = "sampler"  # anchor of negative_kl: mu or pi_old

    def __post_init__(self) -> None:
        for name in ("geometric_low", "geometric_high", "k3", "veto", "negative_kl"):
            if not vars(self)[name] >= 0:
                raise ValueError(f"rejection.{name} is {vars(self)[name]}; it must be 0 or more")
        if not self.geometric_low <= 1 <= self.geometric_high:
            raise ValueError(
                f"rejection.geometric_low is {self.geometric_low} and geometric_high "
                f"{self.geometric_high}: the band rejects a response on which both engines agree; "
                "it must hold 1"
            )
        if self.veto >= 1:
            raise ValueError(f"rejection.veto is {self.veto}; it must be below 1, say 1e-4")

    @property
    def reads_old(self) -> bool:
        """Whether pi_old decides over any response."""
        judges = self.geometric_low > 0 or min(self.geometric_high, self.k3) < float("inf")
        judges = judges or self.veto > 0
        negative = self.negative_kl < float("inf") and self.negative_anchor == "old"
        return (judges and self.ratio == "mismatch") or negative


def rejected(
    ratios: LogRatios, advantages: Array, mask: Array, segment_ids: Array, cfg: RejectionConfig
) -> dict[str, Array]:
    """Who is rejected, by the bound that does it; only bounds that are on.

    Every comparison is strict: a response exactly at a bound is kept. So is one with a NaN: a fault
    must show in the loss, not pass for a rejection.

    Args:
      ratios: see ratios.log_ratios.
      advantages: f32[B, S], one value for each response.
      mask: bool[B, S].
      segment_ids: i32[B, S].
      cfg: the settings.

    Returns:
      bool[B, S] for "geometric", "k3", "veto" and "negative": True on all sampled tokens of a
      rejected response. No gradient.
    """
    ratios = jax.lax.stop_gradient(ratios)
    judged = ratios.mismatch if cfg.ratio == "mismatch" else ratios.sampler
    rules: dict[str, Array] = {}

    def mean(values: Array) -> Array:
        return at_level(values, mask, segment_ids, "geometric")

    if cfg.geometric_low > 0 or cfg.geometric_high < jnp.inf:
        geometric = ratio(mean(judged))
        rules["geometric"] = (geometric < cfg.geometric_low) | (geometric > cfg.geometric_high)
    if cfg.k3 < jnp.inf:
        # The ratio saturates; its own logarithm must not, or a tiny ratio would look harmless.
        rules["k3"] = mean(ratio(judged) - 1 - judged) > cfg.k3
    if cfg.veto > 0:
        vetoes = segment_totals((mask & (ratio(judged) < cfg.veto)).astype(jnp.int32), segment_ids)
        rules["veto"] = jnp.take_along_axis(vetoes, segment_ids, axis=1) > 0
    if cfg.negative_kl < jnp.inf:
        anchored = ratios.sampler if cfg.negative_anchor == "sampler" else ratios.staleness
        rules["negative"] = (advantages < 0) & (mean(-anchored) > cfg.negative_kl)
    broken = jnp.isnan(ratios.sampler) | jnp.isnan(ratios.mismatch)
    faults = segment_totals((mask & broken).astype(jnp.int32), segment_ids)
    whole = jnp.take_along_axis(faults, segment_ids, axis=1) == 0
    return {name: mask & whole & out for name, out in rules.items()}
