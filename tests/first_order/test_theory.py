"""What arXiv 2512.01374 says of the surrogate, held to exact sums over all responses.

The orders are those worked out in jaxrl_llm/first_order/__init__.py.
"""

import dataclasses

import numpy as np
import pytest

from jaxrl_llm.first_order.enumeration import Enumeration
from jaxrl_llm.first_order.gradients import (
    Behaviour,
    agreement,
    expected_batch,
    live_routes,
    sequence_gradient,
    surrogate_gradient,
)
from jaxrl_llm.first_order.passes import flat
from jaxrl_llm.losses.policy import LossConfig, policy_loss
from jaxrl_llm.losses.weights import ImportanceConfig
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.rollout.precision import Precision
from tests.first_order.tiny import (
    MODEL,
    NO_CLIP,
    PARAMS,
    UNCAPPED,
    behaviour,
    compare,
    exact,
    moved,
    on_policy,
    passes,
    responses,
    rewards,
    slope,
    surrogate,
)

ROUNDING = 1e-5  # relative, of a gradient summed in float32
TOKEN_IS = LossConfig(importance=UNCAPPED, clip=NO_CLIP)
NO_IS = LossConfig(importance=ImportanceConfig(ratio="off"), clip=NO_CLIP)
SEQUENCE_IS = LossConfig(importance=dataclasses.replace(UNCAPPED, level="sequence"), clip=NO_CLIP)
COARSE: Precision = "fp8_e5m2"


def sampled_by(who: Behaviour, params: Params, length: int) -> Behaviour:
    """pi_old of `who` sampled, and pi_old is scored at `params`: all mismatch, no staleness."""
    old = passes().score(params, live_routes(responses(length).batch, who.old.routes))
    return Behaviour(sampler=who.old, old=old, old_replayed=old)


def weighted_score(who: Behaviour, params: Params, weights: np.ndarray) -> np.ndarray:
    """sum of weights * A * grad log pi, f64[P]."""
    batch, _ = expected_batch(responses(), rewards(), who, "none", NO_IS)
    return surrogate_gradient(passes(), params, batch, weights.astype(np.float32), NO_IS)


@pytest.mark.parametrize("cfg", [TOKEN_IS, NO_IS, SEQUENCE_IS, LossConfig()])
def test_on_policy_the_gradients_are_equal(cfg: LossConfig) -> None:
    found = compare(PARAMS, on_policy(behaviour("float32")), cfg)
    assert found.relative_error < ROUNDING
    assert found.cosine == pytest.approx(1, abs=1e-9)
    assert found.norm_ratio == pytest.approx(1, abs=ROUNDING)
    assert found.projection == pytest.approx(1, abs=ROUNDING)


@pytest.mark.parametrize("precision", ["int8", COARSE, "int4"])
def test_sequence_weights_are_exact_whoever_sampled(precision: Precision) -> None:
    params = moved(0.1)
    assert compare(params, behaviour(precision), SEQUENCE_IS).relative_error < 3 * ROUNDING
    assert compare(params, behaviour(precision), TOKEN_IS).relative_error > 0.1


def replaying(who: Behaviour) -> Enumeration:
    """The responses with pi_old's routes: J_seq of the policy that keeps them, smooth in theta."""
    batch = dataclasses.replace(responses().batch, routes=who.old.routes)
    return dataclasses.replace(responses(), batch=batch)


def test_the_objective_is_wrong_by_second_order() -> None:
    """J_seq and J_tok leave theta_old along one tangent."""
    who = on_policy(behaviour("float32"))
    cfg = dataclasses.replace(TOKEN_IS, form="ratio")
    batch, weights = expected_batch(responses(), rewards(), who, "r2", cfg)

    def objectives(params: Params) -> np.ndarray:
        scores = passes().score(params, batch)
        token = -float(policy_loss(scores.logprobs, scores.entropy, batch, weights, cfg).loss)
        return np.array([sequence_gradient(passes(), params, replaying(who), rewards())[0], token])

    sizes = 0.006 * 2.0 ** -np.arange(4)
    start = objectives(PARAMS)
    for seed in range(2):
        rises = [objectives(moved(size, seed)) - start for size in sizes]
        errors = [abs(sequence - token) for sequence, token in rises]
        assert slope(sizes, errors) == pytest.approx(2, abs=0.1)


def test_the_gradient_is_wrong_by_first_order() -> None:
    who = on_policy(behaviour("float32"))
    sizes = 0.004 * 2.0 ** -np.arange(4)
    errors = []
    for size in sizes:
        params = moved(size)
        _, target = sequence_gradient(passes(), params, replaying(who), rewards())
        found = agreement(surrogate(params, who, TOKEN_IS, "r2"), flat(target))
        errors.append(found.relative_error)
    assert slope(sizes, errors) == pytest.approx(1, abs=0.1)
    assert errors[-1] > 20 * ROUNDING, "this is no rounding"


def test_without_replay_a_flipped_route_is_a_jump() -> None:
    """The policy of an MoE is not continuous in theta: the orders above hold between flips."""
    who = on_policy(behaviour("float32"))
    errors = []
    for size in (0.00125, 0.000625, 0.0003125):
        params = moved(size, seed=1)
        assert np.any(passes().score(params, responses().batch).routes != who.old.routes)
        natural = compare(params, who, TOKEN_IS).relative_error
        _, target = sequence_gradient(passes(), params, replaying(who), rewards())
        replayed = agreement(surrogate(params, who, TOKEN_IS, "r2"), flat(target)).relative_error
        errors.append((natural, replayed))
    (first, first_replayed), *_, (last, last_replayed) = errors
    assert last_replayed < 0.3 * first_replayed
    assert last > 0.4 * first
    assert last > 2 * last_replayed


def test_for_one_token_the_correction_is_exact_and_its_absence_first_order() -> None:
    sizes = 0.01 * 2.0 ** -np.arange(4)
    who = on_policy(behaviour("float32", 1))
    corrected = [compare(moved(size), who, TOKEN_IS, length=1) for size in sizes]
    assert max(found.relative_error for found in corrected) < ROUNDING
    errors = [compare(moved(size), who, NO_IS, length=1).relative_error for size in sizes]
    assert slope(sizes, errors) == pytest.approx(1, abs=0.1)
    coarse = behaviour("int4", 1)
    assert compare(PARAMS, coarse, TOKEN_IS, length=1).relative_error < ROUNDING
    assert compare(PARAMS, coarse, NO_IS, length=1).relative_error > 0.02


def test_the_correction_removes_the_diagonal_term_and_only_it() -> None:
    """g_IS - g_none = E_mu[sum_t (w_t - 1) g_t A], by weights that say so themselves."""
    params, who = moved(0.05), behaviour(COARSE)
    batch, weights = expected_batch(responses(), rewards(), who, "none", NO_IS)
    scores = passes().score(params, batch)
    mask = np.asarray(batch.loss_mask)
    excess = np.where(mask, np.exp(scores.logprobs - batch.sampler_logprobs) - 1, 0)
    diagonal = weighted_score(who, params, weights * excess)
    difference = surrogate(params, who, TOKEN_IS) - surrogate(params, who, NO_IS)
    size = np.linalg.norm(difference)
    assert np.linalg.norm(difference - diagonal) < 10 * ROUNDING * size
    assert size > 0.05 * np.linalg.norm(exact(params))


def test_a_ratio_to_pi_old_does_not_see_the_sampler() -> None:
    """pi_old = pi, but another policy sampled: PPO's ratio is 1 and corrects nothing."""
    params = moved(0.05)
    who = sampled_by(behaviour("float32", 1), params, 1)
    ppo = LossConfig(importance=ImportanceConfig(ratio="staleness"), clip=NO_CLIP)
    blind = compare(params, who, ppo, length=1)
    assert blind == compare(params, who, NO_IS, length=1)
    assert blind.relative_error > 0.1
    assert compare(params, who, TOKEN_IS, length=1).relative_error < ROUNDING


@pytest.mark.parametrize(
    ("averaging", "length", "turned"),
    [("sequence", 0.0, True), ("token", 0.0, False), ("constant", 7.0, False)],
)
def test_only_normalisation_by_the_own_length_turns_the_gradient(
    averaging: str, length: float, turned: bool
) -> None:
    cfg = dataclasses.replace(TOKEN_IS, averaging=averaging, averaging_length=length)
    found = compare(PARAMS, on_policy(behaviour("float32")), cfg)
    if turned:
        assert found.cosine < 0.98
        return
    mask = responses().batch.loss_mask
    logprobs = np.where(mask, behaviour("float32").old.logprobs, 0).sum(axis=1, dtype=np.float64)
    divisor = length or np.exp(logprobs) @ np.sum(mask, axis=1) / responses().prompts
    assert found.cosine == pytest.approx(1, abs=1e-9)
    assert found.norm_ratio == pytest.approx(1 / divisor, rel=1e-4)


def test_r2_leaves_the_first_mini_batch_alone_and_not_the_later_ones() -> None:
    who = behaviour(COARSE)
    np.testing.assert_allclose(
        surrogate(PARAMS, who, LossConfig(), "r2"),
        surrogate(PARAMS, who, LossConfig()),
        rtol=1e-5,
        atol=1e-7,
    )
    params = moved(0.1)
    replayed, natural = (surrogate(params, who, SEQUENCE_IS, r) for r in ("r2", "none"))
    assert agreement(natural, exact(params)).relative_error < 3 * ROUNDING
    assert agreement(replayed, exact(params)).relative_error > 0.05, "another target policy"


def test_r3_biases_the_first_mini_batch_iff_the_routes_differ() -> None:
    """Sequence weights are exact but for the target policy, which replay changes."""
    same, other = behaviour("float32"), behaviour(COARSE)
    np.testing.assert_array_equal(same.sampler.routes, same.old.routes)
    assert compare(PARAMS, same, SEQUENCE_IS, "r3").relative_error < ROUNDING
    share = np.mean(np.sort(other.sampler.routes) == np.sort(other.old.routes))
    assert share < 0.99, f"of {MODEL.moe.num_experts} experts"
    assert compare(PARAMS, other, SEQUENCE_IS, "none").relative_error < ROUNDING
    assert compare(PARAMS, other, SEQUENCE_IS, "r3").relative_error > 0.05
