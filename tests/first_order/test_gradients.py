"""Expected weights and advantages against the sampled ones of very large groups."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.arrays import NO_ROUTE
from jaxrl_llm.first_order.gradients import Behaviour, agreement, expected_batch, with_behaviour
from jaxrl_llm.first_order.passes import Scores
from jaxrl_llm.learner.step import Replay
from jaxrl_llm.losses.advantages import AdvantageConfig, response_advantages
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.losses.weights import Averaging, token_weights
from tests.first_order.tiny import responses, rewards

SAMPLES = 1000  # of each prompt, in shares that a sampler could have to the last digit
ROWS = responses()
MASK = np.asarray(ROWS.batch.loss_mask)


def counted() -> tuple[np.ndarray, Behaviour]:
    """How often each response was drawn, i64[B], and a sampler with just these probabilities."""
    rng = np.random.default_rng(0)
    each = len(MASK) // 2
    counts = np.concatenate(
        [rng.multinomial(SAMPLES - each, rng.dirichlet(np.ones(each))) + 1 for _ in range(2)]
    )
    logprobs = np.where(MASK, np.log(counts / SAMPLES)[:, None] / MASK.sum(1, keepdims=True), 9.0)
    routes = np.zeros((*MASK.shape, 1, 1), np.int16)
    scores = Scores(jnp.asarray(logprobs, jnp.float32), jnp.zeros(MASK.shape), jnp.asarray(routes))
    return counts, Behaviour(scores, scores, scores)


@pytest.mark.parametrize("averaging", ["response_sum", "token", "sequence", "constant"])
def test_weights_are_those_of_many_responses(averaging: Averaging) -> None:
    constant = 7.0 if averaging == "constant" else 0.0
    cfg = LossConfig(averaging=averaging, averaging_length=constant)
    counts, who = counted()
    _, weights = expected_batch(ROWS, rewards(), who, "none", cfg)
    drawn = np.repeat(np.arange(len(MASK)), counts)
    sampled = token_weights(
        jnp.asarray(MASK[drawn]),
        jnp.asarray(ROWS.batch.segment_ids[drawn]),
        per=averaging,
        constant=constant,
    )
    wanted = np.zeros(MASK.shape)
    np.add.at(wanted, drawn, np.asarray(sampled, np.float64))
    np.testing.assert_allclose(weights, wanted, rtol=1e-4)


@pytest.mark.parametrize(
    "cfg",
    [
        AdvantageConfig(),
        AdvantageConfig(baseline="leave_one_out"),
        AdvantageConfig(baseline="none"),
        AdvantageConfig(scale="std"),
        AdvantageConfig(overlong="mask"),
    ],
)
def test_advantages_are_those_of_a_large_group(cfg: AdvantageConfig) -> None:
    counts, who = counted()
    batch, _ = expected_batch(ROWS, rewards(), who, "none", LossConfig(advantage=cfg))
    drawn = np.repeat(np.arange(len(MASK)), counts)
    shape = (2, SAMPLES)
    wanted = response_advantages(
        rewards()[drawn].reshape(shape),
        np.ones(shape, bool),
        ~ROWS.stopped[drawn].reshape(shape),
        cfg,
    ).reshape(-1)
    found = np.where(MASK[drawn], wanted[:, None], 0)
    np.testing.assert_allclose(batch.advantages[drawn], found, rtol=2 / SAMPLES, atol=1e-4)


def test_equal_rewards_teach_nothing() -> None:
    _, who = counted()
    cfg = LossConfig(advantage=AdvantageConfig(scale="std"))
    batch, _ = expected_batch(ROWS, np.zeros(len(MASK), np.float32), who, "none", cfg)
    assert not np.any(batch.advantages)


@pytest.mark.parametrize(
    ("replay", "routes", "old"), [("none", NO_ROUTE, 2), ("r2", 2, 2), ("r3", 1, 3)]
)
def test_routes_and_pi_old_are_those_of_the_learner(replay: Replay, routes: int, old: int) -> None:
    """The table of learner/step.py; the sampler says 1 of everything, pi_old 2, replayed 3."""

    def scores(number: int) -> Scores:
        shape = (*MASK.shape, 1, 1)
        values = jnp.full(MASK.shape, number, jnp.float32)
        return Scores(values, values, jnp.full(shape, number, jnp.int16))

    batch = with_behaviour(ROWS.batch, Behaviour(scores(1), scores(2), scores(3)), replay)
    np.testing.assert_array_equal(batch.sampler_logprobs, np.where(MASK, 1, 0))
    np.testing.assert_array_equal(batch.old_logprobs, np.full(MASK.shape, old))
    np.testing.assert_array_equal(batch.routes, np.full((*MASK.shape, 1, 1), routes))


def test_agreement_of_two_vectors() -> None:
    found = agreement(np.array([3.0, 4.0]), np.array([2.0, 0.0]))
    wanted = {
        "cosine": 0.6,
        "norm_ratio": 2.5,
        "projection": 1.5,
        "relative_error": np.sqrt(17) / 2,
    }
    assert dataclasses.asdict(found) == pytest.approx(wanted)
    assert np.isnan(agreement(np.zeros(2), np.ones(2)).cosine)
    with pytest.raises(ValueError, match="no direction to compare with"):
        agreement(np.ones(2), np.zeros(2))
