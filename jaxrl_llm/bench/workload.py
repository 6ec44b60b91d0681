"""What the rows compute: models with random weights, batches of random tokens, learner steps.

What it is: the library's own public functions, put together as the loop does. What it is not:
faster or smaller versions of them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_llm.arrays import SAMPLER_ROUTES, Metrics, TrainBatch
from jaxrl_llm.bench.measure import Contestant
from jaxrl_llm.bench.roof import computes_in
from jaxrl_llm.learner.sft import make_sft_step
from jaxrl_llm.learner.state import (
    Optimizer,
    OptimizerConfig,
    TrainState,
    init_state,
    make_optimizer,
    random_params,
)
from jaxrl_llm.learner.step import LearnerConfig, TrainStep, make_train_step
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.model import hf
from jaxrl_llm.model.config import Attention, ComputeConfig, Dispatch, ModelConfig
from jaxrl_llm.model.hf_config import config_json
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.sharding import Layout, MeshConfig, batch_sharding, make_layout

LEARNING_RATE = 1e-5
"""So small that the weights of the last round route as those of the first."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model on one device, and how a learner trains it."""

    model: ModelConfig
    learner: LearnerConfig
    optimizer: Optimizer
    layout: Layout

    def kernels(self, dispatch: Dispatch, attention: Attention) -> Setup:
        """The same, with these ways of computing experts and attention."""
        compute = dataclasses.replace(self.learner.compute, dispatch=dispatch, attention=attention)
        return dataclasses.replace(self, learner=dataclasses.replace(self.learner, compute=compute))

    def params(self) -> Params:
        """Random ones, always the same."""
        return random_params(self.model, self.layout, jax.random.key(0))

    def sft_step(self) -> TrainStep:
        """Forward, backward and AdamW on the mean cross entropy."""
        return make_sft_step(self.model, self.learner, LossConfig(), self.optimizer, self.layout)

    def train_step(self) -> TrainStep:
        """The RL update: MiniRL, with all that is logged of every step."""
        return make_train_step(
            self.model, self.learner, LossConfig(), self.optimizer, self.layout, temperature=1.0
        )

    def batch(self, tokens: np.ndarray, *, segments: int = 1) -> TrainBatch:
        """tokens i32[B, S + 1] on the device, as rows of so many segments, all of it sampled."""
        size = tokens.shape[1] - 1
        shape = (tokens.shape[0], size)
        place = np.broadcast_to(np.arange(size, dtype=np.int32), shape)
        length = size // segments
        uniform = np.full(shape, -np.log(self.model.vocab_size), np.float32)
        fields: dict[str, Any] = {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": place % length,
            "segment_ids": place // length + 1,
            "staleness": np.zeros(shape, np.int32),
            "loss_mask": np.ones(shape, np.bool_),
            "sampler_logprobs": uniform,
            "advantages": np.random.default_rng(1).normal(size=shape).astype(np.float32),
            "old_logprobs": uniform,
            "provenance": np.full(shape, SAMPLER_ROUTES, np.int8),
        }
        return jax.device_put(TrainBatch(**fields), batch_sharding(self.layout))


def make_setup(model: ModelConfig) -> Setup:
    """Of a model, in the type that this backend computes in, nothing computed again."""
    compute = ComputeConfig(dtype=computes_in(), remat="none", keep_logits=True)  # type: ignore[arg-type]
    learning = OptimizerConfig(learning_rate=LEARNING_RATE)
    learner = LearnerConfig(optimizer=learning, compute=compute)
    return Setup(model, learner, make_optimizer(learning, 1), make_layout(MeshConfig()))


def make_tokens(model: ModelConfig, rows: int, length: int) -> np.ndarray:
    """Random ones, i32[rows, length], always the same."""
    return np.random.default_rng(0).integers(0, model.vocab_size, (rows, length), np.int32)


class Trainee:
    """The state that steps donate and renew; several kinds of step may share one."""

    def __init__(self, setup: Setup) -> None:
        self.state: TrainState = init_state(setup.params(), setup.optimizer)

    def advance(self, step: TrainStep, batch: TrainBatch) -> Metrics:
        """One update, done when it returns."""
        self.state, metrics = step(self.state, batch)
        jax.block_until_ready(self.state)
        return metrics

    def contestant(self, step: TrainStep, batch: TrainBatch) -> Contestant:
        """Such updates, one at each call."""
        return lambda: self.advance(step, batch)


def write_checkpoint(folder: Path, setup: Setup, *, max_length: int) -> None:
    """The setup's random weights for a peer, in float32."""
    described = config_json(
        setup.model, dtype="float32", max_length=max_length, stop_token_ids=(), pad_token_id=None
    )
    hf.write(folder, hf.tensors(setup.params(), setup.model, "float32"), described)


def describe(model: ModelConfig) -> str:
    """The sizes of a model that a reader wants to see, and how it is computed."""
    moe = model.moe
    return (
        f"D {model.width}, {model.num_layers} layers, top-{moe.experts_per_token} of "
        f"{moe.num_experts} experts of {moe.expert_width}, V {model.vocab_size:,}, "
        f"{computes_in()}, activations kept"
    )
