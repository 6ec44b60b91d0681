"""Log-probabilities of given tokens, taken from hidden states without ever holding [B, S, V]."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_llm.model.layers import map_chunks

Array = jax.Array


def token_logprobs(
    hidden: Array, unembed: Array, targets: Array, *, temperature: float, chunk: int
) -> tuple[Array, Array]:
    """Log-probability of each target, and entropy, under softmax(logits / temperature).

    Args:
      hidden: [B, S, D], any float dtype; the product with the head is taken in float32.
      unembed: f32[D, V].
      targets: i32[B, S].
      temperature: above 0; that of the sampling, so that mu and pi are the same kind of thing.
      chunk: positions whose logits, f32[B, chunk, V], exist at a time, in the gradient too.

    Returns:
      logprobs f32[B, S] and entropy f32[B, S], in nats.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need one above 0")

    def positions(part: Array, wanted: Array) -> tuple[Array, Array]:
        return _logprobs(part, unembed, wanted, temperature)

    return map_chunks(positions, (hidden, targets), chunk=chunk)


def _logprobs(
    hidden: Array, unembed: Array, targets: Array, temperature: float
) -> tuple[Array, Array]:
    flat = hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32)
    # Accelerators round float32 factors to fewer bits unless told not to.
    logits = jnp.matmul(flat, unembed, precision=jax.lax.Precision.HIGHEST) / temperature
    # From here on no large numbers cancel: the entropy of a confident policy stays exact.
    log_shares = jax.nn.log_softmax(logits, axis=-1)
    # A comparison and a sum instead of an index: it stays local when the vocabulary is split.
    chosen = jnp.arange(logits.shape[-1]) == targets.reshape(-1, 1)
    logprobs = jnp.sum(jnp.where(chosen, log_shares, 0.0), axis=-1)
    entropy = -jnp.sum(jnp.exp(log_shares) * log_shares, axis=-1)
    return logprobs.reshape(targets.shape), entropy.reshape(targets.shape)
