"""What a step saw, as Means: pure functions that the losses and the learner report from.

Every result is a (total, weight) pair counted in tokens, so micro-batches and hosts add exactly.
Nothing here is differentiated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import NO_ROUTE, Array, Mean


def masked_mean(values: Array, mask: Array) -> Mean:
    """Mean of `values` ([B, S], any real dtype or bool) over the mask (bool[B, S])."""
    total = jnp.sum(jnp.where(mask, jax.lax.stop_gradient(values), 0).astype(jnp.float32))
    return Mean(total, jnp.sum(mask.astype(jnp.float32)))


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
    natural = jax.lax.top_k(jax.lax.stop_gradient(logits), routes.shape[-1])[1]
    return route_overlap(natural, routes, mask)


def route_overlap(experts: Array, routes: Array, mask: Array) -> Mean:
    """|experts and routes| / K, averaged over the tokens with routes and over layers.

    Args:
      experts: i32[L, B, S, K], as the model returns them.
      routes: int16[B, S, L, K], as a batch holds them.
      mask: bool[B, S].

    Returns:
      A Mean whose weight counts tokens, each once and not once a layer.
    """
    routes = jnp.moveaxis(routes, 2, 0)
    has_routes = routes[..., 0] != NO_ROUTE  # it fills all K slots of a token together
    return _layer_mean(jnp.mean(_among(experts, routes), axis=-1), mask & has_routes)


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
    return _layer_mean(covered, jnp.broadcast_to(mask, covered.shape))


def _among(experts: Array, routes: Array) -> Array:
    """Whether each expert is one of the token's routes, in any slot; bool[L, B, S, K]."""
    return jnp.any(experts[..., :, None] == routes[..., None, :], axis=-1)


def _layer_mean(values: Array, mask: Array) -> Mean:
    """masked_mean over [L, B, S], its total and weight divided by L."""
    layers = max(mask.shape[0], 1)
    mean = masked_mean(values, mask)
    return Mean(mean.total / layers, mean.weight / layers)
