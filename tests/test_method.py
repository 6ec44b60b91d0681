"""The method where its parts meet: what an exact engine and R3 leave for the loss to correct."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrl_llm.arrays import ReplayedRoutes
from jaxrl_llm.data.collate import collate
from jaxrl_llm.data.tokenizer import TokenizerConfig, make_tokenizer
from jaxrl_llm.learner.state import OptimizerConfig, init_state, make_optimizer, random_params
from jaxrl_llm.learner.step import (
    LearnerConfig,
    make_policy,
    make_score_step,
    make_train_step,
    prepare,
)
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.model.config import ModelConfig, MoEConfig
from jaxrl_llm.rollout.engine import Request
from jaxrl_llm.rollout.local import LocalEngine, LocalEngineConfig
from jaxrl_llm.rollout.precision import Precision
from jaxrl_llm.sharding import MeshConfig, make_layout
from jaxrl_llm.types import Prompt, Rollout, SamplingParams

MODEL = ModelConfig(
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_width=8),
)
TEMPERATURE = 0.7
LEARNER = LearnerConfig(mini_batches=2, replay="r3")


def sampled_batch(precision: Precision):
    """Weights, and a batch that an engine of this precision sampled from them, advantages ±1."""
    mesh = make_layout(MeshConfig())
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = init_state(random_params(MODEL, mesh, jax.random.key(3)), optimizer)
    tokenizer = make_tokenizer(TokenizerConfig())
    config = LocalEngineConfig(precision=precision, slots=4, max_length=24)
    engine = LocalEngine(config, MODEL, tokenizer.decode)
    engine.publish(state.params, 0)
    sampling = SamplingParams(max_new_tokens=12, temperature=TEMPERATURE)
    prompts = [Prompt(f"p{n}", np.arange(2, 7 + n, dtype=np.int32), "", "") for n in range(3)]
    requests = [Request(p, s, 10 * n + s, sampling) for n, p in enumerate(prompts) for s in (0, 1)]
    rollouts = sorted(engine.generate(requests), key=lambda r: (r.prompt_id, r.sample_index))
    assert all(isinstance(rollout, Rollout) for rollout in rollouts)
    advantages = np.array([1, -1] * 3, np.float32)
    batch = collate(rollouts, advantages, step=0, rows=3, length=46, pack=True)
    return mesh, optimizer, state, batch


def test_exact_sampling_and_r3_leave_nothing_to_correct() -> None:
    """Every importance weight of the first mini-batch is 1 to 1e-4, and no token is clipped."""
    mesh, optimizer, state, batch = sampled_batch("float32")
    score = make_score_step(MODEL, LEARNER, mesh, temperature=TEMPERATURE)(state.params, batch)
    prepared = prepare(batch, score, "r3")
    policy = make_policy(MODEL, LEARNER.compute, mesh, temperature=TEMPERATURE)
    logprobs = policy(state.params, prepared, ReplayedRoutes(prepared.routes)).logprobs
    mask = batch.loss_mask
    weights = np.exp(np.asarray(logprobs) - batch.sampler_logprobs)[mask]
    np.testing.assert_allclose(weights, 1.0, atol=1e-4)
    np.testing.assert_array_equal(
        np.asarray(score.routes)[mask], batch.routes[mask], err_msg="routes of one forward pass"
    )

    train = make_train_step(MODEL, LEARNER, LossConfig(), optimizer, mesh, temperature=TEMPERATURE)
    _, metrics = train(state, prepared)
    value = {name: float(mean.value()) for name, mean in metrics.items()}
    assert value["clip/high_fraction"] == value["clip/low_fraction"] == 0.0
    assert value["is_weight/capped_fraction"] == 0.0
    assert value["is_weight/raw_mean"] == pytest.approx(1.0, abs=1e-4)
    assert value["staleness/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert value["routing/replay_coverage"] == 1.0


def test_the_precision_of_the_engine_is_what_the_weights_correct() -> None:
    """The coarser the engine, the further log mu is from log pi; R3 brings them closer."""
    distances = {}
    for precision in ("bfloat16", "fp8_e4m3", "int4"):
        mesh, _, state, batch = sampled_batch(precision)
        for replay in ("none", "r3"):
            learner = dataclasses.replace(LEARNER, replay=replay)
            score = make_score_step(MODEL, learner, mesh, temperature=TEMPERATURE)
            logprobs = np.asarray(score(state.params, batch).logprobs)
            gap = (logprobs - batch.sampler_logprobs)[batch.loss_mask]
            distances[precision, replay] = float(np.mean(gap**2))
    assert distances["bfloat16", "r3"] < distances["fp8_e4m3", "r3"] < distances["int4", "r3"]
    assert distances["fp8_e4m3", "r3"] < distances["fp8_e4m3", "none"]
