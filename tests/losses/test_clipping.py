import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.losses.clipping import (
    binary_divergence,
    clip_mask,
    clip_ratio,
    divergence_mask,
)
from tests.losses.batches import MASK, random_batch
from tests.reference import losses as reference

LOW, HIGH = 0.2, 0.27
UPPER, LOWER = np.float32(1 + HIGH), np.float32(1 - LOW)
ABOVE, BELOW = np.nextafter(UPPER, np.float32(2)), np.nextafter(LOWER, np.float32(0))


@pytest.mark.parametrize(
    ("ratio", "advantage", "is_open"),
    [
        (UPPER, 1.0, True),  # exactly at the bound: the inequality is strict
        (ABOVE, 1.0, False),
        (LOWER, -1.0, True),
        (BELOW, -1.0, False),
        (ABOVE, -1.0, True),  # pushed back towards the band: free to go
        (BELOW, 1.0, True),
        (100.0, 0.0, True),  # advantage 0 pushes nowhere
        (0.0, 0.0, True),
        (100.0, -0.0, True),
        (1.0, 1.0, True),
        (1.0, -1.0, True),
        (np.nan, 1.0, True),  # a fault must not pass for a closed mask
        (np.nan, -1.0, True),
        (np.inf, 1.0, False),
        (0.0, -1.0, False),
    ],
)
def test_one_token(ratio, advantage, is_open) -> None:
    found = clip_mask(np.float32([[ratio]]), np.float32([[advantage]]), low=LOW, high=HIGH)
    assert found.dtype == bool
    assert bool(found[0, 0]) is is_open


@settings(max_examples=100, deadline=None)
@given(
    ratio=st.floats(0, 10),
    advantage=st.floats(-5, 5),
    low=st.floats(0, 1),
    high=st.floats(0, 5),
    dual=st.floats(1.01, 8),
)
def test_equals_the_reference(ratio, advantage, low, high, dual) -> None:
    bounds = {"low": low, "high": high, "dual": dual}
    found = clip_mask(np.array([[ratio]]), np.array([[advantage]]), **bounds)
    assert bool(found[0, 0]) == reference.is_open(ratio, advantage, low, high, dual)


@settings(max_examples=100, deadline=None)
@given(
    ratio=st.floats(0, 10, width=32, allow_subnormal=False),
    advantage=st.floats(-5, 5, width=32, allow_subnormal=False),
    dual=st.sampled_from([3.0, np.inf]),
)
def test_the_clipped_ratio_is_ppos_smaller_value(ratio, advantage, dual) -> None:
    """min(r A, clip(r) A), dual clip included; and it is the ratio just where the mask is open."""
    bounds = {"low": LOW, "high": HIGH, "dual": dual}
    given_ = np.float32([[ratio]]), np.float32([[advantage]])
    found = float(clip_ratio(*given_, **bounds)[0, 0])
    wanted = min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)
    if advantage < 0 and dual < np.inf:
        wanted = max(wanted, dual * advantage)
    np.testing.assert_allclose(found * advantage, wanted, rtol=1e-5, atol=1e-30)
    assert bool(clip_mask(*given_, **bounds)[0, 0]) == (found == np.float32(ratio))


@pytest.mark.parametrize(
    ("ratio", "is_open"),
    [(3.0, True), (np.nextafter(np.float32(3), np.float32(4)), False), (2.0, True)],
)
def test_dual_clip_bounds_negative_advantages_from_above(ratio, is_open) -> None:
    bounds = {"low": LOW, "high": HIGH, "dual": 3.0}
    found = clip_mask(np.float32([[ratio]]), np.float32([[-1.0]]), **bounds)
    assert bool(found[0, 0]) is is_open


def test_infinite_bounds_never_close() -> None:
    ratios = np.float32([[0.0, 1e-6, 1.0, 1e6]])
    for sign in (-1.0, 1.0):
        assert clip_mask(ratios, np.full((1, 4), sign), low=np.inf, high=np.inf).all()


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_binary_divergence_equals_the_reference(kind) -> None:
    logprobs, _, batch = random_batch(0)
    found = binary_divergence(logprobs, batch.sampler_logprobs, MASK, kind=kind)
    np.testing.assert_array_equal(found[~MASK], 0.0)
    for t in map(tuple, np.argwhere(MASK)):
        pi, mu = float(logprobs[t]), float(batch.sampler_logprobs[t])
        wanted = reference.binary_divergence(kind, pi, mu)
        np.testing.assert_allclose(found[t], wanted, rtol=1e-4, atol=1e-6)


def test_binary_divergence_at_the_ends() -> None:
    """p and q of 0 and 1: no NaN, and infinite just where the KL is."""
    certain, impossible, half = 0.0, -1000.0, float(np.log(0.5))
    ones = np.ones((1, 1), bool)

    def divergence(pi, anchor, kind):
        at = (np.float32([[pi]]), np.float32([[anchor]]))
        return float(binary_divergence(*at, ones, kind=kind)[0, 0])

    for kind in ("tv", "kl"):
        for same in (certain, impossible, half):
            assert divergence(same, same, kind) == 0.0
    assert divergence(half, certain, "kl") == pytest.approx(np.log(2))
    assert divergence(certain, half, "kl") == np.inf
    assert divergence(half, impossible, "kl") == pytest.approx(np.log(2))
    assert divergence(certain, impossible, "tv") == 1.0
    assert np.isnan(divergence(np.nan, half, "tv"))
    assert np.isnan(divergence(np.nan, half, "kl"))


@pytest.mark.parametrize(
    ("divergence", "moved", "advantage", "is_open"),
    [
        (0.2, 0.1, 1.0, True),  # at its bound
        (0.21, 0.1, 1.0, False),
        (0.21, -0.1, 1.0, True),  # back towards the anchor
        (0.3, -0.1, -1.0, True),
        (0.31, -0.1, -1.0, False),
        (0.31, 0.1, -1.0, True),
        (9.0, 0.1, 0.0, True),
        (np.inf, 0.1, 1.0, False),
        (np.nan, 0.1, 1.0, True),
        (9.0, np.nan, 1.0, True),
    ],
)
def test_divergence_mask_of_one_token(divergence, moved, advantage, is_open) -> None:
    found = divergence_mask(
        *(np.float32([[x]]) for x in (divergence, moved, advantage)),
        low=float(np.float32(0.3)),
        high=float(np.float32(0.2)),
    )
    assert bool(found[0, 0]) is is_open
