"""The policy loss: MiniRL (arXiv 2512.01374) and its rivals, which are other settings of it.

    loss = - sum over tokens of  weights * M * sg(w) * A * log pi
           + kl.coefficient      * sum of  weights * KL penalty
           - entropy_coefficient * sum of  weights * entropy

`weights` are token weights of the global batch (weights.token_weights), so the losses of rows and
micro-batches add. w corrects for who sampled (weights.importance_weight), M is the clip mask
(clipping.trust_mask) and removes what rejection.rejected names, A is the advantage (advantages.py).
Every objective of the family has this gradient; presets.py says which M, w, A and weights each
chose. What this is not: a model, a router loss (router.py) or an optimizer step.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import Array, LossOutput, Mean, TrainBatch
from jaxrl_llm.losses.advantages import AdvantageConfig
from jaxrl_llm.losses.clipping import ClipConfig, clip_ratio, trust_mask
from jaxrl_llm.losses.diagnostics import masked_mean
from jaxrl_llm.losses.kl import KLConfig, k1, k3, kl_penalty
from jaxrl_llm.losses.ratios import LogRatios, log_ratio, log_ratios, ratio
from jaxrl_llm.losses.rejection import RejectionConfig, rejected
from jaxrl_llm.losses.weights import Averaging, Importance, ImportanceConfig, importance_weight


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Settings of the loss; the defaults are MiniRL. presets.py has the other algorithms."""

    advantage: AdvantageConfig = AdvantageConfig()  # A, from the rewards of a group
    # What is differentiated, and so what the loss is worth; the gradient is the same. score:
    # sg(w) * A * log pi. ratio: w * A with pi / sg(pi) in it, PPO's min(r A, clip(r) A).
    form: Literal["score", "ratio"] = "score"
    importance: ImportanceConfig = ImportanceConfig()  # w, who sampled
    clip: ClipConfig = ClipConfig()  # M, which tokens may still move the policy
    rejection: RejectionConfig = RejectionConfig()  # whole responses taken out of M
    # response_sum = sum over tokens, mean over responses (the paper's); token = mean over all
    # tokens; sequence = mean over the tokens of a response, then over responses; constant = sum
    # over tokens divided by averaging_length, mean over responses (Dr. GRPO).
    averaging: Averaging = "response_sum"
    averaging_length: float = 0.0  # tokens; above 0 with averaging constant, else 0
    kl: KLConfig = KLConfig()  # penalty towards a frozen reference
    entropy_coefficient: float = 0.0  # weight of the entropy bonus
    router_z_coefficient: float = 0.0  # weight of the squared log-sum-exp of the router logits
    router_balance_coefficient: float = 0.0  # weight of the load balance loss of the routers

    def __post_init__(self) -> None:
        for name in ("entropy_coefficient", "router_z_coefficient", "router_balance_coefficient"):
            if not vars(self)[name] >= 0:
                raise ValueError(f"loss.{name} is {vars(self)[name]}; it must be 0 or more")
        constant = self.averaging == "constant"
        if self.averaging_length < 0 or (self.averaging_length > 0) != constant:
            raise ValueError(
                f"loss.averaging_length is {self.averaging_length} with loss.averaging "
                f"{self.averaging}; only constant has one: the longest response, in tokens"
            )
        if self.form == "ratio" and self.clip.kind == "ratio" and not _one_ratio(self):
            raise ValueError(
                f"loss.form ratio clips the ratio it differentiates, but importance.ratio is "
                f"{self.importance.ratio} ({self.importance.level}) and clip.anchor is "
                f"{self.clip.anchor} ({self.clip.level}); anchor the clip on the importance "
                "ratio's denominator and give both one level, or set loss.form to score"
            )

    @property
    def reads_old(self) -> bool:
        """Whether pi_old enters the loss, so that later mini-batches need it scored."""
        return (
            self.importance.ratio in ("mismatch", "staleness")
            or (self.clip.kind != "none" and self.clip.anchor == "old")
            or self.rejection.reads_old
        )


class TokenTerms(NamedTuple):
    """What the gradient of each token is multiplied with; constants, all [B, S]."""

    ratios: LogRatios
    advantages: Array  # f32, A; 0 off the mask
    importance: Importance  # w and its parts
    passes: Array  # bool, M
    rejected: dict[str, Array]  # bool, by the bound that rejects; see rejection.rejected

    @property
    def kept(self) -> Array:
        """bool[B, S], True for tokens of responses that nothing rejects, and off the mask."""
        return ~functools.reduce(jnp.logical_or, self.rejected.values(), self.passes & False)


def policy_loss(
    logprobs: Array, entropy: Array, batch: TrainBatch, weights: Array, cfg: LossConfig
) -> LossOutput:
    """The loss of one (micro-)batch and its metrics.

    M, w and A are constants: the gradient is that of -sum(weights * M * A * sg(w) * log pi) and of
    the two penalties. Off batch.loss_mask nothing contributes, in value or gradient, whatever the
    arrays hold there; on it nothing is hidden, and a NaN shows. Without batch.old_logprobs, pi_old
    is pi itself, which is exact for the first mini-batch after a publish. Rejected tokens weigh
    nothing here and in a weighted KL penalty, but stay in the denominators.

    Args:
      logprobs: log pi of the targets, f32[B, S], nats; differentiated.
      entropy: of pi at each position, f32[B, S], nats; differentiated if the bonus is on.
      batch: [B, S] fields; routes are not read. A response is one segment of one row.
      weights: f32[B, S], token weights, 0 off the mask.
      cfg: the settings.

    Returns:
      loss f32[] and metrics, each averaged over sampled tokens.

    Raises:
      ValueError: if a KL penalty is asked for and batch.ref_logprobs is None.
    """
    if cfg.kl.coefficient and batch.ref_logprobs is None:
        raise ValueError(
            f"kl.coefficient is {cfg.kl.coefficient} but the batch has no ref_logprobs; "
            "score it with a reference policy or set kl.coefficient to 0"
        )
    mask = batch.loss_mask
    terms = token_terms(logprobs, batch, cfg)
    metrics = _metrics(entropy, batch, terms)
    per_token = -_objective(logprobs, terms, mask, cfg)
    if batch.ref_logprobs is not None:
        weight = jnp.where(terms.kept, terms.importance.weight, 0.0)
        kl = kl_penalty(logprobs, batch.ref_logprobs, weight, mask, cfg.kl)
        per_token += cfg.kl.coefficient * kl
        metrics["policy/kl_ref"] = masked_mean(kl, mask)
    if cfg.entropy_coefficient:  # not 0 * entropy: that would still cost a backward pass
        per_token -= cfg.entropy_coefficient * jnp.where(mask, entropy, 0.0)
    return LossOutput(jnp.sum(weights * per_token), metrics)


def token_terms(logprobs: Array, batch: TrainBatch, cfg: LossConfig) -> TokenTerms:
    """M, w and A of every token at these log-probabilities f32[B, S]; nothing is differentiated."""
    logprobs, batch = jax.lax.stop_gradient((logprobs, batch))
    mask, segments = batch.loss_mask, batch.segment_ids
    old = logprobs if batch.old_logprobs is None else batch.old_logprobs
    ratios = log_ratios(logprobs, old, batch.sampler_logprobs, mask)
    advantages = jnp.where(mask, batch.advantages, 0.0)
    return TokenTerms(
        ratios=ratios,
        advantages=advantages,
        importance=importance_weight(ratios, mask, segments, cfg.importance, level=cfg.clip.level),
        passes=trust_mask(ratios, logprobs, advantages, mask, segments, cfg.clip),
        rejected=rejected(ratios, advantages, mask, segments, cfg.rejection),
    )


def _objective(logprobs: Array, terms: TokenTerms, mask: Array, cfg: LossConfig) -> Array:
    """What is maximised of each token, f32[B, S], 0 off the mask; see LossConfig.form."""
    open_ = terms.passes & terms.kept
    pull = jnp.where(open_, terms.importance.weight * terms.advantages, 0.0)
    if cfg.form == "score":
        return pull * jnp.where(mask, logprobs, 0.0)
    one = jnp.exp(log_ratio(logprobs, jax.lax.stop_gradient(logprobs), mask))
    if cfg.clip.kind != "ratio":  # a token that DPPO masks is worth nothing
        return pull * one
    clip = cfg.clip
    clipped = clip_ratio(
        terms.importance.ratio, terms.advantages, low=clip.low, high=clip.high, dual=clip.dual
    )
    bound = terms.importance.correction * clipped * terms.advantages
    return jnp.where(open_, pull * one, jnp.where(terms.kept & mask, bound, 0.0))


def _metrics(entropy: Array, batch: TrainBatch, terms: TokenTerms) -> dict[str, Mean]:
    """What the loss saw, averaged over sampled tokens."""
    mask = batch.loss_mask
    advantages, ratios = terms.advantages, terms.ratios
    mu, old = jnp.zeros_like(ratios.mismatch), ratios.mismatch  # both relative to mu
    metrics = {
        "policy/entropy": masked_mean(entropy, mask),
        "policy/kl_sampler_old": masked_mean(k1(mu, old, mask), mask),
        "policy/kl_sampler_old_k3": masked_mean(k3(mu, old, mask), mask),
        "is_weight/raw_mean": masked_mean(ratio(ratios.sampler), mask),
        "is_weight/used_mean": masked_mean(terms.importance.weight, mask),
        "is_weight/capped_fraction": masked_mean(terms.importance.bounded, mask),
        "staleness/ratio_mean": masked_mean(ratio(ratios.staleness), mask),
        "clip/high_fraction": masked_mean(~terms.passes & (advantages > 0), mask),
        "clip/low_fraction": masked_mean(~terms.passes & (advantages < 0), mask),
    }
    rejections = {f"rejection/{name}": gone for name, gone in terms.rejected.items()}
    return metrics | {name: masked_mean(gone, mask) for name, gone in rejections.items()}


def _one_ratio(cfg: LossConfig) -> bool:
    """Whether the clip bounds the very ratio that the importance weight differentiates."""
    denominator = {"staleness": "old", "mismatch": "old", "sampler": "sampler", "off": ""}
    one_level = cfg.importance.ratio == "mismatch" or cfg.importance.level == cfg.clip.level
    return denominator[cfg.importance.ratio] == cfg.clip.anchor and one_level
