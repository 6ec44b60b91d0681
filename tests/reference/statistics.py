"""The statistics of importance weights again: float64, one token at a time, no masks but `if`.

Names and values as they are logged; None stands for nothing to look at.
"""

import math
from fractions import Fraction

import numpy as np

from tests.reference.losses import responses

Values = dict[str, float | None]
SATURATION = 20.0


def quantile(values: list[float], q: str) -> float | None:
    """The smallest value v with F(v) >= q, counted in exact arithmetic; q as a decimal."""
    for rank, v in enumerate(sorted(values), start=1):
        if Fraction(rank, len(values)) >= Fraction(q):
            return v
    return None


def effective_share(weights: list[float]) -> float | None:
    if not weights:
        return None
    squares = math.fsum(w * w for w in weights)
    return math.fsum(weights) ** 2 / (len(weights) * squares) if squares else 0.0


def mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def spread(weights: list[float]) -> Values:
    """What is logged of weights of tokens."""
    centre = mean(weights)
    found = {
        "mean": centre,
        "std": None,
        "max": max(weights, default=None),
        "min": min(weights, default=None),
        "above_2": mean([float(w > 2) for w in weights]),
        "above_5": mean([float(w > 5) for w in weights]),
        "below_half": mean([float(w < 0.5) for w in weights]),
        "ess_token": effective_share(weights),
        "p50": quantile(weights, "0.5"),
        "p99": quantile(weights, "0.99"),
        "p999": quantile(weights, "0.999"),
    }
    if centre is not None:
        found["std"] = math.sqrt(mean([(w - centre) ** 2 for w in weights]))
    return found


def saturated(log_ratio: float) -> float:
    return math.exp(min(log_ratio, SATURATION))


def importance_statistics(
    logprobs: np.ndarray, batch: dict[str, np.ndarray | None], weight: np.ndarray
) -> Values:
    mask, mu = batch["loss_mask"], batch["sampler_logprobs"]
    old = logprobs if batch["old_logprobs"] is None else batch["old_logprobs"]

    def usable(t: tuple[int, int]) -> bool:
        return all(math.isfinite(x[t]) for x in (logprobs, old, mu))

    every = responses(mask, batch["segment_ids"])
    tokens = [t for tokens in every for t in tokens if usable(t)]
    whole = [tokens for tokens in every if all(usable(t) for t in tokens)]
    factors = {"is_weight/raw_": (logprobs, mu), "mismatch/ratio_": (old, mu)}
    if batch["old_logprobs"] is not None:
        factors["staleness/ratio_"] = (logprobs, old)
    found: Values = {}
    for prefix, (over, under) in factors.items():
        logs = {t: float(over[t]) - float(under[t]) for t in tokens}
        products = [math.fsum(logs[t] for t in response) for response in whole]
        largest = max(products, default=0.0)
        statistics = spread([saturated(logs[t]) for t in tokens])
        statistics["ess_sequence"] = effective_share([math.exp(p - largest) for p in products])
        found |= {prefix + name: value for name, value in statistics.items()}
    found |= used(weight, tokens, whole)
    found |= off_policy(old, mu, tokens, whole)
    found |= curves(logprobs, old, batch, every, usable)
    arrays = {"current": logprobs, "old": batch["old_logprobs"], "sampler": mu, "weight": weight}
    arrays["ref"] = batch["ref_logprobs"]
    for name, values in arrays.items():
        if values is not None:
            bad = sum(not math.isfinite(values[t]) for tokens in every for t in tokens)
            found[f"nonfinite/{name}"] = float(bad)
    return found


def used(
    weight: np.ndarray, tokens: list[tuple[int, int]], whole: list[list[tuple[int, int]]]
) -> Values:
    fine = {t for t in tokens if math.isfinite(weight[t])}
    statistics = spread([float(weight[t]) for t in fine])
    means = [mean([float(weight[t]) for t in r]) for r in whole if all(t in fine for t in r)]
    statistics["ess_response"] = effective_share(means)
    return {f"is_weight/used_{name}": value for name, value in statistics.items()}


def off_policy(
    old: np.ndarray,
    mu: np.ndarray,
    tokens: list[tuple[int, int]],
    whole: list[list[tuple[int, int]]],
) -> Values:
    rho = {t: float(old[t]) - float(mu[t]) for t in tokens}
    training = [mean([float(old[t]) for t in response]) for response in whole]
    rollout = [mean([float(mu[t]) for t in response]) for response in whole]
    gaps = [r - t for r, t in zip(rollout, training, strict=True)]
    products = [math.fsum(rho[t] for t in response) for response in whole]

    def square(log: float) -> float:
        return math.exp(2 * max(min(log, SATURATION), -SATURATION))

    values = {
        "kl": mean([-d for d in rho.values()]),
        "k3_kl": mean([saturated(d) - 1 - min(d, SATURATION) for d in rho.values()]),
        "chi2_token": mean([square(d) - 1 for d in rho.values()]),
        "chi2_seq": mean([square(p) - 1 for p in products]),
        "training_log_ppl": mean([-x for x in training]),
        "rollout_log_ppl": mean([-x for x in rollout]),
        "training_ppl": mean([saturated(-x) for x in training]),
        "rollout_ppl": mean([saturated(-x) for x in rollout]),
        "log_ppl_diff": mean(gaps),
        "log_ppl_abs_diff": mean([abs(gap) for gap in gaps]),
        "log_ppl_diff_max": max(gaps, default=None),
        "log_ppl_diff_min": min(gaps, default=None),
        "ppl_ratio": mean([saturated(gap) for gap in gaps]),
    }
    return {f"rollout_corr/{name}": value for name, value in values.items()}


def first_of_bin(value: int) -> int:
    """0, 1, 2, 2, 4, 4, 4, 4, 8, ..."""
    return 0 if value == 0 else 2 ** int(math.log2(value))


def curves(
    logprobs: np.ndarray,
    old: np.ndarray,
    batch: dict[str, np.ndarray],
    every: list[list[tuple[int, int]]],
    usable,
) -> Values:
    """A position counts the sampled tokens of the response, usable or not, before the token."""
    mu, found = batch["sampler_logprobs"], {}
    for response in every:
        for position, t in enumerate(response):
            if usable(t):
                bins = {"position": first_of_bin(position)}
                bins["staleness"] = min(first_of_bin(int(batch["staleness"][t])), 32)
                for kind, first in bins.items():
                    gap = float(mu[t]) - float(old[t])
                    away = abs(float(logprobs[t]) - float(mu[t]))
                    found.setdefault(f"mismatch/kl_at_{kind}_{first}", []).append(gap)
                    found.setdefault(f"is_weight/abs_log_at_{kind}_{first}", []).append(away)
    return {name: mean(values) for name, values in found.items()}
