"""A whole experiment that runs in seconds, for tests of the loop; vary it with dataclasses."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.config import ColdStartConfig, RolloutConfig, RunConfig, TaskConfig, to_json
from jaxrl_llm.data.prompts import DataConfig
from jaxrl_llm.data.rewards import Verdict, Verifier
from jaxrl_llm.evaluate import EvaluationConfig
from jaxrl_llm.learner.checkpoint import CHECKPOINTS, CheckpointConfig, Checkpoints
from jaxrl_llm.learner.state import (
    OptimizerConfig,
    TrainState,
    abstract_params,
    fresh_optimizer_state,
    make_optimizer,
    shardings_of,
)
from jaxrl_llm.learner.step import LearnerConfig
from jaxrl_llm.model.config import ModelConfig, MoEConfig
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.rollout.local import LocalEngineConfig
from jaxrl_llm.sharding import make_layout
from tests.learner.tiny import make_params

COLD_STEPS, RL_STEPS = 3, 4


def tiny_config(run_dir: Path) -> RunConfig:
    """Three supervised and four RL steps of a model with 16 channels."""
    return RunConfig(
        run_dir=str(run_dir),
        steps=RL_STEPS,
        model=ModelConfig(
            vocab_size=16,
            width=16,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            moe=MoEConfig(num_experts=4, experts_per_token=2, expert_width=8),
        ),
        task=TaskConfig(
            data=DataConfig(
                kind="addition", size=64, heldout_size=8, data_dir=str(run_dir.parent / "data")
            )
        ),
        cold_start=ColdStartConfig(
            steps=COLD_STEPS, batch=8, optimizer=OptimizerConfig(learning_rate=1e-2)
        ),
        rollout=RolloutConfig(
            groups=4,
            samples=4,
            max_new_tokens=20,
            engine=LocalEngineConfig(precision="fp8_e4m3", slots=8, max_length=28),
        ),
        learner=LearnerConfig(mini_batches=2, replay="r3"),
        evaluation=EvaluationConfig(every=2, samples=2, pass_k=2, resamples=100),
        checkpoint=CheckpointConfig(every=2),
    )


def vary(config: RunConfig, part: str, **settings: object) -> RunConfig:
    """The config with some settings of one part, such as "learner", changed."""
    changed = dataclasses.replace(getattr(config, part), **settings)
    return dataclasses.replace(config, **{part: changed})


def saved_run(config: RunConfig, *steps: int) -> Params:
    """Leave a run directory with checkpoints of random weights; returns those of the last step."""
    mesh, optimizer = make_layout(config.learner.mesh), make_optimizer(config.learner.optimizer, 1)
    shardings = shardings_of(abstract_params(config.model, mesh))
    params: Params = {}
    config.directory.mkdir(parents=True)
    (config.directory / "config.json").write_text(json.dumps(to_json(config)))
    with Checkpoints(config.directory / CHECKPOINTS, config.checkpoint) as checkpoints:
        for step in steps:
            params = jax.device_put(make_params(config.model, seed=step), shardings)
            state = fresh_optimizer_state(TrainState(jnp.int32(step), params, None), optimizer)
            checkpoints.save(step, state, {})
    return params


@contextlib.contextmanager
def even_lengths() -> Iterator[None]:
    """Responses of even length are correct: the untrained model earns no other rewards."""

    def score(_: Verifier, texts: Sequence[tuple[str, str]]) -> list[Verdict]:
        even = [len(text) % 2 == 0 for text, _ in texts]
        return [Verdict(float(yes), "correct" if yes else "wrong") for yes in even]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Verifier, "score", score)
        yield
