"""Statistics of importance weights: against float64 numpy, in any layout, on any devices."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.arrays import Max, Mean, Min, TrainBatch
from jaxrl_llm.losses.statistics import (
    count,
    effective_share,
    importance_statistics,
    nonfinite_counts,
    quantiles,
    response_positions,
    response_share,
)
from jaxrl_llm.metrics import describe
from jaxrl_llm.sharding import (
    MeshConfig,
    batch_sharding,
    make_layout,
    partitioned,
    replicated,
)
from tests.losses.batches import as_dict, poison, random_batch
from tests.reference import statistics as reference

ROWS, LENGTH = 16, 24
statistics = jax.jit(importance_statistics)
Weighted = tuple[np.ndarray, TrainBatch, np.ndarray]


def ragged(seed: int, *, spread: float = 0.7) -> Weighted:
    """(logprobs, batch, weight): packed rows of unequal responses, some of several turns."""
    rng = np.random.default_rng(seed)
    segment_ids = np.zeros((ROWS, LENGTH), np.int32)
    mask = np.zeros((ROWS, LENGTH), bool)
    for row in range(ROWS - 2):  # two rows of padding
        start = 0
        for segment in range(1, 5):
            stop = min(start + int(rng.integers(1, 12)), LENGTH)
            segment_ids[row, start:stop] = segment
            mask[row, start:stop] = rng.random(stop - start) < rng.choice([0.0, 0.6, 1.0])
            start = stop
    logprobs, _, batch = random_batch(seed, mask=mask, segment_ids=segment_ids, spread=spread)
    lag = np.where(mask, rng.choice([0, 1, 2, 3, 5, 40], mask.shape), 0).astype(np.int32)
    weight = poison(rng.gamma(1.0, 1.5, mask.shape).clip(0, 5), mask)
    return logprobs, dataclasses.replace(batch, staleness=lag), weight


def broken(seed: int) -> Weighted:
    """Every kind of non-finite value, on some sampled tokens of each array."""
    logprobs, batch, weight = ragged(seed)
    rng = np.random.default_rng(seed)

    def damage(values: np.ndarray) -> np.ndarray:
        bad = rng.choice([np.nan, -np.inf, np.inf], values.shape)
        return np.where(rng.random(values.shape) < 0.02, bad, values).astype(np.float32)

    batch = dataclasses.replace(
        batch,
        sampler_logprobs=damage(batch.sampler_logprobs),
        old_logprobs=damage(batch.old_logprobs),
        ref_logprobs=damage(batch.ref_logprobs),
    )
    return damage(logprobs), batch, damage(weight)


def values(found: dict[str, Mean | Max | Min]) -> dict[str, float]:
    """The values of the names that had something to look at."""
    return {name: float(x.value()) for name, x in found.items() if not is_empty(x)}


def is_empty(statistic: Mean | Max | Min) -> bool:
    if isinstance(statistic, Mean):
        return bool(statistic.weight == 0)
    return bool(np.isnan(statistic.value()))


def assert_close(found: dict[str, float], wanted: dict[str, float], rtol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("make", [ragged, broken, functools.partial(ragged, spread=15.0)])
@pytest.mark.parametrize("seed", range(4))
def test_every_statistic_equals_the_reference(make, seed: int) -> None:
    logprobs, batch, weight = make(seed)
    wanted = reference.importance_statistics(logprobs, as_dict(batch), weight)
    wanted = {name: value for name, value in wanted.items() if value is not None}
    found = values(statistics(logprobs, batch, weight))
    assert len(wanted) > 60
    assert_close(found, wanted, rtol=5e-5)  # float32 exponentials of some tens of nats


def test_without_old_logprobs_pi_old_is_pi_and_the_staleness_factor_has_no_names() -> None:
    logprobs, batch, weight = ragged(5)
    batch = dataclasses.replace(batch, old_logprobs=None, ref_logprobs=None)
    found = values(statistics(logprobs, batch, weight))
    wanted = reference.importance_statistics(logprobs, as_dict(batch), weight)
    assert_close(found, {name: value for name, value in wanted.items() if value is not None}, 5e-5)
    assert not [name for name in found if name.startswith("staleness/")]
    assert {"nonfinite/old", "nonfinite/ref"}.isdisjoint(found)
    assert found["mismatch/ratio_std"] == found["is_weight/raw_std"]


def test_equal_policies_have_weights_of_one_and_no_gap() -> None:
    logprobs, batch, _ = ragged(6)
    mask = batch.loss_mask
    batch = dataclasses.replace(batch, old_logprobs=logprobs, sampler_logprobs=logprobs)
    found = values(statistics(logprobs, batch, poison(np.ones_like(logprobs), mask)))
    for family in ("is_weight/raw_", "is_weight/used_", "mismatch/ratio_", "staleness/ratio_"):
        for name in ("mean", "max", "min", "p50", "p999", "ess_token"):
            assert found[family + name] == pytest.approx(1, abs=1e-6), family + name
        for name in ("std", "above_2", "above_5", "below_half"):
            assert found[family + name] == 0, family + name
    for name in ("kl", "k3_kl", "chi2_token", "chi2_seq", "log_ppl_abs_diff"):
        assert found[f"rollout_corr/{name}"] == 0, name
    assert found["rollout_corr/ppl_ratio"] == 1
    assert found["rollout_corr/training_ppl"] == found["rollout_corr/rollout_ppl"] > 1


def test_nothing_sampled_is_nothing_logged() -> None:
    logprobs, batch, weight = ragged(7)
    batch = dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    found = values(statistics(logprobs, batch, weight))
    assert found == {f"nonfinite/{n}": 0 for n in ("current", "old", "sampler", "ref", "weight")}


def test_every_name_is_documented() -> None:
    for name in statistics(*ragged(8)):
        assert describe(name), name


def test_nothing_is_differentiated() -> None:
    logprobs, batch, weight = ragged(9)

    def total(logprobs: jax.Array, weight: jax.Array) -> jax.Array:
        return sum(jnp.sum(x) for x in jax.tree.leaves(statistics(logprobs, batch, weight)))

    safe = np.where(batch.loss_mask, logprobs, 0), np.where(batch.loss_mask, weight, 0)
    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(*safe):
        assert not np.any(gradient)


# The layout of a mini-batch.


def unpacked(weighted: Weighted, order: np.ndarray) -> Weighted:
    """The same responses, a row each in the given order, and rows of padding."""
    logprobs, batch, weight = weighted
    found = [
        (row, np.flatnonzero(batch.segment_ids[row] == segment))
        for row in range(ROWS)
        for segment in range(1, batch.segment_ids[row].max(initial=0) + 1)
    ]
    found = [(row, where) for row, where in found if where.size]
    rows = 64
    assert len(found) <= rows

    def move(array: np.ndarray) -> np.ndarray:
        out = np.full((rows, LENGTH), np.nan if array.dtype == np.float32 else 0, array.dtype)
        for place, (row, where) in zip(order, found, strict=False):
            out[place, : where.size] = array[row, where]
        return out

    moved = jax.tree.map(move, dataclasses.replace(batch, segment_ids=batch.segment_ids * 0))
    real = move((batch.segment_ids > 0).astype(np.int32))
    return move(logprobs), dataclasses.replace(moved, segment_ids=real), move(weight)


@pytest.mark.parametrize("make", [ragged, broken])
@pytest.mark.parametrize("seed", [0, 1])
def test_packing_padding_rows_and_their_order_change_nothing(make, seed: int) -> None:
    weighted = make(seed)
    order = np.random.default_rng(seed).permutation(64)
    found = values(statistics(*unpacked(weighted, order)))
    assert_close(found, values(statistics(*weighted)), rtol=2e-5)


@pytest.mark.parametrize("make", [ragged, broken])
def test_rows_split_over_eight_devices_change_nothing(make) -> None:
    layout = make_layout(MeshConfig(data=4, fsdp=2))
    rows = batch_sharding(layout)
    weighted = make(3)
    placed = jax.device_put(weighted, rows)
    split = jax.jit(partitioned(importance_statistics, replicated(layout)))
    compiled = split.lower(*placed).compile()
    found = compiled(*placed)
    assert_close(values(found), values(statistics(*weighted)), rtol=2e-5)
    program = compiled.as_text()
    assert "all-reduce" in program
    for moves in ("all-gather", "all-to-all", "collective-permute"):
        assert moves not in program, "the batch stays where it is"


def test_mini_batches_pool_by_their_counts() -> None:
    """Means as if there were one mini-batch, extremes too; what is local as the mean of the two."""
    logprobs, batch, weight = ragged(10)
    lower = np.arange(ROWS)[:, None] < 5
    parts = [dataclasses.replace(batch, loss_mask=batch.loss_mask & m) for m in (lower, ~lower)]
    first, second = (statistics(logprobs, part, weight) for part in parts)
    whole = statistics(logprobs, batch, weight)
    local = ("std", "ess_token", "ess_sequence", "ess_response", "p50", "p99", "p999")
    for name in whole:
        if name.endswith(local) or name.startswith("nonfinite/"):
            wanted = (float(first[name].value()) + float(second[name].value())) / 2
        else:
            wanted = float(whole[name].value())
        pooled = float((first[name] + second[name]).value())
        np.testing.assert_allclose(pooled, wanted, rtol=2e-5, atol=2e-6, err_msg=name)
    name = "rollout_corr/log_ppl_diff_min"
    assert first[name].value() != second[name].value()


# Quantiles.

SAMPLES = {
    "normal": lambda rng: rng.normal(size=rng.integers(1, 3000)),
    "ties": lambda rng: rng.choice([-2.0, -0.5, 0.0, 0.5, 3.0], rng.integers(1, 500)),
    "one": lambda rng: rng.normal(size=1),
    "wide": lambda rng: rng.choice([-1, 1], 999) * 10.0 ** rng.uniform(-37, 38, 999),
    "infinite": lambda rng: rng.choice([-np.inf, -1.0, 1.0, np.inf], 100),
}


SHARES = (0.001, 0.25, 0.5, 0.99, 0.999, 1.0)


@functools.cache
def jitted(shares: tuple[float, ...]):
    return jax.jit(lambda values, mask: quantiles(values, mask, shares))


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("seed", range(3))
def test_quantiles_are_exact_order_statistics(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kept = SAMPLES[kind](rng).astype(np.float32)
    order = rng.permutation(4000)
    others = rng.normal(size=order.size - kept.size).astype(np.float32)
    values, mask = np.concatenate([kept, others])[order], (np.arange(order.size) < kept.size)[order]
    found = jitted(SHARES)(values, mask)
    wanted = [np.quantile(kept, q, method="inverted_cdf") for q in SHARES]
    np.testing.assert_array_equal(found, np.array(wanted, np.float32))


def test_the_rank_of_a_quantile_is_exact() -> None:
    """Where q times the number is whole, the next value up would be one too far."""
    ascending = np.arange(1.0, 2001.0, dtype=np.float32)
    shares = {0.999: (999, 1000), 0.07: (7, 100), 0.5: (1, 2)}  # 0.07 * 100 > 7 in float64
    find = jax.jit(jax.vmap(lambda n: quantiles(ascending, ascending <= n, tuple(shares))))
    wanted = [[-(-int(n) * p // q) for p, q in shares.values()] for n in ascending]
    np.testing.assert_array_equal(find(ascending), wanted)


def test_a_quantile_of_millions_of_tokens_is_exact() -> None:
    """0.999 times the number is 3,996,998.001, which float32 rounds down."""
    number = 4_000_999
    found = jitted((0.999,))(np.arange(number, dtype=np.float32), np.ones(number, bool))
    assert int(found[0]) + 1 == -(-number * 999 // 1000)


def test_quantiles_leave_out_nan_and_are_nan_of_nothing() -> None:
    find = jitted((0.5, 1.0))
    some = np.array([3.0, np.nan, 1.0, 2.0, -np.nan], np.float32)
    np.testing.assert_array_equal(find(some, np.ones(5, bool)), [2, 3])
    assert np.isnan(find(some, np.zeros(5, bool))).all()
    assert np.isnan(find(some, np.isnan(some))).all()
    for q in (0.0, -0.1, 1.1, float("nan"), 0.99999):
        with pytest.raises(ValueError, match="a quantile needs 0 < q <= 1"):
            quantiles(some, np.ones(5, bool), (0.5, q))


# Parts whose edges the whole does not reach.


def test_effective_share_divides_out_what_would_overflow() -> None:
    share, everyone = jax.jit(effective_share), np.ones(4, bool)
    for offset in (-1e4, 0.0, 1e4):
        assert share(np.full(4, offset), everyone).value() == 1
        assert share(np.array([offset + 200, offset, offset, offset]), everyone).value() == 0.25
    two = np.array([0.0, 0.0, -np.inf, 99.0])
    assert share(two, np.array([1, 1, 1, 0], bool)).value() == pytest.approx(2 / 3)
    nothing_left = share(np.full(4, -np.inf), everyone)
    assert (nothing_left.value(), nothing_left.weight) == (0, 1)
    assert share(two, np.zeros(4, bool)).weight == 0


def test_a_sequence_level_weight_is_not_raised_to_the_length() -> None:
    """Two responses of weights 1 and 3, on 1 and 3 tokens: (1 + 3)^2 / (2 * (1 + 9))."""
    weight, mask = jnp.array([[1.0, 3.0, 3.0, 3.0]]), jnp.ones((1, 4), bool)
    counted = count(mask, mask, jnp.array([[1, 2, 2, 2]]))
    assert response_share(weight, counted).value() == pytest.approx(16 / 20)
    assert effective_share(jnp.log(weight), counted.tokens).value() == pytest.approx(100 / (4 * 28))


def test_positions_count_the_sampled_tokens_of_the_response() -> None:
    segment_ids = np.array([[2, 2, 2, 2, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1]], np.int32)
    mask = np.array([[0, 1, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0, 1, 1]], bool)
    found = np.asarray(response_positions(mask, segment_ids))
    np.testing.assert_array_equal(found[0, mask[0]], [0, 1, 0, 1, 2])
    np.testing.assert_array_equal(found[1, mask[1]], [0, 1, 2, 3])


def test_nonfinite_values_are_counted_where_they_are_sampled() -> None:
    logprobs, batch, weight = ragged(12)
    first, second, *_ = map(tuple, np.argwhere(batch.loss_mask))
    old = batch.old_logprobs.copy()
    old[first], old[second] = -np.inf, np.nan
    weight[second] = np.inf
    batch = dataclasses.replace(batch, old_logprobs=old, ref_logprobs=None)
    found = nonfinite_counts(logprobs, batch, weight)
    assert {name: float(x.value()) for name, x in found.items()} == {
        "current": 0,
        "old": 2,
        "sampler": 0,
        "weight": 1,
    }


def test_extremes_pool_and_are_nan_of_nothing() -> None:
    high = [Max(jnp.float32(x)) for x in (-jnp.inf, -2.0, 3.0)]
    low = [Min(jnp.float32(x)) for x in (jnp.inf, -2.0, 3.0)]
    assert functools.reduce(operator.add, high).value() == 3
    assert functools.reduce(operator.add, low).value() == -2
    assert np.isnan(high[0].value())
    assert np.isnan(low[0].value())
