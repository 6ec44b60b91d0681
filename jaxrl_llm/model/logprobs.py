"""Log-probabilities of given tokens, taken from hidden states; [B, S, V] is held only if told so.

The gradient is written out: it takes two passes over the logits of a chunk, computed again or kept,
and their maximum and sum, where differentiation would keep or recompute each step of the softmax.

Shapes: B rows, S positions of each, C of them at a time, N = B C, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.model.layers import join_chunks, split_chunks, transposed
from jaxrl_llm.sharding import ONE_DEVICE, TOKEN_AXES, Layout, alike

Array = jax.Array

HEAD = ("embed", "vocab")
"""The names of the head's dimensions."""


@dataclasses.dataclass(frozen=True)
class _How:
    """What of token_logprobs' arguments is no array."""

    temperature: float
    chunk: int  # no more than there are positions
    keep: bool
    layout: Layout


def token_logprobs(
    hidden: Array,
    unembed: Array,
    targets: Array,
    *,
    temperature: float,
    chunk: int,
    keep: bool = False,
    layout: Layout = ONE_DEVICE,
) -> tuple[Array, Array]:
    """Log-probability of each target, and entropy, under softmax(logits / temperature).

    Args:
      hidden: [B, S, D], any float dtype; the product with the head is taken in float32, or with
        hidden in bfloat16 to 16 bits of the head.
      unembed: f32[D, V].
      targets: i32[B, S].
      temperature: above 0; that of the sampling, so that mu and pi are the same kind of thing.
      chunk: positions whose logits, f32[B, chunk, V], are computed at a time.
      keep: keep the logits of all chunks, f32[B, S, V], for the gradient. Else it computes those of
        a chunk again, but for one that holds all positions: its logits are there anyway.
      layout: how the arrays are split: hidden and targets as a batch, the head by its rules.

    Returns:
      logprobs f32[B, S] and entropy f32[B, S], in nats.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need one above 0")

    def share(hidden: Array, unembed: Array, targets: Array) -> tuple[Array, Array]:
        head = layout.whole(unembed, HEAD)  # f32[D, this device's part of V]
        local = targets - layout.share("vocab") * head.shape[1]
        operands = layout.vary((hidden, head), (*TOKEN_AXES, *layout.axes("vocab")))
        length = hidden.shape[1]
        how = _How(temperature, min(chunk, length), keep or chunk >= length, layout)
        return _logprobs(how, *operands, local)

    tokens = layout.tokens
    return layout.shard(share, (tokens, layout.spec(HEAD), tokens), tokens)(
        hidden, unembed, targets
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(how: _How, hidden: Array, head: Array, targets: Array) -> tuple[Array, Array]:
    """targets: ids from the first one of this device's part of the vocabulary."""
    return _forward(how, hidden, head, targets)[0]


def _forward(
    how: _How, hidden: Array, head: Array, targets: Array
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    def part(arrays: tuple[Array, Array]) -> tuple[tuple[Array, ...], Array | None]:
        flat, wanted = arrays[0].reshape(-1, hidden.shape[-1]), arrays[1]
        logits = _logits(flat, head, how.temperature)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        if axes := how.layout.axes("vocab"):
            largest = jax.lax.pmax(largest, axes)
        # From here on no large numbers cancel: the entropy of a confident policy stays exact.
        shifted = logits - largest
        exponentials = jnp.exp(shifted)
        sums = [
            jnp.sum(exponentials, axis=-1),
            jnp.sum(exponentials * shifted, axis=-1),
            jnp.sum(jnp.where(_chosen(wanted, logits), shifted, 0.0), axis=-1),
        ]
        total, weighted, target = how.layout.total(jnp.stack(sums), "vocab")
        log_total = jnp.log(total)
        found = target - log_total, log_total - weighted / total, largest[:, 0], log_total
        return tuple(x.reshape(wanted.shape) for x in found), logits if how.keep else None

    numbers, logits = jax.lax.map(part, split_chunks((hidden, targets), how.chunk))
    logprobs, *others = join_chunks(numbers, hidden.shape[1])
    return (logprobs, others[0]), (hidden, head, targets, tuple(others), logits)


def _backward(
    how: _How, saved: tuple[Any, ...], gradients: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    hidden, head, targets, others, kept = saved

    def add(total: Array, part: tuple[Any, Any]) -> tuple[Array, Any]:
        (hidden, wanted, *numbers), logits = part
        flat = hidden.reshape(-1, hidden.shape[-1])
        columns = (x.reshape(-1, 1) for x in numbers)
        to_logprob, to_entropy, entropy, largest, log_total = columns
        if logits is None:
            logits = _logits(flat, head, how.temperature)
        log_shares = (logits - largest) - log_total  # large numbers first, as above
        pull = to_logprob + to_entropy * (log_shares + entropy)
        to_logits = jnp.where(_chosen(wanted, logits), to_logprob, 0.0) - jnp.exp(log_shares) * pull
        to_hidden, to_head = _to_factors(flat, head, to_logits / how.temperature)
        return total + to_head, to_hidden.reshape(hidden.shape)

    arrays = (hidden, targets, *alike((*gradients, *others), hidden))
    parts = split_chunks(arrays, how.chunk), kept
    to_head, parts = jax.lax.scan(add, jnp.zeros_like(head), parts)
    return join_chunks(parts, hidden.shape[1]), to_head, None


_logprobs.defvjp(_forward, _backward)


def _chosen(targets: Array, logits: Array) -> Array:
    """bool[N, V], where the targets are."""
    return jnp.arange(logits.shape[-1]) == targets.reshape(-1, 1)


def _logits(x: Array, head: Array, temperature: float) -> Array:
    """f32[N, V]. With x in bfloat16, the head to 16 bits: as the sum of two in bfloat16.

    x has no more bits to lose. A product in float32 takes a TPU six passes over bfloat16 parts,
    most of them of bits that are not there; this takes two, and its gradients, which are rounded
    to bfloat16 as all others are, one each.
    """
    if x.dtype != jnp.bfloat16:
        # Accelerators round float32 factors to fewer bits unless told not to.
        return jnp.matmul(x, head, precision=jax.lax.Precision.HIGHEST) / temperature
    # By its name: the compiler may take a cast there and back for no rounding at all.
    high = jax.lax.reduce_precision(head, exponent_bits=8, mantissa_bits=7)
    parts = (high.astype(x.dtype), (head - high).astype(x.dtype))
    one, other = (jnp.matmul(x, part, preferred_element_type=jnp.float32) for part in parts)
    return (one + other) / temperature


def _to_factors(x: Array, head: Array, gradient: Array) -> tuple[Array, Array]:
    """The gradients of _logits() at temperature 1, of the dtypes of x and head."""
    if x.dtype != jnp.bfloat16:
        product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        return product(gradient, head.T).astype(x.dtype), product(transposed(x), gradient)
    rounded = gradient.astype(x.dtype)
    to_head = jnp.matmul(x.T, rounded, preferred_element_type=jnp.float32)
    return jnp.matmul(rounded, head.astype(x.dtype).T), to_head
