import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.losses.clipping import clip_mask
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
    ratio=st.floats(0, 10), advantage=st.floats(-5, 5), low=st.floats(0, 1), high=st.floats(0, 5)
)
def test_equals_the_reference(ratio, advantage, low, high) -> None:
    found = clip_mask(np.array([[ratio]]), np.array([[advantage]]), low=low, high=high)
    assert bool(found[0, 0]) == reference.is_open(ratio, advantage, low, high)


def test_infinite_bounds_never_close() -> None:
    ratios = np.float32([[0.0, 1e-6, 1.0, 1e6]])
    for sign in (-1.0, 1.0):
        assert clip_mask(ratios, np.full((1, 4), sign), low=np.inf, high=np.inf).all()
