"""What a run is refused for before it begins, each with its remedy.

What it is: contradictions between a config and the files, prompts and processes it meets. What it
is not: contradictions within a config, which config.py refuses.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence

import jax

from jaxrl_llm.config import RunConfig, differences, read_config, to_json, unequal
from jaxrl_llm.learner.checkpoint import CHECKPOINTS
from jaxrl_llm.lock import LOCK
from jaxrl_llm.model.hf_config import read_model_config
from jaxrl_llm.processes import anywhere, from_first
from jaxrl_llm.runlog import RunReader
from jaxrl_llm.types import Prompt


def check_processes(config: RunConfig, dataset: str, heldout: Sequence[Prompt]) -> None:
    """ValueError, in all processes of a job, if they do not have the same settings and files.

    Each would compile another program and wait for the others in it for ever.

    dataset: the digest of this process's prompts, as texts.
    heldout: the held-out split as this process's tokenizer reads it.
    """
    tokens = b"".join(prompt.tokens.tobytes() for prompt in heldout)
    mine = {
        "settings": to_json(config),
        "prompts": dataset,
        "prompts as tokens": zlib.crc32(tokens),
        "version of jax": jax.__version__,
    }
    different = unequal(mine, from_first(lambda: mine))
    if not (config.directory / LOCK).exists():
        different.append(f"run_dir: {config.directory}, where the first has made {LOCK}, has none")
    if anywhere(bool(different)):
        here = "; ".join(different) or "not this one from the first: see what the others print"
        raise ValueError(
            f"the processes of this job differ ({here}); run the same command with the same files "
            "on all hosts, and set --run-dir to a folder on a file system that all of them see"
        )


def check_weights(config: RunConfig) -> None:
    """ValueError if cold_start.weights is no folder of the weights of this model."""
    folder = config.cold_start.weights
    try:
        model = read_model_config(folder)
    except ValueError as error:
        raise ValueError(f"cold_start.weights is {folder!r}: {error}") from None
    different = unequal(dataclasses.asdict(model), dataclasses.asdict(config.model), "model")
    if different:
        raise ValueError(
            f"cold_start.weights is {folder!r}, a model with other settings "
            f"({'; '.join(different)}); set model to read_model_config of that folder"
        )


def check_size(config: RunConfig, prompts: int) -> None:
    """ValueError if a step could draw a prompt twice, which a group cannot be told apart by."""
    rollout = config.rollout
    ahead = rollout.groups * (1 + rollout.buffer.max_staleness)
    drawn = {
        "cold_start.batch": config.cold_start.batch if config.cold_start.steps else 0,
        "rollout.groups x (1 + rollout.buffer.max_staleness) x rollout.oversample": math.ceil(
            ahead * rollout.oversample
        ),
    }
    for name, count in drawn.items():
        if count > prompts // 2:
            raise ValueError(
                f"{name} is {count}, more than half of the {prompts} training prompts; give more "
                "prompts (task.data) or lower it"
            )


def check_length(config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """ValueError naming a held-out prompt that leaves no room for a whole response."""
    longest = max(prompts, key=lambda prompt: prompt.tokens.size)
    needed = longest.tokens.size + config.rollout.max_new_tokens
    engine = "sglang" if config.rollout.sglang.servers else "engine"
    if needed > config.rollout.max_length:
        raise ValueError(
            f"prompt {longest.prompt_id!r} of {longest.tokens.size} tokens and "
            f"rollout.max_new_tokens = {config.rollout.max_new_tokens} need {needed} tokens; "
            f"rollout.{engine}.max_length is {config.rollout.max_length}; raise it, or lower "
            "max_new_tokens"
        )


def check_log(config: RunConfig) -> None:
    """ValueError if the log is of a run whose checkpoints are gone: starting over would erase it.

    A run killed before its first checkpoint has a log too, but a short one.
    """
    if not (config.directory / "metrics.jsonl").exists() or not config.checkpoint.every:
        return
    reader = RunReader(config.directory)
    columns = [reader.metrics(phase)["step"] for phase in ("sft", "rl")]
    last = max((int(steps[-1]) for steps in columns if steps.size), default=0)
    if last >= 2 * config.checkpoint.every:
        raise ValueError(
            f"{config.directory} has the log of {last} steps but no checkpoint: starting over "
            f"would erase the log; restore {CHECKPOINTS}/, or use another --run-dir"
        )


def check_directory(config: RunConfig) -> None:
    """ValueError if the run directory holds another experiment, naming the settings that differ."""
    path = config.directory / "config.json"
    if not path.exists():
        return
    other = differences(read_config(path), config)
    if other:
        raise ValueError(
            f"{config.directory} holds a run with other settings ({'; '.join(other)}): to start a "
            "new run choose another --run-dir, to go on with this one use its settings"
        )
