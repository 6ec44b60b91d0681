"""A Qwen3-MoE from Hugging Face, mathematics from a file, rollouts from SGLang servers: a template.

    command    jaxrl-llm train configs/qwen3_moe.py --learner.mesh.fsdp 8   (as many as devices)
    hardware   one machine of TPUs or GPUs for the learner, GPU machines for the servers
    expect     README, "Rollouts from SGLang servers", from nothing to the first step

Read from the environment:

    MODEL        folder of the checkpoint with its tokenizer.json, such as Qwen3-30B-A3B
    PROMPTS      JSONL file of {"prompt", "answer"}; prompts are what the model reads, so with the
                 chat template applied
    SGLANG_URL   the servers, separated by commas

The batch is the paper's (arXiv 2512.01374, section 4): mini-batches of 64 prompts x 16 samples, two
of them for each rollout batch; the loss is MiniRL and the routes are replayed (R3). A key for the
servers is read from SGLANG_API_KEY and is no setting.
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
from jaxrl_llm.model.config import ComputeConfig
from jaxrl_llm.model.hf_config import read_model_config
from jaxrl_llm.rollout.sglang import SGLangConfig

RESPONSE, PROMPT = 8192, 1024
"""Longest response and prompt, in tokens."""


def get_config() -> RunConfig:
    """The experiment on $MODEL."""
    folder = Path(os.environ.get("MODEL", "Qwen3-30B-A3B"))
    return RunConfig(
        run_dir="runs/qwen3-moe-{seed}",
        steps=500,
        model=read_model_config(folder),
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
            max_new_tokens=RESPONSE,
            sglang=SGLangConfig(
                servers=tuple(os.environ.get("SGLANG_URL", "http://127.0.0.1:30000").split(",")),
                max_length=PROMPT + RESPONSE,
                concurrency=256,
                request_seconds=1800.0,
            ),
        ),
        learner=LearnerConfig(
            mini_batches=2,
            # For each share of the mesh: with --learner.mesh.fsdp 8, 128 rows at a time. Fewer take
            # less memory and gather the parameters more often.
            micro_batch_rows=16,
            replay="r3",
            pack=True,
            optimizer=OptimizerConfig(learning_rate=1e-6),
            compute=ComputeConfig(dtype="bfloat16", attention_chunk=1024),
        ),
        evaluation=EvaluationConfig(every=50, samples=4, pass_k=4, greedy=False),
        checkpoint=CheckpointConfig(every=10),
    )
