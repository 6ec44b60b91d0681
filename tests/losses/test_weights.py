import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.weights import Band, Off, Truncate, importance_weight, token_weights
from tests.losses.batches import MASK, SEGMENTS, poison
from tests.reference import losses as reference

RULES = ["response_sum", "token", "sequence", "constant"]
ONE = np.ones((1, 1), bool)


def weigh(log_ratio: float, rule) -> float:
    return float(importance_weight(np.float32([[log_ratio]]), ONE, rule)[0, 0])


def test_truncate_cuts_at_its_cap() -> None:
    assert weigh(0.0, Truncate(5.0)) == 1.0
    assert weigh(1.0, Truncate(5.0)) == pytest.approx(np.e)
    assert weigh(2.0, Truncate(5.0)) == 5.0
    assert weigh(1000.0, Truncate(5.0)) == 5.0
    assert weigh(-1000.0, Truncate(5.0)) == 0.0
    assert weigh(1000.0, Truncate(np.inf)) == pytest.approx(np.exp(20.0))


def test_band_rejects_outside_and_keeps_its_ends() -> None:
    assert weigh(0.0, Band(1.0, 1.0)) == 1.0
    assert weigh(0.5, Band(0.5, 2.0)) == pytest.approx(np.exp(0.5))
    assert weigh(0.8, Band(0.5, 2.0)) == 0.0
    assert weigh(-0.8, Band(0.5, 2.0)) == 0.0
    assert weigh(1000.0, Band(0.5, 2.0)) == 0.0


def test_off_weighs_every_token_1() -> None:
    assert weigh(1000.0, Off()) == 1.0
    assert weigh(-np.inf, Off()) == 1.0


@pytest.mark.parametrize("rule", [Off(), Truncate(5.0), Band(0.5, 2.0)])
def test_the_weight_is_0_off_the_mask_and_never_differentiated(rule) -> None:
    log_ratio = poison(np.linspace(-1, 1, MASK.size).reshape(MASK.shape), MASK)

    def total(x):
        return jnp.sum(importance_weight(x, MASK, rule))

    found = importance_weight(log_ratio, MASK, rule)
    np.testing.assert_array_equal(found[~MASK], 0.0)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(jax.grad(total)(log_ratio), 0.0)


@pytest.mark.parametrize("rule", [Truncate(5.0), Band(0.5, 2.0)])
def test_a_nan_on_the_mask_shows(rule) -> None:
    assert np.isnan(weigh(np.nan, rule))


def test_rules_refuse_impossible_bounds() -> None:
    for cap in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="positive"):
            Truncate(cap)
    for low, high in ((2.0, 1.0), (-1.0, 1.0), (np.nan, 1.0)):
        with pytest.raises(ValueError, match="low <= high"):
            Band(low, high)


@pytest.mark.parametrize("per", RULES)
def test_token_weights_equal_the_reference(per) -> None:
    constant = 7.0 if per == "constant" else 0.0
    found = token_weights(MASK, SEGMENTS, per=per, constant=constant)
    wanted = reference.token_weights(MASK, SEGMENTS, per, constant)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    jitted = jax.jit(token_weights, static_argnames=("per", "constant"))
    np.testing.assert_array_equal(jitted(MASK, SEGMENTS, per=per, constant=constant), found)


@pytest.mark.parametrize("per", RULES)
def test_more_padding_rows_change_nothing(per) -> None:
    constant = 7.0 if per == "constant" else 0.0
    mask, segment_ids = (np.pad(x, ((0, 2), (0, 0))) for x in (MASK, SEGMENTS))
    found = np.asarray(token_weights(mask, segment_ids, per=per, constant=constant))
    wanted = token_weights(MASK, SEGMENTS, per=per, constant=constant)
    np.testing.assert_array_equal(found[:-2], wanted)
    assert not found[-2:].any()


@pytest.mark.parametrize("per", RULES)
def test_nothing_sampled_weighs_nothing(per) -> None:
    constant = 7.0 if per == "constant" else 0.0
    found = token_weights(np.zeros_like(MASK), SEGMENTS, per=per, constant=constant)
    np.testing.assert_array_equal(found, 0.0)


@pytest.mark.parametrize("per", ["response_sum", "sequence"])
def test_a_fully_masked_response_is_not_counted(per) -> None:
    mask = MASK & ~((SEGMENTS == 2) & MASK)
    found = token_weights(mask, SEGMENTS, per=per)
    np.testing.assert_allclose(found, reference.token_weights(mask, SEGMENTS, per), rtol=1e-6)
    assert found[1, 2] == np.float32(0.5 if per == "response_sum" else 0.125)  # two responses left


def test_only_constant_has_a_constant() -> None:
    for per, constant in (("constant", 0.0), ("constant", -1.0), ("token", 3.0), ("token", -3.0)):
        with pytest.raises(ValueError, match="constant is"):
            token_weights(MASK, SEGMENTS, per=per, constant=constant)
