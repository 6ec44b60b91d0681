"""Auxiliary losses of the MoE routers: z-loss and load balance.

Both are means over tokens, written as sums with token weights that add up to 1 over the global
batch (token_weights with per="token" over the real tokens, prompts included), and means over MoE
layers.

The z-loss is additive: micro-batches add to the full batch exactly. The balance loss is a product
of two means, load and probability, and so is not. It becomes additive once the load is a constant:
computed from the experts of the WHOLE batch (expert_load of its micro-batches adds) and handed to
each of them, the losses of micro-batches add to the global-batch loss of arXiv 2501.11873. Without
one, each call balances its own tokens: the sum over micro-batches is then the mean of their Switch
losses, weighted by their tokens, which asks every micro-batch to be balanced by itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import Array, LossOutput, Mean, RouterOutput


def z_loss(logits: Array, weights: Array) -> Array:
    """sum over tokens of weight * logsumexp(logits)^2, averaged over layers (arXiv 2202.08906).

    Args:
      logits: f32[L, B, S, E], live router logits.
      weights: f32[B, S], token weights; a token of weight 0 has no effect whatever its logits.

    Returns:
      f32[]; 0 for a model without MoE layers.
    """
    normaliser = jax.nn.logsumexp(_on_tokens(logits, weights), axis=-1)
    return jnp.sum(weights * jnp.square(normaliser)) / max(logits.shape[0], 1)


def expert_load(experts: Array, weights: Array, *, num_experts: int) -> Array:
    """Each expert's weighted share of the expert slots, per layer: f in the Switch paper.

    Args:
      experts: i32[L, B, S, K], ids used, replayed ones included: the load that really arose.
      weights: f32[B, S], token weights.

    Returns:
      f32[L, E]; every layer sums to sum(weights). Loads of micro-batches add. No gradient.
    """
    slots = experts[..., None] == jnp.arange(num_experts)  # fused into the sum, never stored
    share = weights[..., None, None] / experts.shape[-1]
    return jnp.sum(jnp.where(slots, jax.lax.stop_gradient(share), 0.0), axis=(1, 2, 3))


def balance_loss(logits: Array, load: Array, weights: Array) -> Array:
    """E * sum_e load_e * P_e, averaged over layers (Switch Transformer, arXiv 2101.03961, eq. 4).

    P_e = sum over tokens of weight * softmax(logits)_e carries the gradient, the load is constant.
    With a load that sums to 1 and uniform routing the loss is sum(weights), its value at balance.

    Args:
      logits: f32[L, B, S, E], live router logits.
      load: f32[L, E], each layer summing to 1; see the module docstring for whose tokens.
      weights: f32[B, S], token weights; a token of weight 0 has no effect whatever its logits.

    Returns:
      f32[], linear in the tokens: losses of micro-batches under one load add.
    """
    layers, *_, num_experts = logits.shape
    probabilities = jax.nn.softmax(_on_tokens(logits, weights), axis=-1)
    mean_probability = jnp.einsum("bs,lbse->le", weights, probabilities)
    balance = jnp.sum(jax.lax.stop_gradient(load) * mean_probability)
    return num_experts * balance / max(layers, 1)


def router_loss(
    router: RouterOutput,
    weights: Array,
    *,
    z_coefficient: float,
    balance_coefficient: float,
    load: Array | None = None,
) -> LossOutput:
    """Both losses times their coefficients; the metrics are the bare losses.

    Args:
      router: fields [L, B, S, ...].
      weights: f32[B, S], token weights over the real tokens.
      z_coefficient: at least 0; 0 leaves the z-loss a metric.
      balance_coefficient: at least 0; 0 leaves the balance loss a metric.
      load: f32[L, E] of the whole batch, each layer summing to 1; None: of these tokens alone.

    Returns:
      The loss and the metrics router/z_loss and router/balance_loss.
    """
    total = jnp.sum(weights)
    if load is None:
        own = expert_load(router.experts, weights, num_experts=router.logits.shape[-1])
        load = own / jnp.where(total == 0, 1.0, total)
    z = z_loss(router.logits, weights)
    balance = balance_loss(router.logits, load, weights)
    loss = jnp.zeros((), z.dtype)
    if z_coefficient:  # not 0 * z: that would still cost a backward pass
        loss += z_coefficient * z
    if balance_coefficient:
        loss += balance_coefficient * balance
    metrics = {"router/z_loss": Mean(z, total), "router/balance_loss": Mean(balance, total)}
    return LossOutput(loss, jax.lax.stop_gradient(metrics))


def _on_tokens(logits: Array, weights: Array) -> Array:
    """The logits, with 0 in place of those of weightless tokens: NaN there must not spread."""
    return jnp.where((weights != 0)[..., None], logits, 0.0)
