"""Qwen3-30B-A3B by the paper's recipe on a TPU v5p-64, with rollouts from SGLang servers.

    command    jaxrl-llm train configs/qwen3_30b_a3b_v5p_64.py --multihost    (on every host)
    check      jaxrl-llm compile configs/qwen3_30b_a3b_v5p_64.py --topology v5p:2x4x4
    hardware   v5p-64, which is 64 TensorCores on 32 chips in 2x4x4, for the learner; GPU machines
               for the servers
    expect     README, "Will it fit?": a third of the memory stays free

On 64 chips (v5p-128, topology v5p:4x4x4) add --learner.mesh.data 4.

Read from the environment:

    MODEL        folder of the checkpoint of Qwen3-30B-A3B-Base, cold-started, with tokenizer.json
    PROMPTS      JSONL file of {"prompt", "answer"}; prompts are what the model reads
    SGLANG_URL   the servers, separated by commas

The batch is the paper's (arXiv 2512.01374, section 4): mini-batches of 1,024 responses, 64 prompts
x 16 samples, two for each rollout batch, sequences of up to 32,768 tokens; the loss is MiniRL and
the routes are replayed (R3). At worst every sequence is that long: 1,024 rows, of which each device
takes one at a time. Shorter ones are packed into fewer rows, which take fewer micro-batches.
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

LENGTH, PROMPT = 32768, 1024
"""Longest prompt plus response, and what of it is left for the prompt, in tokens."""

EVERYWHERE = ("data", "fsdp")
"""Parameters, gradients and moments are split over all devices. Two axes of the mesh, since of a
collective over all of them at once the TPU compiler makes an all-reduce."""

# As in the checkpoint's config.json; written out so that it compiles without one.
QWEN3_30B_A3B = ModelConfig(
    vocab_size=151936,
    width=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    moe=MoEConfig(num_experts=128, experts_per_token=8, expert_width=768),
)


def get_config() -> RunConfig:
    """The experiment on $MODEL."""
    folder = Path(os.environ.get("MODEL", "Qwen3-30B-A3B"))
    return RunConfig(
        run_dir="runs/qwen3-30b-a3b-{seed}",
        steps=500,
        model=QWEN3_30B_A3B,
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
            groups=128,
            samples=16,
            max_new_tokens=LENGTH - PROMPT,
            sglang=SGLangConfig(
                servers=tuple(os.environ.get("SGLANG_URL", "http://127.0.0.1:30000").split(",")),
                max_length=LENGTH,
                concurrency=256,
                request_seconds=7200.0,
            ),
        ),
        learner=LearnerConfig(
            mini_batches=2,
            micro_batch_rows=1,  # one for each device, 32 at a time
            replay="r3",
            pack=True,
            row_length=LENGTH,
            optimizer=OptimizerConfig(learning_rate=1e-6),
            compute=ComputeConfig(dtype="bfloat16", remat="attention", logprob_chunk=2048),
            mesh=MeshConfig(
                data=2, fsdp=16, rules=ShardingRules(embed=EVERYWHERE, expert_embed=EVERYWHERE)
            ),
        ),
        evaluation=EvaluationConfig(every=50, samples=4, pass_k=4, greedy=False),
        checkpoint=CheckpointConfig(every=10),
    )
