"""A config of a model small enough to compile in seconds, and its FLOPs by hand."""

from __future__ import annotations

import dataclasses

from jaxrl_llm.config import RolloutConfig, RunConfig, TaskConfig
from jaxrl_llm.data.prompts import DataConfig
from jaxrl_llm.learner.step import LearnerConfig
from jaxrl_llm.model.config import ComputeConfig, ModelConfig, MoEConfig
from jaxrl_llm.rollout.local import LocalEngineConfig
from jaxrl_llm.sharding import MeshConfig

MODEL = ModelConfig(
    vocab_size=512,
    width=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    moe=MoEConfig(num_experts=8, experts_per_token=2, expert_width=128),
)
ROWS, LENGTH = 16, 128


def get_config() -> RunConfig:
    """Four devices, two micro-batches, all experts computed for all tokens."""
    return RunConfig(
        steps=10,
        model=MODEL,
        task=TaskConfig(data=DataConfig(kind="addition")),
        rollout=RolloutConfig(
            groups=4,
            samples=4,
            max_new_tokens=100,
            engine=LocalEngineConfig(max_length=LENGTH + 1),
        ),
        learner=LearnerConfig(
            replay="r3",
            micro_batch_rows=2,
            compute=ComputeConfig(dispatch="dense", logprob_chunk=64),
            mesh=MeshConfig(fsdp=4),
        ),
    )


def on_mesh(mesh: MeshConfig, compute: ComputeConfig, micro_batch_rows: int) -> RunConfig:
    """The same with another mesh, computed otherwise."""
    config = get_config()
    learner = dataclasses.replace(
        config.learner, mesh=mesh, compute=compute, micro_batch_rows=micro_batch_rows
    )
    return dataclasses.replace(config, learner=learner)


def forward_flops(tokens: int) -> dict[str, int]:
    """FLOPs of one pass over so many tokens in full rows, all experts computed, by hand."""
    width, heads, kv_heads = 256, 4 * 64, 2 * 64
    per_token = {
        "projections": 3 * 2 * width * (heads + kv_heads + kv_heads + heads),
        # Queries and keys are turned by a matrix as wide as a head.
        "rotation": 3 * 2 * (heads + kv_heads) * 64,
        # The scores of a row are all computed, also those that the mask hides.
        "attention": 3 * 2 * 2 * LENGTH * heads,
        "router": 3 * 2 * width * 8,
        "gate and up": 3 * 2 * 2 * width * 8 * 128,
        "down": 3 * 2 * width * 8 * 128,
        "head": 2 * width * 512,
    }
    return {part: tokens * flops for part, flops in per_token.items()}


def training_flops(tokens: int, *, remat: bool, keep_logits: bool = False) -> int:
    """Forward, gradient, and what is computed again for it."""
    parts = forward_flops(tokens)
    forward = sum(parts.values())
    # Of a layer that is recomputed the result of its last product is not: no gradient needs it.
    head = 0 if keep_logits else parts["head"]
    layers = forward - parts["head"] - parts["down"] if remat else 0
    # The matrix of the rotation is a constant and has no gradient.
    return 3 * forward - parts["rotation"] + head + layers
