"""A policy whose every response is listed, and its passes: what these tests share."""

import functools

import jax
import numpy as np

from jaxrl_llm.first_order.enumeration import Enumeration, enumerate_responses
from jaxrl_llm.first_order.gradients import (
    Agreement,
    Behaviour,
    agreement,
    behaviour_at,
    expected_batch,
    sequence_gradient,
    surrogate_gradient,
)
from jaxrl_llm.first_order.passes import Passes, Score, flat, make_passes, make_sampler_score
from jaxrl_llm.learner.step import Replay
from jaxrl_llm.losses.clipping import ClipConfig
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.losses.weights import ImportanceConfig
from jaxrl_llm.model.config import ComputeConfig, ModelConfig, MoEConfig
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.rollout.precision import Numerics, Precision
from tests.learner.tiny import make_params

# Sharp random weights: far from uniform, and with routes that the engine's rounding changes.
MODEL = ModelConfig(
    vocab_size=4,
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_width=8),
)
LENGTH, STOP = 4, 0
TEMPERATURE = 1.3
NO_CLIP = ClipConfig(kind="none")
UNCAPPED = ImportanceConfig(high=float("inf"))
PARAMS = make_params(MODEL, seed=3)


@functools.cache
def responses(length: int = LENGTH) -> Enumeration:
    """Of two prompts of unequal length."""
    return enumerate_responses([(1,), (2, 3)], vocab_size=4, length=length, stop_token=STOP)


@functools.cache
def rewards(length: int = LENGTH) -> np.ndarray:
    """f32[B]: a third of the responses is right."""
    count = len(responses(length).prompt)
    return (np.random.default_rng(1).random(count) < 1 / 3).astype(np.float32)


@functools.cache
def passes() -> Passes:
    compute = ComputeConfig(remat="none", dispatch="dense")
    return make_passes(MODEL, compute, temperature=TEMPERATURE)


@functools.cache
def engine(precision: Precision) -> Score:
    return make_sampler_score(Numerics(MODEL, precision, "same"), temperature=TEMPERATURE)


@functools.cache
def behaviour(precision: Precision, length: int = LENGTH) -> Behaviour:
    """Of an engine that serves PARAMS."""
    return behaviour_at(passes().score, engine(precision), PARAMS, responses(length))


def on_policy(behaviour: Behaviour) -> Behaviour:
    """As if pi_old itself had sampled: mu = pi_old, to the last bit."""
    old = behaviour.old
    return Behaviour(sampler=old, old=old, old_replayed=old)


def moved(size: float, seed: int = 0) -> Params:
    """PARAMS + size * direction, the direction of about unit effect on the log-probabilities."""
    direction = make_params(MODEL, seed=100 + seed)
    return jax.tree.map(lambda a, b: (a + size * b).astype(np.float32), PARAMS, direction)


def exact(params: Params, length: int = LENGTH) -> np.ndarray:
    """The sequence-level gradient, f64[P]."""
    return flat(sequence_gradient(passes(), params, responses(length), rewards(length))[1])


def surrogate(
    params: Params,
    who: Behaviour,
    cfg: LossConfig,
    replay: Replay = "none",
    length: int = LENGTH,
) -> np.ndarray:
    """The surrogate's expected gradient, f64[P]."""
    batch, weights = expected_batch(responses(length), rewards(length), who, replay, cfg)
    return surrogate_gradient(passes(), params, batch, weights, cfg)


def compare(
    params: Params, who: Behaviour, cfg: LossConfig, replay: Replay = "none", length: int = LENGTH
) -> Agreement:
    return agreement(surrogate(params, who, cfg, replay, length), exact(params, length))


def slope(sizes: np.ndarray, errors: list[float]) -> float:
    """Of log error against log size, least squares."""
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])
