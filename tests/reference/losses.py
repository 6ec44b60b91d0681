"""The mathematics of the losses again: float64, one token at a time, no masks but `if`.

Written from the papers, not from the package. `policy_loss` takes the log-probabilities at
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
        if baseline == "none":
            out[g, members] = known
            continue
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


Token = tuple[int, int]


def at_level(values: dict[Token, float], level: str) -> dict[Token, float]:
    """Log-ratios of one response: the tokens' own, their sum or their mean, for each token."""
    if level == "token":
        return values
    total = sum(values.values())
    return dict.fromkeys(values, total if level == "sequence" else total / len(values))


def is_open(
    ratio: float, advantage: float, low: float, high: float, dual: float = math.inf
) -> bool:
    if advantage > 0:
        return ratio <= 1 + high
    if advantage < 0:
        return 1 - low <= ratio <= dual
    return True


def binary_divergence(kind: str, pi: float, anchor: float) -> float:
    """Between the two-point distributions that anchor and pi give "this token or another"."""
    p, q = math.exp(anchor), math.exp(pi)
    if kind == "tv":
        return (abs(p - q) + abs((1 - p) - (1 - q))) / 2
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def passes(ratio: float, pi: float, anchor: float, advantage: float, clip: dict) -> bool:
    """M_t; `ratio` is pi over the anchor at the mask's level."""
    if clip["kind"] == "none":
        return True
    if clip["kind"] == "ratio":
        return is_open(ratio, advantage, clip["low"], clip["high"], clip["dual"])
    divergence = binary_divergence(clip["kind"], pi, anchor)
    if advantage > 0 and pi > anchor:
        return divergence <= clip["high"]
    if advantage < 0 and pi < anchor:
        return divergence <= clip["low"]
    return True


def bound(ratio: float, cfg: dict) -> float:
    if cfg["rule"] == "clip":
        return min(max(ratio, cfg["low"]), cfg["high"])
    return ratio if cfg["low"] <= ratio <= cfg["high"] else 0.0


def is_rejected(
    mismatch: list[float], sampler: list[float], staleness: list[float], advantage: float, cfg: dict
) -> bool:
    """Of one response, from the log-ratios of its tokens."""
    judged = mismatch if cfg["ratio"] == "mismatch" else sampler
    geometric = math.exp(np.mean(judged))
    if not cfg["geometric_low"] <= geometric <= cfg["geometric_high"]:
        return True
    if np.mean([math.exp(x) - 1 - x for x in judged]) > cfg["k3"]:
        return True
    if min(math.exp(x) for x in judged) < cfg["veto"]:
        return True
    moved = sampler if cfg["negative_anchor"] == "sampler" else staleness
    return advantage < 0 and -np.mean(moved) > cfg["negative_kl"]


def kl(estimator: str, log_p: float, log_q: float) -> float:
    d = log_p - log_q
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]


def policy_loss(
    logprobs: np.ndarray,
    entropy: np.ndarray,
    constants_at: np.ndarray,
    batch: dict[str, np.ndarray | None],
    weights: np.ndarray,
    cfg: dict,
) -> float:
    """Any surrogate of the family; `batch` and `cfg`: the fields of TrainBatch and LossConfig."""
    total = 0.0
    for tokens in responses(batch["loss_mask"], batch["segment_ids"]):
        pi = {t: float(constants_at[t]) for t in tokens}
        mu = {t: float(batch["sampler_logprobs"][t]) for t in tokens}
        old = pi if batch["old_logprobs"] is None else batch["old_logprobs"]
        old = {t: float(old[t]) for t in tokens}
        sampler = {t: pi[t] - mu[t] for t in tokens}
        mismatch = {t: old[t] - mu[t] for t in tokens}
        staleness = {t: pi[t] - old[t] for t in tokens}
        anchor, moved = (old, staleness) if cfg["clip"]["anchor"] == "old" else (mu, sampler)
        moved = at_level(moved, cfg["clip"]["level"])
        for t in tokens:
            advantage = float(batch["advantages"][t])
            rejected = is_rejected(
                *([x[t] for t in tokens] for x in (mismatch, sampler, staleness)),
                advantage,
                cfg["rejection"],
            )
            correction, ratio = importance(
                {"sampler": sampler, "mismatch": mismatch, "staleness": staleness}, t, cfg
            )
            is_passed = passes(math.exp(moved[t]), pi[t], anchor[t], advantage, cfg["clip"])
            new = float(logprobs[t])
            token = -(not rejected) * objective(
                new, pi[t], correction, ratio, advantage, is_passed, cfg
            )
            if cfg["kl"]["coefficient"]:
                penalty = kl(cfg["kl"]["estimator"], new, float(batch["ref_logprobs"][t]))
                w = (not rejected) * correction * ratio
                scale = {"none": 1.0, "importance": w, "unbiased": w * math.exp(new - pi[t])}
                token += cfg["kl"]["coefficient"] * scale[cfg["kl"]["weight"]] * penalty
            token -= cfg["entropy_coefficient"] * float(entropy[t])
            total += float(weights[t]) * token
    return total


def importance(ratios: dict[str, dict], t: Token, cfg: dict) -> tuple[float, float]:
    """(correction, ratio) of one token, whose product is w_t."""
    kind = cfg["importance"]["ratio"]
    if kind == "off":
        return 1.0, 1.0
    bounded = bound(
        math.exp(at_level(ratios[kind], cfg["importance"]["level"])[t]), cfg["importance"]
    )
    if kind == "mismatch":
        return bounded, math.exp(at_level(ratios["staleness"], cfg["clip"]["level"])[t])
    return 1.0, bounded


def objective(
    new: float,
    pi: float,
    correction: float,
    ratio: float,
    advantage: float,
    is_passed: bool,
    cfg: dict,
) -> float:
    """What is maximised of a token, as a function of its log-probability `new` alone."""
    if cfg["form"] == "score":
        return is_passed * correction * ratio * advantage * new
    ratio *= math.exp(new - pi)
    if cfg["clip"]["kind"] != "ratio":
        return is_passed * correction * ratio * advantage
    # PPO as its paper writes it: no mask, but the smaller of two values.
    low, high, dual = (cfg["clip"][name] for name in ("low", "high", "dual"))
    value = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if advantage < 0 and dual < math.inf:
        value = max(value, dual * advantage)
    return correction * value


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
