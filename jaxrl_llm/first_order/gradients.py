"""The surrogate's expected gradient under any LossConfig, and its agreement with the exact one.

What it is: E_{y ~ mu} of the loss, over an enumeration: the token weights of losses/weights.py with
mu(y) in place of 1 / n, and the advantages of an infinite group. The auxiliary losses of the
routers are left out: they approximate no reward. What it is not: a model (passes.py).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, assert_never

import jax
import numpy as np

from jaxrl_llm.arrays import NO_ROUTE, Array, TrainBatch
from jaxrl_llm.first_order.enumeration import Enumeration
from jaxrl_llm.first_order.passes import Cotangent, Passes, Score, Scores, flat
from jaxrl_llm.learner.step import Replay
from jaxrl_llm.losses.advantages import AdvantageConfig
from jaxrl_llm.losses.policy import LossConfig, policy_loss
from jaxrl_llm.model.transformer import Params


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How a surrogate's gradient g compares with the sequence-level gradient G."""

    cosine: float  # <g, G> / (|g| |G|): what matters to an optimizer that normalises
    norm_ratio: float  # |g| / |G|
    projection: float  # <g, G> / |G|^2: progress along G, relative to following G itself
    relative_error: float  # |g - G| / |G|


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """Who sampled, and pi_old, on every row of an enumeration."""

    sampler: Scores  # mu and e^mu
    old: Scores  # pi_old and e^pi_old, by its own routing
    old_replayed: Scores  # pi_old on the sampler's routes, what r3 divides by


def behaviour_at(
    score: Score, sampler_score: Score, params: Params, enumeration: Enumeration
) -> Behaviour:
    """The behaviour of an engine that publishes `params` and of the learner that owns them."""
    sampler = sampler_score(params, enumeration.batch)
    replayed = dataclasses.replace(enumeration.batch, routes=sampler.routes)
    old = score(params, live_routes(enumeration.batch, sampler.routes))
    return Behaviour(sampler, old, score(params, replayed))


def live_routes(batch: TrainBatch, like: Array) -> TrainBatch:
    """The batch with NO_ROUTE everywhere: the router decides, in a program that can replay."""
    routes: Any = np.full_like(like, NO_ROUTE)
    return dataclasses.replace(batch, routes=routes)


def sequence_gradient(
    passes: Passes, params: Params, enumeration: Enumeration, rewards: np.ndarray
) -> tuple[float, Params]:
    """J_seq = mean over prompts of sum_y pi(y) R(y), and its gradient by jax.grad.

    pi routes by itself: this is the policy that is wanted, whatever is replayed on the way.

    Args:
      rewards: f32[B], of every row. They are centred before they enter the float32 sums: as the
        probabilities add up to 1 this changes rounding alone.
    """
    centre = np.float32(np.mean(rewards))
    values: Any = (rewards - centre) / np.float32(enumeration.prompts)
    value, gradient = passes.expectation(params, enumeration.batch, values)
    return float(value) + float(centre), gradient


def expected_batch(
    enumeration: Enumeration,
    rewards: np.ndarray,
    behaviour: Behaviour,
    replay: Replay,
    cfg: LossConfig,
) -> tuple[TrainBatch, np.ndarray]:
    """What policy_loss reads, and token weights f32[B, S] that make its sum E_{y ~ mu}.

    A token of response y weighs, over the number of prompts,
      "response_sum" mu(y)    "token" mu(y) / E[|y|]    "sequence" mu(y) / |y|
      "constant" mu(y) / averaging_length
    which is what token_weights tends to for many responses.
    """
    sampler = np.asarray(behaviour.sampler.logprobs, np.float64)
    mask = np.asarray(enumeration.batch.loss_mask)
    probabilities = np.exp(np.sum(np.where(mask, sampler, 0.0), axis=1))
    advantages = _advantages(enumeration, rewards, probabilities, cfg.advantage)
    batch = with_behaviour(enumeration.batch, behaviour, replay)
    on_tokens: Any = np.where(mask, advantages[:, None], 0.0).astype(np.float32)
    batch = dataclasses.replace(batch, advantages=on_tokens)
    weights = _weights(mask, probabilities / enumeration.prompts, cfg)
    return batch, weights.astype(np.float32)


def with_behaviour(batch: TrainBatch, behaviour: Behaviour, replay: Replay) -> TrainBatch:
    """The batch with mu, and the routes and pi_old that learner/step.py gives each replay."""
    routes: Any
    match replay:
        case "none":
            routes, old = np.full_like(behaviour.sampler.routes, NO_ROUTE), behaviour.old
        case "r2":
            routes, old = behaviour.old.routes, behaviour.old
        case "r3":
            routes, old = behaviour.sampler.routes, behaviour.old_replayed
        case _:
            assert_never(replay)
    fields: dict[str, Any] = {
        "sampler_logprobs": np.where(batch.loss_mask, behaviour.sampler.logprobs, np.float32(0)),
        "old_logprobs": old.logprobs,
        "routes": routes,
    }
    return dataclasses.replace(batch, **fields)


def surrogate_gradient(
    passes: Passes,
    params: Params,
    batch: TrainBatch,
    weights: np.ndarray,
    cfg: LossConfig,
    *,
    scores: Scores | None = None,
) -> np.ndarray:
    """The direction in which the loss moves the parameters, f64[P]: minus its gradient.

    By the chain rule through the log-probabilities, so that no loss needs the model compiled anew.

    Args:
      batch, weights: from expected_batch, or of sampled responses and from token_weights.
      scores: of pi, passes.score(params, batch), where they are at hand; they depend on params and
        batch.routes alone.
    """
    scores = passes.score(params, batch) if scores is None else scores
    cotangent = jax.device_get(_ascent(scores, batch, weights, cfg))
    return flat(passes.pull_back(params, batch, cotangent))


@partial(jax.jit, static_argnames="cfg")
def _ascent(scores: Scores, batch: TrainBatch, weights: Array, cfg: LossConfig) -> Cotangent:
    """Minus the derivatives of policy_loss by the log-probabilities and entropies of pi."""

    def objective(logprobs: Array, entropy: Array) -> Array:
        return -policy_loss(logprobs, entropy, batch, weights, cfg).loss

    return Cotangent(*jax.grad(objective, argnums=(0, 1))(scores.logprobs, scores.entropy))


def agreement(surrogate: np.ndarray, target: np.ndarray) -> Agreement:
    """Compare two gradients f64[P]. Raises ValueError for a target of length 0.

    A surrogate of length 0 (everything clipped) has no direction: its cosine is NaN.
    """
    length, wanted = np.linalg.norm(surrogate), np.linalg.norm(target)
    if not wanted > 0:
        raise ValueError(
            "the sequence-level gradient is 0 (or NaN): all responses earn one reward, or the "
            "policy is deterministic; there is no direction to compare with"
        )
    inner = float(surrogate @ target)
    return Agreement(
        cosine=inner / float(length * wanted) if length > 0 else float("nan"),
        norm_ratio=float(length / wanted),
        projection=inner / float(wanted**2),
        relative_error=float(np.linalg.norm(surrogate - target) / wanted),
    )


def _advantages(
    enumeration: Enumeration, rewards: np.ndarray, probabilities: np.ndarray, cfg: AdvantageConfig
) -> np.ndarray:
    """f64[B]: group advantages in the limit of an infinite group, where both baselines are one."""
    advantages = np.asarray(rewards, np.float64)
    if cfg.baseline != "none":
        for prompt in range(enumeration.prompts):
            rows = enumeration.prompt == prompt
            share = probabilities[rows] / probabilities[rows].sum()
            centred = advantages[rows] - share @ advantages[rows]
            spread = np.sqrt(share @ centred**2)
            if cfg.scale == "std" and spread > 0:
                centred /= spread
            advantages[rows] = centred
    if cfg.overlong == "mask":
        advantages = np.where(enumeration.stopped, advantages, 0.0)
    return advantages


def _weights(mask: np.ndarray, shares: np.ndarray, cfg: LossConfig) -> np.ndarray:
    """f64[B, S]: the averaging rule with the share mu(y) / prompts of every response."""
    lengths: Any = np.sum(mask, axis=1)
    match cfg.averaging:
        case "response_sum":
            per_row = shares
        case "token":
            per_row = shares / (shares @ lengths)
        case "sequence":
            per_row = shares / lengths
        case "constant":
            per_row = shares / cfg.averaging_length
        case _:
            assert_never(cfg.averaging)
    return np.where(mask, per_row[:, None], 0.0)
