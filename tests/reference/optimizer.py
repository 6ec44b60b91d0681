"""AdamW with global-norm clipping, written out in float64 numpy."""

import dataclasses

import numpy as np

Tree = dict[str, np.ndarray]


@dataclasses.dataclass
class AdamW:
    """State and settings; `update` moves the parameters in place, one step."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    decayed: tuple[str, ...]  # names of parameters that decay
    step: int = 0
    first: Tree = dataclasses.field(default_factory=dict)
    second: Tree = dataclasses.field(default_factory=dict)

    def update(self, params: Tree, gradient: Tree, learning_rate: float) -> None:
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        scale = min(1.0, self.clip_norm / norm)
        self.step += 1
        for name, value in params.items():
            g = gradient[name] * scale
            zero = np.zeros_like(value)
            m = self.beta1 * self.first.get(name, zero) + (1 - self.beta1) * g
            v = self.beta2 * self.second.get(name, zero) + (1 - self.beta2) * g**2
            self.first[name], self.second[name] = m, v
            m_hat = m / (1 - self.beta1**self.step)
            v_hat = v / (1 - self.beta2**self.step)
            change = m_hat / (np.sqrt(v_hat) + self.eps)
            if name in self.decayed:
                change = change + self.weight_decay * value
            params[name] = value - learning_rate * change
