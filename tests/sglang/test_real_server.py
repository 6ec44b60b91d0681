"""The contract, on the real server: what SGLang says is what our forward pass computes.

One server for all tests, with random weights of a model that has every kind of part SGLang computes
as we do. Log-probabilities are compared to 1e-3 nats and are equal to about 1e-5.
"""

import concurrent.futures
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import loop
from jaxrl_llm.config import RolloutConfig, RunConfig
from jaxrl_llm.data.rewards import Verdict, Verifier
from jaxrl_llm.evaluate import EvaluationConfig
from jaxrl_llm.learner.publish import PublishConfig
from jaxrl_llm.learner.state import OptimizerConfig
from jaxrl_llm.learner.step import LearnerConfig
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.rollout import wire
from jaxrl_llm.rollout.engine import EngineError, EngineFailure, Request
from jaxrl_llm.rollout.sampling import keep
from jaxrl_llm.rollout.servers import OnPublish
from jaxrl_llm.rollout.sglang import SGLangConfig
from jaxrl_llm.types import Prompt, Rollout, SamplingParams
from tests.sglang.learner import (
    KEY,
    MODEL,
    NATS,
    PROBE,
    Learner,
    agreement,
    as_sampled,
    engine,
    export,
    finished,
    ours,
    params,
    requests,
)
from tests.sglang.server import RealServer, real_server
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """It serves params(0) under the label "default"."""
    folder = tmp_path_factory.mktemp("server")
    export(params(0), folder / "model")
    flags = ("--skip-tokenizer-init",)
    with real_server(folder / "model", folder / "log", *flags, api_key=KEY) as running:
        yield running


@pytest.fixture
def client(server: RealServer) -> Iterator[httpx.Client]:
    """Speaks to the server without our engine."""
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=120) as client:
        yield client


@pytest.fixture
def default_weights(client: httpx.Client, tmp_path: Path) -> None:
    """Whatever tests before have published, the server has params(0) again."""
    export(params(0), tmp_path / "default")
    update(client, tmp_path / "default", "default")


def update(client: httpx.Client, folder: Path, label: str) -> None:
    body = {"model_path": str(folder), "weight_version": label, "flush_cache": True}
    answer = client.post("/update_weights_from_disk", json=body)
    assert answer.status_code == 200, answer.text


CONTRACT = wire.Contract(
    MODEL, {"default": 0}, routes=True, keep_spanning_routes=False, decode_text=lambda _: ""
)


def ask(client: httpx.Client, request: Request) -> dict[str, Any]:
    body = wire.payload(
        request, rid=f"{request.prompt.prompt_id}-{request.seed}", routes=True, prompt_logprobs=True
    )
    answer = client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ask_all(client: httpx.Client, asked: Sequence[Request]) -> list[dict[str, Any]]:
    """At once, so that the server answers them in batches."""
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as threads:
        return list(threads.map(lambda request: ask(client, request), asked))


# What the server reports is what our forward pass computes.


def test_every_log_probability_and_the_routes_are_ours(
    client: httpx.Client, default_weights: None
) -> None:
    asked = requests(24, SamplingParams(max_new_tokens=40))
    pairs, sampled = [], []
    for request, value in zip(asked, ask_all(client, asked), strict=True):
        rollout = wire.parse(value, request, CONTRACT)
        expected = as_sampled(params(0), rollout).logprobs
        reported = np.where(rollout.loss_mask, rollout.sampler_logprobs, 0)
        prompt = request.prompt.tokens.size - 1
        reported[:prompt] = wire.prompt_logprobs(value, request, MODEL.vocab_size)
        np.testing.assert_allclose(reported, expected, rtol=0, atol=NATS)
        pairs.append((rollout, params(0)))
        sampled.append(reported)
    assert np.std(np.concatenate(sampled)) > 0.5  # else a tolerance of 1e-3 says little
    assert sum(rollout.tokens.size - 1 for rollout, _ in pairs) > 1000
    assert agreement(pairs) >= 0.999


def test_cached_and_uncached_requests_carry_the_same_routes(
    client: httpx.Client, default_weights: None
) -> None:
    (request,) = requests(1, SamplingParams(max_new_tokens=8), prompt_length=40)
    body = wire.payload(request, rid="cold", routes=True)
    cold = client.post("/generate", json=body).json()
    warm = client.post("/generate", json=body | {"rid": "warm"}).json()
    assert cold["meta_info"]["cached_tokens"] == 0
    assert warm["meta_info"]["cached_tokens"] == 39
    first, second = (wire.parse(value, request, CONTRACT) for value in (cold, warm))
    np.testing.assert_array_equal(second.tokens, first.tokens)
    np.testing.assert_array_equal(second.routes, first.routes)
    np.testing.assert_allclose(second.sampler_logprobs, first.sampler_logprobs, rtol=0, atol=1e-5)
    assert agreement([(second, params(0))]) >= 0.999


SETTINGS = {
    "plain": SamplingParams(max_new_tokens=24),
    "temperature": SamplingParams(max_new_tokens=24, temperature=0.7),
    "hot": SamplingParams(max_new_tokens=24, temperature=1.7),
    "greedy": SamplingParams(max_new_tokens=24, temperature=0.0),
    "top_k": SamplingParams(max_new_tokens=24, top_k=5),
    "top_p": SamplingParams(max_new_tokens=24, top_k=16, top_p=0.8),
    "top_k and top_p": SamplingParams(max_new_tokens=24, top_k=5, top_p=0.9, temperature=0.8),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_log_probabilities_are_of_the_distribution_sampled_from(
    client: httpx.Client, default_weights: None, name: str
) -> None:
    sampling = SETTINGS[name]
    asked = requests(8, sampling)
    renormalised = 0
    for request, value in zip(asked, ask_all(client, asked), strict=True):
        rollout = wire.parse(value, request, CONTRACT)
        logits = as_sampled(params(0), rollout).logits[rollout.loss_mask]
        # Greedy sampling reports those at temperature 1.
        expected = log_softmax(logits / (sampling.temperature or 1))
        if sampling.top_k:
            scaled = jnp.asarray(logits / sampling.temperature)
            top_p, top_k = (np.full(len(logits), x) for x in (sampling.top_p, sampling.top_k))
            kept = np.asarray(keep(scaled, jnp.asarray(top_p), jnp.asarray(top_k)))
            renormalised += np.sum(np.isinf(kept))
            expected = log_softmax(kept)
        chosen = rollout.tokens[1:][rollout.loss_mask]
        expected = expected[np.arange(chosen.size), chosen]
        reported = rollout.sampler_logprobs[rollout.loss_mask]
        np.testing.assert_allclose(reported, expected, rtol=0, atol=NATS)
        if name == "greedy":
            np.testing.assert_array_equal(chosen, np.argmax(logits, axis=-1))
    assert (renormalised > 0) == (sampling.top_k > 0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - np.max(logits, axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def test_a_seed_fixes_a_response_alone_and_among_others(
    client: httpx.Client, default_weights: None
) -> None:
    asked = requests(12, SamplingParams(max_new_tokens=24))
    together = [value["output_ids"] for value in ask_all(client, asked)]
    assert [ask(client, request)["output_ids"] for request in asked[:3]] == together[:3]
    other = dataclasses.replace(asked[0], seed=5)
    assert ask(client, other)["output_ids"] != together[0]


def test_a_stop_token_is_part_of_the_response(client: httpx.Client, default_weights: None) -> None:
    (request,) = requests(1, SamplingParams(max_new_tokens=64, stop_token_ids=(3, 4)))
    rollout = wire.parse(ask(client, request), request, CONTRACT)
    response = rollout.tokens[request.prompt.tokens.size :]
    assert rollout.finish == "stop"
    assert response[-1] in (3, 4)
    assert not set(response[:-1].tolist()) & {3, 4}
    expected = as_sampled(params(0), rollout).logprobs[rollout.loss_mask]
    reported = rollout.sampler_logprobs[rollout.loss_mask]
    np.testing.assert_allclose(reported, expected, rtol=0, atol=NATS)


# Through the engine: weights that were published are those that sample.


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    return Learner(tmp_path / "weights")


def versions(rollout: Rollout) -> list[int]:
    """Of the sampled tokens, in order, each once."""
    return list(dict.fromkeys(rollout.weight_version[rollout.loss_mask].tolist()))


def check_sampled_by(rollouts: Sequence[Rollout], weights: Params) -> None:
    for rollout in rollouts:
        expected = as_sampled(weights, rollout).logprobs[rollout.loss_mask]
        reported = rollout.sampler_logprobs[rollout.loss_mask]
        np.testing.assert_allclose(reported, expected, rtol=0, atol=NATS)
    assert agreement([(rollout, weights) for rollout in rollouts]) >= 0.999


def test_rollouts_are_those_of_the_weights_published_last(
    server: RealServer, learner: Learner
) -> None:
    asked = requests(8, SamplingParams(max_new_tokens=24))
    with engine(server, learner) as sampler:
        for version, seed in ((0, 0), (3, 1), (4, 2)):
            sampler.publish(params(seed), version)
            rollouts = finished(sampler.generate(asked))
            assert [versions(rollout) for rollout in rollouts] == [[version]] * len(asked)
            check_sampled_by(rollouts, params(seed))
            metrics = sampler.report().metrics
            assert metrics["engine/servers"] == 1
            assert metrics["engine/probe_error"] < NATS


def one_small_update(weights: Params) -> Params:
    """Moves log-probabilities by far less than the probe's tolerance."""
    return jax.tree.map(lambda leaf: leaf * np.float32(1.002), weights)


@pytest.mark.parametrize("change", ["other weights", "one small update"])
def test_the_probe_catches_a_server_left_on_old_weights(
    server: RealServer, learner: Learner, change: str
) -> None:
    new = params(1) if change == "other weights" else one_small_update(params(0))
    tokens = PROBE.prompt.tokens
    moved = np.mean(np.abs(ours(new, tokens).logprobs - ours(params(0), tokens).logprobs))
    tolerance = SGLangConfig().probe_tolerance
    assert (moved > tolerance) == (change == "other weights")
    with engine(server, learner) as sampler:
        sampler.publish(params(0), 0)
        learner.misled = True
        with pytest.raises(EngineError, match=r"version 1 .* samples from other weights") as raised:
            sampler.publish(new, 1)
        assert f"{server.url} holds version 0 ({learner.published[0].label})" in str(raised.value)
        assert KEY not in str(raised.value)
        assert sampler.report().metrics["engine/servers"] == 0
        learner.misled = False
        sampler.publish(new, 2)  # the same server, told the truth
        check_sampled_by(finished(sampler.generate(requests(2, SETTINGS["plain"]))), new)


def test_weights_loaded_behind_the_engines_back_are_not_learned_from(
    server: RealServer, client: httpx.Client, learner: Learner, tmp_path: Path
) -> None:
    export(params(2), tmp_path / "stranger")
    with engine(server, learner, health_seconds=5.0) as sampler:
        sampler.publish(params(1), 1)
        update(client, tmp_path / "stranger", "stranger")
        rollouts = finished(sampler.generate(requests(4, SETTINGS["plain"])))
        events = " ".join(sampler.report().events)
    assert [versions(rollout) for rollout in rollouts] == [[1]] * 4
    check_sampled_by(rollouts, params(1))
    assert "stranger" in events


LONG = SamplingParams(max_new_tokens=400)


def wait_until_sampling(client: httpx.Client, count: int) -> None:
    """Until the server has `count` responses under way, each with some tokens."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        load = client.get("/v1/loads").json()["loads"][0]
        if load["num_running_reqs"] == count and load["num_used_tokens"] >= 50 * count:
            return
        time.sleep(0.02)
    raise AssertionError(f"the server never sampled {count} responses at once")


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_weights_published_during_generation(
    server: RealServer, client: httpx.Client, learner: Learner, mode: OnPublish
) -> None:
    asked = requests(2, LONG, prompt_length=20)
    with engine(server, learner, on_publish=mode) as sampler:
        sampler.publish(params(0), 0)
        responses = sampler.generate(asked)
        wait_until_sampling(client, len(asked))
        sampler.publish(params(1), 1)
        rollouts = finished(responses)
        metrics = sampler.report().metrics
        again = finished(sampler.generate(asked))
    check_sampled_by(again, params(1))
    if mode == "abort":
        assert metrics["engine/resubmitted"] == len(asked)
        assert metrics["engine/spanning"] == 0
        assert [versions(rollout) for rollout in rollouts] == [[1]] * len(asked)
        for rollout, other in zip(rollouts, again, strict=True):
            np.testing.assert_array_equal(rollout.tokens, other.tokens)
        check_sampled_by(rollouts, params(1))
    else:
        assert metrics["engine/resubmitted"] == 0
        assert metrics["engine/spanning"] == len(asked)
        for rollout in rollouts:
            assert versions(rollout) == [0, 1]
            assert rollout.routes is None
            check_spanning(rollout, recomputed=mode == "retract")


def check_spanning(rollout: Rollout, *, recomputed: bool) -> None:
    """Tokens have the log-probabilities that the weights of their own version give them.

    For the newer tokens that is so only if the older ones' keys and values were computed anew. The
    experts are not known here, so a few tokens may be elsewhere.
    """
    before, after = (rollout.weight_version == version for version in (0, 1))
    old, new = (ours(params(seed), rollout.tokens).logprobs for seed in (0, 1))
    assert close(rollout, before, old) > 0.9
    assert close(rollout, before, new) < 0.1
    assert (close(rollout, after, new) > 0.9) == recomputed


def close(rollout: Rollout, where: np.ndarray, expected: np.ndarray) -> float:
    """Share of the tokens there that are within NATS of what was expected."""
    return float(np.mean(np.abs(rollout.sampler_logprobs - expected)[where] < NATS))


def test_a_learner_that_starts_again_meets_no_prefix_of_later_weights(
    server: RealServer, client: httpx.Client, learner: Learner
) -> None:
    """In place, a response that outlives its weights leaves later ones' prefixes in the cache.

    The same version with the same weights is published again after a restart, under its old label.
    """
    asked = requests(2, LONG, prompt_length=20)
    with engine(server, learner, on_publish="in_place") as sampler:
        sampler.publish(params(0), 0)
        responses = sampler.generate(asked)
        wait_until_sampling(client, len(asked))
        sampler.publish(params(1), 1)
        spanning = finished(responses)
    beginnings = [rollout.tokens[:-40] for rollout in spanning]
    with engine(server, learner, on_publish="in_place") as sampler:
        sampler.publish(params(0), 0)
        # Prompts that are cached as far as they go, were it not for the weights.
        again = [
            dataclasses.replace(request, prompt=dataclasses.replace(request.prompt, tokens=tokens))
            for request, tokens in zip(requests(2, SETTINGS["plain"]), beginnings, strict=True)
        ]
        check_sampled_by(finished(sampler.generate(again)), params(0))


def test_routes_of_spanning_responses_are_kept_where_asked_for(
    server: RealServer, client: httpx.Client, learner: Learner
) -> None:
    """After a retraction they are the newer weights', of the older tokens too."""
    asked = requests(2, LONG, prompt_length=20)
    with engine(server, learner, on_publish="retract", keep_spanning_routes=True) as sampler:
        sampler.publish(params(0), 0)
        responses = sampler.generate(asked)
        wait_until_sampling(client, len(asked))
        sampler.publish(params(1), 1)
        rollouts = finished(responses)
    assert [versions(rollout) for rollout in rollouts] == [[0, 1]] * len(asked)
    assert agreement([(rollout, params(1)) for rollout in rollouts]) >= 0.999


def test_a_token_outside_the_vocabulary_never_reaches_the_server(
    server: RealServer, client: httpx.Client, learner: Learner
) -> None:
    """It would end the server's process."""
    (good,) = requests(1, SETTINGS["plain"])
    prompt = Prompt("p1", np.array([1, MODEL.vocab_size], np.int32), "", "")
    bad = dataclasses.replace(good, prompt=prompt)
    with engine(server, learner) as sampler:
        sampler.publish(params(0), 0)
        outcomes = list(sampler.generate([bad, good]))
    failures = [outcome for outcome in outcomes if isinstance(outcome, EngineFailure)]
    assert [failure.cause for failure in failures] == ["bad_token"]
    check_sampled_by([o for o in outcomes if isinstance(o, Rollout)], params(0))
    assert client.get("/health_generate").status_code == 200


# The protocol.


def test_an_unknown_sampling_field_is_refused_and_ours_are_known(client: httpx.Client) -> None:
    (request,) = requests(1, SamplingParams(max_new_tokens=2))
    body = wire.payload(request, rid="unknown", routes=True)
    body["sampling_params"]["min_q"] = 0.1
    answer = client.post("/generate", json=body)
    assert answer.status_code == 400
    assert "unknown field `min_q`" in answer.text


def test_fresh_answers_have_the_keys_of_the_recorded_ones(client: httpx.Client) -> None:
    """The fast tests rely on the recording; a server that answers otherwise must be noticed."""
    recorded = json.loads(
        (Path(__file__).parent.parent / "recorded" / "sglang_0.5.23.json").read_text()
    )
    (request,) = requests(1, SamplingParams(max_new_tokens=6))
    value = ask(client, request)
    old = recorded["basic"]["response"]
    # Text comes from a tokenizer alone.
    assert old.keys() - {"text"} <= value.keys()
    assert old["meta_info"].keys() <= value["meta_info"].keys()
    span = value["meta_info"]["weight_versions"][0]
    assert span.keys() == old["meta_info"]["weight_versions"][0].keys()
    for path in ("model_info", "server_info"):
        fresh = client.get(f"/{path}").json()
        assert recorded[path]["response"].keys() <= fresh.keys()
    truncated = ask(client, requests(1, SETTINGS["top_p"])[0])
    assert recorded["top_p"]["response"]["meta_info"].keys() <= truncated["meta_info"].keys()
    assert client.get("/server_info").json()["version"] == recorded["version"]


def test_the_api_key_is_asked_for_and_kept_secret(server: RealServer, client: httpx.Client) -> None:
    assert httpx.get(f"{server.url}/model_info").status_code == 401
    assert client.get("/model_info").status_code == 200
    command_line = Path(f"/proc/{server.process.pid}/cmdline").read_text()
    assert "sglang_serve.py" in command_line
    assert KEY not in command_line
    assert "'api_key': '(the API key)'" in server.log_text()
    assert KEY not in server.log_text()


# The whole job.


def test_a_run_with_r3_learns_and_publishes_every_step(
    server: RealServer,
    client: httpx.Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rewards are shares of the digit 7, for which five steps are enough."""

    def score(_: Verifier, texts: Sequence[tuple[str, str]]) -> list[Verdict]:
        return [Verdict(text.count("7") / max(1, len(text)), "correct") for text, _ in texts]

    monkeypatch.setattr(Verifier, "score", score)
    monkeypatch.setenv("SGLANG_API_KEY", KEY)
    records = list(loop.run(five_steps(server, tmp_path / "run")))
    assert [record.phase for record in records] == ["eval", *["rl"] * 5, "eval"]
    for version, record in enumerate(records[1:-1]):
        metrics = record.metrics
        rollouts = [rollout for group in record.groups for rollout in group.rollouts]
        assert len(rollouts) == 64
        assert [versions(rollout) for rollout in rollouts] == [[version]] * len(rollouts)
        assert metrics["engine/probe_error"] < NATS
        assert metrics["rollout/staleness"] == 0
        assert metrics["routing/replay_coverage"] == 1
        assert metrics["routing/provenance_sampler"] == 1
        assert metrics["routing/agreement"] >= 0.999
        # The worst token of the step, so every one is within NATS of the learner's.
        assert abs(np.log(metrics["mismatch/ratio_max"])) < NATS
        assert abs(np.log(metrics["mismatch/ratio_min"])) < NATS
        assert metrics["rollout/failures"] == metrics["rollout/dropped_groups"] == 0
    before, after = (
        np.mean([r.reward for group in record.groups for r in group.rollouts])
        for record in (records[0], records[-1])
    )
    assert after > before + 0.2
    assert client.get("/model_info").json()["weight_version"].startswith("v5-")


def five_steps(server: RealServer, run_dir: Path) -> RunConfig:
    """From random weights, without a cold start."""
    config = tiny_config(run_dir)
    return dataclasses.replace(
        config,
        steps=5,
        model=MODEL,
        cold_start=dataclasses.replace(config.cold_start, steps=0),
        rollout=RolloutConfig(
            groups=8,
            samples=8,
            max_new_tokens=20,
            sglang=SGLangConfig(servers=(server.url,), max_length=28, probe_tolerance=NATS),
            publish=PublishConfig(dtype="float32"),
        ),
        learner=LearnerConfig(
            mini_batches=2, replay="r3", optimizer=OptimizerConfig(learning_rate=2e-2)
        ),
        evaluation=EvaluationConfig(samples=4, pass_k=1, resamples=100, greedy=False),
    )
