"""The mathematics of the losses again: float64, one token at a time, no masks but `if`.

Written from arXiv 2512.01374, not from the package. `policy_loss` takes the log-probabilities at
which the constants of the surrogate (weight and clip mask) are evaluated apart from those it is a
function of, so that finite differences of it are the gradient of the surrogate.
"""

import math

import numpy as np


def responses(mask: np.ndarray, segment_ids: np.ndarray) -> list[list[tuple[int, int]]]:
    """The sampled tokens (row, position) of every response that has any."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for b, s in np.argwhere(mask):
        found.setdefault((b, segment_ids[b, s]), []).append((b, s))
    return list(found.values())


def group_advantages(
    rewards: np.ndarray, valid: np.ndarray, baseline: str, scale: str
) -> np.ndarray:
    out = np.zeros(rewards.shape)
    for g in range(rewards.shape[0]):
        members = [n for n in range(rewards.shape[1]) if valid[g, n]]
        known = [float(rewards[g, n]) for n in members]
        if len(set(known)) < 2:
            continue
        for n in members:
            others = [float(rewards[g, m]) for m in members if m != n]
            centre = np.mean(known) if baseline == "mean" else np.mean(others)
            out[g, n] = rewards[g, n] - centre
            if scale == "std":
                out[g, n] /= np.std(known, ddof=1)
    return out


def token_weights(
    mask: np.ndarray, segment_ids: np.ndarray, per: str, constant: float = 0.0
) -> np.ndarray:
    out = np.zeros(mask.shape)
    found = responses(mask, segment_ids)
    for tokens in found:
        for b, s in tokens:
            out[b, s] = {
                "response_sum": lambda: 1 / len(found),
                "token": lambda: 1 / mask.sum(),
                "sequence": lambda tokens=tokens: 1 / len(found) / len(tokens),
                "constant": lambda: 1 / len(found) / constant,
            }[per]()
    return out


def sequence_log_ratio(
    log_ratio: np.ndarray, mask: np.ndarray, segment_ids: np.ndarray
) -> np.ndarray:
    out = np.zeros(mask.shape)
    for tokens in responses(mask, segment_ids):
        mean = sum(float(log_ratio[t]) for t in tokens) / len(tokens)
        for t in tokens:
            out[t] = mean
    return out


def is_open(ratio: float, advantage: float, low: float, high: float) -> bool:
    if advantage > 0:
        return ratio <= 1 + high
    if advantage < 0:
        return ratio >= 1 - low
    return True


def importance(kind: str, cap: float, pi: float, old: float, mu: float) -> float:
    """w_t from the three log-probabilities of one token."""
    if kind == "sampler":
        return min(math.exp(pi - mu), cap)
    if kind == "mismatch":
        return min(math.exp(old - mu), cap) * math.exp(pi - old)
    if kind == "staleness":
        return min(math.exp(pi - old), cap)
    return 1.0


def kl(estimator: str, log_p: float, log_q: float) -> float:
    d = log_p - log_q
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]


def policy_loss(
    logprobs: np.ndarray,
    entropy: np.ndarray,
    constants_at: np.ndarray,
    batch: dict[str, np.ndarray | None],
    weights: np.ndarray,
    cfg: dict[str, float | str],
) -> float:
    """The MiniRL surrogate; `batch` and `cfg` are the fields of TrainBatch and LossConfig."""
    total = 0.0
    for t in map(tuple, np.argwhere(batch["loss_mask"])):
        pi, mu = float(constants_at[t]), float(batch["sampler_logprobs"][t])
        old = pi if batch["old_logprobs"] is None else float(batch["old_logprobs"][t])
        advantage = float(batch["advantages"][t])
        w = importance(cfg["importance"], cfg["importance_cap"], pi, old, mu)
        anchored = {"old": math.exp(pi - old), "sampler": math.exp(pi - mu), "none": 1.0}
        mask = is_open(anchored[cfg["clip_anchor"]], advantage, cfg["clip_low"], cfg["clip_high"])
        token = -mask * w * advantage * float(logprobs[t])
        if cfg["kl_coefficient"]:
            reference = float(batch["ref_logprobs"][t])
            penalty = kl(cfg["kl_estimator"], float(logprobs[t]), reference)
            token += cfg["kl_coefficient"] * w * penalty
        token -= cfg["entropy_coefficient"] * float(entropy[t])
        total += float(weights[t]) * token
    return total


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def z_loss(logits: np.ndarray, weights: np.ndarray) -> float:
    layers, rows, positions, _ = logits.shape
    total = 0.0
    for layer in range(layers):
        for b in range(rows):
            for s in range(positions):
                if weights[b, s]:
                    total += weights[b, s] * np.log(np.exp(logits[layer, b, s]).sum()) ** 2
    return total / layers


def expert_load(experts: np.ndarray, weights: np.ndarray, num_experts: int) -> np.ndarray:
    layers, rows, positions, slots = experts.shape
    load = np.zeros((layers, num_experts))
    for layer in range(layers):
        for b in range(rows):
            for s in range(positions):
                for e in experts[layer, b, s]:
                    load[layer, e] += weights[b, s] / slots
    return load


def balance_loss(logits: np.ndarray, load: np.ndarray, weights: np.ndarray) -> float:
    layers, rows, positions, num_experts = logits.shape
    total = 0.0
    for layer in range(layers):
        for b in range(rows):
            for s in range(positions):
                if weights[b, s]:
                    total += weights[b, s] * load[layer] @ softmax(logits[layer, b, s])
    return num_experts * total / layers


def route_overlap(experts: np.ndarray, routes: np.ndarray, mask: np.ndarray) -> float:
    """Mean over layers and sampled tokens with routes of the share of experts in common."""
    shares = [
        len(set(experts[layer, b, s]) & set(routes[b, s, layer])) / routes.shape[-1]
        for b, s in np.argwhere(mask)
        for layer in range(experts.shape[0])
        if routes[b, s, layer, 0] != -1
    ]
    return float(np.mean(shares)) if shares else 0.0


def finite_differences(function, at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of a scalar function at a float64 array."""
    gradient = np.zeros(at.shape)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient
