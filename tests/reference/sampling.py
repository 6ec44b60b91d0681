"""The distribution that a sampler draws from, token by token in float64."""

import numpy as np


def distribution(
    logits: np.ndarray, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> np.ndarray:
    """Probabilities f64[V] after temperature, top-k and top-p; all mass on the best token at 0."""
    if temperature == 0:
        return np.eye(logits.size)[np.argmax(logits)]
    shares = np.exp((logits.astype(np.float64) - np.max(logits)) / temperature)
    shares /= shares.sum()
    kept = np.zeros(logits.size, bool)
    mass = 0.0
    for rank, token in enumerate(sorted(range(logits.size), key=lambda t: (-logits[t], t))):
        if (top_k and rank >= top_k) or (top_p < 1 and mass >= top_p):
            break
        kept[token] = True
        mass += shares[token]
    return np.where(kept, shares, 0.0) / shares[kept].sum()
