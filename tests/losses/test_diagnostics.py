import jax
import numpy as np
import pytest

from jaxrl_llm.arrays import NO_ROUTE, PROVENANCE, ROUTES_MISSING, Max, Mean, Min
from jaxrl_llm.losses.diagnostics import (
    agreement_metrics,
    masked_mean,
    pool,
    provenance_metrics,
    replay_coverage,
    route_agreement,
    route_overlap,
)
from tests.losses.batches import SEGMENTS, poison
from tests.reference import losses as reference

LAYERS, EXPERTS, SLOTS = 3, 6, 2
REAL = SEGMENTS > 0
TOKENS = REAL.sum()


def random_routes(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits [L, B, S, E], their natural experts [L, B, S, K], routes [B, S, L, K])."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(LAYERS, *REAL.shape, EXPERTS)).astype(np.float32)
    natural = np.argsort(-logits, axis=-1)[..., :SLOTS].astype(np.int32)
    other = np.argsort(rng.normal(size=(*REAL.shape, LAYERS, EXPERTS)), axis=-1)
    return logits, natural, other[..., :SLOTS].astype(np.int16)


def as_routes(experts: np.ndarray) -> np.ndarray:
    return np.moveaxis(experts, 0, 2).astype(np.int16)


def test_masked_mean_counts_the_mask_alone() -> None:
    values = np.arange(REAL.size, dtype=np.float32).reshape(REAL.shape)
    mean = masked_mean(poison(values, REAL), REAL)
    assert mean.weight == TOKENS
    np.testing.assert_allclose(mean.value(), values[REAL].mean())
    assert masked_mean(values > 3, REAL).value() == (values > 3)[REAL].mean()
    assert masked_mean(values, np.zeros_like(REAL)).value() == 0.0


def test_route_overlap_equals_the_reference() -> None:
    _, natural, routes = random_routes(0)
    routes[0, 1:4] = NO_ROUTE
    mean = jax.jit(route_overlap)(natural, routes, REAL)
    wanted = reference.route_overlap(natural, routes, REAL)
    np.testing.assert_allclose(mean.value(), wanted, rtol=1e-6)
    np.testing.assert_allclose(mean.weight, TOKENS - 3, rtol=1e-6)
    assert 0 < wanted < 1


def test_route_agreement_looks_at_the_live_choice_in_any_order() -> None:
    logits, natural, routes = random_routes(1)
    found = route_agreement(logits, routes, REAL).value()
    np.testing.assert_allclose(found, reference.route_overlap(natural, routes, REAL), rtol=1e-6)
    same = as_routes(natural[..., ::-1])
    np.testing.assert_allclose(route_agreement(logits, same, REAL).value(), 1.0, rtol=1e-6)


def test_replay_coverage_is_what_was_used_of_what_was_given() -> None:
    _, natural, routes = random_routes(2)
    full = as_routes(natural[..., ::-1])
    np.testing.assert_allclose(replay_coverage(natural, full, REAL).value(), 1.0, rtol=1e-6)
    full[0, 1:4] = NO_ROUTE  # three tokens without routes
    full[1, 0, 0] = (full[1, 0, 0] + 1) % EXPERTS  # one token, in one layer of three, went its way
    found = replay_coverage(natural, full, REAL)
    np.testing.assert_allclose(found.value(), 1 - (3 + 1 / LAYERS) / TOKENS, rtol=1e-6)
    np.testing.assert_allclose(found.weight, TOKENS, rtol=1e-6)
    assert replay_coverage(natural, None, REAL).value() == 0.0
    used = np.moveaxis(routes, 2, 0)
    assert replay_coverage(natural, routes, REAL).value() < 0.5
    np.testing.assert_allclose(replay_coverage(used, routes, REAL).value(), 1.0, rtol=1e-6)


def test_agreement_per_layer_and_its_mean_are_one_computation() -> None:
    logits, natural, routes = random_routes(4)
    routes[0, 1:4] = NO_ROUTE
    metrics = jax.jit(lambda *arrays: agreement_metrics(*arrays, layers=(1, 2, 11), kind="live_"))(
        logits, routes, REAL
    )
    names = ["routing/live_overlap_layer_01", "routing/live_overlap_layer_02"]
    names += ["routing/live_overlap_layer_11"]
    assert set(metrics) == {"routing/live_agreement", *names}
    for index, name in enumerate(names):
        one = slice(index, index + 1)
        wanted = reference.route_overlap(natural[one], routes[:, :, one], REAL)
        np.testing.assert_allclose(metrics[name].value(), wanted, rtol=1e-6)
        np.testing.assert_allclose(metrics[name].weight, TOKENS - 3)
    whole = metrics["routing/live_agreement"]
    np.testing.assert_allclose(
        whole.value(), reference.route_overlap(natural, routes, REAL), rtol=1e-6
    )
    layers = [float(metrics[name].value()) for name in names]
    assert len(set(layers)) > 1, "layers differ"
    np.testing.assert_allclose(np.mean(layers), whole.value(), rtol=1e-6)


def test_provenance_shares_are_of_the_mask_and_fallback_is_what_went_live() -> None:
    codes = np.array(list(PROVENANCE), np.int8)
    provenance = np.random.default_rng(0).choice(codes, REAL.shape)
    provenance[~REAL] = ROUTES_MISSING  # off the mask nothing counts
    metrics = provenance_metrics(provenance, REAL)
    shares = {name: float(mean.value()) for name, mean in metrics.items()}
    fallback = shares.pop("routing/fallback_fraction")
    assert sum(shares.values()) == pytest.approx(1)
    for code, name in PROVENANCE.items():
        expected = np.mean(provenance[REAL] == code)
        assert shares[f"routing/provenance_{name}"] == pytest.approx(expected)
    live = [shares[f"routing/provenance_{name}"] for name in ("unreported", "missing")]
    assert all(live)
    assert fallback == pytest.approx(sum(live))
    assert {float(mean.weight) for mean in metrics.values()} == {TOKENS}


@pytest.mark.parametrize("function", [route_overlap, replay_coverage])
def test_rows_add(function) -> None:
    _, natural, routes = random_routes(3)
    routes[0, :2] = NO_ROUTE
    parts = [
        function(natural[:, b : b + 1], routes[b : b + 1], REAL[b : b + 1])
        for b in range(REAL.shape[0])
    ]
    whole = function(natural, routes, REAL)
    np.testing.assert_allclose((parts[0] + parts[1] + parts[2]).value(), whole.value(), rtol=1e-6)


@pytest.mark.parametrize("function", [route_overlap, replay_coverage])
def test_a_model_without_moe_layers_has_nothing_to_report(function) -> None:
    none = np.zeros((0, *REAL.shape, SLOTS), np.int32)
    assert function(none, as_routes(none), REAL).value() == 0.0


def test_pool_adds_what_there_is_and_leaves_out_what_is_empty() -> None:
    """A name need not be in every mini-batch, and one that saw nothing is no 0."""

    def mean(total: float, weight: float) -> Mean:
        return Mean(np.float32(total), np.float32(weight))

    nothing = np.float32(np.inf)
    parts = [
        {
            "a": mean(1, 2),
            "empty": mean(0, 0),
            "most": Max(np.float32(3)),
            "no most": Max(-nothing),
        },
        {"a": mean(3, 2), "b": mean(1, 4), "most": Max(np.float32(2)), "no least": Min(nothing)},
        {"least": Min(np.float32(-1)), "empty": mean(0, 0), "nan": mean(np.nan, 2)},
        {"least": Min(np.float32(5)), "late": mean(2, 1)},
        {"late": mean(0, 0)},
    ]
    found = pool(parts)
    assert np.isnan(found.pop("nan"))
    assert found == {"a": 1.0, "b": 0.25, "most": 3.0, "least": -1.0, "late": 2.0}
