import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.arrays import TrainBatch
from jaxrl_llm.losses.advantages import AdvantageConfig
from jaxrl_llm.losses.clipping import ClipConfig
from jaxrl_llm.losses.kl import KLConfig
from jaxrl_llm.losses.policy import LossConfig, policy_loss
from jaxrl_llm.losses.rejection import RejectionConfig
from jaxrl_llm.losses.weights import ImportanceConfig, token_weights
from tests.losses.batches import MASK, SEGMENTS, as_dict, random_batch
from tests.losses.compare import assert_equals_the_reference, value_and_gradients
from tests.reference import losses as reference

IMPORTANCE = ["sampler", "mismatch", "staleness", "off"]
ANCHORS = ["old", "sampler", "none"]
EVERYTHING = {
    "kl": KLConfig(coefficient=0.3, estimator="k3"),
    "entropy_coefficient": 0.2,
}


def settings(importance="sampler", anchor="old", high=5.0, low=0.2, above=0.27, **others):
    """A LossConfig from the settings that most tests vary."""
    clip = ClipConfig(anchor=anchor, low=low, high=above)
    if anchor == "none":
        clip = ClipConfig(kind="none")
    return LossConfig(importance=ImportanceConfig(ratio=importance, high=high), clip=clip, **others)


def one_token(*, pi=0.0, mu=0.0, old=0.0, advantage=1.0) -> tuple[np.ndarray, TrainBatch]:
    """A batch of one response of one token, from log-probabilities relative to -10 nats."""

    def at(value):
        return np.array([[value - 10.0]], np.float32)

    zero, one = np.zeros((1, 1), np.int32), np.ones((1, 1), np.int32)
    batch = TrainBatch(
        inputs=zero,
        targets=zero,
        positions=zero,
        segment_ids=one,
        staleness=zero,
        loss_mask=one.astype(bool),
        sampler_logprobs=at(mu),
        advantages=np.array([[advantage]], np.float32),
        old_logprobs=at(old),
    )
    return at(pi), batch


def pull(cfg: LossConfig, **token: float) -> float:
    """M * w * A of one token: minus its gradient."""
    logprobs, batch = one_token(**token)
    _, (gradient, _), _ = value_and_gradients(logprobs, np.zeros((1, 1), np.float32), batch, cfg)
    return -float(gradient[0, 0])


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("anchor", ANCHORS)
def test_value_and_gradients_equal_the_reference(importance, anchor) -> None:
    cfg = settings(importance, anchor, high=1.5, **EVERYTHING)
    assert assert_equals_the_reference(cfg, *random_batch(3))["tokens that learn"] > 3


@pytest.mark.parametrize(
    ("estimator", "weight"),
    [("k1", "none"), ("k2", "none"), ("k3", "none"), ("k1", "unbiased"), ("k3", "unbiased")],
)
def test_weights_of_the_penalty_equal_the_reference(estimator, weight) -> None:
    penalty = KLConfig(coefficient=0.7, estimator=estimator, weight=weight)
    rejection = RejectionConfig(ratio="sampler", geometric_low=0.9)
    assert_equals_the_reference(LossConfig(kl=penalty, rejection=rejection), *random_batch(4))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_penalty_alone_equals_the_reference(estimator) -> None:
    cfg = LossConfig(kl=KLConfig(coefficient=0.7, estimator=estimator))
    logprobs, entropy, batch = random_batch(4)
    batch = dataclasses.replace(batch, advantages=np.zeros_like(batch.advantages))
    _, (gradient, _), metrics = value_and_gradients(logprobs, entropy, batch, cfg)

    wanted, values = np.zeros(MASK.shape), []
    for t in map(tuple, np.argwhere(MASK)):
        pi, mu, ref = (float(x[t]) for x in (logprobs, batch.sampler_logprobs, batch.ref_logprobs))
        slope = {"k1": 1.0, "k2": pi - ref, "k3": 1 - np.exp(ref - pi)}[estimator]
        weight = min(np.exp(pi - mu), 5.0)
        wanted[t] = 0.7 * weight * slope / 3  # three responses
        values.append(weight * reference.kl(estimator, pi, ref))
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)
    assert metrics["policy/kl_ref"] == pytest.approx(np.mean(values), rel=1e-5)


def test_the_two_readings_of_the_cap() -> None:
    """pi/mu = 8 = (pi_old/mu = 2) * (pi/pi_old = 4), then the other way about."""
    two, four, eight = np.log([2.0, 4.0, 8.0])
    late = {"pi": eight, "old": two, "mu": 0.0}
    wanted = {"sampler": 5.0, "mismatch": 8.0, "staleness": 4.0, "off": 1.0}
    for importance, weight in wanted.items():
        cfg = settings(importance, "none")
        assert pull(cfg, **late) == pytest.approx(weight, rel=1e-5)
    noisy = {"pi": four, "old": eight, "mu": 0.0}  # pi_old/mu = 8, pi/pi_old = 1/2
    wanted = {"sampler": 4.0, "mismatch": 2.5, "staleness": 0.5, "off": 1.0}
    for importance, weight in wanted.items():
        cfg = settings(importance, "none")
        assert pull(cfg, **noisy) == pytest.approx(weight, rel=1e-5)


def test_the_anchors_of_the_clip_mask() -> None:
    """A token that the update moved up while the engine had over-sampled it, and its mirror."""
    moved = {"pi": 0.0, "old": -0.5, "mu": 0.2, "advantage": 1.0}
    assert pull(settings("off", "old"), **moved) == 0.0
    assert pull(settings("off", "sampler"), **moved) == 1.0
    assert pull(settings("off", "none"), **moved) == 1.0
    mismatched = {"pi": 0.0, "old": 0.0, "mu": 0.5, "advantage": -1.0}
    assert pull(settings("off", "old"), **mismatched) == -1.0
    assert pull(settings("off", "sampler"), **mismatched) == 0.0
    assert pull(settings("off", "none"), **mismatched) == -1.0


def test_at_the_old_weights_the_mask_is_open_and_the_gradient_is_that_of_reinforce() -> None:
    logprobs, entropy, batch = random_batch(5)
    batch = dataclasses.replace(batch, sampler_logprobs=logprobs, old_logprobs=logprobs)
    for importance in IMPORTANCE:
        cfg = settings(importance, low=0.0, above=0.0)
        _, (gradient, _), metrics = value_and_gradients(logprobs, entropy, batch, cfg)
        wanted = np.where(MASK, -batch.advantages / np.float32(3), 0.0)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-6)
        assert metrics["is_weight/used_mean"] == metrics["staleness/ratio_mean"] == 1.0
        assert metrics["clip/high_fraction"] == metrics["clip/low_fraction"] == 0.0


def test_without_old_logprobs_pi_old_is_pi() -> None:
    logprobs, entropy, batch = random_batch(6)
    for importance in IMPORTANCE:
        cfg = settings(importance)
        without = dataclasses.replace(batch, old_logprobs=None)
        same = dataclasses.replace(batch, old_logprobs=logprobs)
        found = value_and_gradients(logprobs, entropy, without, cfg)
        wanted = value_and_gradients(logprobs, entropy, same, cfg)
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1][0], wanted[1][0])
        assert found[2] == wanted[2]


def test_the_importance_weight_makes_the_gradient_that_of_the_reward() -> None:
    """Every answer of a bandit once, averaged with mu's probabilities: exact, not sampled."""
    rng = np.random.default_rng(0)
    pi_logits, mu_logits = rng.normal(size=(2, 6)).astype(np.float32)
    rewards = rng.normal(size=(6, 1)).astype(np.float32)
    zeros = np.zeros((6, 1), np.int32)
    batch = TrainBatch(
        inputs=zeros,
        targets=zeros,
        positions=zeros,
        segment_ids=zeros + 1,
        staleness=zeros,
        loss_mask=zeros == 0,
        sampler_logprobs=jax.nn.log_softmax(mu_logits)[:, None],
        advantages=rewards,
    )
    mu = jax.nn.softmax(mu_logits)[:, None]

    def surrogate(logits, importance):
        cfg = settings(importance, "none", high=np.inf)
        logprobs = jax.nn.log_softmax(logits)[:, None]
        return -policy_loss(logprobs, 0 * mu, batch, mu, cfg).loss

    wanted = jax.grad(lambda logits: jnp.vdot(jax.nn.softmax(logits), rewards[:, 0]))(pi_logits)
    for importance in ("sampler", "mismatch"):
        found = jax.grad(surrogate)(pi_logits, importance)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    uncorrected = jax.grad(surrogate)(pi_logits, "off")
    assert np.abs(uncorrected - wanted).max() > 0.05


def test_nothing_off_the_mask_contributes() -> None:
    """random_batch holds NaN and infinities there; here the rubbish itself changes."""
    cfg = LossConfig(**EVERYTHING)
    logprobs, entropy, batch = random_batch(7)
    loss, gradients, metrics = value_and_gradients(logprobs, entropy, batch, cfg)
    assert np.isfinite(loss)
    assert np.isfinite(list(metrics.values())).all()
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[~MASK], 0.0)
    clean = {
        name: np.where(MASK, value, 0) if value.dtype == np.float32 else value
        for name, value in as_dict(batch).items()
        if value is not None
    }
    again = value_and_gradients(
        np.where(MASK, logprobs, 0), np.where(MASK, entropy, 0), TrainBatch(**clean), cfg
    )
    np.testing.assert_array_equal(loss, again[0])
    np.testing.assert_array_equal(gradients, again[1])
    assert metrics == again[2]


def test_a_fully_masked_batch_is_worth_nothing() -> None:
    logprobs, entropy, batch = random_batch(8, mask=np.zeros_like(MASK))
    cfg = LossConfig(**EVERYTHING)
    loss, gradients, metrics = value_and_gradients(logprobs, entropy, batch, cfg)
    assert loss == 0.0
    np.testing.assert_array_equal(gradients, 0.0)
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("field", ["sampler_logprobs", "advantages", "logprobs"])
def test_a_nan_on_the_mask_shows(field) -> None:
    logprobs, batch = one_token()
    nan = np.full((1, 1), np.nan, np.float32)
    if field == "logprobs":
        logprobs = nan
    else:
        batch = dataclasses.replace(batch, **{field: nan})
    loss, _, _ = value_and_gradients(logprobs, np.zeros((1, 1), np.float32), batch, LossConfig())
    assert np.isnan(loss)


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
def test_ratios_that_overflow_give_finite_numbers(importance, advantage) -> None:
    cfg = settings(importance, "none", high=np.inf)
    for token in ({"mu": -1000.0, "old": -500.0}, {"pi": -1000.0}, {"old": -1000.0}):
        logprobs, batch = one_token(**token, advantage=advantage)
        loss, (gradient, _), metrics = value_and_gradients(
            logprobs, np.zeros((1, 1), np.float32), batch, cfg
        )
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()
        assert np.isfinite(list(metrics.values())).all()
        if advantage == 0.0:
            assert loss == gradient[0, 0] == 0.0


def test_metrics_by_hand() -> None:
    cfg = settings(high=1.5)
    logprobs, entropy, batch = random_batch(23)
    _, _, metrics = value_and_gradients(logprobs, entropy, batch, cfg)
    pi, mu, old, advantage = (
        x[MASK].astype(np.float64)
        for x in (logprobs, batch.sampler_logprobs, batch.old_logprobs, batch.advantages)
    )
    ratio = np.exp(pi - mu)
    used = np.minimum(ratio, 1.5)
    wanted = {
        "policy/entropy": entropy[MASK].mean(),
        "policy/kl_sampler_old": (mu - old).mean(),
        "policy/kl_sampler_old_k3": (np.exp(old - mu) - 1 - (old - mu)).mean(),
        "policy/kl_ref": (used * (pi - batch.ref_logprobs[MASK]) ** 2 / 2).mean(),
        "staleness/ratio_mean": np.exp(pi - old).mean(),
        "is_weight/raw_mean": ratio.mean(),
        "is_weight/used_mean": used.mean(),
        "is_weight/capped_fraction": (ratio > 1.5).mean(),
        "clip/high_fraction": ((np.exp(pi - old) > 1.27) & (advantage > 0)).mean(),
        "clip/low_fraction": ((np.exp(pi - old) < 0.8) & (advantage < 0)).mean(),
    }
    assert metrics == pytest.approx(wanted, rel=1e-5)
    assert metrics["is_weight/capped_fraction"] > 0
    assert metrics["clip/high_fraction"] > 0
    assert metrics["clip/low_fraction"] > 0


def test_the_capped_fraction_is_of_the_ratio_that_is_capped() -> None:
    token = {"pi": np.log(8.0), "old": np.log(2.0)}
    wanted = {"sampler": 1.0, "mismatch": 0.0, "staleness": 0.0, "off": 0.0}
    for importance, fraction in wanted.items():
        logprobs, batch = one_token(**token)
        cfg = settings(importance)
        _, _, metrics = value_and_gradients(logprobs, np.zeros((1, 1), np.float32), batch, cfg)
        assert metrics["is_weight/capped_fraction"] == fraction
        assert metrics["is_weight/raw_mean"] == pytest.approx(8.0, rel=1e-5)


def test_only_log_probabilities_and_entropy_are_differentiated() -> None:
    """Even when pi_old comes out of the same parameters by mistake."""
    logprobs, entropy, batch = random_batch(10)
    weights = token_weights(MASK, SEGMENTS, per="response_sum")

    def loss(old, mu, importance):
        traced = dataclasses.replace(batch, old_logprobs=old, sampler_logprobs=mu)
        cfg = settings(importance, **EVERYTHING)
        return policy_loss(logprobs, entropy, traced, weights, cfg).loss

    for importance in IMPORTANCE:
        gradients = jax.grad(loss, argnums=(0, 1))(
            batch.old_logprobs, batch.sampler_logprobs, importance
        )
        np.testing.assert_array_equal(gradients, 0.0)


def test_a_kl_penalty_needs_a_reference() -> None:
    logprobs, batch = one_token()
    with pytest.raises(ValueError, match="no ref_logprobs; score it"):
        policy_loss(logprobs, logprobs, batch, logprobs, LossConfig(kl=KLConfig(coefficient=0.1)))


def test_the_defaults_are_the_papers() -> None:
    cfg = LossConfig()
    assert (cfg.importance.ratio, cfg.importance.level) == ("sampler", "token")
    assert (cfg.importance.rule, cfg.importance.low, cfg.importance.high) == ("clip", 0.0, 5.0)
    assert (cfg.clip.kind, cfg.clip.anchor) == ("ratio", "old")
    assert (cfg.clip.low, cfg.clip.high) == (0.2, 0.27)
    assert (cfg.advantage.baseline, cfg.advantage.scale) == ("mean", "none")
    assert (cfg.form, cfg.averaging) == ("score", "response_sum")
    assert cfg.kl.coefficient == cfg.entropy_coefficient == 0.0
    assert cfg.rejection == RejectionConfig()


def two_levels() -> LossConfig:
    """A PPO clip of the token's ratio over a weight of the response's."""
    return LossConfig(form="ratio", importance=ImportanceConfig("staleness", level="geometric"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImportanceConfig(high=0.0), "importance.low is 0.0 and importance.high 0.0"),
        (lambda: ImportanceConfig(low=2.0, high=1.0), "importance.low is 2.0"),
        (lambda: ImportanceConfig(high=np.nan), "importance.high nan"),
        (lambda: ClipConfig(low=-0.1), "clip.low is -0.1"),
        (lambda: ClipConfig(high=np.nan), "clip.high is nan"),
        (lambda: ClipConfig(dual=0.9), "clip.dual is 0.9"),
        (lambda: ClipConfig(kind="tv", level="geometric"), "mean nothing; set kind to ratio"),
        (lambda: ClipConfig(kind="kl", dual=3.0), "mean nothing; set kind to ratio"),
        (lambda: KLConfig(coefficient=-1.0), "kl.coefficient is -1.0"),
        (lambda: KLConfig(estimator="k2", weight="unbiased"), "use k3, or weight importance"),
        (lambda: RejectionConfig(k3=np.nan), "rejection.k3 is nan"),
        (lambda: RejectionConfig(geometric_low=1.1), "it must hold 1"),
        (lambda: RejectionConfig(geometric_high=0.9), "it must hold 1"),
        (lambda: RejectionConfig(veto=1.0), "rejection.veto is 1.0"),
        (lambda: AdvantageConfig(baseline="none", scale="std"), "set scale to none"),
        (lambda: LossConfig(entropy_coefficient=-0.1), "loss.entropy_coefficient is -0.1"),
        (lambda: LossConfig(router_z_coefficient=np.nan), "loss.router_z_coefficient is nan"),
        (lambda: LossConfig(router_balance_coefficient=-1), "router_balance_coefficient is -1"),
        (lambda: LossConfig(averaging="constant"), "averaging_length is 0.0"),
        (lambda: LossConfig(averaging_length=9.0), "averaging_length is 9.0"),
        (lambda: LossConfig(form="ratio"), "clips the ratio it differentiates"),
        (two_levels, "give both one level"),
    ],
)
def test_impossible_settings_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
