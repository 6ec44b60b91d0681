"""Log-probabilities of given tokens, taken from hidden states without ever holding [B, S, V]."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_llm.model.layers import map_chunks
from jaxrl_llm.sharding import ONE_DEVICE, TOKEN_AXES, Layout

Array = jax.Array

HEAD = ("embed", "vocab")
"""The names of the head's dimensions."""


def token_logprobs(
    hidden: Array,
    unembed: Array,
    targets: Array,
    *,
    temperature: float,
    chunk: int,
    layout: Layout = ONE_DEVICE,
) -> tuple[Array, Array]:
    """Log-probability of each target, and entropy, under softmax(logits / temperature).

    Args:
      hidden: [B, S, D], any float dtype; the product with the head is taken in float32, or with
        hidden in bfloat16 to 16 bits of the head.
      unembed: f32[D, V].
      targets: i32[B, S].
      temperature: above 0; that of the sampling, so that mu and pi are the same kind of thing.
      chunk: positions whose logits, f32[B, chunk, V], exist at a time, in the gradient too.
      layout: how the arrays are split: hidden and targets as a batch, the head by its rules.

    Returns:
      logprobs f32[B, S] and entropy f32[B, S], in nats.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need one above 0")

    def share(hidden: Array, unembed: Array, targets: Array) -> tuple[Array, Array]:
        head = layout.whole(unembed, HEAD)  # f32[D, this device's part of V]
        local = targets - layout.share("vocab") * head.shape[1]

        def positions(part: Array, wanted: Array) -> tuple[Array, Array]:
            return _logprobs(part, head, wanted, temperature, layout)

        return map_chunks(positions, (hidden, local), chunk=chunk)

    tokens = layout.tokens
    return layout.shard(share, (tokens, layout.spec(HEAD), tokens), tokens)(
        hidden, unembed, targets
    )


def _logprobs(
    hidden: Array, head: Array, targets: Array, temperature: float, layout: Layout
) -> tuple[Array, Array]:
    """targets: ids from the first one of this device's part of the vocabulary."""
    operands = (hidden.reshape(-1, hidden.shape[-1]), head)
    flat, head = layout.vary(operands, (*TOKEN_AXES, *layout.axes("vocab")))
    if flat.dtype == jnp.bfloat16:
        logits = _product(flat, head) / temperature
    else:  # accelerators round float32 factors to fewer bits unless told not to
        logits = jnp.matmul(flat, head, precision=jax.lax.Precision.HIGHEST) / temperature
    # From here on no large numbers cancel: the entropy of a confident policy stays exact.
    log_shares = _log_softmax(logits, layout)
    # A comparison and a sum instead of an index: its gradient is no scatter.
    chosen = jnp.arange(logits.shape[-1]) == targets.reshape(-1, 1)
    logprobs = jnp.sum(jnp.where(chosen, log_shares, 0.0), axis=-1)
    entropy = -jnp.sum(jnp.exp(log_shares) * log_shares, axis=-1)
    both = layout.total(jnp.stack([logprobs, entropy]), "vocab")
    return both[0].reshape(targets.shape), both[1].reshape(targets.shape)


@jax.custom_vjp
def _product(x: Array, matrix: Array) -> Array:
    """bf16[N, D] @ f32[D, V] -> f32[N, V], the matrix to 16 bits: as the sum of two in bfloat16.

    x has no more bits to lose. A product in float32 takes a TPU six passes over bfloat16 parts,
    most of them of bits that are not there; this takes two, and its gradients, which are rounded
    to bfloat16 as all others are, one each.
    """
    # By its name: the compiler may take a cast there and back for no rounding at all.
    high = jax.lax.reduce_precision(matrix, exponent_bits=8, mantissa_bits=7)
    parts = (high.astype(x.dtype), (matrix - high).astype(x.dtype))
    one, other = (jnp.matmul(x, part, preferred_element_type=jnp.float32) for part in parts)
    return one + other


def _product_backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, matrix = operands
    rounded = gradient.astype(x.dtype)
    to_x = jnp.matmul(rounded, matrix.astype(x.dtype).T)
    return to_x, jnp.matmul(x.T, rounded, preferred_element_type=jnp.float32)


_product.defvjp(lambda x, matrix: (_product(x, matrix), (x, matrix)), _product_backward)


def _log_softmax(logits: Array, layout: Layout) -> Array:
    """Over the last dimension, of which this device has a part."""
    if not (axes := layout.axes("vocab")):
        return jax.nn.log_softmax(logits, axis=-1)
    largest = jax.lax.pmax(jnp.max(jax.lax.stop_gradient(logits), axis=-1, keepdims=True), axes)
    shifted = logits - largest
    total = layout.total(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True), "vocab")
    return shifted - jnp.log(total)
