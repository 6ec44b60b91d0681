"""How responses are laid out on a device changes no loss, no gradient and no metric."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.arrays import TrainBatch
from jaxrl_llm.losses import presets
from jaxrl_llm.losses.kl import KLConfig
from jaxrl_llm.losses.policy import LossConfig, policy_loss
from jaxrl_llm.losses.rejection import RejectionConfig
from jaxrl_llm.losses.weights import ImportanceConfig, token_weights
from tests.losses.batches import poison

ROWS, LENGTH = 8, 8
FIELDS = ["sampler_logprobs", "advantages", "old_logprobs", "ref_logprobs", "logprobs", "entropy"]
PENALTIES = {"kl": KLConfig(coefficient=0.1), "entropy_coefficient": 0.1}
CONFIGS = {
    "response_sum": LossConfig(importance=ImportanceConfig(high=1.2), **PENALTIES),
    "token": dataclasses.replace(
        presets.dppo_kl(),
        rejection=RejectionConfig(geometric_low=0.8, k3=0.1, veto=0.3, negative_kl=0.1),
        **PENALTIES,
    ),
    "sequence": dataclasses.replace(presets.gspo(), **PENALTIES),
    "constant": LossConfig(
        importance=ImportanceConfig(level="sequence", rule="band", low=0.5, high=2.0),
        averaging="constant",
        averaging_length=7.0,
        **PENALTIES,
    ),
}
AVERAGING = list(CONFIGS)

# The loss mask of every response; several turns, and responses without a sampled token, included.
responses = st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=ROWS)
Place = tuple[int, int, int]
"""Row, first position and segment id of a response."""


def unpacked(masks: list[list[bool]], order: list[int]) -> list[Place]:
    """A row each, in the order drawn; the rows left over are padding."""
    return [(order[i], 0, 1) for i in range(len(masks))]


def packed(masks: list[list[bool]], order: list[int]) -> list[Place]:
    """First fit, taking the responses in the order drawn."""
    used, segments = [0] * ROWS, [0] * ROWS
    places: dict[int, Place] = {}
    for i in (i for i in order if i < len(masks)):
        row = next(r for r in range(ROWS) if used[r] + len(masks[i]) <= LENGTH)
        segments[row] += 1
        places[i] = (row, used[row], segments[row])
        used[row] += len(masks[i])
    return [places[i] for i in range(len(masks))]


def lay_out(masks: list[list[bool]], places: list[Place], seed: int) -> dict[str, np.ndarray]:
    """Every field [ROWS, LENGTH]; a response's values depend on the seed and the response alone."""
    fields = {name: np.zeros((ROWS, LENGTH), np.float32) for name in FIELDS}
    mask, segment_ids = np.zeros((ROWS, LENGTH), bool), np.zeros((ROWS, LENGTH), np.int32)
    for i, (row, start, segment) in enumerate(places):
        rng = np.random.default_rng([seed, i])
        span = slice(start, start + len(masks[i]))
        mask[row, span], segment_ids[row, span] = masks[i], segment
        base = -rng.uniform(0.1, 3, len(masks[i]))
        for name in FIELDS:
            fields[name][row, span] = base + 0.4 * rng.normal(size=len(masks[i]))
    fields = {name: poison(values, mask, seed=seed) for name, values in fields.items()}
    return fields | {"loss_mask": mask, "segment_ids": segment_ids}


@functools.cache
def run(averaging: str):
    cfg = CONFIGS[averaging]

    @jax.jit
    def loss_and_gradients(fields, weights):
        def loss(logprobs, entropy):
            zeros = jnp.zeros(logprobs.shape, jnp.int32)
            names = {field.name for field in dataclasses.fields(TrainBatch)}
            batch = TrainBatch(
                inputs=zeros,
                targets=zeros,
                positions=zeros,
                staleness=zeros,
                **{name: value for name, value in fields.items() if name in names},
            )
            out = policy_loss(logprobs, entropy, batch, weights, cfg)
            return out.loss, out.metrics

        (total, metrics), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            fields["logprobs"], fields["entropy"]
        )
        return total, jnp.stack(gradients), metrics

    @jax.jit
    def weigh(mask, segment_ids):
        return token_weights(mask, segment_ids, per=averaging, constant=cfg.averaging_length)

    return weigh, loss_and_gradients


def assert_same(found, wanted) -> None:
    (loss, gradients, metrics), (wanted_loss, wanted_gradients, wanted_metrics) = found, wanted
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-5, atol=1e-7)
    assert metrics.keys() == wanted_metrics.keys()
    for name, mean in metrics.items():
        assert mean.weight == wanted_metrics[name].weight
        np.testing.assert_allclose(mean.total, wanted_metrics[name].total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("averaging", AVERAGING)
@settings(max_examples=40, deadline=None)
@given(masks=responses, order=st.permutations(range(ROWS)), seed=st.integers(0, 1000))
def test_packing_and_padding_rows_change_nothing(averaging, masks, order, seed) -> None:
    weigh, loss_and_gradients = run(averaging)
    found = []
    for place in (unpacked, packed):
        places = place(masks, order)
        fields = lay_out(masks, places, seed)
        weights = weigh(fields["loss_mask"], fields["segment_ids"])
        loss, gradients, metrics = loss_and_gradients(fields, weights)
        gradients = np.asarray(gradients)
        assert not gradients[:, ~fields["loss_mask"]].any()
        spans = [
            gradients[:, row, start : start + len(mask)]
            for mask, (row, start, _) in zip(masks, places, strict=True)
        ]
        found.append((loss, spans, metrics))
    assert_same(*found)


@pytest.mark.parametrize("averaging", AVERAGING)
@pytest.mark.parametrize("interleaved", [True, False])
@settings(max_examples=20, deadline=None)
@given(
    masks=responses,
    order=st.permutations(range(ROWS)),
    seed=st.integers(0, 1000),
    parts=st.sampled_from([2, 8]),
)
def test_micro_batches_add(averaging, interleaved, masks, order, seed, parts) -> None:
    """Token weights are those of the whole batch, split with the rows."""
    weigh, loss_and_gradients = run(averaging)
    fields = lay_out(masks, packed(masks, order), seed)
    weights = np.asarray(weigh(fields["loss_mask"], fields["segment_ids"]))
    whole = loss_and_gradients(fields, weights)

    rows = (
        np.arange(ROWS).reshape(-1, parts).T if interleaved else np.arange(ROWS).reshape(parts, -1)
    )
    pieces = [loss_and_gradients({k: v[r] for k, v in fields.items()}, weights[r]) for r in rows]
    loss = sum(piece[0] for piece in pieces)
    gradients = np.zeros((2, ROWS, LENGTH), np.float32)
    for r, piece in zip(rows, pieces, strict=True):
        gradients[:, r] = piece[1]
    metrics = pieces[0][2]
    for piece in pieces[1:]:
        metrics = {name: mean + piece[2][name] for name, mean in metrics.items()}
    assert_same((loss, gradients, metrics), whole)
