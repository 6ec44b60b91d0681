"""The attribution passes: change one thing, and only its term moves."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrl_llm.arrays import NO_ROUTE, ReplayedRoutes, TrainBatch
from jaxrl_llm.learner.attribution import Attribution, make_attribution
from jaxrl_llm.learner.state import abstract_params, shardings_of
from jaxrl_llm.learner.step import LearnerConfig, make_policy
from jaxrl_llm.metrics import describe
from jaxrl_llm.model.config import ComputeConfig
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.sharding import MeshConfig, batch_sharding, make_layout
from tests.learner.tiny import (
    LENGTH,
    MODEL,
    ROWS,
    make_batch,
    make_params,
    make_routes,
    one_device,
    replace,
    with_noise,
)

TEMPERATURE = 0.8
OLD, NEW = make_params(), make_params(seed=1)
BATCH = make_batch()
MASK = np.asarray(BATCH.loss_mask)
TERMS = ["staleness_routing", "staleness_weights", "mismatch_routing", "mismatch_numerics"]


@pytest.fixture(scope="module")
def policy():
    """policy(params, routes) -> (log-probabilities, routes used) of BATCH."""
    forward = jax.jit(make_policy(MODEL, ComputeConfig(), one_device(), temperature=TEMPERATURE))

    def run(params: Params, routes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        output = forward(params, BATCH, None if routes is None else ReplayedRoutes(routes))
        used = np.moveaxis(np.asarray(output.router.experts), 0, 2).astype(np.int16)
        return np.asarray(output.logprobs), used

    return run


@pytest.fixture(scope="module")
def sampled(policy) -> TrainBatch:
    """BATCH as a sampler without any numerics of its own would have sampled it."""
    logprobs, routes = policy(OLD, None)
    return replace(BATCH, sampler_logprobs=np.where(MASK, logprobs, 0), routes=routes)


@pytest.fixture(scope="module")
def steps() -> Attribution:
    return make_attribution(MODEL, LearnerConfig(), one_device(), temperature=TEMPERATURE)


@pytest.fixture(scope="module")
def attribution(steps):
    """attribution(old params, new params, batch) -> metric values without their prefix."""

    def run(old: Params, new: Params, batch: TrainBatch) -> dict[str, float]:
        return values(steps.after(new, steps.before(old, batch)))

    return run


def values(metrics) -> dict[str, float]:
    assert all(describe(name) for name in metrics)
    return {n.removeprefix("attribution/"): float(mean.value()) for n, mean in metrics.items()}


def assert_moved(found: dict[str, float], *moved: str) -> None:
    """Of the four terms just these are not 0, and log w is their sum."""
    for term in TERMS:
        if term in moved:
            assert found[f"abs_{term}"] > 1e-3, term
        else:
            assert found[f"abs_{term}"] < 1e-6, term
    total = sum(found[f"mean_{term}"] for term in TERMS)
    assert total == pytest.approx(found["mean_log_weight"], abs=1e-6)


def test_an_exact_sampler_leaves_nothing_to_explain(attribution, sampled) -> None:
    found = attribution(OLD, OLD, sampled)
    assert_moved(found)
    for routes in ("natural", "r2", "r3"):
        assert abs(found[f"kl_{routes}"]) < 1e-6
    assert found["tokens"] == MASK.sum()
    assert found["left_out_tokens"] == found["unrouted_tokens"] == 0


def test_other_experts_in_the_sampler_move_the_routing_of_the_mismatch(
    attribution, policy, sampled
) -> None:
    routes = make_routes(np.random.default_rng(3))
    logprobs, _ = policy(OLD, routes)
    batch = replace(sampled, sampler_logprobs=np.where(MASK, logprobs, 0), routes=routes)
    found = attribution(OLD, OLD, batch)
    assert_moved(found, "mismatch_routing")
    gap = (policy(OLD, None)[0].astype(np.float64) - logprobs)[MASK]
    assert found["mean_mismatch_routing"] == pytest.approx(gap.mean(), rel=1e-4)
    assert found["kl_natural"] == pytest.approx(-gap.mean(), rel=1e-4)
    assert abs(found["kl_r3"]) < 1e-6, "R3 removes it"


def test_noise_in_the_sampler_moves_its_numerics(attribution, sampled) -> None:
    noisy = np.where(MASK, with_noise(sampled.sampler_logprobs, 0.1), 0)
    found = attribution(OLD, OLD, replace(sampled, sampler_logprobs=noisy))
    assert_moved(found, "mismatch_numerics")
    gap = (sampled.sampler_logprobs.astype(np.float64) - noisy)[MASK]
    assert found["square_mismatch_numerics"] == pytest.approx((gap**2).mean(), rel=1e-4)
    assert found["share_mismatch_numerics"] == pytest.approx(1, abs=1e-4)


def test_an_update_moves_the_staleness(attribution, policy, sampled) -> None:
    found = attribution(OLD, NEW, sampled)
    assert_moved(found, "staleness_routing", "staleness_weights")
    natural, r2 = policy(NEW, None)[0], policy(NEW, sampled.routes)[0]
    gap = (natural.astype(np.float64) - r2)[MASK]
    assert found["mean_staleness_routing"] == pytest.approx(gap.mean(), rel=1e-4)
    assert found["kl_r2"] != pytest.approx(found["kl_natural"], rel=1e-2)
    assert found["kl_r2"] == pytest.approx(found["kl_r3"], rel=1e-4), "the sampler's are pi_old's"


def test_an_update_that_keeps_the_routes_moves_the_weights_alone(attribution, sampled) -> None:
    found = attribution(OLD, OLD | {"head": NEW["head"]}, sampled)
    assert_moved(found, "staleness_weights")


def test_all_at_once_still_adds_up(attribution, policy, sampled) -> None:
    routes = make_routes(np.random.default_rng(4))
    mu = np.where(MASK, with_noise(policy(OLD, routes)[0], 0.1), 0)
    found = attribution(OLD, NEW, replace(sampled, sampler_logprobs=mu, routes=routes))
    assert_moved(found, *TERMS)
    assert sum(found[f"share_{term}"] for term in TERMS) == pytest.approx(1, rel=1e-5)


def test_without_routes_the_mismatch_is_not_split(attribution, sampled) -> None:
    full, found = (
        attribution(OLD, NEW, sampled),
        attribution(OLD, NEW, replace(sampled, routes=None)),
    )
    for name in ("mean_mismatch_routing", "mean_mismatch_numerics", "kl_r3", "unrouted_tokens"):
        assert name in full
        assert name not in found
    for name in ("mean_staleness_routing", "mean_staleness_weights", "mean_mismatch", "kl_r2"):
        assert found[name] == pytest.approx(full[name], rel=1e-5, abs=1e-6)


def test_tokens_without_routes_are_left_out_and_counted(attribution, sampled) -> None:
    routes = sampled.routes.copy()
    routes[3] = NO_ROUTE  # a whole rollout, which no other row sees
    found = attribution(OLD, NEW, replace(sampled, routes=routes))
    assert found["unrouted_tokens"] == MASK[3].sum() > 0
    assert found["tokens"] == MASK.sum() - MASK[3].sum()
    mask = MASK.copy()
    mask[3] = False
    wanted = attribution(OLD, NEW, replace(sampled, loss_mask=mask))
    for term in TERMS:
        assert found[f"mean_{term}"] == pytest.approx(wanted[f"mean_{term}"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("mesh", "rows", "expected"),
    [
        ({}, 3, 3),
        ({}, 0, 2),
        ({"data": 2, "expert": 2}, 3, 4),
        ({"data": 2, "expert": 2}, 0, 8),
        ({}, 99, ROWS),
    ],
)
def test_which_rows_are_scored(mesh: dict[str, int], rows: int, expected: int) -> None:
    config = MeshConfig(**mesh)
    layout = make_layout(config)
    steps = make_attribution(
        MODEL,
        LearnerConfig(micro_batch_rows=2, mesh=config),
        layout,
        temperature=TEMPERATURE,
        rows=rows,
    )
    numbered = replace(BATCH, staleness=np.repeat(np.arange(ROWS)[:, None], LENGTH, axis=1))
    numbered = jax.device_put(numbered, batch_sharding(layout))
    params = jax.device_put(OLD, shardings_of(abstract_params(MODEL, layout)))
    old = jax.eval_shape(steps.before, params, numbered)
    assert old.natural.shape == (expected, LENGTH)
    assert old.r3 is None
    if rows != 3:  # each run compiles
        return
    chosen = np.asarray(steps.before(params, numbered).batch.staleness[:, 0])
    np.testing.assert_array_equal(chosen, np.arange(expected) * (ROWS // expected))


def test_a_negative_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="rows is -1"):
        make_attribution(MODEL, LearnerConfig(), one_device(), temperature=1.0, rows=-1)


def test_eight_devices_say_what_one_says(attribution, sampled) -> None:
    config = MeshConfig(data=2, fsdp=2, expert=2)
    mesh = make_layout(config)
    learner = LearnerConfig(mesh=config)
    steps = make_attribution(MODEL, learner, mesh, temperature=TEMPERATURE)
    noisy = np.where(MASK, with_noise(sampled.sampler_logprobs, 0.1), 0).astype(np.float32)
    batch = replace(sampled, sampler_logprobs=noisy)
    shardings = shardings_of(abstract_params(MODEL, mesh))
    old, new = (jax.device_put(params, shardings) for params in (OLD, NEW))
    before = steps.before(old, jax.device_put(batch, batch_sharding(mesh)))
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(before)} == {8}
    found, wanted = values(steps.after(new, before)), attribution(OLD, NEW, batch)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_after_reads_the_rows_that_before_kept(steps, sampled) -> None:
    """A caller whose batch has changed since, as prepare() does under r2, changes nothing."""
    names = {field.name for field in dataclasses.fields(TrainBatch)}
    kept = steps.before(OLD, sampled).batch
    for name in names:
        given, got = getattr(sampled, name), getattr(kept, name)
        assert (given is None) == (got is None), name
        if given is not None:
            np.testing.assert_array_equal(got, given)
