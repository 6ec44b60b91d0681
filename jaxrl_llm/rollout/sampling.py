"""Choosing the next token of every row, with a seed, temperature, top-p and top-k of its own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Leaf = np.ndarray | jax.Array
"""A field of what crosses between host and device."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samplers:
    """The sampling settings of B rows, as arrays: changing one compiles nothing."""

    seed: Leaf  # u32[B, 2], high and low word
    temperature: Leaf  # f32[B], 0 is greedy
    top_p: Leaf  # f32[B], 1 keeps all
    top_k: Leaf  # i32[B], 0 keeps all


def sample(logits: Array, positions: Array, samplers: Samplers) -> tuple[Array, Array]:
    """Draw one token per row.

    Args:
      logits: f32[B, V].
      positions: i32[B], of the token that was consumed. The noise of a row is a function of its
        seed and position alone, so neither its slot nor its neighbours matter.
      samplers: leaves lead with B.

    Returns:
      tokens i32[B] and their log-probabilities f32[B], nats, under the distribution they were drawn
      from: softmax(logits / temperature), renormalised over the tokens that top-p and top-k keep.
      A greedy row reports the log-probability at temperature 1 over all tokens.
    """
    greedy = samplers.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, samplers.temperature)[:, None]
    top_p = jnp.where(greedy, 1.0, samplers.top_p)
    top_k = jnp.where(greedy | (samplers.top_k == 0), logits.shape[-1], samplers.top_k)
    # Sorting the vocabulary is the dearest part of sampling, and most runs never need it.
    truncated = jnp.any((top_p < 1) | (top_k < logits.shape[-1]))
    kept = jax.lax.cond(truncated, keep, lambda scores, *_: scores, scaled, top_p, top_k)
    logprobs = jax.nn.log_softmax(kept, axis=-1)
    noise = jax.vmap(_noise, in_axes=(0, 0, None))(samplers.seed, positions, logits.shape[-1])
    tokens = _first_highest(jnp.where(greedy[:, None], scaled, logprobs + noise))
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def _first_highest(scores: Array) -> Array:
    """argmax over the last dimension, in two passes that CPUs take many numbers at a time through.

    Where there is a NaN it is any index.
    """
    highest = jnp.max(scores, axis=-1, keepdims=True)
    ids = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    first = jnp.min(jnp.where(scores == highest, ids, scores.shape[-1]), axis=-1)
    return jnp.minimum(first, scores.shape[-1] - 1)


def keep(logits: Array, top_p: Array, top_k: Array) -> Array:
    """f32[B, V] with -inf for the tokens outside top-p or top-k; both look at the full softmax.

    A token stays if fewer than top_k tokens rank before it and those together do not reach top_p.
    Equal logits rank by id, so that the set is never larger than asked.
    """
    ids = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
    ranked, order = jax.lax.sort((-logits, ids), num_keys=2)
    shares = jax.nn.softmax(-ranked, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    # A rounded sum may reach 1 before the last token: top_p = 1 must keep that one too.
    stays = (ids < top_k[:, None]) & ((before < top_p[:, None]) | (top_p[:, None] >= 1))
    last = jnp.sum(stays, axis=-1, keepdims=True) - 1
    logit, token = (jnp.take_along_axis(a, last, axis=-1) for a in (-ranked, order))
    return jnp.where((logits > logit) | ((logits == logit) & (ids <= token)), logits, -jnp.inf)


def _noise(seed: Leaf, position: Array, size: int) -> Array:
    """Gumbel noise f32[size]: the argmax of log-probabilities plus this is a sample of them."""
    # Named, because the default generator is a setting of the process, and a seed must mean one
    # response everywhere.
    key = jax.random.wrap_key_data(jnp.asarray(seed), impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,))


def seed_words(seed: int) -> np.ndarray:
    """u32[2], the high and low word of a seed of up to 64 bits."""
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
