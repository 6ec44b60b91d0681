"""The MiniRL loss (arXiv 2512.01374), and the settings of its parts.

    loss = - sum over tokens of  weights * M * sg(w) * A * log pi
           + kl_coefficient      * sum of  weights * sg(w) * kl
           - entropy_coefficient * sum of  weights * entropy

`weights` are token weights of the global batch (weights.token_weights), so the losses of rows and
micro-batches add. w corrects for who sampled, M is the clip mask, A the advantage. What this is
not: a model, a router loss (router.py) or an optimizer step.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, assert_never

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import Array, LossOutput, Mean, TrainBatch
from jaxrl_llm.losses.clipping import clip_mask
from jaxrl_llm.losses.diagnostics import masked_mean
from jaxrl_llm.losses.kl import Estimator, k1, k3, kl_estimate
from jaxrl_llm.losses.ratios import log_ratio, ratio
from jaxrl_llm.losses.weights import Off, Truncate, importance_weight


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Settings of the loss; the defaults are the paper's."""

    # Importance weight w: sampler = min(pi/mu, cap), the paper's; mismatch = min(pi_old/mu, cap) *
    # pi/pi_old, its peers'; staleness = min(pi/pi_old, cap), uncorrected for the engine; off = 1.
    importance: Literal["sampler", "mismatch", "staleness", "off"] = "sampler"
    importance_cap: float = 5.0  # where the importance weight is truncated; inf for nowhere
    clip_anchor: Literal["old", "sampler", "none"] = "old"  # clip pi/pi_old, pi/mu, or nothing
    clip_low: float = 0.2  # a token with A < 0 is masked below the ratio 1 - clip_low
    clip_high: float = 0.27  # a token with A > 0 is masked above the ratio 1 + clip_high
    # response_sum = sum over tokens, mean over responses (the paper's); token = mean over all
    # tokens; sequence = mean over the tokens of a response, then over responses.
    averaging: Literal["response_sum", "token", "sequence"] = "response_sum"
    kl_coefficient: float = 0.0  # weight of KL(pi || reference); above 0 it needs ref_logprobs
    # As a loss, k2 descends KL(pi || reference), k3 descends KL(reference || pi), and k1 does
    # nothing in the mean (see kl.py).
    kl_estimator: Estimator = "k2"
    entropy_coefficient: float = 0.0  # weight of the entropy bonus
    router_z_coefficient: float = 0.0  # weight of the squared log-sum-exp of the router logits
    router_balance_coefficient: float = 0.0  # weight of the load balance loss of the routers

    def __post_init__(self) -> None:
        Truncate(self.importance_cap)
        names = ["clip_low", "clip_high", "kl_coefficient", "entropy_coefficient"]
        names += ["router_z_coefficient", "router_balance_coefficient"]
        for name in names:
            value = vars(self)[name]
            if not value >= 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more")


def policy_loss(
    logprobs: Array, entropy: Array, batch: TrainBatch, weights: Array, cfg: LossConfig
) -> LossOutput:
    """The loss of one (micro-)batch and its metrics.

    Its gradient is that of -sum(weights * M * A * sg(w) * log pi) and of the two penalties: M and w
    are constants. Off batch.loss_mask nothing contributes, in value or gradient, whatever the
    arrays hold there; on it nothing is hidden, and a NaN shows. Without batch.old_logprobs, pi_old
    is pi itself, which is exact for the first mini-batch after a publish. The KL penalty is an
    expectation under pi over tokens of mu, hence its importance weight.

    Args:
      logprobs: log pi of the targets, f32[B, S], nats; differentiated.
      entropy: of pi at each position, f32[B, S], nats; differentiated if the bonus is on.
      batch: [B, S] fields; routes are not read.
      weights: f32[B, S], token weights, 0 off the mask.
      cfg: the settings.

    Returns:
      loss f32[] and metrics, each averaged over sampled tokens.

    Raises:
      ValueError: if a KL penalty is asked for and batch.ref_logprobs is None.
    """
    if cfg.kl_coefficient and batch.ref_logprobs is None:
        raise ValueError(
            f"kl_coefficient is {cfg.kl_coefficient} but the batch has no ref_logprobs; "
            "score it with a reference policy or set kl_coefficient to 0"
        )
    batch = jax.lax.stop_gradient(batch)
    mask = batch.loss_mask
    now = jax.lax.stop_gradient(logprobs)
    old = now if batch.old_logprobs is None else batch.old_logprobs
    ratios = _LogRatios(
        sampler=log_ratio(now, batch.sampler_logprobs, mask),
        mismatch=log_ratio(old, batch.sampler_logprobs, mask),
        staleness=log_ratio(now, old, mask),
    )
    importance, importance_metrics = _importance(ratios, mask, cfg)
    advantages = jnp.where(mask, batch.advantages, 0.0)
    passes, clip_metrics = _passes(ratios, advantages, mask, cfg)
    metrics = importance_metrics | clip_metrics
    metrics["policy/entropy"] = masked_mean(entropy, mask)
    metrics["policy/ratio_old"] = masked_mean(ratio(ratios.staleness), mask)
    metrics["policy/kl_sampler_old"] = masked_mean(k1(batch.sampler_logprobs, old, mask), mask)
    metrics["policy/kl_sampler_old_k3"] = masked_mean(k3(batch.sampler_logprobs, old, mask), mask)

    pull = jnp.where(passes, importance * advantages, 0.0)
    per_token = -pull * jnp.where(mask, logprobs, 0.0)
    if batch.ref_logprobs is not None:
        kl = importance * kl_estimate(logprobs, batch.ref_logprobs, mask, cfg.kl_estimator)
        per_token += cfg.kl_coefficient * kl
        metrics["policy/kl_ref"] = masked_mean(kl, mask)
    if cfg.entropy_coefficient:  # not 0 * entropy: that would still cost a backward pass
        per_token -= cfg.entropy_coefficient * jnp.where(mask, entropy, 0.0)
    return LossOutput(jnp.sum(weights * per_token), metrics)


class _LogRatios(NamedTuple):
    """Logarithms of the ratios of eq. 5, without gradients: sampler = mismatch + staleness."""

    sampler: Array  # f32[B, S], pi / mu
    mismatch: Array  # f32[B, S], pi_old / mu
    staleness: Array  # f32[B, S], pi / pi_old


def _importance(ratios: _LogRatios, mask: Array, cfg: LossConfig) -> tuple[Array, dict[str, Mean]]:
    """The importance weight w, f32[B, S], and how much of it the cap took.

    In the mismatch reading nothing but the clip mask bounds the staleness factor, and that only on
    the side towards which the advantage pushes.
    """
    cap = Truncate(cfg.importance_cap)
    match cfg.importance:
        case "sampler":
            capped = ratios.sampler
            weight = importance_weight(capped, mask, cap)
        case "mismatch":
            capped = ratios.mismatch
            weight = importance_weight(capped, mask, cap) * ratio(ratios.staleness)
        case "staleness":
            capped = ratios.staleness
            weight = importance_weight(capped, mask, cap)
        case "off":
            capped = jnp.full_like(ratios.sampler, -jnp.inf)  # nothing to cap
            weight = importance_weight(ratios.sampler, mask, Off())
        case _:
            assert_never(cfg.importance)
    return weight, {
        "is_weight/raw": masked_mean(ratio(ratios.sampler), mask),
        "is_weight/used": masked_mean(weight, mask),
        "is_weight/capped_fraction": masked_mean(ratio(capped) > cap.cap, mask),
    }


def _passes(
    ratios: _LogRatios, advantages: Array, mask: Array, cfg: LossConfig
) -> tuple[Array, dict[str, Mean]]:
    """The clip mask M, bool[B, S], and how often it closed on either side."""
    bounds = {"low": cfg.clip_low, "high": cfg.clip_high}
    match cfg.clip_anchor:
        case "old":
            passes = clip_mask(ratio(ratios.staleness), advantages, **bounds)
        case "sampler":
            passes = clip_mask(ratio(ratios.sampler), advantages, **bounds)
        case "none":
            passes = jnp.ones_like(mask)
        case _:
            assert_never(cfg.clip_anchor)
    return passes, {
        "clip/high_fraction": masked_mean(~passes & (advantages > 0), mask),
        "clip/low_fraction": masked_mean(~passes & (advantages < 0), mask),
    }
