"""What a step saw, as Means: pure functions that the losses and the learner report from.

Every result is a (total, weight) pair counted in tokens, so micro-batches and hosts add exactly.
Nothing here is differentiated.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import (
    NO_ROUTE,
    PROVENANCE,
    ROUTES_MISSING,
    ROUTES_UNREPORTED,
    Array,
    Max,
    Mean,
    Metrics,
    Min,
)


def masked_mean(values: Array, mask: Array) -> Mean:
    """Mean of `values` ([B, S], any real dtype or bool) over the mask (bool[B, S])."""
    total = jnp.sum(jnp.where(mask, jax.lax.stop_gradient(values), 0).astype(jnp.float32))
    return Mean(total, jnp.sum(mask.astype(jnp.float32)))


def pool(metrics: Sequence[Metrics]) -> dict[str, float]:
    """The metrics of several mini-batches as numbers: Means by their weights, extremes by theirs.

    A name need not be in all of them. One that had nothing to look at is left out: 0 would be a
    claim.
    """
    host = jax.device_get(list(metrics))
    names = dict.fromkeys(name for part in host for name in part)
    pooled = {name: _pooled([part[name] for part in host if name in part]) for name in names}
    return {name: value for name, value in pooled.items() if value is not None}


def _pooled(parts: Sequence[Mean | Max | Min]) -> float | None:
    pooled: Any = functools.reduce(operator.add, parts)
    match pooled:
        case Mean(total, weight):
            return float(total) / float(weight) if weight else None
        case Max(largest):
            return None if largest == -jnp.inf else float(largest)
        case Min(smallest):
            return None if smallest == jnp.inf else float(smallest)
    raise TypeError(f"a metric is {type(pooled).__name__}; it must be Mean, Max or Min")


def route_agreement(logits: Array, routes: Array, mask: Array) -> Mean:
    """Share of the experts in `routes` that the router, left alone, would choose as well.

    The natural top-k of the live logits is compared, not the experts used: under routing replay
    those are the routes themselves. The order within the K slots does not matter.

    Args:
      logits: f32[L, B, S, E], live router logits.
      routes: int16[B, S, L, K], another forward pass's experts.
      mask: bool[B, S], the tokens to compare; tokens without routes are left out.

    Returns:
      The mean over tokens and layers of |natural and routed| / K.
    """
    return _over_layers(route_overlap_by_layer(_natural(logits, routes), routes, mask))


def route_overlap(experts: Array, routes: Array, mask: Array) -> Mean:
    """|experts and routes| / K, averaged over the tokens with routes and over layers.

    Args:
      experts: i32[L, B, S, K], as the model returns them.
      routes: int16[B, S, L, K], as a batch holds them.
      mask: bool[B, S].

    Returns:
      A Mean whose weight counts tokens, each once and not once a layer.
    """
    return _over_layers(route_overlap_by_layer(experts, routes, mask))


def route_overlap_by_layer(experts: Array, routes: Array, mask: Array) -> Mean:
    """route_overlap of every layer: a Mean of total f32[L] and weight f32[L], in tokens."""
    routes = jnp.moveaxis(routes, 2, 0)
    has_routes = routes[..., 0] != NO_ROUTE  # it fills all K slots of a token together
    return _by_layer(jnp.mean(_among(experts, routes), axis=-1), mask & has_routes)


def agreement_metrics(
    logits: Array, routes: Array, mask: Array, *, layers: Sequence[int], kind: str
) -> dict[str, Mean]:
    """route_agreement over all layers and of each one, from one comparison.

    Args:
      logits, routes, mask: see route_agreement.
      layers: L indices of the MoE layers among all layers, for the names.
      kind: "" or a prefix such as "live_": the names are routing/{kind}agreement and
        routing/{kind}overlap_layer_00 and so on.
    """
    by_layer = route_overlap_by_layer(_natural(logits, routes), routes, mask)
    metrics = {f"routing/{kind}agreement": _over_layers(by_layer)}
    for index, layer in enumerate(layers):
        one = Mean(by_layer.total[index], by_layer.weight[index])
        metrics[f"routing/{kind}overlap_layer_{layer:02}"] = one
    return metrics


def provenance_metrics(provenance: Array, mask: Array) -> dict[str, Mean]:
    """Whose experts the tokens used: routing/provenance_* shares and routing/fallback_fraction.

    Args:
      provenance: int8[B, S], codes of types.py.
      mask: bool[B, S], the sampled tokens.
    """
    metrics = {
        f"routing/provenance_{name}": masked_mean(provenance == code, mask)
        for code, name in PROVENANCE.items()
    }
    fallback = (provenance == ROUTES_UNREPORTED) | (provenance == ROUTES_MISSING)
    return metrics | {"routing/fallback_fraction": masked_mean(fallback, mask)}


def replay_coverage(experts: Array, routes: Array | None, mask: Array) -> Mean:
    """Share of tokens, over layers, whose forward pass used just the routes it was given.

    1 when a replay fired everywhere. A token with NO_ROUTE counts as not covered, and so does every
    token when there are no routes at all.

    Args:
      experts: i32[L, B, S, K], ids the forward pass used.
      routes: int16[B, S, L, K], ids it was told to use, or None.
      mask: bool[B, S], the tokens that should be covered.

    Returns:
      A Mean whose weight counts tokens, each once and not once a layer.
    """
    if routes is None:
        covered = jnp.zeros(experts.shape[:-1], bool)
    else:
        covered = jnp.all(_among(experts, jnp.moveaxis(routes, 2, 0)), axis=-1)
    return _over_layers(_by_layer(covered, jnp.broadcast_to(mask, covered.shape)))


def _natural(logits: Array, routes: Array) -> Array:
    """The experts that a router of these logits, left alone, chooses: i32[L, B, S, K]."""
    return jax.lax.top_k(jax.lax.stop_gradient(logits), routes.shape[-1])[1]


def _among(experts: Array, routes: Array) -> Array:
    """Whether each expert is one of the token's routes, in any slot; bool[L, B, S, K]."""
    return jnp.any(experts[..., :, None] == routes[..., None, :], axis=-1)


def _by_layer(values: Array, mask: Array) -> Mean:
    """masked_mean of each layer of [L, B, S]: total and weight f32[L]."""
    total = jnp.sum(jnp.where(mask, values, 0).astype(jnp.float32), axis=(1, 2))
    return Mean(total, jnp.sum(mask.astype(jnp.float32), axis=(1, 2)))


def _over_layers(mean: Mean) -> Mean:
    """Total and weight summed over the layers and divided by L, so that a token counts once."""
    layers = max(mean.total.shape[0], 1)
    return Mean(jnp.sum(mean.total) / layers, jnp.sum(mean.weight) / layers)
