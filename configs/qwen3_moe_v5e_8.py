"""A small Qwen3-MoE on one host of eight TPU v5e: what a lab trains to try an idea on real prompts.

    command    jaxrl-llm train configs/qwen3_moe_v5e_8.py
    check      jaxrl-llm compile configs/qwen3_moe_v5e_8.py --topology v5e:2x4
    hardware   v5e-8, which is 8 chips in 2x4 of one host, for the learner; a GPU with SGLang
    expect     README, "Will it fit?": four tenths of the memory stay free

Read from the environment:

    MODEL        folder of a checkpoint of this shape with its tokenizer.json
    PROMPTS      JSONL file of {"prompt", "answer"}; prompts are what the model reads
    SGLANG_URL   the servers, separated by commas

1.4 billion parameters, of which a token meets 0.5, the head among them: Qwen3-0.6B with 32 experts
in place of its MLP, of which a token takes 4. A mini-batch is 256 responses of up to 8,192 tokens,
32 prompts x 8. The loss is MiniRL and the routes are replayed (R3), as in arXiv 2512.01374.
"""

import os
from pathlib import Path

from jaxrl_llm.config import ColdStartConfig, RolloutConfig, RunConfig, TaskConfig
from jaxrl_llm.data.prompts import DataConfig
from jaxrl_llm.data.rewards import RewardConfig
from jaxrl_llm.data.tokenizer import TokenizerConfig
from jaxrl_llm.evaluate import EvaluationConfig
from jaxrl_llm.learner.checkpoint import CheckpointConfig
from jaxrl_llm.learner.state import OptimizerConfig
from jaxrl_llm.learner.step import LearnerConfig
from jaxrl_llm.model.config import ComputeConfig, ModelConfig, MoEConfig
from jaxrl_llm.rollout.sglang import SGLangConfig
from jaxrl_llm.sharding import MeshConfig, ShardingRules

LENGTH, PROMPT = 8192, 1024
"""Longest prompt plus response, and what of it is left for the prompt, in tokens."""

EVERYWHERE = ("data", "fsdp")


def get_config() -> RunConfig:
    """The experiment on $MODEL."""
    folder = Path(os.environ.get("MODEL", "qwen3-moe-1b"))
    return RunConfig(
        run_dir="runs/qwen3-moe-v5e-{seed}",
        steps=500,
        model=ModelConfig(
            vocab_size=151936,
            width=1024,
            num_layers=28,
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
            tie_embeddings=True,
            moe=MoEConfig(num_experts=32, experts_per_token=4, expert_width=384),
        ),
        task=TaskConfig(
            tokenizer=TokenizerConfig(
                kind="file",
                path=str(folder / "tokenizer.json"),
                stop_tokens=("<|im_end|>", "<|endoftext|>"),
            ),
            data=DataConfig(
                kind="jsonl", files=(os.environ.get("PROMPTS", "prompts.jsonl"),), heldout_size=256
            ),
            reward=RewardConfig(kind="math_verify", extraction="boxed"),
        ),
        cold_start=ColdStartConfig(weights=str(folder)),
        rollout=RolloutConfig(
            groups=64,
            samples=8,
            max_new_tokens=LENGTH - PROMPT,
            sglang=SGLangConfig(
                servers=tuple(os.environ.get("SGLANG_URL", "http://127.0.0.1:30000").split(",")),
                max_length=LENGTH,
                concurrency=256,
                request_seconds=1800.0,
            ),
        ),
        learner=LearnerConfig(
            mini_batches=2,
            micro_batch_rows=1,  # one for each device, eight at a time
            replay="r3",
            pack=True,
            row_length=LENGTH,
            optimizer=OptimizerConfig(learning_rate=1e-6),
            compute=ComputeConfig(dtype="bfloat16", remat="attention", logprob_chunk=1024),
            mesh=MeshConfig(
                data=2, fsdp=4, rules=ShardingRules(embed=EVERYWHERE, expert_embed=EVERYWHERE)
            ),
        ),
        evaluation=EvaluationConfig(every=50, samples=4, pass_k=4, greedy=False),
        checkpoint=CheckpointConfig(every=10),
    )
