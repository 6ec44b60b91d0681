"""The passes that tell numerics, routing and staleness apart, on part of a mini-batch.

What it is: two jitted steps around the updates, before() at the weights they start from and after()
at the present ones, both over the same rows. Five forward passes in all, so every k steps is
enough. What it is not: the split itself (losses/attribution.py), nor anything that trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import NO_ROUTE, Array, Mean, ReplayedRoutes, TrainBatch
from jaxrl_llm.learner.state import abstract_params, shardings_of
from jaxrl_llm.learner.step import LearnerConfig, Policy, make_policy
from jaxrl_llm.losses.attribution import Passes, attribute
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.sharding import BATCH_AXES, Layout, batch_sharding, partitioned, replicated

RunPolicy = Callable[[Params, TrainBatch, ReplayedRoutes | None], Policy]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OldPasses:
    """The rows under examination and what pi_old said of them. Every leaf leads with rows R."""

    batch: TrainBatch  # of R rows, as before() received it
    natural: Array  # f32[R, S], log pi_old with its own experts, nats
    routes: Array  # int16[R, S, L, K], those experts
    r3: Array | None  # f32[R, S], log pi_old with the sampler's experts; None without batch.routes


class Attribution(NamedTuple):
    """The two steps; keep what before() returns until after()."""

    before: Callable[[Params, TrainBatch], OldPasses]
    after: Callable[[Params, OldPasses], dict[str, Mean]]


def make_attribution(
    model: ModelConfig, learner: LearnerConfig, layout: Layout, *, temperature: float, rows: int = 0
) -> Attribution:
    """The jitted before(params_old, batch) and after(params, old_passes) -> metrics.

    Call before() with the weights that the rollout batch is scored with and a mini-batch as
    collated: prepare() may put pi_old's routes where the sampler's were. Call after() with the
    weights that the mini-batch's own loss is taken at: before its update, which donates them.
    Experts alone are replayed, never gate values.

    Args:
      model: of the policy.
      learner: its mesh, compute settings and micro_batch_rows are read.
      layout: how rows and positions are split.
      temperature: of sampling.
      rows: how many rows to score, spread evenly over the mini-batch, rounded up to what divides
        over the devices; 0 is one micro-batch.

    Returns:
      The steps. Metrics are those of losses.attribution.attribute, prefixed "attribution/", and
      "attribution/unrouted_tokens", the sampled tokens left out because the sampler reported no
      experts for them. Without batch.routes the mismatch is not split and r3 has no names.

    Raises:
      ValueError: rows is negative.
    """
    if rows < 0:
        raise ValueError(f"rows is {rows}; give the rows to score, or 0 for one micro-batch")
    policy = make_policy(model, learner.compute, layout, temperature=temperature)
    devices = layout.size(BATCH_AXES)

    def before(params: Params, batch: TrainBatch) -> OldPasses:
        whole = batch.inputs.shape[0]
        wanted = -(-rows // devices) * devices if rows else whole // learner.micro_batches(whole)
        spread = partitioned(partial(_spread_rows, rows=min(wanted, whole)), by_rows)
        return _old_passes(policy, params, spread(batch))

    def after(params: Params, old: OldPasses) -> dict[str, Mean]:
        return partitioned(_measured, replicated(layout))(_passes(policy, params, old), old.batch)

    by_rows = batch_sharding(layout)
    params = shardings_of(abstract_params(model, layout))
    return Attribution(
        jax.jit(before, in_shardings=(params, by_rows), out_shardings=by_rows),
        jax.jit(after, in_shardings=(params, by_rows), out_shardings=replicated(layout)),
    )


def _old_passes(policy: RunPolicy, params: Params, batch: TrainBatch) -> OldPasses:
    natural, _, router = policy(params, batch, None)
    routes = jnp.moveaxis(router.experts, 0, 2).astype(jnp.int16)
    r3 = None
    if batch.routes is not None:
        r3 = policy(params, batch, ReplayedRoutes(batch.routes)).logprobs
    return OldPasses(batch, natural, routes, r3)


def _passes(policy: RunPolicy, params: Params, old: OldPasses) -> Passes:
    """Those of pi_old and those of pi."""
    batch = old.batch
    natural = policy(params, batch, None).logprobs
    r2 = policy(params, batch, ReplayedRoutes(old.routes)).logprobs
    passes = Passes(batch.sampler_logprobs, old.natural, natural, r2)
    if batch.routes is None:
        return passes
    r3 = policy(params, batch, ReplayedRoutes(batch.routes)).logprobs
    return passes._replace(old_r3=old.r3, r3=r3)


def _measured(passes: Passes, batch: TrainBatch) -> dict[str, Mean]:
    mask = batch.loss_mask
    if batch.routes is None:
        return attribute(passes, mask)
    routed = mask & jnp.all(batch.routes != NO_ROUTE, axis=(2, 3))
    unrouted = jnp.sum((mask & ~routed).astype(jnp.float32))
    counted = {"attribution/unrouted_tokens": Mean(unrouted, jnp.ones_like(unrouted))}
    return attribute(passes, routed) | counted


def _spread_rows(batch: TrainBatch, rows: int) -> TrainBatch:
    """`rows` of the batch's rows at equal distances: no group of one prompt takes them all."""
    stride = batch.inputs.shape[0] // rows

    def one(leaf: Array) -> Array:
        return leaf[: rows * stride].reshape(rows, stride, *leaf.shape[1:])[:, 0]

    return jax.tree.map(one, batch)
