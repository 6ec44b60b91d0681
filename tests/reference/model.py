"""Qwen3-MoE in float64 numpy: one unpacked sequence, one token and one expert at a time.

Written from the equations, with no regard for speed: a second opinion on jaxrl_llm.model. The
gradient of the expert layer is derived by hand, that of the whole model is left to differences.
"""

from typing import Any

import numpy as np

from jaxrl_llm.model.config import ModelConfig

Array = np.ndarray


def to_float64(tree: Any) -> Any:
    """A nested dict of arrays as float64 numpy."""
    if isinstance(tree, dict):
        return {name: to_float64(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)


def softmax(x: Array) -> Array:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * scale


def rotate(head: Array, position: int, theta: float) -> Array:
    """One head [P] turned: pair (i, i + P / 2) by position / theta^(2 i / P)."""
    half = head.size // 2
    turned = head.copy()
    for i in range(half):
        angle = position / theta ** (2 * i / head.size)
        turned[i] = head[i] * np.cos(angle) - head[i + half] * np.sin(angle)
        turned[i + half] = head[i + half] * np.cos(angle) + head[i] * np.sin(angle)
    return turned


def attention(x: Array, params: Any, config: ModelConfig) -> Array:
    """Causal grouped-query attention over one sequence x[S, D]."""
    length, size = x.shape[0], config.head_dim

    def heads(name: str, norm: str | None) -> Array:
        split = (x @ params[name]).reshape(length, -1, size)
        if norm is None:
            return split
        normed = rms_norm(split, params[norm], config.norm_eps)
        return np.array(
            [[rotate(h, s, config.rope_theta) for h in row] for s, row in enumerate(normed)]
        )

    query, key, value = heads("q", "q_norm"), heads("k", "k_norm"), heads("v", None)
    group = config.num_heads // config.num_kv_heads
    output = np.zeros_like(query)
    for s in range(length):
        for h in range(config.num_heads):
            scores = key[: s + 1, h // group] @ query[s, h] / np.sqrt(size)
            output[s, h] = softmax(scores) @ value[: s + 1, h // group]
    return output.reshape(length, -1) @ params["o"]


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    z = x @ gate
    return (z * sigmoid(z) * (x @ up)) @ down


def route(
    logits: Array, k: int, replayed: Array | None, normalize: bool, gates: Array | None = None
) -> tuple[Array, Array]:
    """Expert ids and gate values of one token; replayed ids of -1 are the router's to choose."""
    experts = np.argsort(-logits, kind="stable")[:k]
    if replayed is not None and replayed[0] != -1:
        experts = replayed
        if gates is not None:
            return experts, gates
    weights = softmax(logits)[experts]
    return experts, weights / weights.sum() if normalize else weights


def dispatch(x: Array, experts: Array, weights: Array, params: Any) -> Array:
    """x[N, D], experts and weights [N, K] -> [N, D]."""
    output = np.zeros_like(x)
    for n in range(x.shape[0]):
        for e, weight in zip(experts[n], weights[n], strict=True):
            matrices = (params[name][e] for name in ("gate", "up", "down"))
            output[n] += weight * swiglu(x[n], *matrices)
    return output


def dispatch_gradient(
    x: Array, experts: Array, weights: Array, params: Any, upstream: Array
) -> tuple[Array, Array, Any]:
    """Gradient of sum(upstream * dispatch(...)) with respect to x, weights and params."""
    to_x, to_weights = np.zeros_like(x), np.zeros_like(weights)
    to_params = {name: np.zeros_like(matrix) for name, matrix in params.items()}
    for n in range(x.shape[0]):
        for k, e in enumerate(experts[n]):
            gate, up, down = (params[name][e] for name in ("gate", "up", "down"))
            z, u = x[n] @ gate, x[n] @ up
            silu = z * sigmoid(z)
            to_weights[n, k] = (silu * u) @ down @ upstream[n]
            to_y = weights[n, k] * upstream[n]
            to_hidden = down @ to_y
            to_u = to_hidden * silu
            to_z = to_hidden * u * sigmoid(z) * (1 + z * (1 - sigmoid(z)))
            to_params["down"][e] += np.outer(silu * u, to_y)
            to_params["gate"][e] += np.outer(x[n], to_z)
            to_params["up"][e] += np.outer(x[n], to_u)
            to_x[n] += gate @ to_z + up @ to_u
    return to_x, to_weights, to_params


def layers(params: Any, config: ModelConfig) -> list[tuple[bool, Any]]:
    """(is MoE, parameters) of each layer in global order, taken from the stacked segments."""
    found = []
    cursors = dict.fromkeys(params["segments"], 0)
    names = iter(sorted(params["segments"]))
    current = next(names)
    for layer in range(config.num_layers):
        if cursors[current] == len(params["segments"][current]["mlp_norm"]):
            current = next(names)
        found.append((layer not in config.moe.dense_layers, current, cursors[current]))
        cursors[current] += 1

    def pick(tree: Any, index: int) -> Any:
        if isinstance(tree, dict):
            return {name: pick(value, index) for name, value in tree.items()}
        return tree[index]

    return [(is_moe, pick(params["segments"][name], index)) for is_moe, name, index in found]


def forward(
    params: Any,
    config: ModelConfig,
    tokens: Array,
    routes: Array | None,
    gates: Array | None = None,
) -> tuple[Array, Array, Array, Array]:
    """One sequence: tokens[S], routes[S, L, K] or None, their gate values to replay or None.

    Returns hidden [S, D], router logits [L, S, E], experts and weights [L, S, K].
    """
    moe = config.moe
    hidden = params["embed"][tokens]
    all_logits, all_experts, all_weights = [], [], []
    for is_moe, block in layers(params, config):
        normed = rms_norm(hidden, block["attention_norm"], config.norm_eps)
        hidden = hidden + attention(normed, block["attention"], config)
        normed = rms_norm(hidden, block["mlp_norm"], config.norm_eps)
        mlp = block["mlp"]
        if not is_moe:
            hidden = hidden + swiglu(normed, mlp["gate"], mlp["up"], mlp["down"])
            continue
        logits = normed @ mlp["router"]
        replayed, frozen = (
            [None] * len(tokens) if given is None else given[:, len(all_logits)]
            for given in (routes, gates)
        )
        chosen = [
            route(row, moe.experts_per_token, ids, moe.normalize_weights, values)
            for row, ids, values in zip(logits, replayed, frozen, strict=True)
        ]
        experts, weights = (np.array(part) for part in zip(*chosen, strict=True))
        hidden = hidden + dispatch(normed, experts, weights, mlp)
        all_logits.append(logits)
        all_experts.append(experts)
        all_weights.append(weights)
    hidden = rms_norm(hidden, params["final_norm"], config.norm_eps)
    return hidden, np.array(all_logits), np.array(all_experts), np.array(all_weights)


def token_logprobs(
    params: Any, config: ModelConfig, hidden: Array, targets: Array, temperature: float
) -> tuple[Array, Array]:
    """Log-probability of each target and entropy, from hidden [S, D] and the full softmax."""
    head = params["embed"].T if config.tie_embeddings else params["head"]
    shares = softmax(hidden @ head / temperature)
    return np.log(shares[np.arange(len(targets)), targets]), -np.sum(shares * np.log(shares), -1)
