"""The split of log w: exact, pooled by tokens, and nothing left out in silence."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrl_llm.losses.attribution import Passes, attribute, log_weight_terms
from jaxrl_llm.metrics import describe
from tests.losses.batches import MASK, poison

TERMS = ["staleness_routing", "staleness_weights", "mismatch_routing", "mismatch_numerics"]
FACTORS = {
    "staleness_routing": ("natural", "r2"),
    "staleness_weights": ("r2", "old"),
    "mismatch_routing": ("old", "old_r3"),
    "mismatch_numerics": ("old_r3", "sampler"),
    "staleness": ("natural", "old"),
    "mismatch": ("old", "sampler"),
    "log_weight": ("natural", "sampler"),
}
run = jax.jit(attribute)


def make_passes(seed: int) -> Passes:
    """Six passes that are near each other, rubbish off the mask."""
    rng = np.random.default_rng(seed)
    base = -rng.uniform(0.1, 3, MASK.shape)
    return Passes(*(poison(base + 0.4 * rng.normal(size=MASK.shape), MASK) for _ in range(6)))


def without_sampler_routes(passes: Passes) -> Passes:
    return passes._replace(old_r3=None, r3=None)


@pytest.mark.parametrize("seed", range(3))
def test_the_terms_add_up_to_the_log_weight(seed: int) -> None:
    passes = make_passes(seed)
    wanted = passes.natural[MASK].astype(np.float64) - passes.sampler[MASK]
    for given, names in (
        (passes, TERMS),
        (without_sampler_routes(passes), [*TERMS[:2], "mismatch"]),
    ):
        terms = log_weight_terms(given, MASK)
        assert list(terms) == names
        total = np.sum([np.asarray(term, np.float64) for term in terms.values()], axis=0)
        np.testing.assert_allclose(total[MASK], wanted, atol=2e-6)
        assert not np.any(total[~MASK])
        assert min(np.abs(term[MASK]).max() for term in terms.values()) > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_every_metric_equals_float64_numpy(seed: int) -> None:
    passes = make_passes(seed)
    exact = {name: x.astype(np.float64)[MASK] for name, x in passes._asdict().items()}
    wanted = {"tokens": MASK.sum(), "left_out_tokens": 0}
    for name, (above, below) in FACTORS.items():
        term = exact[above] - exact[below]
        wanted[f"mean_{name}"] = term.mean()
        wanted[f"abs_{name}"] = np.abs(term).mean()
        wanted[f"square_{name}"] = (term**2).mean()
    whole = sum(wanted[f"abs_{term}"] for term in TERMS)
    wanted |= {f"share_{term}": wanted[f"abs_{term}"] / whole for term in TERMS}
    for name in ("natural", "r2", "r3"):
        gap = exact["sampler"] - exact[name]
        wanted[f"kl_{name}"] = gap.mean()
        wanted[f"kl_{name}_k3"] = (np.exp(-gap) - 1 + gap).mean()
    found = run(passes, MASK)
    assert found.keys() == {f"attribution/{name}" for name in wanted}
    for name, value in wanted.items():
        got = found[f"attribution/{name}"].value()
        np.testing.assert_allclose(got, value, rtol=2e-5, atol=1e-6, err_msg=name)
        assert describe(f"attribution/{name}"), name


def test_without_the_samplers_experts_their_names_are_absent() -> None:
    passes = make_passes(3)
    full, found = run(passes, MASK), run(without_sampler_routes(passes), MASK)
    for name in ("share_mismatch_routing", "abs_mismatch_numerics", "kl_r3", "kl_r3_k3"):
        assert f"attribution/{name}" in full
        assert f"attribution/{name}" not in found
    shares = [mean.value() for name, mean in found.items() if "/share_" in name]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(1, rel=1e-6)
    same = "attribution/mean_mismatch"
    np.testing.assert_allclose(found[same].value(), full[same].value(), rtol=1e-6)


def test_a_token_that_a_pass_broke_on_is_left_out_of_all_and_counted() -> None:
    passes = make_passes(4)
    first, second, third, *_ = map(tuple, np.argwhere(MASK))
    passes.r3[first], passes.sampler[second], passes.natural[third] = np.nan, -np.inf, np.inf
    found = run(passes, MASK)
    rest = MASK.copy()
    rest[tuple(np.transpose([first, second, third]))] = False
    wanted = run(passes, rest)
    for name, mean in wanted.items():
        assert np.isfinite(mean.value()), name
        if name != "attribution/left_out_tokens":
            np.testing.assert_allclose(found[name].value(), mean.value(), rtol=1e-6, err_msg=name)
    assert found["attribution/tokens"].value() == MASK.sum() - 3
    assert found["attribution/left_out_tokens"].value() == 3


def test_rows_pool_and_nothing_is_empty_not_zero() -> None:
    passes = make_passes(5)
    rows = [MASK & (np.arange(MASK.shape[0]) == row)[:, None] for row in range(2)]
    first, second, whole = (run(passes, mask) for mask in (*rows, MASK))
    for name in whole:
        if not name.endswith("tokens"):  # those are per mini-batch
            pooled = (first[name] + second[name]).value()
            np.testing.assert_allclose(pooled, whole[name].value(), rtol=1e-5, err_msg=name)
    empty = run(passes, np.zeros_like(MASK))
    assert {name for name, mean in empty.items() if mean.weight > 0} == {
        "attribution/tokens",
        "attribution/left_out_tokens",
    }


def test_equal_passes_have_no_shares() -> None:
    """0 of 0 is not a share of 0."""
    one = make_passes(6).old
    found = run(Passes(*[one] * 6), MASK)
    assert found["attribution/abs_log_weight"].value() == 0
    assert all(mean.weight == 0 for name, mean in found.items() if "/share_" in name)
    assert dataclasses.astuple(found["attribution/tokens"]) == (MASK.sum(), 1)
