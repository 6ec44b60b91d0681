"""Routing replay: which factor of arXiv 2512.01374, eq. 8, uses which experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.arrays import (
    NOT_REPLAYED,
    OLD_ROUTES,
    SAMPLER_ROUTES,
    Array,
    LossOutput,
    ReplayedRoutes,
    TrainBatch,
)
from jaxrl_llm.learner.step import (
    LearnerConfig,
    Policy,
    Replay,
    ScoreOutput,
    make_gradient,
    make_score_step,
    prepare,
)
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.model.config import ComputeConfig
from jaxrl_llm.model.transformer import Params, make_forward
from tests.learner.tiny import (
    MODEL,
    make_batch,
    make_params,
    make_routes,
    one_device,
    replace,
    with_some_routes,
)

TEMPERATURE = 0.8
OLD, NEW = make_params(), make_params(seed=1)
TOKEN_ROUTES = make_routes(np.random.default_rng(5))
BATCH = replace(make_batch(), routes=TOKEN_ROUTES)
MASK = np.asarray(BATCH.loss_mask)


def learner(replay: Replay) -> LearnerConfig:
    return LearnerConfig(mini_batches=2, replay=replay)


@pytest.fixture(scope="module")
def policy():
    """policy(params, routes, gates) -> what the model says of BATCH, without the learner."""
    forward = make_forward(MODEL, ComputeConfig())

    @jax.jit
    def run(params: Params, routes: Array | None, gates: Array | None = None) -> Policy:
        replayed = None if routes is None else ReplayedRoutes(routes, gates)
        output = forward(params, BATCH.inputs, BATCH.positions, BATCH.segment_ids, replayed)
        distribution = jax.nn.log_softmax(output.hidden @ params["head"] / TEMPERATURE)
        logprobs = jnp.take_along_axis(distribution, BATCH.targets[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(distribution) * distribution, axis=-1)
        return Policy(logprobs, entropy, output.router)

    return run


@pytest.fixture(scope="module")
def score():
    """score(replay, batch), at the old weights."""
    steps = {
        replay: make_score_step(MODEL, learner(replay), one_device(), temperature=TEMPERATURE)
        for replay in ("r2", "r3")
    }
    return lambda replay, batch=BATCH: steps[replay](OLD, batch)


@pytest.fixture(scope="module")
def gradient():
    """gradient(replay, params, batch)."""
    steps = {
        replay: jax.jit(
            make_gradient(
                MODEL, learner(replay), LossConfig(), one_device(), temperature=TEMPERATURE
            )
        )
        for replay in ("none", "r2", "r3")
    }
    return lambda replay, params, batch: steps[replay](params, batch)


def value(output: LossOutput | ScoreOutput, name: str) -> float:
    return float(output.metrics[name].value())


def assert_equal(left: Array, right: Array) -> None:
    np.testing.assert_allclose(np.asarray(left)[MASK], np.asarray(right)[MASK], rtol=1e-5)


def mean_ratio(logprobs: Array, other: Array) -> float:
    difference = np.asarray(logprobs, np.float64) - np.asarray(other, np.float64)
    return float(np.mean(np.exp(difference[MASK])))


def natural_experts(policy_output: Policy) -> np.ndarray:
    """int[B, S, L, K] of a pass, the way a batch holds routes."""
    return np.moveaxis(np.asarray(policy_output.router.experts), 0, 2)


def overlap(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Share of the experts of each token that both have, f64[B, S]."""
    both = (left[..., :, None] == right[..., None, :]).any(-1)
    return both.mean(axis=(-1, -2))


def test_r2_scores_with_the_learners_own_routing(score, policy) -> None:
    scored = score("r2")
    expected = policy(OLD, None)
    assert_equal(scored.logprobs, expected.logprobs)
    assert_equal(scored.entropy, expected.entropy)
    assert scored.routes.dtype == jnp.int16
    np.testing.assert_array_equal(scored.routes, natural_experts(expected))
    difference = (np.asarray(BATCH.sampler_logprobs) - np.asarray(expected.logprobs))[MASK]
    assert value(scored, "policy/kl_sampler_old") == pytest.approx(difference.mean(), rel=1e-5)
    k3 = np.exp(-difference) - 1 + difference
    assert value(scored, "policy/kl_sampler_old_k3") == pytest.approx(k3.mean(), rel=1e-5)
    agreement = overlap(natural_experts(expected), TOKEN_ROUTES)[MASK].mean()
    assert 0.3 < agreement < 0.7, "random routes"
    assert value(scored, "routing/agreement") == pytest.approx(agreement, rel=1e-5)
    for layer in range(MODEL.num_layers):
        one = slice(layer, layer + 1)
        share = overlap(natural_experts(expected)[:, :, one], TOKEN_ROUTES[:, :, one])[MASK].mean()
        name = f"routing/overlap_layer_{layer:02}"
        assert value(scored, name) == pytest.approx(share, rel=1e-5)


def test_r3_scores_with_the_samplers_routes(score, policy) -> None:
    scored = score("r3")
    expected = policy(OLD, TOKEN_ROUTES)
    assert_equal(scored.logprobs, expected.logprobs)
    np.testing.assert_array_equal(scored.routes, TOKEN_ROUTES)
    moved = np.abs(np.asarray(scored.logprobs) - np.asarray(policy(OLD, None).logprobs))[MASK]
    assert np.median(moved) > 0.01, "other experts, other log-probabilities"


def test_a_token_without_routes_is_routed_live_and_not_covered(score, policy, gradient) -> None:
    batch = with_some_routes(TOKEN_ROUTES, BATCH)
    routed = np.asarray(batch.routes)[..., 0, 0] >= 0
    scored = score("r3", batch)
    expected = policy(OLD, batch.routes)
    assert_equal(scored.logprobs, expected.logprobs)
    np.testing.assert_array_equal(scored.routes, natural_experts(expected))
    np.testing.assert_array_equal(np.asarray(scored.routes)[routed], TOKEN_ROUTES[routed])
    _, output = gradient("r3", OLD, prepare(batch, scored, "r3"))
    share = routed[MASK].mean()
    assert 0.3 < share < 0.9
    assert value(output, "routing/replay_coverage") == pytest.approx(share, rel=1e-6)
    assert value(output, "routing/fallback_fraction") == pytest.approx(1 - share, rel=1e-6)
    assert value(output, "routing/provenance_sampler") == pytest.approx(share, rel=1e-6)
    assert value(output, "routing/provenance_missing") == pytest.approx(1 - share, rel=1e-6)


def test_r2_leaves_the_target_policy_of_the_first_mini_batch_alone(score, gradient) -> None:
    scored = score("r2")
    replayed = gradient("r2", OLD, prepare(BATCH, scored, "r2"))
    natural = gradient("none", OLD, prepare(BATCH, scored, "none"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), replayed[0], natural[0]
    )
    for name in natural[1].metrics:
        if name.startswith("routing/"):
            continue
        expected = value(natural[1], name)
        assert value(replayed[1], name) == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    assert value(replayed[1], "staleness/ratio_mean") == pytest.approx(1, abs=1e-6)
    assert value(replayed[1], "routing/replay_coverage") == 1
    assert value(natural[1], "routing/replay_coverage") == 0
    assert value(natural[1], "routing/provenance_not_replayed") == 1
    assert value(replayed[1], "routing/provenance_old") == 1
    assert value(replayed[1], "routing/live_agreement") == 1, "the weights are still the old ones"


@pytest.mark.parametrize("replay", ["none", "r2", "r3"])
def test_which_experts_pi_uses_after_an_update(replay: Replay, score, policy, gradient) -> None:
    """The staleness ratio and the importance weight of the second mini-batch, pass by pass."""
    scored = score("r3" if replay == "r3" else "r2")
    old_routes = {"none": None, "r2": None, "r3": TOKEN_ROUTES}[replay]
    old = policy(OLD, old_routes)
    routes = {"none": None, "r2": natural_experts(old), "r3": TOKEN_ROUTES}[replay]
    new = policy(NEW, None if routes is None else routes.astype(np.int16))
    _, output = gradient(replay, NEW, prepare(BATCH, scored, replay))
    ratio = mean_ratio(new.logprobs, old.logprobs)
    assert value(output, "staleness/ratio_mean") == pytest.approx(ratio, rel=1e-4)
    weight = mean_ratio(new.logprobs, BATCH.sampler_logprobs)
    assert value(output, "is_weight/raw_mean") == pytest.approx(weight, rel=1e-4)
    assert value(output, "routing/replay_coverage") == (replay != "none")
    assert value(output, "routing/fallback_fraction") == 0
    if routes is not None:
        live = policy(NEW, routes.astype(np.int16)).router.logits
        chosen = np.argsort(-np.asarray(live), axis=-1)[..., : routes.shape[-1]]
        shares = (chosen[..., :, None] == np.moveaxis(routes, 2, 0)[..., None, :]).any(-1).mean(-1)
        for layer, share in enumerate(shares):
            name = f"routing/live_overlap_layer_{layer:02}"
            assert value(output, name) == pytest.approx(share[MASK].mean(), rel=1e-5)
        agreement = value(output, "routing/live_agreement")
        assert agreement == pytest.approx(shares[:, MASK].mean(), rel=1e-5)
        assert 0.3 < agreement < 0.9


def test_an_exact_sampler_under_r3_gives_weights_of_one(score, policy, gradient) -> None:
    """On the first mini-batch; k3 is a sum of terms above 0, so every token is alike."""
    sampled = policy(OLD, TOKEN_ROUTES).logprobs
    batch = replace(BATCH, sampler_logprobs=np.where(MASK, sampled, 0))
    _, output = gradient("r3", OLD, prepare(batch, score("r3", batch), "r3"))
    for name in ("is_weight/raw_mean", "is_weight/used_mean", "staleness/ratio_mean"):
        assert value(output, name) == pytest.approx(1, abs=1e-5), name
    assert abs(value(output, "policy/kl_sampler_old_k3")) < 1e-9
    for name in ("is_weight/capped_fraction", "clip/high_fraction", "clip/low_fraction"):
        assert value(output, name) == 0, name


def test_prepare_hands_over_what_each_replay_needs() -> None:
    scored = ScoreOutput(jnp.ones(2), jnp.ones(2), jnp.full(2, 7), jnp.full(2, 0.5), {})
    batch = replace(BATCH, routes=jnp.zeros(2))
    real = np.asarray(BATCH.segment_ids) > 0
    for replay, routes, code in (
        ("none", 0, SAMPLER_ROUTES),
        ("r2", 7, OLD_ROUTES),
        ("r3", 0, SAMPLER_ROUTES),
    ):
        ready = prepare(batch, scored, replay)
        np.testing.assert_array_equal(ready.old_logprobs, scored.logprobs)
        np.testing.assert_array_equal(ready.routes, routes)
        np.testing.assert_array_equal(ready.gates, scored.gates)
        assert ready.provenance.dtype == np.int8
        np.testing.assert_array_equal(ready.provenance, np.where(real, code, NOT_REPLAYED))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replay": "r2", "mini_batches": 1}, "r2 changes nothing with learner.mini_batches 1"),
        (
            {"replay": "r2", "mini_batches": 2, "old_logprobs": "none"},
            "r2 replays the routes of the scoring pass",
        ),
        ({"replay_gates": True}, "learner.replay is none .*; set replay to r2 or r3"),
        (
            {"replay_gates": True, "replay": "r3", "old_logprobs": "none"},
            "learner.old_logprobs is none; set .* old_logprobs to score",
        ),
        ({"mini_batches": 0}, "mini_batches is 0"),
        ({"micro_batch_rows": -1}, "micro_batch_rows is -1"),
    ],
)
def test_contradictions_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnerConfig(**settings)


def trace(config: LearnerConfig, batch: TrainBatch) -> None:
    step = make_gradient(MODEL, config, LossConfig(), one_device(), temperature=1.0)
    jax.eval_shape(step, OLD, batch)


def test_batches_that_lack_something_are_refused() -> None:
    ready = replace(BATCH, old_logprobs=BATCH.sampler_logprobs)
    trace(learner("r3"), ready)
    with pytest.raises(ValueError, match="no old_logprobs"):
        trace(learner("r3"), BATCH)
    for replay in ("r2", "r3"):
        with pytest.raises(ValueError, match=f"replay is {replay} but the batch has no routes"):
            trace(learner(replay), replace(ready, routes=None))
    live = dataclasses.replace(learner("r3"), route_fallback="live")
    trace(live, replace(ready, routes=None))
    with pytest.raises(ValueError, match="the batch has no provenance; collate"):
        trace(learner("r3"), replace(ready, provenance=None))
    gated = dataclasses.replace(learner("r3"), replay_gates=True)
    with pytest.raises(ValueError, match="replay_gates is set but the batch has no gates"):
        trace(gated, ready)
    with pytest.raises(ValueError, match="16 rows, no multiple of 3"):
        trace(dataclasses.replace(learner("none"), micro_batch_rows=3), ready)
