"""The fake server as a true second engine: published weights, computed a second time, agree."""

import dataclasses
from pathlib import Path

import httpx
import jax
import numpy as np
import pytest

from jaxrl_llm.learner.publish import PublishConfig, Publisher
from jaxrl_llm.rollout import wire
from jaxrl_llm.rollout.local import LocalEngine
from jaxrl_llm.types import SamplingParams
from tests.rollout import engines
from tests.rollout.fake_samplers import HashSampler, ModelSampler
from tests.rollout.fake_sglang import FakeServer

MODEL = dataclasses.replace(
    engines.MODEL, moe=dataclasses.replace(engines.MODEL.moe, dense_layers=())
)
SAMPLER = ModelSampler(MODEL, max_length=32)
SETTINGS = [
    SamplingParams(9, stop_token_ids=(3,)),
    SamplingParams(14, temperature=0.7),
    SamplingParams(6, temperature=0.0),
    SamplingParams(12, top_p=0.8, top_k=10),
]


def words(ids: object) -> str:
    assert isinstance(ids, list)
    return " ".join(map(str, ids))


def test_a_published_model_answers_as_the_engine_in_process(tmp_path: Path) -> None:
    params = engines.params(1, MODEL)
    local = LocalEngine(engines.CONFIG, MODEL, words)
    local.publish(params, 7)
    publisher = Publisher(
        PublishConfig(dtype="float32"),
        MODEL,
        tmp_path,
        stop_token_ids=(3,),
        pad_token_id=0,
        max_length=32,
    )
    publication = publisher.publish(params, 7)
    requests = [engines.request(seed, sampling) for seed, sampling in enumerate(SETTINGS)]
    wanted = engines.by_prompt(local.generate(requests))
    contract = wire.Contract(MODEL, {publication.label: 7}, True, False, words)
    update = {"model_path": publication.path, "weight_version": publication.label}
    with FakeServer(SAMPLER, chunk=4) as server, httpx.Client(base_url=server.url) as client:
        assert client.post("/update_weights_from_disk", json=update, timeout=60).status_code == 200
        for request in requests:
            body = wire.payload(request, rid="r", routes=True, prompt_logprobs=True)
            value = client.post("/generate", json=body, timeout=60).json()
            rollout = wire.parse(value, request, contract)
            expected = wanted[request.prompt.prompt_id]
            np.testing.assert_array_equal(rollout.tokens, expected.tokens)
            np.testing.assert_array_equal(rollout.routes, expected.routes)
            np.testing.assert_array_equal(rollout.weight_version, expected.weight_version)
            assert (rollout.text, rollout.finish) == (expected.text, expected.finish)
            np.testing.assert_allclose(
                rollout.sampler_logprobs, expected.sampler_logprobs, atol=1e-5
            )
            prompt = wire.prompt_logprobs(value, request, MODEL.vocab_size)
            weights = SAMPLER.load(publication.path)
            tokens = request.prompt.tokens.tolist()
            np.testing.assert_allclose(prompt, SAMPLER.score(weights, tokens, 1.0), atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_forward_pass_agrees_with_what_was_sampled(temperature: float) -> None:
    weights = SAMPLER.load("")
    request = engines.request(5, SamplingParams(10, temperature=temperature))
    (rollout,) = engines.by_prompt(weights.engine.generate([request])).values()
    scored = SAMPLER.score(weights, rollout.tokens.tolist(), temperature)
    found = rollout.sampler_logprobs[rollout.loss_mask]
    np.testing.assert_allclose(found, scored[rollout.loss_mask], atol=1e-5)


def test_the_start_up_weights_can_be_given() -> None:
    given = ModelSampler(MODEL, max_length=32, params=engines.params(3, MODEL))
    leaves = jax.tree.leaves(given.load("").params)
    wanted = jax.tree.leaves(engines.params(3, MODEL))
    for leaf, other in zip(leaves, wanted, strict=True):
        np.testing.assert_array_equal(leaf, other)
    other = SAMPLER.load("")
    assert not np.array_equal(leaves[0], jax.tree.leaves(other.params)[0])


def test_hashed_routes_do_not_depend_on_what_comes_later() -> None:
    sampler = HashSampler(MODEL)
    weights = sampler.load("")
    rows = sampler.routes(weights, [4, 5, 6])
    np.testing.assert_array_equal(sampler.routes(weights, [4, 5, 6, 7])[:3], rows)
    assert not np.array_equal(sampler.routes(weights, [4, 5, 7])[2], rows[2])
