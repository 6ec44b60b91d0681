"""Device data: pytrees of arrays with no logic, shared by the losses, the model and the learner.

Host code builds a TrainBatch of numpy arrays (data/collate.py); jitted code receives the same class
holding jax arrays. The alignment rule of types.py holds for every [B, S] field: index s belongs to
the forward pass that consumes inputs[s].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

# For parts that see device data only.
from jaxrl_llm.types import NO_ROUTE as NO_ROUTE
from jaxrl_llm.types import NOT_REPLAYED as NOT_REPLAYED
from jaxrl_llm.types import OLD_ROUTES as OLD_ROUTES
from jaxrl_llm.types import PROVENANCE as PROVENANCE
from jaxrl_llm.types import ROUTES_MISSING as ROUTES_MISSING
from jaxrl_llm.types import ROUTES_UNREPORTED as ROUTES_UNREPORTED
from jaxrl_llm.types import SAMPLER_ROUTES as SAMPLER_ROUTES
from jaxrl_llm.types import RouteFallback as RouteFallback

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """One mini-batch of packed rows. Every leaf leads with B: one PartitionSpec shards it all."""

    inputs: Array  # i32[B, S]
    targets: Array  # i32[B, S]
    positions: Array  # i32[B, S], from 0 within each segment
    segment_ids: Array  # i32[B, S], 1, 2, ... within a row; 0 = padding
    staleness: Array  # i32[B, S], step now - weight version that sampled the target; 0 off mask
    loss_mask: Array  # bool[B, S], True iff the target was sampled by the policy
    sampler_logprobs: Array  # f32[B, S], mu, after temperature; 0 off the mask
    advantages: Array  # f32[B, S], the response's advantage on its sampled positions, else 0
    old_logprobs: Array | None = None  # f32[B, S], pi_old
    ref_logprobs: Array | None = None  # f32[B, S], the frozen reference
    routes: Array | None = None  # int16[B, S, L, K], to replay; NO_ROUTE: the live router decides
    provenance: Array | None = None  # int8[B, S], whose experts each position uses and why
    gates: Array | None = None  # f32[B, S, L, K], gate values to replay with the routes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReplayedRoutes:
    """What a forward pass is told to use in place of its routers' own choice."""

    experts: Array  # int[B, S, L, K], ids; NO_ROUTE in all K slots: the live router decides
    gates: Array | None = None  # f32[B, S, L, K], of those experts, frozen; None: live gate values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterOutput:
    """What the MoE routers did. After the layer scan every field has a leading L."""

    logits: Array  # f32[..., E], live, before the softmax
    experts: Array  # i32[..., K], ids used: the router's own choice or the replayed ids
    weights: Array  # f32[..., K], gate values of those experts, from live logits or replayed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardOutput:
    """A forward pass without its head; log-probabilities are taken from `hidden` in chunks."""

    hidden: Array  # [B, S, D], after the final norm, compute dtype
    router: RouterOutput  # fields [L, B, S, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A weighted mean kept as (total, weight): it adds exactly over micro-batches and hosts."""

    total: Array  # f32[], sum of weight * value
    weight: Array  # f32[], sum of weight

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> Array:
        """total / weight; 0 where the weight is 0."""
        empty = self.weight == 0
        return jnp.where(empty, 0.0, self.total / jnp.where(empty, 1.0, self.weight))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Max:
    """A maximum that pools as a Mean does: the sum of two is the larger one."""

    largest: Array  # f32[]; -inf where there was nothing to look at

    def __add__(self, other: Max) -> Max:
        return Max(jnp.maximum(self.largest, other.largest))

    def value(self) -> Array:
        """The maximum; NaN of nothing."""
        return jnp.where(self.largest == -jnp.inf, jnp.nan, self.largest)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Min:
    """A minimum that pools as a Mean does: the sum of two is the smaller one."""

    smallest: Array  # f32[]; inf where there was nothing to look at

    def __add__(self, other: Min) -> Min:
        return Min(jnp.minimum(self.smallest, other.smallest))

    def value(self) -> Array:
        """The minimum; NaN of nothing."""
        return jnp.where(self.smallest == jnp.inf, jnp.nan, self.smallest)


Metrics = Mapping[str, Mean | Max | Min]
"""What a step reports by name; those of micro-batches, mini-batches and hosts add."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossOutput:
    """A loss and what it saw."""

    loss: Array  # f32[], weighted over the global batch: losses of micro-batches add
    metrics: dict[str, Mean]
    logprobs: Array | None = None  # f32[B, S], log pi that it saw, a constant; if it was asked for
