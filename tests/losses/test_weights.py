import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.ratios import LogRatios, log_ratios
from jaxrl_llm.losses.weights import ImportanceConfig, importance_weight, token_weights
from tests.losses.batches import MASK, SEGMENTS, random_batch
from tests.reference import losses as reference

RULES = ["response_sum", "token", "sequence", "constant"]
ONE = np.ones((1, 1), bool)


INF = np.inf


def weigh(log_ratio: float, cfg: ImportanceConfig) -> float:
    """The weight of a response of one token with this log-ratio."""
    zero, moved = np.zeros((1, 1), np.float32), np.float32([[log_ratio]])
    ratios = LogRatios(
        sampler=moved,
        mismatch=moved if cfg.ratio == "mismatch" else zero,
        staleness=moved if cfg.ratio == "staleness" else zero,
    )
    found = importance_weight(ratios, ONE, ONE.astype(np.int32), cfg, level="token")
    return float(found.weight[0, 0])


CLIPPED, BANDED = ImportanceConfig(high=5.0), ImportanceConfig(rule="band", low=0.5, high=2.0)


def test_clip_cuts_at_its_bounds() -> None:
    assert weigh(0.0, CLIPPED) == 1.0
    assert weigh(1.0, CLIPPED) == pytest.approx(np.e)
    assert weigh(2.0, CLIPPED) == 5.0
    assert weigh(1000.0, CLIPPED) == 5.0
    assert weigh(-1000.0, CLIPPED) == 0.0
    assert weigh(-1000.0, ImportanceConfig(low=0.5)) == 0.5
    assert weigh(1000.0, ImportanceConfig(high=INF)) == pytest.approx(np.exp(20.0))


def test_band_rejects_outside_and_keeps_its_ends() -> None:
    assert weigh(0.0, ImportanceConfig(rule="band", low=1.0, high=1.0)) == 1.0
    assert weigh(0.5, BANDED) == pytest.approx(np.exp(0.5))
    assert weigh(0.8, BANDED) == 0.0
    assert weigh(-0.8, BANDED) == 0.0
    assert weigh(1000.0, BANDED) == 0.0


def test_off_weighs_every_token_1() -> None:
    for log_ratio in (1000.0, -INF, np.nan):
        assert weigh(log_ratio, ImportanceConfig(ratio="off")) == 1.0


KINDS = ["sampler", "mismatch", "staleness", "off"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("rule", ["clip", "band"])
def test_the_weight_equals_the_reference_and_is_never_differentiated(kind, level, rule) -> None:
    logprobs, _, batch = random_batch(2)
    ratios = log_ratios(logprobs, batch.old_logprobs, batch.sampler_logprobs, MASK)
    cfg = ImportanceConfig(ratio=kind, level=level, rule=rule, low=0.7, high=1.3)

    def weight(ratios):
        return importance_weight(ratios, MASK, SEGMENTS, cfg, level="geometric").weight

    values = {"importance": dataclasses.asdict(cfg), "clip": {"level": "geometric"}}
    wanted = np.zeros(MASK.shape)
    for tokens in reference.responses(MASK, SEGMENTS):
        named = {name: {t: float(x[t]) for t in tokens} for name, x in ratios._asdict().items()}
        for t in tokens:
            wanted[t] = np.prod(reference.importance(named, t, values))
    np.testing.assert_allclose(weight(ratios), wanted, rtol=1e-5)
    for gradient in jax.grad(lambda r: jnp.sum(weight(r)))(ratios):
        np.testing.assert_array_equal(gradient, 0.0)


def test_what_a_bound_changed_is_told() -> None:
    ratios = LogRatios(*[np.float32([[np.log(3.0), np.log(1.5), 0.0, np.nan]])] * 3)
    mask, segments = np.ones((1, 4), bool), np.arange(1, 5, dtype=np.int32)[None]
    for cfg in (ImportanceConfig(high=2.0), BANDED):
        found = importance_weight(ratios, mask, segments, cfg, level="token")
        np.testing.assert_array_equal(found.bounded, [[True, False, False, False]])


@pytest.mark.parametrize("cfg", [CLIPPED, BANDED])
@pytest.mark.parametrize("kind", ["sampler", "mismatch", "staleness"])
def test_a_nan_on_the_mask_shows(cfg, kind) -> None:
    assert np.isnan(weigh(np.nan, dataclasses.replace(cfg, ratio=kind)))


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
