import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxrl_llm.losses.advantages import AdvantageConfig, group_advantages
from tests.reference import losses as reference

RULES = [(b, s) for b in ("mean", "leave_one_out") for s in ("none", "std")]
ALL = np.ones((1, 4), bool)


@pytest.mark.parametrize(("baseline", "scale"), [*RULES, ("none", "none")])
@settings(max_examples=50, deadline=None)
@given(
    rewards=arrays(np.float64, (3, 5), elements=st.sampled_from([0.0, 0.1, 0.5, 1.0, -2.0])),
    valid=arrays(np.bool_, (3, 5)),
)
def test_equals_the_reference(baseline, scale, rewards, valid) -> None:
    found = group_advantages(rewards, valid, baseline=baseline, scale=scale)
    wanted = reference.group_advantages(rewards, valid, baseline, scale)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_by_hand() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 0.0]], np.float32)
    found = group_advantages(rewards, ALL)
    np.testing.assert_array_equal(found, np.float32([[0.75, -0.25, -0.25, -0.25]]))
    found = group_advantages(rewards, ALL, baseline="leave_one_out")
    np.testing.assert_allclose(found, [[1, -1 / 3, -1 / 3, -1 / 3]], rtol=1e-6)
    found = group_advantages(rewards, ALL, scale="std")  # deviation of the sample: 1/2
    np.testing.assert_allclose(found, [[1.5, -0.5, -0.5, -0.5]], rtol=1e-6)


@pytest.mark.parametrize(("baseline", "scale"), RULES)
def test_equal_rewards_give_exactly_nothing(baseline, scale) -> None:
    """0.1 in float32 differs from its own mean in the last bit; a deviation would blow that up."""
    rewards = np.full((1, 3), 0.1, np.float32)
    found = group_advantages(rewards, ALL[:, :3], baseline=baseline, scale=scale)
    np.testing.assert_array_equal(found, np.zeros((1, 3)))


@pytest.mark.parametrize(("baseline", "scale"), RULES)
def test_a_group_of_one_and_an_empty_group_give_nothing(baseline, scale) -> None:
    rewards = np.array([[3.0, np.nan], [np.nan, np.inf]])
    valid = np.array([[True, False], [False, False]])
    found = group_advantages(rewards, valid, baseline=baseline, scale=scale)
    np.testing.assert_array_equal(found, np.zeros((2, 2)))


@pytest.mark.parametrize(("baseline", "scale"), RULES)
def test_invalid_members_do_not_exist(baseline, scale) -> None:
    rewards = np.array([[1.0, np.nan, 0.0, np.inf, 0.5]])
    valid = np.array([[True, False, True, False, True]])
    found = group_advantages(rewards, valid, baseline=baseline, scale=scale)
    alone = group_advantages(rewards[:, [0, 2, 4]], ALL[:, :3], baseline=baseline, scale=scale)
    np.testing.assert_array_equal(found[:, [0, 2, 4]], alone)
    np.testing.assert_array_equal(found[:, [1, 3]], np.zeros((1, 2)))


def test_a_nan_reward_of_a_valid_member_shows() -> None:
    found = group_advantages(np.array([[1.0, np.nan, 0.0, 0.0]]), ALL)
    assert np.isnan(found).all()


def test_library_and_dtype_are_those_of_the_rewards() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 0.5]], np.float32)
    on_host = group_advantages(rewards, ALL)
    assert isinstance(on_host, np.ndarray)
    assert on_host.dtype == np.float32
    on_device = jax.jit(group_advantages)(jnp.asarray(rewards), jnp.asarray(ALL))
    assert isinstance(on_device, jax.Array)
    np.testing.assert_allclose(on_host, on_device, rtol=1e-6)


def test_refuses_what_is_not_a_table_of_rewards() -> None:
    with pytest.raises(ValueError, match=r"float64\[2\].*bool\[1, 4\]"):
        group_advantages(np.zeros(2), ALL)
    with pytest.raises(ValueError, match=r"float64\[4\].*bool\[4\]"):
        group_advantages(np.zeros(4), ALL[0])
    with pytest.raises(ValueError, match=r"valid float64\[1, 4\]"):
        group_advantages(np.zeros((1, 4)), np.ones((1, 4)))
    with pytest.raises(ValueError, match="int64; convert"):
        group_advantages(np.zeros((1, 4), np.int64), ALL)


def test_the_defaults_are_the_papers() -> None:
    assert AdvantageConfig() == AdvantageConfig(baseline="mean", scale="none")
