"""A model of a few hundred parameters and batches for it, shared by the tests of the learner."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxrl_llm.arrays import (
    NO_ROUTE,
    NOT_REPLAYED,
    ROUTES_MISSING,
    SAMPLER_ROUTES,
    Array,
    TrainBatch,
)
from jaxrl_llm.model.config import ModelConfig, MoEConfig
from jaxrl_llm.model.transformer import Params, init_params
from jaxrl_llm.sharding import Layout, MeshConfig, make_layout

MODEL = ModelConfig(
    vocab_size=12,
    width=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_width=4),
)
ROWS, LENGTH = 16, 8  # B, S


def one_device() -> Layout:
    return make_layout(MeshConfig())


def make_params(model: ModelConfig = MODEL, seed: int = 0) -> Params:
    """Random numpy parameters, large enough that distributions, routes and gradients are not flat.

    Not those of init_params, whose random generator takes seconds to compile.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key.endswith("norm"):
            return rng.uniform(0.5, 1.5, shape.shape).astype(np.float32)
        return rng.normal(0, shape.shape[-2] ** -0.5 * 2, shape.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_routes(rng: np.random.Generator, model: ModelConfig = MODEL) -> np.ndarray:
    """int16[B, S, L, K], distinct random experts for each token and layer."""
    shape = (ROWS, LENGTH, model.num_moe_layers, model.moe.num_experts)
    order = np.argsort(rng.random(shape), axis=-1)
    return order[..., : model.moe.experts_per_token].astype(np.int16)


def make_batch(seed: int = 0, *, model: ModelConfig = MODEL) -> TrainBatch:
    """Packed rows of unequal responses, the last two of padding; no old_logprobs, no routes.

    Its provenance is that of routes for every token.
    """
    rng = np.random.default_rng(seed)
    shape = (ROWS, LENGTH)
    tokens = rng.integers(0, model.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    segment_ids = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    for row in range(ROWS - 2):
        start, segment = 0, 1
        for length in rng.integers(2, 6, 2):
            stop = min(start + int(length), LENGTH)
            segment_ids[row, start:stop] = segment
            positions[row, start:stop] = np.arange(stop - start)
            start, segment = stop, segment + 1
    mask = (positions >= 1) & (segment_ids > 0)
    return TrainBatch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        positions=positions,
        segment_ids=segment_ids,
        staleness=np.zeros(shape, np.int32),
        loss_mask=mask,
        sampler_logprobs=np.where(mask, -rng.gamma(2.0, 1.2, shape), 0).astype(np.float32),
        advantages=np.where(mask, rng.normal(size=shape), 0).astype(np.float32),
        provenance=np.where(segment_ids > 0, SAMPLER_ROUTES, NOT_REPLAYED).astype(np.int8),
    )


def with_noise(logprobs: Array, scale: float, seed: int = 0) -> np.ndarray:
    """Log-probabilities of a policy that is a little different: at most 0."""
    noise = np.random.default_rng(seed).normal(size=logprobs.shape) * scale
    return np.minimum(np.asarray(logprobs) + noise, 0).astype(np.float32)


def with_some_routes(routes: np.ndarray, batch: TrainBatch) -> TrainBatch:
    """The batch with routes, NO_ROUTE for padding and for every third token."""
    real = np.asarray(batch.segment_ids) > 0
    keep = real & (np.arange(LENGTH) % 3 > 0)
    provenance = np.where(keep, SAMPLER_ROUTES, np.where(real, ROUTES_MISSING, NOT_REPLAYED))
    return replace(
        batch,
        routes=np.where(keep[..., None, None], routes, NO_ROUTE).astype(np.int16),
        provenance=provenance.astype(np.int8),
    )


def replace(batch: TrainBatch, **fields: object) -> TrainBatch:
    return dataclasses.replace(batch, **fields)  # type: ignore[arg-type]
