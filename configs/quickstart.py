"""Addition with a written-out scratch: the whole method in minutes on two CPU cores.

    command    bash launch/quickstart.sh          (or: jaxrl-llm train configs/quickstart.py)
    hardware   2 cores, no accelerator
    expect     see the README's "What to expect"

A Qwen3-style MoE of 126 thousand parameters starts from random weights. Demonstrations with
wrong scratch digits teach it the format and the skill but leave its samples unreliable; MiniRL with
a binary verified reward makes them reliable. The engine samples in fp8, so every part of the method
has something to do: importance sampling corrects for the engine's numerics, two mini-batches per
rollout batch make the second one off-policy and the clip mask act, and R3 replays the experts that
the engine used.
"""

from jaxrl_llm.config import ColdStartConfig, RolloutConfig, RunConfig, TaskConfig
from jaxrl_llm.data.prompts import DataConfig
from jaxrl_llm.evaluate import EvaluationConfig
from jaxrl_llm.learner.checkpoint import CheckpointConfig
from jaxrl_llm.learner.state import OptimizerConfig
from jaxrl_llm.learner.step import LearnerConfig
from jaxrl_llm.model.config import ModelConfig, MoEConfig
from jaxrl_llm.rollout.local import LocalEngineConfig
from jaxrl_llm.runlog import RunLogConfig


def get_config() -> RunConfig:
    """The quickstart."""
    return RunConfig(
        run_dir="runs/quickstart-{seed}",
        steps=160,
        model=ModelConfig(
            vocab_size=16,
            width=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            moe=MoEConfig(num_experts=8, experts_per_token=2, expert_width=32),
        ),
        task=TaskConfig(data=DataConfig(kind="addition", size=8192, heldout_size=256)),
        cold_start=ColdStartConfig(
            steps=900,
            batch=64,
            corrupted_share=0.09,
            optimizer=OptimizerConfig(
                learning_rate=6e-3,
                schedule="cosine",
                warmup_steps=20,
                final_share=0.05,
                beta2=0.99,
            ),
        ),
        rollout=RolloutConfig(
            groups=32,
            samples=8,
            max_new_tokens=20,
            # In so small a model pauses cost more than slots that stay free a little longer.
            engine=LocalEngineConfig(precision="fp8_e4m3", slots=64, max_length=28, free_slots=16),
        ),
        learner=LearnerConfig(
            mini_batches=2,
            replay="r3",
            optimizer=OptimizerConfig(learning_rate=3e-4),
        ),
        evaluation=EvaluationConfig(every=40, samples=4, pass_k=4),
        checkpoint=CheckpointConfig(every=100),
        log=RunLogConfig(rollout_routes=True),
    )
