"""The same comparison from samples, with error bars, for policies too large to enumerate.

What it is: gradients of independent batches of responses, and an unbiased estimate of their inner
products. A batch's gradient is the true one plus noise, and the noise would enter |g|^2; so only
products of DIFFERENT batches are averaged (a U-statistic), and leaving out one batch at a time
(jackknife) gives standard errors. What it is not: cheap; the cosine of small gradients takes many
samples, and the error bar says when they are too few.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.arrays import TrainBatch
from jaxrl_llm.data.collate import collate
from jaxrl_llm.first_order.gradients import (
    Behaviour,
    live_routes,
    surrogate_gradient,
    with_behaviour,
)
from jaxrl_llm.first_order.passes import Passes, Scores
from jaxrl_llm.learner.step import Replay
from jaxrl_llm.losses.advantages import AdvantageConfig, response_advantages
from jaxrl_llm.losses.clipping import ClipConfig
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.losses.weights import ImportanceConfig, token_weights
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.rollout.engine import Engine, EngineFailure, Request
from jaxrl_llm.types import Prompt, Rollout, SamplingParams

ON_POLICY = LossConfig(
    advantage=AdvantageConfig(baseline="leave_one_out"),
    importance=ImportanceConfig(ratio="off"),
    clip=ClipConfig(kind="none"),
)
"""REINFORCE: over responses of pi itself its gradient is that of J_seq, without bias."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and the standard error of its estimate."""

    value: float
    error: float


@dataclasses.dataclass(frozen=True)
class SampledAgreement:
    """gradients.Agreement, estimated."""

    cosine: Estimate
    norm_ratio: Estimate
    projection: Estimate
    relative_error: Estimate


@dataclasses.dataclass(frozen=True)
class SampledGroups:
    """N responses to each of G prompts; rollouts in the order of the rewards' rows."""

    rollouts: tuple[Rollout, ...]
    rewards: np.ndarray  # f32[G, N]
    length: int  # positions that the longest possible response needs; one shape for every batch


def sample_groups(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    reward: Callable[[Rollout], float],
    *,
    samples: int,
    seed: int,
) -> SampledGroups:
    """`samples` responses to every prompt. Another seed gives an independent batch.

    Raises RuntimeError with the engine's message for a request that failed: a batch without some
    responses would be a biased one.
    """
    requests = [
        Request(prompt, index, seed * len(prompts) * samples + row * samples + index, sampling)
        for row, prompt in enumerate(prompts)
        for index in range(samples)
    ]
    done: dict[tuple[str, int], Rollout] = {}
    for outcome in engine.generate(requests):
        if isinstance(outcome, EngineFailure):
            raise RuntimeError(f"{outcome.prompt_id} sample {outcome.sample_index}: {outcome}")
        done[outcome.prompt_id, outcome.sample_index] = outcome
    rollouts = tuple(done[r.prompt.prompt_id, r.sample_index] for r in requests)
    rewards = np.array([reward(rollout) for rollout in rollouts], np.float32)
    longest = max(prompt.tokens.size for prompt in prompts) + sampling.max_new_tokens
    return SampledGroups(rollouts, rewards.reshape(len(prompts), samples), longest - 1)


def sampled_surrogate(
    passes: Passes,
    old: Params,
    params: Params,
    groups: SampledGroups,
    replay: Replay,
    cfg: LossConfig,
) -> np.ndarray:
    """The surrogate's gradient at `params` on responses of an engine that serves `old`, f64[P].

    Its expectation is that of surrogate_gradient over an enumeration, to 1 / N where a group's
    deviation or the token mean divides by sampled sums. A mean baseline leaves the response itself
    out, for the group's own mean would shorten every gradient by 1 / N.
    """
    if cfg.advantage.baseline == "mean":
        centred = dataclasses.replace(cfg.advantage, baseline="leave_one_out")
        cfg = dataclasses.replace(cfg, advantage=centred)
    batch = _collated(groups, cfg.advantage)
    if batch.routes is None:
        raise ValueError("the rollouts have no routes; use an engine that reports them")
    none: Any = np.zeros_like(batch.sampler_logprobs)
    behaviour = Behaviour(
        sampler=Scores(batch.sampler_logprobs, none, batch.routes),
        old=passes.score(old, live_routes(batch, batch.routes)),
        old_replayed=passes.score(old, batch),
    )
    batch = with_behaviour(batch, behaviour, replay)
    return surrogate_gradient(passes, params, batch, _token_weights(batch, cfg), cfg)


def sampled_target(passes: Passes, params: Params, groups: SampledGroups) -> np.ndarray:
    """An unbiased estimate of grad J_seq at `params`, f64[P].

    The responses must come from `params` themselves, in an engine of the learner's precision.
    """
    batch = _collated(groups, ON_POLICY.advantage)
    if batch.routes is not None:
        batch = live_routes(batch, batch.routes)
    weights = _token_weights(batch, ON_POLICY)
    return surrogate_gradient(passes, params, batch, weights, ON_POLICY)


def sampled_agreement(surrogates: np.ndarray, targets: np.ndarray) -> SampledAgreement:
    """Agreement of two gradients from n independent batches of each, with standard errors.

    Args:
      surrogates, targets: f64[n, P], a gradient of each batch, n at least 3. Those of one index may
        share their samples.

    Raises:
      ValueError: for other shapes, or where the noise hides either gradient: the estimate of a
        squared length is not positive, with all batches or with one of them left out.
    """
    if surrogates.shape != targets.shape or surrogates.ndim != 2 or len(targets) < 3:
        raise ValueError(
            f"surrogates {surrogates.shape} and targets {targets.shape}: two arrays [batches, "
            "parameters] of one shape with at least 3 batches are needed"
        )
    pairs = ((surrogates, targets), (surrogates, surrogates), (targets, targets))
    products = np.stack([_cross_means(left @ right.T) for left, right in pairs])
    if not np.all(products[1:] > 0):
        raise ValueError(
            f"{len(targets)} batches cannot tell a gradient from 0: the squared lengths are "
            f"estimated as {products[1, 0]:.3g} (surrogate) and {products[2, 0]:.3g} (target); "
            "use more batches or more samples in each"
        )
    inner, length, wanted = products
    return SampledAgreement(
        cosine=_jackknife(inner / np.sqrt(length * wanted)),
        norm_ratio=_jackknife(np.sqrt(length / wanted)),
        projection=_jackknife(inner / wanted),
        # Of equal gradients the estimated square scatters around 0.
        relative_error=_jackknife(np.sqrt(np.maximum(length - 2 * inner + wanted, 0.0) / wanted)),
    )


def _cross_means(gram: np.ndarray) -> np.ndarray:
    """f64[1 + n]: the mean of gram[i, j] over i != j, of all batches and without each of them."""
    n = len(gram)
    crossed = gram - np.diag(np.diag(gram))
    total, own = crossed.sum(), crossed.sum(axis=0) + crossed.sum(axis=1)
    return np.concatenate([[total / (n * (n - 1))], (total - own) / ((n - 1) * (n - 2))])


def _jackknife(values: np.ndarray) -> Estimate:
    """The first value, and the standard error from those that leave one batch out."""
    others = values[1:]
    spread = np.sum((others - others.mean()) ** 2)
    return Estimate(float(values[0]), float(np.sqrt((len(others) - 1) / len(others) * spread)))


def _collated(groups: SampledGroups, cfg: AdvantageConfig) -> TrainBatch:
    """One response a row, with advantages."""
    truncated = np.array([r.finish == "length" for r in groups.rollouts])
    valid = np.ones(groups.rewards.shape, np.bool_)
    advantages = response_advantages(
        groups.rewards, valid, truncated.reshape(groups.rewards.shape), cfg
    )
    return collate(
        groups.rollouts,
        advantages.reshape(-1),
        step=max(int(r.weight_version.max()) for r in groups.rollouts),
        rows=len(groups.rollouts),
        length=groups.length,
        pack=False,
    )


def _token_weights(batch: TrainBatch, cfg: LossConfig) -> Any:
    return token_weights(
        batch.loss_mask, batch.segment_ids, per=cfg.averaging, constant=cfg.averaging_length
    )
