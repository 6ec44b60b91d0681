"""A tiny model, an engine for it, and requests: what the tests of the engine share."""

from collections.abc import Iterable

import jax
import numpy as np

from jaxrl_llm.model.config import ModelConfig, MoEConfig
from jaxrl_llm.model.transformer import Params, init_params
from jaxrl_llm.rollout.engine import EngineFailure, Request
from jaxrl_llm.rollout.local import LocalEngine, LocalEngineConfig
from jaxrl_llm.types import Prompt, Rollout, SamplingParams

# A dense layer first, so that route rows and layers have different indices; short rotary periods
# and shared key heads, so that a wrong position or head shows.
MODEL = ModelConfig(
    vocab_size=16,
    width=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=100.0,
    moe=MoEConfig(4, 2, expert_width=8, dense_layers=(0,), dense_width=24),
)
CONFIG = LocalEngineConfig(slots=4, max_length=32, prefill_rows=2, prefill_chunk=4, decode_steps=6)


def params(seed: int = 0, model: ModelConfig = MODEL) -> Params:
    """Random weights: norm scales that differ, matrices that give the layers opinions."""
    rng = np.random.default_rng(seed)

    def vary(leaf: jax.Array) -> jax.Array:
        scale = np.exp(0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)
        return leaf * scale * (1.5 if leaf.ndim > 2 else 1.0)

    return jax.tree.map(vary, init_params(model, jax.random.key(seed)))


def engine(config: LocalEngineConfig = CONFIG, *, version: int = 0, seed: int = 0) -> LocalEngine:
    """An engine with published weights, whose text is the response's ids between spaces."""
    made = LocalEngine(config, MODEL, lambda ids: " ".join(map(str, ids)))
    made.publish(params(seed), version)
    return made


def request(seed: int, sampling: SamplingParams, *, prompt_length: int = 5) -> Request:
    """Prompt, index and seed are functions of `seed` and the length."""
    tokens = np.random.default_rng(seed).integers(0, MODEL.vocab_size, prompt_length)
    prompt = Prompt(f"p{seed}", tokens.astype(np.int32), text="", answer="")
    return Request(prompt, sample_index=seed % 3, seed=seed, sampling=sampling)


def mixed_requests() -> list[Request]:
    """More than there are slots, of unequal prompts, lengths and settings."""
    settings = [
        SamplingParams(9, stop_token_ids=(3,)),
        SamplingParams(14, temperature=0.7),
        SamplingParams(1, stop_token_ids=(3, 5, 7), temperature=1.3),
        SamplingParams(6, temperature=0.0),
        SamplingParams(12, top_p=0.8),
        SamplingParams(5, top_k=3, temperature=1.5),
    ]
    return [
        request(seed, settings[seed % len(settings)], prompt_length=1 + seed % 11)
        for seed in range(18)
    ]


def by_prompt(outcomes: Iterable[Rollout | EngineFailure]) -> dict[str, Rollout]:
    """The rollouts by prompt id; fails if one of them is a failure."""
    rollouts = {}
    for outcome in outcomes:
        assert isinstance(outcome, Rollout), outcome
        rollouts[outcome.prompt_id] = outcome
    return rollouts


def assert_same(left: Rollout, right: Rollout) -> None:
    """Equal bit for bit."""
    assert (left.prompt_id, left.sample_index) == (right.prompt_id, right.sample_index)
    assert (left.text, left.finish) == (right.text, right.finish)
    for name in ("tokens", "loss_mask", "sampler_logprobs", "routes", "weight_version"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
