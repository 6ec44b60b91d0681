"""The passes over an enumeration against the engine that samples, jax.grad and plain sums."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.arrays import NO_ROUTE
from jaxrl_llm.first_order.gradients import sequence_gradient
from jaxrl_llm.first_order.passes import Cotangent, flat, make_passes
from jaxrl_llm.model.config import ComputeConfig
from jaxrl_llm.model.transformer import Params, make_forward
from jaxrl_llm.rollout.engine import Request
from jaxrl_llm.rollout.local import LocalEngine, LocalEngineConfig
from jaxrl_llm.rollout.precision import Precision
from jaxrl_llm.types import Prompt, Rollout, SamplingParams
from tests.first_order.tiny import (
    LENGTH,
    MODEL,
    PARAMS,
    STOP,
    TEMPERATURE,
    behaviour,
    exact,
    moved,
    passes,
    responses,
    rewards,
)

MASK = np.asarray(responses().batch.loss_mask)


def objective(params: Params) -> jax.Array:
    """J_seq, from the model and the definition, without the package's passes."""
    batch = responses().batch
    forward = make_forward(MODEL, ComputeConfig(dispatch="dense"))
    output = forward(params, batch.inputs, batch.positions, batch.segment_ids, None)
    shares = jax.nn.log_softmax(output.hidden @ params["head"] / TEMPERATURE)
    logprobs = jnp.take_along_axis(shares, batch.targets[..., None], axis=-1)[..., 0]
    probabilities = jnp.exp(jnp.sum(logprobs * MASK, axis=1))
    return jnp.sum(probabilities * rewards()) / 2


@pytest.mark.parametrize("precision", ["float32", "fp8_e5m2"])
def test_the_responses_are_all_there_is(precision: Precision) -> None:
    """The probabilities of each prompt's responses add up to 1, whoever gives them."""
    who = behaviour(precision)
    for scores in (who.sampler, who.old, who.old_replayed):
        logprobs = np.sum(np.where(MASK, scores.logprobs, 0), axis=1, dtype=np.float64)
        for prompt in range(2):
            total = np.exp(logprobs[responses().prompt == prompt]).sum()
            assert total == pytest.approx(1, abs=1e-5)


def test_the_sequence_gradient_is_jax_grad_of_the_definition() -> None:
    params = moved(0.1)
    value, gradient = jax.jit(jax.value_and_grad(objective))(params)
    found, _ = sequence_gradient(passes(), params, responses(), rewards())
    assert found == pytest.approx(float(value), abs=1e-6)
    wanted = flat(gradient)
    assert np.linalg.norm(exact(params) - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_rows_in_parts_and_padding_change_nothing() -> None:
    """242 rows in three parts of 81, one row of padding among them."""
    pieces = make_passes(MODEL, ComputeConfig(dispatch="dense"), temperature=TEMPERATURE, rows=81)
    whole, batch = passes(), responses().batch
    scores, expected = pieces.score(PARAMS, batch), whole.score(PARAMS, batch)
    np.testing.assert_allclose(scores.logprobs[MASK], expected.logprobs[MASK], atol=1e-5)
    np.testing.assert_array_equal(scores.routes, expected.routes)
    rng = np.random.default_rng(0)
    by = Cotangent(*(np.where(MASK, rng.normal(size=(2, *MASK.shape)), 0).astype(np.float32)))
    left, right = (flat(p.pull_back(PARAMS, batch, by)) for p in (pieces, whole))
    assert np.linalg.norm(left - right) < 1e-5 * np.linalg.norm(right)
    values = rng.normal(size=len(MASK)).astype(np.float32)
    left, right = (flat(p.expectation(PARAMS, batch, values)[1]) for p in (pieces, whole))
    assert np.linalg.norm(left - right) < 1e-5 * np.linalg.norm(right)


def test_replayed_routes_are_used() -> None:
    who = behaviour("fp8_e5m2")
    batch = dataclasses.replace(responses().batch, routes=who.sampler.routes)
    np.testing.assert_array_equal(passes().score(PARAMS, batch).routes, who.sampler.routes)
    real = np.asarray(batch.segment_ids) > 0
    for scores in (who.sampler, who.old):
        assert np.all(scores.routes[real] >= 0)
        assert np.all(scores.routes[~real] == NO_ROUTE)
    assert np.any(who.sampler.routes != who.old.routes)


@pytest.mark.parametrize("precision", ["float32", "fp8_e4m3", "int4"])
def test_the_sampler_is_the_engine(precision: Precision) -> None:
    """What the engine reports of responses it samples stands in the row of that response."""
    config = LocalEngineConfig(precision, "same", slots=32, max_length=8, prefill_rows=8)
    engine = LocalEngine(config, MODEL, lambda ids: "")
    engine.publish(PARAMS, 0)
    sampling = SamplingParams(LENGTH, stop_token_ids=(STOP,), temperature=TEMPERATURE)
    prompts = [np.array(ids, np.int32) for ids in ((1,), (2, 3))]
    requests = [
        Request(Prompt(str(seed % 2), prompts[seed % 2], "", ""), seed, seed, sampling)
        for seed in range(64)
    ]
    batch, scores = responses().batch, behaviour(precision).sampler
    rows = {
        tuple(np.concatenate([i[:n], t[n - 1 : n]]).tolist()): row
        for row, (i, t, n) in enumerate(
            zip(batch.inputs, batch.targets, batch.segment_ids.sum(axis=1), strict=True)
        )
    }
    differences, agreeing = [], []
    for rollout in engine.generate(requests):
        assert isinstance(rollout, Rollout)
        row, size = rows[tuple(rollout.tokens.tolist())], rollout.tokens.size - 1
        found, mask = scores.logprobs[row, :size], rollout.loss_mask
        np.testing.assert_array_equal(mask, batch.loss_mask[row, :size])
        differences += np.abs(found - rollout.sampler_logprobs)[mask].tolist()
        agreeing += (scores.routes[row, :size] == rollout.routes).ravel().tolist()
    assert len(differences) > 100
    # A sum in another order may fall on the other side of a rounding boundary, but seldom.
    assert np.quantile(differences, 0.9) < 1e-4
    assert np.mean(agreeing) > 0.99
