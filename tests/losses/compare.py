"""policy_loss beside its slow reference: value, gradients, metrics.

Not jitted: so many settings would mean as many compilations. tests/losses/test_properties.py and
the learner's tests run the loss compiled.
"""

import dataclasses

import jax
import numpy as np

from jaxrl_llm.arrays import TrainBatch
from jaxrl_llm.losses.policy import LossConfig, policy_loss
from jaxrl_llm.losses.weights import token_weights
from tests.losses.batches import as_dict
from tests.reference import losses as reference


def _value_and_gradients(logprobs, entropy, batch, cfg):
    weights = token_weights(
        batch.loss_mask, batch.segment_ids, per=cfg.averaging, constant=cfg.averaging_length
    )

    def loss(logprobs, entropy):
        out = policy_loss(logprobs, entropy, batch, weights, cfg)
        return out.loss, {name: mean.value() for name, mean in out.metrics.items()}

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(logprobs, entropy)


def value_and_gradients(logprobs, entropy, batch, cfg):
    """The loss, its gradients in (logprobs, entropy) and the metrics' values."""
    (loss, metrics), gradients = _value_and_gradients(logprobs, entropy, batch, cfg)
    return loss, gradients, {name: float(value) for name, value in metrics.items()}


def assert_equals_the_reference(
    cfg: LossConfig, logprobs: np.ndarray, entropy: np.ndarray, batch: TrainBatch
) -> dict[str, float]:
    """Value, and gradients against finite differences; the weight and the mask are constants.

    Returns the metrics and the number of "tokens that learn", so that a caller can see that the
    masks left something to compare.
    """
    loss, (by_logprobs, by_entropy), metrics = value_and_gradients(logprobs, entropy, batch, cfg)
    mask, fields, settings = batch.loss_mask, as_dict(batch), dataclasses.asdict(cfg)
    weights = reference.token_weights(mask, batch.segment_ids, cfg.averaging, cfg.averaging_length)
    at, entropy_at = (np.where(mask, x, 0).astype(np.float64) for x in (logprobs, entropy))

    def slow(values, entropies):
        return reference.policy_loss(values, entropies, at, fields, weights, settings)

    np.testing.assert_allclose(loss, slow(at, entropy_at), rtol=1e-5, atol=1e-6)
    wanted = reference.finite_differences(lambda x: slow(x, entropy_at), at)
    np.testing.assert_allclose(by_logprobs, wanted, rtol=1e-5, atol=1e-5)
    wanted = reference.finite_differences(lambda x: slow(at, x), entropy_at)
    np.testing.assert_allclose(by_entropy, wanted, atol=1e-5)
    return metrics | {"tokens that learn": float(np.count_nonzero(by_logprobs))}
