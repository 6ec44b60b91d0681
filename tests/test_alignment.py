"""The alignment rule of types.py, traced by index with one hand-built rollout of five tokens.

    tokens            11   12   13   14    1      11 12 are the prompt, 13 14 1 were sampled
    position s         0    1    2    3
    inputs[s]         11   12   13   14
    targets[s]        12   13   14    1
    loss_mask[s]       F    T    T    T

It goes over the wire (JSON), through collate alone and packed behind another rollout, and through
the loss, whose gradient says which log-probability was multiplied by which advantage.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.arrays import Array, TrainBatch
from jaxrl_llm.data.collate import collate, unpack
from jaxrl_llm.losses.clipping import ClipConfig
from jaxrl_llm.losses.policy import LossConfig, policy_loss
from jaxrl_llm.losses.weights import token_weights
from jaxrl_llm.types import (
    NO_ROUTE,
    NOT_SAMPLED,
    Group,
    Prompt,
    Rollout,
    bind_routes,
    group_from_json,
    group_to_json,
)

VOCAB = 16
LENGTH = 12
STEP = 9

TRACED = bind_routes(
    Rollout(
        prompt_id="traced",
        sample_index=0,
        tokens=np.array([11, 12, 13, 14, 1], np.int32),
        loss_mask=np.array([False, True, True, True]),
        sampler_logprobs=np.array([0.0, -0.1, -0.2, -0.3], np.float32),
        routes=None,
        weight_version=np.array([NOT_SAMPLED, 9, 8, 7], np.int32),
        text="",
        finish="stop",
    ),
    np.array([[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]], np.int16),
)
OTHER = Rollout(
    prompt_id="other",
    sample_index=0,
    tokens=np.array([2, 3, 4, 5, 6, 7, 1], np.int32),
    loss_mask=np.array([False, False, False, True, True, True]),
    sampler_logprobs=np.array([0, 0, 0, -0.4, -0.5, -0.6], np.float32),
    routes=None,
    weight_version=np.array([-1, -1, -1, 9, 9, 9], np.int32),
    text="",
    finish="stop",
)
ADVANTAGES = {"traced": 0.5, "other": -0.25}

# Where TRACED begins: alone in row 0, in a row of its own, or behind the six positions of OTHER.
PLACES = {"alone": (0, 0), "padded": (1, 0), "packed": (0, 6)}


def over_the_wire(rollout: Rollout) -> Rollout:
    prompt = Prompt(rollout.prompt_id, rollout.tokens[:2], "", "")
    text = json.dumps(group_to_json(Group(prompt, (rollout,))))
    return group_from_json(json.loads(text)).rollouts[0]


def make_batch(placing: str) -> tuple[TrainBatch, list[Rollout]]:
    rollouts = [over_the_wire(r) for r in ([TRACED] if placing == "alone" else [OTHER, TRACED])]
    batch = collate(
        rollouts,
        np.array([ADVANTAGES[r.prompt_id] for r in rollouts], np.float32),
        step=STEP,
        rows=2,
        length=LENGTH,
        pack=placing == "packed",
    )
    return batch, rollouts


@pytest.fixture(params=PLACES)
def placing(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_field_sits_at_the_position_that_consumes_its_input(placing: str) -> None:
    batch, _ = make_batch(placing)
    row, start = PLACES[placing]
    assert batch.routes is not None

    def at(s: int) -> tuple[object, ...]:
        where = (row, start + s)
        assert batch.segment_ids[where] == (2 if placing == "packed" else 1)
        scalars = ("inputs", "targets", "positions", "loss_mask", "staleness")
        values = {name: np.asarray(getattr(batch, name)) for name in scalars}
        return (
            *(values[name][where].item() for name in scalars),
            round(float(batch.sampler_logprobs[where]), 6),
            float(batch.advantages[where]),
            batch.routes[where].tolist(),
        )

    # input, target, position, sampled, staleness, log mu, advantage, experts
    assert at(0) == (11, 12, 0, False, 0, 0.0, 0.0, [[0, 1]])
    assert at(1) == (12, 13, 1, True, 0, -0.1, 0.5, [[2, 3]])
    assert at(2) == (13, 14, 2, True, 1, -0.2, 0.5, [[4, 5]])
    assert at(3) == (14, 1, 3, True, 2, -0.3, 0.5, [[6, 7]])
    after = (row, start + 4)
    assert batch.segment_ids[after] == 0
    assert not batch.loss_mask[after]
    assert np.all(batch.routes[after] == NO_ROUTE)


def test_the_other_rollout_in_the_row_keeps_its_own() -> None:
    batch, rollouts = make_batch("packed")
    assert batch.routes is not None
    assert batch.inputs[0, :6].tolist() == [2, 3, 4, 5, 6, 7]
    assert batch.targets[0, :6].tolist() == [3, 4, 5, 6, 7, 1]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 0]
    assert batch.segment_ids[0].tolist() == [1] * 6 + [2] * 4 + [0] * 2
    assert batch.advantages[0].tolist() == [0, 0, 0, *[-0.25] * 3, 0, *[0.5] * 3, 0, 0]
    assert np.all(batch.routes[0, :6] == NO_ROUTE), "it reported no routes"
    assert not np.any(batch.segment_ids[1])
    values = np.arange(2 * LENGTH).reshape(2, LENGTH)
    back = unpack(values, rollouts, pack=True)
    assert [array.tolist() for array in back] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]


def bigram_logprobs(table: Array, batch: TrainBatch) -> Array:
    """log p(target | input) of a model that sees one token: f32[B, S]."""
    return jax.nn.log_softmax(table)[batch.inputs, batch.targets]


def test_the_loss_pairs_each_log_probability_with_its_token(placing: str) -> None:
    """d loss / d log pi = -(1/n) * min(pi / mu, cap) * A at exactly the sampled positions."""
    batch, rollouts = make_batch(placing)
    row, start = PLACES[placing]
    table = jnp.asarray(np.random.default_rng(0).normal(size=(VOCAB, VOCAB)), jnp.float32)
    logprobs = bigram_logprobs(table, batch)
    weights = token_weights(
        jnp.asarray(batch.loss_mask), jnp.asarray(batch.segment_ids), per="response_sum"
    )
    config = LossConfig(clip=ClipConfig(kind="none"))

    def loss(logprobs: Array) -> Array:
        return policy_loss(logprobs, jnp.zeros_like(logprobs), batch, weights, config).loss

    gradient = np.asarray(jax.grad(loss)(logprobs))

    expected = np.zeros((2, LENGTH))
    log_table = np.asarray(jax.nn.log_softmax(table), np.float64)
    pairs = {1: (12, 13, -0.1), 2: (13, 14, -0.2), 3: (14, 1, -0.3)}
    for s, (token, target, log_mu) in pairs.items():
        ratio = min(np.exp(log_table[token, target] - log_mu), 5.0)
        expected[row, start + s] = -ratio * 0.5 / len(rollouts)
    if placing != "alone":
        for s, (token, target, log_mu) in {
            3: (5, 6, -0.4),
            4: (6, 7, -0.5),
            5: (7, 1, -0.6),
        }.items():
            ratio = min(np.exp(log_table[token, target] - log_mu), 5.0)
            expected[0, s] = -ratio * -0.25 / len(rollouts)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_only_the_inputs_of_sampled_tokens_get_a_gradient_through_the_model(placing: str) -> None:
    """12, 13 and 14 predict sampled tokens; 11 predicts a prompt token, 1 (stop) nothing."""
    batch, _ = make_batch(placing)
    weights = token_weights(
        jnp.asarray(batch.loss_mask), jnp.asarray(batch.segment_ids), per="response_sum"
    )

    def loss(table: Array) -> Array:
        logprobs = bigram_logprobs(table, batch)
        return policy_loss(
            logprobs,
            jnp.zeros_like(logprobs),
            batch,
            weights,
            LossConfig(clip=ClipConfig(kind="none")),
        ).loss

    gradient = np.asarray(jax.grad(loss)(jnp.zeros((VOCAB, VOCAB))))
    moved = set(np.flatnonzero(np.any(gradient != 0, axis=1)).tolist())
    assert moved == ({12, 13, 14} if placing == "alone" else {5, 6, 7, 12, 13, 14})
    raised = {s: int(np.argmin(gradient[s])) for s in (12, 13, 14)}
    assert raised == {12: 13, 13: 14, 14: 1}, "a positive advantage raises the sampled tokens"
