"""Samples against exact probabilities, and reported log-probabilities against the same."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrl_llm.rollout import sampling
from jaxrl_llm.rollout.sampling import Samplers, keep, sample, seed_words
from tests.reference.sampling import distribution

LOGITS = np.array([1.0, 0.3, -0.5, 2.0, 0.3, -3.0, 1.2, 0.0], np.float32)
GREEDY = "greedy ignores top_p"
SETTINGS: dict[str, dict[str, float]] = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.5},
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 3},
    "top_k splits a tie": {"top_k": 4},
    "top_k of one": {"top_k": 1},
    "all": {"temperature": 1.4, "top_p": 0.85, "top_k": 5},
    GREEDY: {"temperature": 0.0, "top_p": 0.2, "top_k": 2},
}
DRAWS = 20_000

sample_jit = jax.jit(sample)


@pytest.fixture(params=[64, 3, 1], ids=["one block", "three blocks", "a block for each token"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The vocabulary in so many blocks; the last of three is filled up."""
    monkeypatch.setattr(sampling, "BLOCK", request.param)
    jax.clear_caches()
    yield
    jax.clear_caches()


def samplers(seeds: np.ndarray, settings: dict[str, float]) -> Samplers:
    count = len(seeds)
    return Samplers(
        seed=np.stack([seed_words(int(seed)) for seed in seeds]),
        temperature=np.full(count, settings.get("temperature", 1.0), np.float32),
        top_p=np.full(count, settings.get("top_p", 1.0), np.float32),
        top_k=np.full(count, settings.get("top_k", 0), np.int32),
    )


def draw(settings: dict[str, float], *, position: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities of DRAWS rows that differ in nothing but the seed."""
    logits = np.broadcast_to(LOGITS, (DRAWS, LOGITS.size))
    positions = np.full(DRAWS, position, np.int32)
    tokens, logprobs = sample_jit(logits, positions, samplers(np.arange(DRAWS), settings))
    return np.asarray(tokens), np.asarray(logprobs)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", SETTINGS)
def test_samples_follow_the_exact_distribution(name: str) -> None:
    expected = distribution(LOGITS, **SETTINGS[name]) * DRAWS
    tokens, _ = draw(SETTINGS[name])
    counts = np.bincount(tokens, minlength=LOGITS.size)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    surprise = np.sum((counts - expected)[possible] ** 2 / expected[possible])
    freedom = max(np.count_nonzero(possible) - 1, 1)
    assert stats.chi2.sf(surprise, freedom) > 1e-3


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", SETTINGS)
def test_logprobs_are_of_the_distribution_that_was_sampled(name: str) -> None:
    settings = SETTINGS[name]
    tokens, logprobs = draw(settings)
    # Greedy reports what temperature 1 would have given, for its own distribution says nothing.
    told = {} if settings.get("temperature") == 0 else settings
    expected = np.log(distribution(LOGITS, **told)[tokens])
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)
    assert np.all(logprobs <= 0)


@pytest.mark.usefixtures("blocks")
def test_greedy_takes_the_first_of_the_highest() -> None:
    logits = np.array([[0, 1, 3, 2, 3, 3, 1, 3], [5, 0, 0, 0, 0, 0, 0, 6]], np.float32)
    tokens, _ = sample_jit(logits, np.zeros(2, np.int32), samplers(np.arange(2), SETTINGS[GREEDY]))
    np.testing.assert_array_equal(tokens, [2, 7])


def test_rows_of_one_batch_keep_their_own_settings() -> None:
    names = list(SETTINGS)
    rows = [samplers(np.array([5]), SETTINGS[name]) for name in names]
    together = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
    positions = np.full(len(names), 3, np.int32)
    logits = np.broadcast_to(LOGITS, (len(names), LOGITS.size))
    tokens, logprobs = sample_jit(logits, positions, together)
    for index, row in enumerate(rows):
        alone = sample_jit(LOGITS[None], positions[:1], row)
        assert (tokens[index], logprobs[index]) == (alone[0][0], alone[1][0])


def test_noise_depends_on_seed_and_position() -> None:
    here, _ = draw({}, position=7)
    there, _ = draw({}, position=8)
    again, _ = draw({}, position=7)
    np.testing.assert_array_equal(here, again)
    # Independent draws agree as often as two samples of the distribution do.
    chance = np.sum(distribution(LOGITS) ** 2)
    assert abs(np.mean(here == there) - chance) < 5 * np.sqrt(chance / DRAWS)
    assert abs(np.mean(here[1:] == here[:-1]) - chance) < 5 * np.sqrt(chance / DRAWS)


def test_seeds_differ_beyond_32_bits() -> None:
    np.testing.assert_array_equal(seed_words(2**63 - 1), [2**31 - 1, 2**32 - 1])
    seeds = np.array([1, 1 + 2**32, 1 + 2**40, 1 + 2**62])
    logits = np.zeros((4, 4096), np.float32)
    tokens, _ = sample_jit(logits, np.zeros(4, np.int32), samplers(seeds, {}))
    assert len(set(np.asarray(tokens).tolist())) == 4


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]] * 4))
    kept = keep(logits, jnp.array([0.5, 0.51, 0.76, 1.0]), jnp.full(4, 4))
    np.testing.assert_array_equal(jnp.isfinite(kept).sum(axis=-1), [1, 2, 3, 4])


def test_top_p_of_one_keeps_tokens_beyond_a_rounded_sum_of_one() -> None:
    # A thousand equal shares sum to more than 1 in float32 before the last of them.
    kept = keep(jnp.zeros((1, 1000)), jnp.ones(1), jnp.array([1000]))
    assert np.all(np.isfinite(kept))


@pytest.mark.usefixtures("blocks")
def test_logits_that_are_not_finite_give_a_logprob_that_is_not() -> None:
    logits = np.array([[0.0, np.nan, 1.0], [np.inf, np.inf, 0.0], [0.0, 0.0, 1.0]], np.float32)
    tokens, logprobs = sample_jit(logits, np.zeros(3, np.int32), samplers(np.arange(3), {}))
    assert np.all((tokens >= 0) & (tokens < 3))
    np.testing.assert_array_equal(np.isfinite(logprobs), [False, False, True])
