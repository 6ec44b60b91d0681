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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.arrays import NO_ROUTE, Array, Mean, ReplayedRoutes, TrainBatch
from jaxrl_llm.learner.state import abstract_params, shardings_of
from jaxrl_llm.learner.step import LearnerConfig, Policy, make_policy
from jaxrl_llm.losses.attribution import Passes, attribute
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.sharding import batch_sharding

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
    model: ModelConfig, learner: LearnerConfig, mesh: Mesh, *, temperature: float, rows: int = 0
) -> Attribution:
    """The jitted before(params_old, batch) and after(params, old_passes) -> metrics.

    Call before() with the weights that the rollout batch is scored with and a mini-batch as
    collated: prepare() may put pi_old's routes where the sampler's were. Call after() with the
    weights that the mini-batch's own loss is taken at: before its update, which donates them.
    Experts alone are replayed, never gate values.

    Args:
      model: of the policy.
      learner: its compute settings and micro_batches are read.
      mesh: rows are split over its data and fsdp axes.
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
    policy = make_policy(model, learner.compute, mesh, temperature=temperature)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]

    def before(params: Params, batch: TrainBatch) -> OldPasses:
        whole = batch.inputs.shape[0]
        wanted = -(-rows // devices) * devices if rows else whole // learner.micro_batches
        return _old_passes(policy, params, _spread_rows(batch, min(wanted, whole)))

    by_rows = batch_sharding(mesh)
    params = shardings_of(abstract_params(model, mesh))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return Attribution(
        jax.jit(before, in_shardings=(params, by_rows), out_shardings=by_rows),
        jax.jit(partial(_split, policy), in_shardings=(params, by_rows), out_shardings=everywhere),
    )


def _old_passes(policy: RunPolicy, params: Params, batch: TrainBatch) -> OldPasses:
    natural, _, router = policy(params, batch, None)
    routes = jnp.moveaxis(router.experts, 0, 2).astype(jnp.int16)
    r3 = None
    if batch.routes is not None:
        r3 = policy(params, batch, ReplayedRoutes(batch.routes)).logprobs
    return OldPasses(batch, natural, routes, r3)


def _split(policy: RunPolicy, params: Params, old: OldPasses) -> dict[str, Mean]:
    """The passes of pi, and the metrics of all passes."""
    batch, mask = old.batch, old.batch.loss_mask
    natural = policy(params, batch, None).logprobs
    r2 = policy(params, batch, ReplayedRoutes(old.routes)).logprobs
    passes = Passes(batch.sampler_logprobs, old.natural, natural, r2)
    if batch.routes is None:
        return attribute(passes, mask)
    r3 = policy(params, batch, ReplayedRoutes(batch.routes)).logprobs
    routed = mask & jnp.all(batch.routes != NO_ROUTE, axis=(2, 3))
    metrics = attribute(passes._replace(old_r3=old.r3, r3=r3), routed)
    unrouted = jnp.sum((mask & ~routed).astype(jnp.float32))
    return metrics | {"attribution/unrouted_tokens": Mean(unrouted, jnp.ones_like(unrouted))}


def _spread_rows(batch: TrainBatch, rows: int) -> TrainBatch:
    """`rows` of the batch's rows at equal distances: no group of one prompt takes them all."""
    stride = batch.inputs.shape[0] // rows

    def one(leaf: Array) -> Array:
        return leaf[: rows * stride].reshape(rows, stride, *leaf.shape[1:])[:, 0]

    return jax.tree.map(one, batch)
