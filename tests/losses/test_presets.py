"""Every rival objective against what its own paper writes, in value and gradient."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import presets
from jaxrl_llm.losses.advantages import response_advantages
from jaxrl_llm.losses.clipping import ClipConfig
from jaxrl_llm.losses.policy import LossConfig, policy_loss
from jaxrl_llm.losses.weights import ImportanceConfig, token_weights
from tests.losses.batches import MASK, SEGMENTS, per_response, ragged_layout, random_batch
from tests.losses.compare import assert_equals_the_reference, value_and_gradients
from tests.reference import losses as reference

PRESETS = {
    "minirl": presets.minirl(),
    "reinforce": presets.reinforce(),
    "rloo": presets.rloo(),
    "ppo": presets.ppo(),
    "dual-clip": dataclasses.replace(presets.ppo(), clip=ClipConfig(high=0.2, dual=1.3)),
    "decoupled_ppo": presets.decoupled_ppo(),
    "grpo": presets.grpo(),
    "dr_grpo": presets.dr_grpo(max_tokens=7),
    "dapo": presets.dapo(),
    "gspo": presets.gspo(),
    "cispo": presets.cispo(),
    "dppo_tv": presets.dppo_tv(),
    "dppo_kl": presets.dppo_kl(),
}
RESPONSES = [[(0, 1), (0, 2), (0, 3)], [(0, 6), (0, 7)], [(1, 2), (1, 3), (1, 4), (1, 5)]]
"""The sampled tokens of each response of random_batch."""


def test_the_responses_are_those_of_the_batches() -> None:
    assert reference.responses(MASK, SEGMENTS) == RESPONSES


@pytest.mark.parametrize("name", PRESETS)
def test_value_and_gradient_equal_the_reference(name) -> None:
    """Over the seeds every mask is open for some tokens and closed for some, if there is one."""
    learning, clipped = 0.0, 0.0
    # GSPO's band is 3e-4 and 4e-4 wide; finite differences must not straddle its ends.
    spread = 1.5e-3 if name == "gspo" else 0.5
    batches = []
    for seed in range(3):
        mask, segments = ragged_layout(seed)
        batches.append(random_batch(seed, mask=mask, segment_ids=segments, spread=spread))
    for seed, advantages in ((11, [1.0, -0.5, -1.5]), (12, [0.5, 1.0, 0.0])):
        logprobs, entropy, batch = random_batch(seed, spread=spread)
        batches.append((logprobs, entropy, per_response(batch, advantages)))
    for batch in batches:
        metrics = assert_equals_the_reference(PRESETS[name], *batch)
        learning += metrics["tokens that learn"]
        clipped += metrics["clip/high_fraction"] + metrics["clip/low_fraction"]
    assert learning > 8
    assert (clipped > 0) == (PRESETS[name].clip.kind != "none")


@pytest.mark.parametrize("name", PRESETS)
def test_both_forms_have_one_gradient(name) -> None:
    cfg = PRESETS[name]
    if cfg.form == "score" and cfg.clip.kind == "ratio":
        cfg = dataclasses.replace(cfg, clip=ClipConfig(anchor="sampler"))
    batch = random_batch(5)
    found = [
        value_and_gradients(*batch, dataclasses.replace(cfg, form=form))[1][0]
        for form in ("score", "ratio")
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-7)


def differentiate(loss, logprobs):
    """(value, gradient) of a formula in jnp that may touch nothing off the mask."""
    clean = jnp.where(MASK, logprobs, 0.0)
    return jax.value_and_grad(loss)(clean)


def test_gspo_in_token_form_is_gspo() -> None:
    """The sequence form (eq. 5) differentiates through s_i; with one A per response they agree."""
    advantages = [1.0, -0.5, -1.5]
    logprobs, entropy, batch = random_batch(7, spread=2e-4)  # its band is 3e-4 and 4e-4 wide
    batch = per_response(batch, advantages)

    def sequence_form(logprobs):
        total = 0.0
        for tokens, advantage in zip(RESPONSES, advantages, strict=True):
            moved = [logprobs[t] - batch.old_logprobs[t] for t in tokens]
            s = jnp.exp(sum(moved) / len(moved))
            total += jnp.minimum(s * advantage, jnp.clip(s, 1 - 3e-4, 1 + 4e-4) * advantage)
        return -total / 3

    loss, (gradient, _), _ = value_and_gradients(logprobs, entropy, batch, presets.gspo())
    wanted, wanted_gradient = differentiate(sequence_form, logprobs)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-4, atol=1e-7)
    assert np.count_nonzero(gradient) > 3


def test_dapo_and_dr_grpo_are_what_their_papers_write() -> None:
    logprobs, entropy, batch = random_batch(9)
    old, advantage = (np.where(MASK, x, 0) for x in (batch.old_logprobs, batch.advantages))

    def clipped(logprobs, high):
        r = jnp.exp(logprobs - old)
        return jnp.minimum(r * advantage, jnp.clip(r, 0.8, high) * advantage) * MASK

    formulas = {
        "dapo": lambda x: -jnp.sum(clipped(x, 1.28)) / MASK.sum(),
        "dr_grpo": lambda x: -jnp.sum(clipped(x, 1.2)) / 7 / 3,
    }
    for name, formula in formulas.items():
        loss, (gradient, _), _ = value_and_gradients(logprobs, entropy, batch, PRESETS[name])
        wanted, wanted_gradient = differentiate(formula, logprobs)
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)
        np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-5, atol=1e-7)


def test_cispo_clips_the_weight_and_never_the_token() -> None:
    """Both bounds, as its eq. 4; a PPO clip would give some of these tokens no gradient at all."""
    logprobs, entropy, batch = random_batch(13)
    cfg = dataclasses.replace(
        presets.cispo(), importance=ImportanceConfig(ratio="staleness", low=0.8, high=1.2)
    )
    old, advantage = (np.where(MASK, x, 0) for x in (batch.old_logprobs, batch.advantages))

    def formula(logprobs):
        r = jnp.clip(jnp.exp(logprobs - old), 0.8, 1.2)
        return -jnp.sum(jax.lax.stop_gradient(r) * advantage * logprobs * MASK) / MASK.sum()

    loss, (gradient, _), metrics = value_and_gradients(logprobs, entropy, batch, cfg)
    wanted, wanted_gradient = differentiate(formula, logprobs)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-5, atol=1e-7)
    assert np.all((gradient != 0) == (advantage != 0))
    assert metrics["is_weight/capped_fraction"] > 0.3


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dppo_masks_by_probability_and_not_by_ratio(name) -> None:
    """A rare token may change by any factor; a common one by a few hundredths of probability."""
    cfg = PRESETS[name]

    def gradient(mu: float, pi: float, advantage: float) -> float:
        _, entropy, batch = random_batch(0)
        logprobs = np.where(MASK, math.log(pi), np.nan).astype(np.float32)
        batch = dataclasses.replace(
            per_response(batch, [advantage] * 3),
            sampler_logprobs=np.where(MASK, math.log(mu), np.nan).astype(np.float32),
        )
        return float(value_and_gradients(logprobs, entropy, batch, cfg)[1][0][0, 1])

    assert gradient(mu=1e-4, pi=1e-3, advantage=1.0) < 0  # ten times likelier: free to go on
    assert gradient(mu=0.5, pi=0.9, advantage=1.0) == 0.0  # 1.8 times: masked
    assert gradient(mu=0.9, pi=0.5, advantage=-1.0) == 0.0
    assert gradient(mu=0.5, pi=0.9, advantage=-1.0) > 0  # back towards mu: free
    assert gradient(mu=0.9, pi=0.5, advantage=1.0) < 0


def test_what_each_preset_fixes() -> None:
    """The table of the README, by the settings that tell the algorithms apart."""
    rows = {
        name: (
            cfg.importance.ratio,
            cfg.importance.high,
            cfg.clip.kind if cfg.clip.kind == "none" else (cfg.clip.kind, cfg.clip.anchor),
            (cfg.clip.low, cfg.clip.high),
            cfg.advantage.baseline,
            cfg.advantage.scale,
            cfg.averaging,
            cfg.kl.coefficient,
        )
        for name, cfg in PRESETS.items()
    }
    inf, old, mu, d = math.inf, ("ratio", "old"), "sampler", (0.2, 0.27)
    std, total, staleness = "std", "response_sum", "staleness"
    assert rows == {
        "minirl": (mu, 5.0, old, d, "mean", "none", total, 0.0),
        "reinforce": ("off", 5.0, "none", d, "none", "none", total, 0.0),
        "rloo": ("off", 5.0, "none", d, "leave_one_out", "none", total, 0.0),
        "ppo": (staleness, inf, old, (0.2, 0.2), "mean", "none", "token", 0.0),
        "dual-clip": (staleness, inf, old, (0.2, 0.2), "mean", "none", "token", 0.0),
        "decoupled_ppo": ("mismatch", 5.0, old, (0.2, 0.2), "mean", "none", "token", 0.0),
        "grpo": (staleness, inf, old, (0.2, 0.2), "mean", std, "sequence", 0.04),
        "dr_grpo": (staleness, inf, old, (0.2, 0.2), "mean", "none", "constant", 0.0),
        "dapo": (staleness, inf, old, (0.2, 0.28), "mean", std, "token", 0.0),
        "gspo": (staleness, inf, old, (3e-4, 4e-4), "mean", std, "sequence", 0.0),
        "cispo": (staleness, 5.0, "none", d, "mean", std, "token", 0.0),
        "dppo_tv": (mu, 20.0, ("tv", mu), (0.15, 0.15), "mean", std, "token", 0.0),
        "dppo_kl": (mu, 20.0, ("kl", mu), (0.05, 0.05), "mean", std, "token", 0.0),
    }
    assert (PRESETS["gspo"].importance.level, PRESETS["gspo"].clip.level) == ("geometric",) * 2
    assert PRESETS["dapo"].advantage.overlong == "mask"


def test_at_the_sampling_weights_all_are_reinforce() -> None:
    """mu = pi_old = pi: every weight is 1 and no mask is closed, so only the averaging differs."""
    logprobs, entropy, batch = random_batch(17)
    batch = dataclasses.replace(
        batch, sampler_logprobs=logprobs, old_logprobs=logprobs, ref_logprobs=logprobs
    )
    for cfg in PRESETS.values():
        weights = token_weights(MASK, SEGMENTS, per=cfg.averaging, constant=cfg.averaging_length)
        _, (gradient, _), _ = value_and_gradients(logprobs, entropy, batch, cfg)
        wanted = -np.where(MASK, batch.advantages, 0) * weights
        np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=0)


REJECTIONS = {
    "geometric": {"geometric_low": 0.8, "geometric_high": 1.3},
    "k3": {"k3": 0.2},
    "veto": {"veto": 0.55},
    "negative": {"negative_kl": 0.05},
    "negative, old": {"negative_kl": 0.05, "negative_anchor": "old"},
}


@pytest.mark.parametrize("name", REJECTIONS)
@pytest.mark.parametrize("judged", ["mismatch", "sampler"])
@pytest.mark.parametrize("base", ["minirl", "dapo"])
def test_rejections_equal_the_reference(name, judged, base) -> None:
    """Some responses are rejected, some are not; denominators are those of all."""
    rejection = dataclasses.replace(LossConfig().rejection, ratio=judged, **REJECTIONS[name])
    cfg = dataclasses.replace(PRESETS[base], rejection=rejection)
    fractions, learning = [], 0.0
    for seed in range(3):
        logprobs, entropy, batch = random_batch(seed)
        batch = per_response(batch, [-1.0, -0.5, 1.5])
        metrics = assert_equals_the_reference(cfg, logprobs, entropy, batch)
        fractions.append(metrics[f"rejection/{name.split(',')[0]}"])
        learning += metrics["tokens that learn"]
    assert 0 < np.mean(fractions) < 1
    assert learning > 2


def test_only_negative_advantages_are_masked_for_having_moved() -> None:
    """Not 0: its tokens pull at nothing, but would be left out of a weighted KL penalty."""
    logprobs, entropy, batch = random_batch(1)
    batch = dataclasses.replace(batch, sampler_logprobs=logprobs + np.float32(1.0))
    rejection = dataclasses.replace(LossConfig().rejection, negative_kl=0.5)
    cfg = dataclasses.replace(presets.minirl(), rejection=rejection)
    batch = per_response(batch, [0.0, -1.0, 1.0])
    _, _, metrics = value_and_gradients(logprobs, entropy, batch, cfg)
    assert metrics["rejection/negative"] == pytest.approx(2 / 9)  # the second response's


def test_a_rejected_response_leaves_the_others_as_they_were() -> None:
    """Its tokens get no gradient; those of the others get exactly what they had."""
    logprobs, entropy, batch = random_batch(1)
    sampler = np.array(batch.sampler_logprobs)
    sampler[0, 6] = logprobs[0, 6] + 20.0  # the second response has a catastrophic token
    batch = dataclasses.replace(batch, sampler_logprobs=sampler)
    for base in (presets.minirl(), presets.dapo(), presets.grpo(), presets.dr_grpo(9)):
        base = dataclasses.replace(base, kl=presets.minirl().kl)
        veto = dataclasses.replace(base.rejection, ratio="sampler", veto=1e-4)
        _, (before, _), _ = value_and_gradients(logprobs, entropy, batch, base)
        cfg = dataclasses.replace(base, rejection=veto)
        _, (after, _), metrics = value_and_gradients(logprobs, entropy, batch, cfg)
        np.testing.assert_array_equal(after[SEGMENTS != 2], before[SEGMENTS != 2])
        np.testing.assert_array_equal(after[SEGMENTS == 2], 0.0)
        assert before[0, 6] != 0 or before[0, 7] != 0
        assert metrics["rejection/veto"] == pytest.approx(2 / 9)


@pytest.mark.parametrize("name", ["geometric", "k3", "veto", "negative"])
def test_a_response_exactly_at_a_bound_is_kept_and_a_nan_is_not_hidden(name) -> None:
    """One token, ratio pi_old / mu = 1/2 and pi / mu = 1/2, A < 0."""
    half = np.float32(np.log(np.float32(0.5)))
    bounds = {
        "geometric": {"geometric_low": float(np.exp(half))},
        "k3": {"k3": float(np.float32(0.5) - 1 - half)},
        "veto": {"veto": float(np.exp(half))},
        "negative": {"negative_kl": float(-half)},
    }[name]
    zeros = np.zeros((1, 1), np.int32)
    batch = dataclasses.replace(
        jax.tree.map(lambda x: x[:1, 1:2], random_batch(0)[2]),
        segment_ids=zeros + 1,
        sampler_logprobs=np.zeros((1, 1), np.float32),
        old_logprobs=np.full((1, 1), half),
        advantages=np.float32([[-1.0]]),
    )
    logprobs = np.full((1, 1), half)

    def gone(bounds, logprobs, batch) -> tuple[float, float]:
        rejection = dataclasses.replace(LossConfig().rejection, **bounds)
        cfg = dataclasses.replace(presets.minirl(), rejection=rejection)
        loss, _, metrics = value_and_gradients(logprobs, logprobs, batch, cfg)
        return metrics[f"rejection/{name}"], float(loss)

    assert gone(bounds, logprobs, batch)[0] == 0.0
    tighter = {
        key: value * (0.99 if key in ("k3", "negative_kl") else 1.01)
        for key, value in bounds.items()
    }
    assert gone(tighter, logprobs, batch)[0] == 1.0
    nan = np.full((1, 1), np.nan, np.float32)
    broken = dataclasses.replace(batch, old_logprobs=nan)
    fraction, loss = gone(bounds, nan, broken)
    assert fraction == 0.0
    assert np.isnan(loss)


def test_a_nan_beside_a_catastrophic_token_is_not_hidden() -> None:
    """The veto alone would take the whole response out, and the fault with it."""
    logprobs, entropy, batch = random_batch(1)
    sampler, old = np.array(batch.sampler_logprobs), np.array(batch.old_logprobs)
    sampler[0, 6], old[0, 7] = logprobs[0, 6] + 20.0, np.nan
    batch = dataclasses.replace(batch, sampler_logprobs=sampler, old_logprobs=old)
    veto = dataclasses.replace(LossConfig().rejection, ratio="sampler", veto=1e-4)
    cfg = dataclasses.replace(presets.ppo(), rejection=veto)
    loss, _, metrics = value_and_gradients(logprobs, entropy, batch, cfg)
    assert metrics["rejection/veto"] == 0.0
    assert np.isnan(loss)


def test_overlong_responses_pull_at_nothing_and_still_count_in_the_baseline() -> None:
    rewards = np.float32([[1.0, 0.0, 0.0, 1.0]])
    valid, truncated = np.ones((1, 4), bool), np.array([[False, True, False, False]])
    kept = response_advantages(rewards, valid, truncated, presets.minirl().advantage)
    masked = response_advantages(rewards, valid, truncated, presets.dapo().advantage)
    np.testing.assert_allclose(kept, [[0.5, -0.5, -0.5, 0.5]])
    np.testing.assert_allclose(masked, np.array([[1, 0, -1, 1]]) * np.sqrt(3 / 4), rtol=1e-6)


def test_old_logprobs_are_read_by_those_that_say_so() -> None:
    """reads_old decides whether later mini-batches need a scoring pass."""
    veto = dataclasses.replace(LossConfig().rejection, veto=1e-4)
    on_sampler = dataclasses.replace(presets.dppo_tv(), rejection=veto)
    configs = [*PRESETS.values(), on_sampler]
    configs.append(
        dataclasses.replace(on_sampler, rejection=dataclasses.replace(veto, ratio="sampler"))
    )
    logprobs, entropy, batch = random_batch(19, spread=1.5)
    batch = per_response(batch, [1.0, -0.5, -1.5])
    weights = token_weights(MASK, SEGMENTS, per="token")
    answers = set()
    for cfg in configs:
        losses = [
            float(policy_loss(logprobs, entropy, b, weights, cfg).loss)
            for b in (batch, dataclasses.replace(batch, old_logprobs=batch.ref_logprobs))
        ]
        answers.add(cfg.reads_old)
        if not cfg.reads_old:
            assert losses[0] == losses[1]
    assert answers == {True, False}
