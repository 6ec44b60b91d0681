"""Which factor moved: log w split exactly into staleness and mismatch, and each by its experts.

In a Mixture-of-Experts the experts e enter each factor of the importance weight
w = pi(y | e^pi) / mu(y | e^mu) (arXiv 2512.01374, eq. 5, 8 and 9). Passes over the same tokens that
change one thing at a time make a telescoping sum, in nats:

    log w =  log pi(e^pi)         - log pi(e^pi_old)       staleness_routing
          +  log pi(e^pi_old)     - log pi_old(e^pi_old)   staleness_weights
          +  log pi_old(e^pi_old) - log pi_old(e^mu)       mismatch_routing
          +  log pi_old(e^mu)     - log mu(e^mu)           mismatch_numerics

R2 removes the first term, R3 the first and the third. "Numerics" is what is left with the same
experts: precision and kernels of the engine, but also any fault that makes it another policy. What
this is not: the passes themselves (learner/attribution.py). Nothing here is differentiated.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import Array, Mean
from jaxrl_llm.losses.diagnostics import masked_mean
from jaxrl_llm.losses.kl import k1, k3
from jaxrl_llm.losses.ratios import log_ratio


class Passes(NamedTuple):
    """Log-probabilities of the same targets, f32[B, S], nats, each after temperature."""

    sampler: Array  # mu, with its experts
    old: Array  # pi_old with its own experts
    natural: Array  # pi with its own experts
    r2: Array  # pi with the experts of pi_old
    old_r3: Array | None = None  # pi_old with the sampler's experts; None if those are unknown
    r3: Array | None = None  # pi with the sampler's experts; None if those are unknown


def log_weight_terms(passes: Passes, mask: Array) -> dict[str, Array]:
    """The terms of log w, each f32[B, S] in nats and 0 off the mask; they add up to log w.

    Without the sampler's experts the last two are one, "mismatch".
    """
    terms = {
        "staleness_routing": log_ratio(passes.natural, passes.r2, mask),
        "staleness_weights": log_ratio(passes.r2, passes.old, mask),
    }
    if passes.old_r3 is None:
        return terms | {"mismatch": log_ratio(passes.old, passes.sampler, mask)}
    return terms | {
        "mismatch_routing": log_ratio(passes.old, passes.old_r3, mask),
        "mismatch_numerics": log_ratio(passes.old_r3, passes.sampler, mask),
    }


def attribute(passes: Passes, mask: Array) -> dict[str, Mean]:
    """How large each term of log w is, and KL(mu || pi) under each choice of experts.

    Means are over the tokens of the mask where every pass is finite; they pool over mini-batches.

    Args:
      passes: f32[B, S] each.
      mask: bool[B, S], the sampled tokens whose experts in the sampler are known, if any are.

    Returns:
      mean_*, abs_* and square_*, the mean, mean absolute value and mean square of the terms of
      log_weight_terms, of the sums "staleness" and "mismatch", and of "log_weight", the whole;
      share_*, a term's mean absolute value over that of all terms together; kl_natural, kl_r2 and
      kl_r3, KL(mu || pi) with pi's own, pi_old's and the sampler's experts, and with _k3 appended
      its k3 estimate; tokens and left_out_tokens, per mini-batch. All prefixed "attribution/"; what
      needs the sampler's experts is absent without them.
    """
    passes, mask = jax.lax.stop_gradient((passes, mask))
    finite = [jnp.isfinite(logprobs) for logprobs in passes if logprobs is not None]
    tokens = mask & jnp.all(jnp.stack(finite), axis=0)
    terms = log_weight_terms(passes, tokens)
    sums = {
        "staleness": log_ratio(passes.natural, passes.old, tokens),
        "mismatch": log_ratio(passes.old, passes.sampler, tokens),
        "log_weight": log_ratio(passes.natural, passes.sampler, tokens),
    }
    found = _sizes(terms | sums, tokens) | _shares(terms, tokens) | _divergences(passes, tokens)
    one = jnp.ones((), jnp.float32)
    found["tokens"] = Mean(jnp.sum(tokens.astype(jnp.float32)), one)
    found["left_out_tokens"] = Mean(jnp.sum((mask & ~tokens).astype(jnp.float32)), one)
    return {f"attribution/{name}": mean for name, mean in found.items()}


def _sizes(terms: dict[str, Array], tokens: Array) -> dict[str, Mean]:
    measures = {"mean": lambda x: x, "abs": jnp.abs, "square": jnp.square}
    return {
        f"{name}_{term}": masked_mean(measure(values), tokens)
        for term, values in terms.items()
        for name, measure in measures.items()
    }


def _shares(terms: dict[str, Array], tokens: Array) -> dict[str, Mean]:
    """Ratios of sums, so that they pool like Means; empty if all terms are 0."""
    sizes = {term: masked_mean(jnp.abs(values), tokens).total for term, values in terms.items()}
    whole = jnp.sum(jnp.stack(list(sizes.values())))
    return {f"share_{term}": Mean(size, whole) for term, size in sizes.items()}


def _divergences(passes: Passes, tokens: Array) -> dict[str, Mean]:
    routed = {"natural": passes.natural, "r2": passes.r2}
    if passes.r3 is not None:
        routed["r3"] = passes.r3
    estimators = {"": k1, "_k3": k3}
    return {
        f"kl_{routes}{suffix}": masked_mean(estimator(passes.sampler, logprobs, tokens), tokens)
        for routes, logprobs in routed.items()
        for suffix, estimator in estimators.items()
    }
