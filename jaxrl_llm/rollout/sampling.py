"""Choosing the next token of every row, with a seed, temperature, top-p and top-k of its own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Leaf = np.ndarray | jax.Array
"""A field of what crosses between host and device."""

BLOCK = 64
"""Token ids of a block of the vocabulary."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samplers:
    """The sampling settings of B rows, as arrays: changing one compiles nothing."""

    seed: Leaf  # u32[B, 2], high and low word
    temperature: Leaf  # f32[B], 0 is greedy
    top_p: Leaf  # f32[B], 1 keeps all
    top_k: Leaf  # i32[B], 0 keeps all


def sample(logits: Array, positions: Array, samplers: Samplers) -> tuple[Array, Array]:
    """Draw one token per row: first a block of ids by its share of the whole, then one of its ids.

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
    blocks = _in_blocks(kept)
    peaks = jnp.max(blocks, axis=-1)
    highest = jnp.max(peaks, axis=-1)
    shares = jnp.sum(jnp.exp(blocks - highest[:, None, None]), axis=-1)
    # Noise for the ids of a block and for the blocks, not for all of the vocabulary.
    _, count, size = blocks.shape
    noise = jax.vmap(_noise, in_axes=(0, 0, None))(samplers.seed, positions, size + count)
    noise = jnp.where(greedy[:, None], 0.0, noise)
    weights = jnp.where(greedy[:, None], peaks, jnp.log(shares)) + noise[:, size:]
    block = _first_highest(weights)
    scores = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    index = _first_highest(scores + noise[:, :size])
    score = jnp.take_along_axis(scores, index[:, None], axis=-1)[:, 0]
    tokens = jnp.minimum(block * size + index, logits.shape[-1] - 1)  # NaN may choose what fills up
    return tokens, score - highest - jnp.log(jnp.sum(shares, axis=-1))


def _in_blocks(scores: Array) -> Array:
    """f32[B, V] as [B, blocks, ids of one], filled up with tokens that are never drawn."""
    size = min(BLOCK, scores.shape[-1])
    filled = jnp.pad(scores, ((0, 0), (0, -scores.shape[-1] % size)), constant_values=-jnp.inf)
    return filled.reshape(scores.shape[0], -1, size)


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
