"""Is the update still near on-policy? Importance weights and off-policy gaps of one mini-batch.

    is_weight/raw_*     pi / mu, the whole ratio of arXiv 2512.01374, eq. 5, before any bound
    is_weight/used_*    the weight that entered the loss, after bound and rejection
    mismatch/ratio_*    pi_old / mu, the training-inference factor
    staleness/ratio_*   pi / pi_old, the factor of the updates
    rollout_corr/*      the gap of pi_old and mu under the names that verl gives it

What it is: pure functions of whole [B, S] arrays whose rows may be split over devices. They use
elementwise maths, sums, maxima and sums within a row, so nothing of the batch moves. What it is
not: anything that changes the loss. Nothing here is differentiated.

**What is counted.** A token counts if it was sampled and pi, pi_old and mu are all finite there, so
that the factors are compared on the same tokens. A response (a segment with a sampled token) counts
if all its sampled tokens do. What is left out is in nonfinite/*, never silent.

**How mini-batches pool.** Means and shares pool by their counts, extremes by max and min. A
standard deviation, a quantile and an effective sample size belong to one mini-batch: they are
averaged over the mini-batches that had a token.

**Other systems' names.** verl's rollout_corr/rollout_is_{mean, std, max, min} describe the weights
it uses, here is_weight/used_{mean, std, max, min}; its rollout_is_eff_sample_size, 1 / mean of
(w / mean w)^2, is is_weight/used_ess_token; its rollout_is_ratio_fraction_high at a threshold of 5
is mismatch/ratio_above_5.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import Array, Max, Mean, Min, TrainBatch
from jaxrl_llm.losses.diagnostics import masked_mean
from jaxrl_llm.losses.kl import k1, k3
from jaxrl_llm.losses.ratios import MAX_LOG_RATIO, log_ratio, log_ratios, ratio, segment_totals

Statistics = dict[str, Mean | Max | Min]

QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
STALENESS_BINS = 7  # 0, 1, 2-3, 4-7, 8-15, 16-31, 32 and more


class Counted(NamedTuple):
    """The tokens and responses that statistics are taken over; see the module docstring."""

    tokens: Array  # bool[B, S]
    responses: Array  # bool[B, S + 1], by segment id
    segment_ids: Array  # i32[B, S]


def importance_statistics(logprobs: Array, batch: TrainBatch, weight: Array) -> Statistics:
    """Everything this module has to say about one mini-batch.

    Without batch.old_logprobs, pi_old is pi, as in the loss; the staleness factor is then 1 by
    definition and has no names.

    Args:
      logprobs: log pi of the targets, f32[B, S], nats.
      batch: [B, S] fields; of the rest only ref_logprobs is read, to count what is not finite.
      weight: the importance weight as used, f32[B, S], at least 0.

    Returns:
      Name -> Mean, Max or Min, each f32[]; every name is in metrics.METRICS. An empty one (a Mean
      of weight 0, an infinite Max or Min) had nothing to look at.
    """
    logprobs, batch, weight = jax.lax.stop_gradient((logprobs, batch, weight))
    sampler = batch.sampler_logprobs
    old = logprobs if batch.old_logprobs is None else batch.old_logprobs
    finite = jnp.isfinite(logprobs) & jnp.isfinite(old) & jnp.isfinite(sampler)
    counted = count(batch.loss_mask, finite, batch.segment_ids)
    tokens = counted.tokens
    ratios = log_ratios(logprobs, old, sampler, tokens)
    used = count(batch.loss_mask, finite & jnp.isfinite(weight), batch.segment_ids)
    factors = {"is_weight/raw_": ratios.sampler, "mismatch/ratio_": ratios.mismatch}
    if batch.old_logprobs is not None:
        factors["staleness/ratio_"] = ratios.staleness
    found = _families(
        {prefix: (ratio(factor), tokens) for prefix, factor in factors.items()}
        | {"is_weight/used_": (weight, used.tokens)}
    )
    for prefix, factor in factors.items():
        found[f"{prefix}ess_sequence"] = sequence_share(factor, counted)
    found["is_weight/used_ess_response"] = response_share(weight, used)
    found |= _named("rollout_corr/", off_policy_statistics(old, sampler, counted))
    for suffix, bins in _bins(batch, tokens).items():
        found |= _curve(f"mismatch/kl_{suffix}_", -ratios.mismatch, bins)
        found |= _curve(f"is_weight/abs_log_{suffix}_", jnp.abs(ratios.sampler), bins)
    return found | _named("nonfinite/", nonfinite_counts(logprobs, batch, weight))


def count(mask: Array, finite: Array, segment_ids: Array) -> Counted:
    """The sampled tokens where `finite` (bool[B, S]) holds, and the responses wholly of such."""
    tokens = mask & finite
    sampled = segment_totals(mask.astype(jnp.int32), segment_ids)
    complete = segment_totals(tokens.astype(jnp.int32), segment_ids) == sampled
    return Counted(tokens, (sampled > 0) & complete, segment_ids)


def quantiles(values: Array, mask: Array, shares: Sequence[float]) -> Array:
    """For each share q the smallest masked value v with F(v) >= q, F their empirical distribution.

    Order statistics, exact: numpy's method "inverted_cdf". Nothing is sorted or gathered. The bits
    of a float32, sign handled, are an integer of the same order; its 32 bits are found from the
    highest down, with one count of the values below each guess.

    Args:
      values: f32[...]; NaN is left out, an infinity is a value like others.
      mask: bool[...], which of them.
      shares: Q numbers in (0, 1], with at most four decimals.

    Returns:
      f32[Q], each one of the values; NaN if there are none.

    Raises:
      ValueError: a share is out of range or has more decimals.
    """
    if not all(0 < q <= 1 and round(q, 4) == q for q in shares):
        raise ValueError(
            f"shares are {tuple(shares)}; a quantile needs 0 < q <= 1 and at most four decimals"
        )
    mask = mask & ~jnp.isnan(values)
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    keys = jnp.where(bits & sign, ~bits, bits | sign)
    number = jnp.sum(mask, dtype=jnp.int32)
    ranks = jnp.stack([_rank(q, number) for q in shares])

    def refine(step: Array, found: Array) -> Array:
        guess = found | (sign >> step.astype(jnp.uint32))
        below = jax.vmap(lambda key: jnp.sum(mask & (keys < key), dtype=jnp.int32))(guess)
        return jnp.where(below < ranks, guess, found)

    key = jax.lax.fori_loop(0, 32, refine, jnp.zeros(len(shares), jnp.uint32))
    value = jax.lax.bitcast_convert_type(jnp.where(key & sign, key ^ sign, ~key), jnp.float32)
    return jnp.where(number > 0, value, jnp.nan)


def effective_share(log_weights: Array, counted: Array) -> Mean:
    """(sum w)^2 / (n sum w^2): the effective sample size as a share of the n counted weights.

    1 for equal weights, 1 / n if one outweighs the rest, 0 if all are 0: nothing is left then.

    Args:
      log_weights: log w, f32[...]; -inf is a weight of 0. Any size: the largest is divided out.
      counted: bool[...], which of them; n is their number.

    Returns:
      A Mean of one mini-batch: weight 1, or 0 if nothing is counted.
    """
    log_weights = jnp.where(counted, log_weights, -jnp.inf)
    largest = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(largest), largest, 0.0))
    number = jnp.sum(counted.astype(jnp.float32))
    squares = number * jnp.sum(jnp.square(weights))
    share = jnp.square(jnp.sum(weights)) / jnp.where(squares == 0, 1.0, squares)
    return _of_one(share, number > 0)


def token_statistics(weights: Array, tokens: Array) -> Statistics:
    """How weights are distributed over the counted tokens.

    mean; std (of the population); max; min; p50, p99, p999 (quantiles); above_2 and above_5, the
    tail shares F(2) and F(5), of tokens with a weight above 2 and 5; below_half, of tokens with a
    weight below 1/2; ess_token. The denominator of each is the number of counted tokens.

    Args:
      weights: f32[B, S], finite and at least 0 on counted tokens.
      tokens: bool[B, S].
    """
    some = jnp.any(tokens)
    mean = masked_mean(weights, tokens)
    variance = masked_mean(jnp.square(weights - mean.value()), tokens)
    found: Statistics = {
        "mean": mean,
        "std": _of_one(jnp.sqrt(variance.value()), some),
        "max": _largest(weights, tokens),
        "min": _smallest(weights, tokens),
        "above_2": masked_mean(weights > 2, tokens),
        "above_5": masked_mean(weights > 5, tokens),
        "below_half": masked_mean(weights < 0.5, tokens),
        "ess_token": effective_share(jnp.log(weights), tokens),
    }
    values = quantiles(weights, tokens, tuple(QUANTILES.values()))
    return found | {name: _of_one(values[i], some) for i, name in enumerate(QUANTILES)}


def sequence_share(log_ratio: Array, counted: Counted) -> Mean:
    """The effective share of the responses' ratios, each the product over its tokens.

    Its denominator is the number of counted responses, and it does not saturate, as the ratio of a
    token does (see ratios.ratio). log_ratio is f32[B, S], nats, 0 on tokens that do not count.
    """
    product = segment_totals(log_ratio, counted.segment_ids)
    return effective_share(product, counted.responses)


def response_share(weight: Array, counted: Counted) -> Mean:
    """The effective share of the responses' mean weights over their tokens; weight is f32[B, S].

    It is not the product: a sequence-level weight stands on each token, and would be raised to
    their number.
    """
    mean = _response_means(weight, counted)
    return effective_share(jnp.log(mean), counted.responses)


def off_policy_statistics(old: Array, sampler: Array, counted: Counted) -> Statistics:
    """The gap of pi_old ("training") and mu ("rollout") as verl defines it, with verl's names.

    Over tokens: kl, the mean of log mu - log pi_old; k3_kl; chi2_token, the mean of rho^2 - 1 with
    rho = pi_old / mu. Over responses, with the mean log-probability of the response's tokens:
    training_log_ppl and rollout_log_ppl, the mean of minus that; training_ppl and rollout_ppl, the
    mean of exp(minus that); log_ppl_diff, the mean of mu's minus pi_old's; log_ppl_abs_diff of its
    absolute value, log_ppl_diff_max and log_ppl_diff_min its extremes; ppl_ratio, the mean of its
    exponential; chi2_seq, the mean of (product of rho)^2 - 1.

    Exponents are clipped at MAX_LOG_RATIO, as verl's; those of the perplexities too, where verl's
    run on, so that one response cannot make the mean infinite.
    ms-swift logs chi2_seq too, but of the geometric mean of rho: it is smaller, and no variance of
    the sequence ratio. verl averages the rollout batch at once, which is how Means pool here.

    Args:
      old: log pi_old, f32[B, S], nats.
      sampler: log mu, f32[B, S].
      counted: tokens and responses.
    """
    tokens, responses = counted.tokens, counted.responses
    rho = log_ratio(old, sampler, tokens)
    training, rollout = _response_means(old, counted), _response_means(sampler, counted)
    difference = rollout - training
    product = segment_totals(rho, counted.segment_ids)
    return {
        "kl": masked_mean(k1(sampler, old, tokens), tokens),
        "k3_kl": masked_mean(k3(sampler, old, tokens), tokens),
        "chi2_token": masked_mean(_square_minus_one(rho), tokens),
        "chi2_seq": masked_mean(_square_minus_one(product), responses),
        "training_log_ppl": masked_mean(-training, responses),
        "rollout_log_ppl": masked_mean(-rollout, responses),
        "training_ppl": masked_mean(ratio(-training), responses),
        "rollout_ppl": masked_mean(ratio(-rollout), responses),
        "log_ppl_diff": masked_mean(difference, responses),
        "log_ppl_abs_diff": masked_mean(jnp.abs(difference), responses),
        "log_ppl_diff_max": _largest(difference, responses),
        "log_ppl_diff_min": _smallest(difference, responses),
        "ppl_ratio": masked_mean(ratio(difference), responses),
    }


def response_positions(mask: Array, segment_ids: Array) -> Array:
    """How many sampled tokens of its response come before each token, i32[B, S].

    Args:
      mask: bool[B, S], True iff the target was sampled.
      segment_ids: i32[B, S]; a segment is one stretch of its row.
    """
    sampled = mask.astype(jnp.int32)
    before = jnp.cumsum(sampled, axis=1) - sampled
    starts = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    # `before` never falls along a row: its largest value at a start is that of the latest start.
    return before - jax.lax.cummax(jnp.where(starts, before, 0), axis=1)


def nonfinite_counts(logprobs: Array, batch: TrainBatch, weight: Array) -> Statistics:
    """Sampled tokens whose value is NaN or infinite, for each array there is, in one mini-batch."""
    arrays = {
        "current": logprobs,
        "old": batch.old_logprobs,
        "sampler": batch.sampler_logprobs,
        "ref": batch.ref_logprobs,
        "weight": weight,
    }
    one = jnp.ones((), jnp.float32)
    return {
        name: Mean(jnp.sum((batch.loss_mask & ~jnp.isfinite(values)).astype(jnp.float32)), one)
        for name, values in arrays.items()
        if values is not None
    }


def _rank(share: float, number: Array) -> Array:
    """ceil(share * number), in integers: in float32, 0.999 times a million is off by 0.06."""
    exact = Fraction(str(share))  # the decimal that was meant, its denominator at most 10,000
    whole, rest = number // exact.denominator, number % exact.denominator
    return whole * exact.numerator - (-rest * exact.numerator) // exact.denominator


def _bins(batch: TrainBatch, tokens: Array) -> dict[str, dict[int, Array]]:
    """By position and by staleness: first value of the bin -> its tokens, bool[B, S].

    The bins are 0, 1, 2-3, 4-7, ...; the last one of staleness has no end.
    """
    position = response_positions(batch.loss_mask, batch.segment_ids)
    positions = _powers((position.shape[1] - 1).bit_length() + 1)
    lag = jnp.maximum(batch.staleness, 0)
    return {
        "at_position": {low: tokens & _within(position, low, high) for low, high in positions},
        "at_staleness": {
            low: tokens & _within(lag, low, high) for low, high in _powers(STALENESS_BINS)
        },
    }


def _powers(number: int) -> list[tuple[int, int | None]]:
    """(first, end) of 0, 1, 2-3, 4-7, ...; the last has no end."""
    firsts = [0, *(1 << n for n in range(number - 1))]
    return list(zip(firsts, [*firsts[1:], None], strict=True))


def _within(values: Array, low: int, high: int | None) -> Array:
    inside = values >= low
    return inside if high is None else inside & (values < high)


def _curve(prefix: str, values: Array, bins: dict[int, Array]) -> Statistics:
    """The mean of `values` in each bin, named by the first value of the bin."""
    return {f"{prefix}{first}": masked_mean(values, tokens) for first, tokens in bins.items()}


def _response_means(values: Array, counted: Counted) -> Array:
    """The mean of `values` over the sampled tokens of each counted response, f32[B, S + 1]."""
    total = segment_totals(jnp.where(counted.tokens, values, 0.0), counted.segment_ids)
    length = segment_totals(counted.tokens.astype(jnp.int32), counted.segment_ids)
    return total / jnp.maximum(length, 1)


def _square_minus_one(log_ratio: Array) -> Array:
    """exp(2 log_ratio) - 1, clipped; expm1 keeps the small values of nearly equal policies."""
    return jnp.expm1(2 * jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _largest(values: Array, counted: Array) -> Max:
    return Max(jnp.max(jnp.where(counted, values, -jnp.inf)))


def _smallest(values: Array, counted: Array) -> Min:
    return Min(jnp.min(jnp.where(counted, values, jnp.inf)))


def _of_one(value: Array, some: Array) -> Mean:
    """A value of one mini-batch: it weighs 1, and nothing if there was `some`thing to look at."""
    return Mean(jnp.where(some, value, 0.0), some.astype(jnp.float32))


def _families(weights: dict[str, tuple[Array, Array]]) -> Statistics:
    """token_statistics of several (weights, tokens) by prefix, compiled once for all of them."""
    stacked = jax.vmap(token_statistics)(
        *(jnp.stack(x) for x in zip(*weights.values(), strict=True))
    )
    found: Statistics = {}
    for index, prefix in enumerate(weights):
        found |= _named(prefix, jax.tree.map(lambda leaf, i=index: leaf[i], stacked))
    return found


def _named(prefix: str, statistics: Statistics) -> Statistics:
    return {prefix + name: value for name, value in statistics.items()}
