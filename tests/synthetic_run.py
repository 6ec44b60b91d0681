"""A small run directory with the shape of a real one, for tests of what reads run directories."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from jaxrl_llm.runlog import RunLogConfig, RunWriter, StepRecord
from jaxrl_llm.types import Group, Prompt, Rollout, bind_routes

COLD_START_STEPS = 40
RL_STEPS = 60
VOCABULARY = "0123456789+=#<; "


def encode(text: str) -> np.ndarray:
    """i32[n], one token a character."""
    return np.array([VOCABULARY.index(character) for character in text], np.int32)


def decode(tokens: list[int]) -> str:
    """The stop token ";" decodes to nothing, as with a real tokenizer."""
    return "".join(VOCABULARY[token] for token in tokens).replace(";", "")


def make_rollout(
    prompt: Prompt, sample_index: int, response: str, *, correct: bool, seed: int = 0
) -> Rollout:
    """A finished rollout of `response` and a stop token, with made-up log-probabilities."""
    rng = np.random.default_rng([seed, sample_index])
    tokens = np.concatenate([prompt.tokens, encode(response + ";")])
    positions = tokens.size - 1
    mask = np.arange(positions) >= prompt.tokens.size - 1
    logprobs = np.where(mask, -rng.exponential(0.4, positions), 0.0).astype(np.float32)
    rollout = Rollout(
        prompt_id=prompt.prompt_id,
        sample_index=sample_index,
        tokens=tokens,
        loss_mask=mask,
        sampler_logprobs=logprobs,
        routes=None,
        weight_version=np.where(mask, 3, -1).astype(np.int32),
        text=response,
        finish="stop",
        reward=float(correct),
        verdict="correct" if correct else "wrong",
    )
    return bind_routes(rollout, rng.integers(0, 8, (positions, 2, 2)).astype(np.int16))


def make_group(step: int, *, samples: int = 4) -> Group:
    """A prompt a + b = with samples of which the even ones are correct."""
    rng = np.random.default_rng(step)
    a, b = (int(x) for x in rng.integers(10, 500, 2))
    prompt = Prompt(f"add-{step}", encode(f"{a}+{b}="), f"{a}+{b}=", str(a + b))
    rollouts = []
    for index in range(samples):
        correct = index % 2 == 0
        total = a + b if correct else a + b + 10
        text = f"{total % 10}<{total}#{total}"
        rollouts.append(make_rollout(prompt, index, text, correct=correct, seed=step))
    return Group(prompt, tuple(rollouts))


def rl_record(step: int, *, progress: float) -> StepRecord:
    """One RL step of a run that is going well; `progress` runs from 0 to 1."""
    rng = np.random.default_rng(step)
    accuracy = float(np.clip(0.28 + 0.58 * progress + rng.normal(0, 0.03), 0, 1))
    kl = 2.5e-3 * math.exp(0.8 * progress) * math.exp(rng.normal(0, 0.2))
    metrics = {
        "rollout/reward_mean": accuracy,
        "rollout/accuracy": accuracy,
        "rollout/response_tokens": 15 + rng.normal(0, 0.2) - progress,
        "rollout/truncated_fraction": 0.05 * (1 - progress),
        "rollout/equal_reward_groups": 0.1 + 0.4 * progress,
        "rollout/verdict_correct": round(256 * accuracy),
        "rollout/verdict_wrong": 256 - round(256 * accuracy),
        "rollout/failures": 0.0,
        "rollout/dropped_groups": 0.0,
        "policy/entropy": 0.42 - 0.25 * progress + rng.normal(0, 0.01),
        "policy/kl_sampler_old": kl + rng.normal(0, 8e-4),
        "policy/kl_sampler_old_k3": kl,
        "is_weight/raw_mean": 1 + rng.normal(0, 4e-3),
        "is_weight/used_mean": 0.998 + rng.normal(0, 3e-3),
        "is_weight/capped_fraction": 2e-4,
        "is_weight/raw_ess_token": 0.998 + rng.normal(0, 4e-4),
        "is_weight/raw_ess_sequence": 0.97 + rng.normal(0, 4e-3),
        "clip/high_fraction": abs(rng.normal(0, 2e-3)),
        "clip/low_fraction": abs(rng.normal(0, 4e-3)),
        "routing/agreement": 0.957 + rng.normal(0, 4e-3),
        "routing/replay_coverage": 1.0,
        "learner/loss": rng.normal(0, 0.3),
        "learner/grad_norm": math.exp(rng.normal(0, 0.3)),
        "learner/update_norm": 0.03 * math.exp(rng.normal(0, 0.1)),
        "learner/learning_rate": 3e-4,
    }
    if step % 5 == 0:
        sizes = {"mismatch_numerics": 5e-3, "mismatch_routing": 1e-3}
        sizes |= {"staleness_weights": 2e-3, "staleness_routing": 1e-4}
        metrics |= {f"attribution/abs_{term}": size for term, size in sizes.items()}
    timings = {
        "seconds/rollout": 0.41,
        "seconds/reward": 0.01,
        "seconds/score": 0.12,
        "seconds/update": 0.38,
        "seconds/publish": 0.02,
        "seconds/step": 0.97,
        "rate/rollout_tokens_per_second": 9300.0,
        "rate/learner_tokens_per_second": 7600.0,
    }
    events = ("replay r3 covered 0.93 of the trained tokens",) if step % 20 == 0 else ()
    return StepRecord(
        "rl", step, metrics, timings, events, (make_group(step), make_group(step + 1000))
    )


def evaluation_record(step: int, accuracy: float) -> StepRecord:
    """An evaluation with plausible intervals."""
    metrics = {"eval/prompts": 128.0, "eval/samples": 8.0, "eval/pass_k": 8.0}
    values = {"avg_at_k": accuracy, "pass_at_k": accuracy**0.3, "greedy_accuracy": 0.96}
    for name, value in values.items():
        metrics[f"eval/{name}"] = value
        metrics[f"eval/{name}_low"] = value - 0.04
        metrics[f"eval/{name}_high"] = min(1.0, value + 0.04)
    return StepRecord("eval", step, metrics, {"seconds/evaluate": 2.1})


def write_synthetic_run(run_dir: Path) -> Path:
    """A cold start, an evaluation, RL and another evaluation."""
    with RunWriter(run_dir, RunLogConfig(tensorboard=False, rollouts_every=20)) as writer:
        writer.write_config({"name": "synthetic", "seed": 0, "loss": {"clip_high": 0.27}})
        for step in range(1, COLD_START_STEPS + 1):
            loss = 2.6 * math.exp(-step / 9) + 0.3
            timings = {"seconds/step": 0.2}
            writer.write(StepRecord("sft", step, {"learner/loss": loss}, timings))
        writer.write(evaluation_record(COLD_START_STEPS, 0.29))
        for step in range(COLD_START_STEPS + 1, COLD_START_STEPS + RL_STEPS + 1):
            writer.write(rl_record(step, progress=(step - COLD_START_STEPS) / RL_STEPS))
        writer.write(evaluation_record(COLD_START_STEPS + RL_STEPS, 0.87))
    return run_dir
