"""A whole experiment that runs in seconds, for tests of the loop; vary it with dataclasses."""

import dataclasses
from pathlib import Path

from jaxrl_llm.config import ColdStartConfig, RolloutConfig, RunConfig, TaskConfig
from jaxrl_llm.data.prompts import DataConfig
from jaxrl_llm.evaluate import EvaluationConfig
from jaxrl_llm.learner.checkpoint import CheckpointConfig
from jaxrl_llm.learner.state import OptimizerConfig
from jaxrl_llm.learner.step import LearnerConfig
from jaxrl_llm.model.config import ModelConfig, MoEConfig
from jaxrl_llm.rollout.local import LocalEngineConfig

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
