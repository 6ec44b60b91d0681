"""The fake server keeps the contract recorded from the real one, and its faults are what they say.

Whatever the client is tested against here, tests/sglang asks the real server.
"""

import base64
import concurrent.futures
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from jaxrl_llm.model.config import ModelConfig, MoEConfig
from tests.rollout import fake_faults as faults
from tests.rollout.fake_faults import Fault
from tests.rollout.fake_responses import RECORDED
from tests.rollout.fake_samplers import HashSampler, write_weights
from tests.rollout.fake_sglang import FakeServer

# The recorded server's shape.
MODEL = ModelConfig(vocab_size=512, num_layers=2, moe=MoEConfig(8, 2))
DENSE = ModelConfig(
    vocab_size=16, num_layers=3, moe=MoEConfig(8, 2, dense_layers=(1,), dense_width=8)
)
SAMPLER = HashSampler(DENSE)
BODY: dict[str, Any] = {
    "input_ids": [5, 6, 7],
    "sampling_params": {"max_new_tokens": 6, "sampling_seed": 3, "ignore_eos": True},
    "return_logprob": True,
    "return_routed_experts": True,
}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(SAMPLER) as made:
        yield made


@pytest.fixture
def client(server: FakeServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as made:
        yield made


def form(value: Any) -> Any:
    """Keys and types, without values."""
    if isinstance(value, dict):
        return {name: form(item) for name, item in value.items()}
    if isinstance(value, list):
        return [form(item) for item in value]
    return type(value)


def rows(answer: dict[str, Any], model: ModelConfig = DENSE) -> np.ndarray:
    data = base64.b64decode(answer["meta_info"]["routed_experts"])
    return np.frombuffer(data, "<i4").reshape(-1, model.num_layers, model.moe.experts_per_token)


# --- the recorded contract


@pytest.mark.parametrize("name", ["basic", "temp0.5", "greedy", "top_p", "lp_start_30", "seed1"])
def test_answers_have_the_recorded_form(name: str) -> None:
    record = copy.deepcopy(RECORDED[name])
    with FakeServer(HashSampler(MODEL)) as server, httpx.Client(base_url=server.url) as client:
        if record["response"]["meta_info"]["cached_tokens"]:  # it was recorded warm
            client.post("/generate", json=record["request"])
        answer = client.post("/generate", json=record["request"]).json()
    wanted = record["response"]
    masks = [wanted["meta_info"], answer["meta_info"]]
    if name == "top_p":  # which tokens are kept is the model's affair
        masks = [meta.pop("output_token_sampling_mask") for meta in masks]
        assert len(masks[0]) == len(masks[1])
    assert form(answer) == form(wanted)
    for key in ("prompt_tokens", "completion_tokens", "cached_tokens", "cached_tokens_details"):
        assert answer["meta_info"][key] == wanted["meta_info"][key], key
    for key in ("finish_reason", "weight_version", "weight_versions"):
        assert answer["meta_info"][key] == wanted["meta_info"][key], key
    if "routed_experts" in wanted["meta_info"]:
        assert rows(answer, MODEL).shape == rows(wanted, MODEL).shape


@pytest.mark.parametrize("name", ["err_param", "err_empty", "err_temp"])
def test_errors_are_the_recorded_ones(client: httpx.Client, name: str) -> None:
    answer = client.post("/generate", json=RECORDED[name]["request"])
    assert (answer.status_code, answer.json()) == (400, RECORDED[name]["response"])


def test_what_does_not_fit_is_refused(client: httpx.Client) -> None:
    body = BODY | {"sampling_params": {"max_new_tokens": 2046}}
    answer = client.post("/generate", json=body)
    assert answer.status_code == 400
    assert "maximum context length of 2048" in answer.json()["error"]["message"]


def test_information_has_the_recorded_fields(client: httpx.Client) -> None:
    for path, name in (("/model_info", "model_info"), ("/server_info", "server_info")):
        answer = client.get(path)
        assert answer.status_code == 200
        assert set(answer.json()) == set(RECORDED[name]["response"])
    assert client.get("/health").text == ""


@pytest.mark.parametrize("chunk", [1, 4])
def test_the_stop_token_ends_a_response_and_is_part_of_it(chunk: int) -> None:
    with FakeServer(SAMPLER, chunk=chunk) as server, httpx.Client(base_url=server.url) as client:
        free = client.post("/generate", json=BODY).json()["output_ids"]
        params = {"max_new_tokens": 6, "sampling_seed": 3, "stop_token_ids": [free[2]]}
        answer = client.post("/generate", json=BODY | {"sampling_params": params}).json()
        ignoring = BODY | {"sampling_params": params | {"ignore_eos": True}}
        assert client.post("/generate", json=ignoring).json()["output_ids"] == free
    assert answer["output_ids"] == free[:3]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": free[2]}
    assert answer["text"] == " ".join(map(str, free[:2]))


def test_an_unseeded_request_has_the_seed_42(client: httpx.Client) -> None:
    unseeded = BODY | {"sampling_params": {"max_new_tokens": 9}}
    seeded = BODY | {"sampling_params": {"max_new_tokens": 9, "sampling_seed": 42}}
    answers = [client.post("/generate", json=body).json() for body in (unseeded, seeded)]
    assert answers[0]["output_ids"] == answers[1]["output_ids"]


def test_an_answer_is_a_function_of_the_request(server: FakeServer) -> None:
    bodies = [
        BODY | {"sampling_params": {"max_new_tokens": 9, "sampling_seed": seed}, "rid": f"r{seed}"}
        for seed in range(12)
    ]

    def ask(body: dict[str, Any]) -> Any:
        answer = httpx.post(server.url + "/generate", json=body, timeout=30).json()
        return answer["output_ids"], answer["meta_info"]["routed_experts"]

    alone = [ask(body) for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, reversed(bodies))) == alone[::-1]
    assert len({tuple(ids) for ids, _ in alone}) > 6
    assert len(server.bodies("/generate")) == 24


def test_cached_prefixes_are_shared_under_one_key_alone(client: httpx.Client) -> None:
    def cached(**more: Any) -> int:
        answer = client.post("/generate", json=BODY | more).json()
        return int(answer["meta_info"]["cached_tokens"])

    assert [cached(), cached(), cached(logprob_start_len=1)] == [0, 2, 1]
    assert [cached(extra_key="k"), cached(extra_key="k")] == [0, 2]


def test_seeds_mean_nothing_to_a_server_that_is_not_deterministic() -> None:
    with FakeServer(SAMPLER, deterministic=False) as server:
        answers = [httpx.post(server.url + "/generate", json=BODY).json() for _ in range(3)]
    assert len({tuple(answer["output_ids"]) for answer in answers}) > 1


def test_log_probabilities_are_those_of_the_temperature_before_truncation(
    client: httpx.Client,
) -> None:
    params = {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.8, "top_k": 6}
    body = BODY | {"sampling_params": params, "return_sampling_mask": True, "logprob_start_len": 0}
    answer = client.post("/generate", json=body).json()
    meta, weights = answer["meta_info"], SAMPLER.load("")
    tokens = [5, 6, 7, *answer["output_ids"]]
    plain = [entry[0] for entry in meta["output_token_logprobs"]]
    np.testing.assert_allclose(plain, SAMPLER.score(weights, tokens, 0.5)[2:])
    assert np.all(np.array(meta["output_token_sampling_logprobs"]) >= plain)
    prompt = [entry[0] for entry in meta["input_token_logprobs"]]
    assert prompt[0] is None
    np.testing.assert_allclose(prompt[1:], SAMPLER.score(weights, [5, 6, 7], 1.0))
    np.testing.assert_array_equal(rows(answer), SAMPLER.routes(weights, tokens[:-1]))
    assert not rows(answer)[:, 1].any(), "a dense layer is never written"


# --- weights


def in_background(server: FakeServer, body: dict[str, Any]) -> Any:
    pool = concurrent.futures.ThreadPoolExecutor(1)
    future = pool.submit(lambda: httpx.post(server.url + "/generate", json=body, timeout=30).json())
    pool.shutdown(wait=False)
    return future


def test_an_update_changes_answers_and_labels(client: httpx.Client, tmp_path: Path) -> None:
    before = client.post("/generate", json=BODY).json()
    body = {"model_path": write_weights(tmp_path / "one", "1"), "weight_version": "v1"}
    answer = client.post("/update_weights_from_disk", json=body)
    recorded = RECORDED["update_weights_from_disk"]["response"]
    assert answer.json() == recorded | {"message": recorded["message"].replace("step-1", "v1")}
    after = client.post("/generate", json=BODY).json()
    assert after["output_ids"] != before["output_ids"]
    assert after["meta_info"]["weight_versions"] == [{"version": "v1", "start": 0, "end": 6}]
    assert after["meta_info"]["cached_tokens"] == 0, "the cache was flushed"
    assert client.get("/model_info").json()["weight_version"] == "v1"


def test_a_bad_path_keeps_the_weights(client: httpx.Client, tmp_path: Path) -> None:
    before = client.post("/generate", json=BODY).json()["output_ids"]
    body = {"model_path": str(tmp_path / "none"), "weight_version": "bad"}
    answer = client.post("/update_weights_from_disk", json=body)
    assert (answer.status_code, answer.json()["success"]) == (400, False)
    assert client.post("/generate", json=BODY).json()["output_ids"] == before
    assert client.get("/model_info").json()["weight_version"] == "default"


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_weights_may_change_during_a_response(
    server: FakeServer, client: httpx.Client, tmp_path: Path, mode: str
) -> None:
    new = write_weights(tmp_path / "new", "new")
    server.hold(tokens=2)
    running = in_background(server, BODY)
    server.wait_held(1)
    assert client.post("/pause_generation", json={"mode": mode}).status_code == 200
    server.release()  # from here on the pause alone holds it
    flushes = client.post("/flush_cache")
    assert flushes.status_code == (400 if mode == "in_place" else 200)
    body = {"model_path": new, "weight_version": "new", "flush_cache": mode != "in_place"}
    assert client.post("/update_weights_from_disk", json=body).json()["success"]
    assert client.post("/continue_generation", json={}).status_code == 200
    answer = running.result()
    meta, tokens = answer["meta_info"], [5, 6, 7, *answer["output_ids"]]
    old_rows = SAMPLER.routes(SAMPLER.load(""), tokens[:-1])
    new_rows = SAMPLER.routes(SAMPLER.load(new), tokens[:-1])
    old_span = {"version": "default", "start": 0, "end": 2}
    if mode == "abort":
        recorded = RECORDED["aborted"]["response"]["meta_info"]
        assert set(meta) == set(recorded)
        assert meta["finish_reason"] == recorded["finish_reason"]
        assert meta["weight_versions"] == [old_span]
        np.testing.assert_array_equal(rows(answer), old_rows)
        return
    assert meta["weight_versions"] == [old_span, {"version": "new", "start": 2, "end": 6}]
    assert meta["num_retractions"] == (1 if mode == "retract" else 0)
    old_logprobs = SAMPLER.score(SAMPLER.load(""), tokens, 1.0)[2:]
    new_logprobs = SAMPLER.score(SAMPLER.load(new), tokens, 1.0)[2:]
    found = [entry[0] for entry in meta["output_token_logprobs"]]
    np.testing.assert_allclose(found, [*old_logprobs[:2], *new_logprobs[2:]])
    if mode == "retract":
        np.testing.assert_array_equal(rows(answer), new_rows)
    else:
        np.testing.assert_array_equal(rows(answer)[:4], old_rows[:4])
        np.testing.assert_array_equal(rows(answer)[4:], new_rows[4:])


def test_a_refused_flush_leaves_new_weights_under_the_old_label(
    server: FakeServer, client: httpx.Client, tmp_path: Path
) -> None:
    server.hold(tokens=2)
    running = in_background(server, BODY)
    server.wait_held(1)
    client.post("/pause_generation", json={"mode": "in_place"})
    body = {"model_path": write_weights(tmp_path / "new", "new"), "weight_version": "new"}
    answer = client.post("/update_weights_from_disk", json=body)
    assert answer.status_code == 400
    assert answer.json()["message"].startswith("Weights were updated, but the cache was not")
    assert client.get("/model_info").json()["weight_version"] == "default"
    client.post("/continue_generation", json={})
    server.release()
    assert running.result()["meta_info"]["weight_versions"][1]["version"] == "new"


def test_requests_sent_while_paused_wait_and_then_run(
    server: FakeServer, client: httpx.Client
) -> None:
    client.post("/pause_generation", json={"mode": "abort"})
    waiting = in_background(server, BODY | {"rid": "w"})
    server.wait_requests("/generate", 1)
    client.post("/abort_request", json={"rid": "w"})  # lost, as in the real one
    assert client.post("/flush_cache?timeout=5").status_code == 200
    assert not waiting.done()
    client.post("/continue_generation", json={})
    assert waiting.result()["meta_info"]["finish_reason"]["type"] == "length"


def test_a_running_request_can_be_aborted_by_its_id(
    server: FakeServer, client: httpx.Client
) -> None:
    server.hold(tokens=3)
    running = [in_background(server, BODY | {"rid": rid}) for rid in ("a", "b")]
    server.wait_held(2)
    again = client.post("/generate", json=BODY | {"rid": "a"})
    assert (again.status_code, "Duplicate" in again.text) == (400, True)
    assert client.post("/abort_request", json={"rid": "a"}).text == ""
    assert running[0].result()["meta_info"]["finish_reason"]["type"] == "abort"
    assert server.running == 1
    server.release()
    assert running[1].result()["meta_info"]["finish_reason"]["type"] == "length"


def test_a_response_whose_client_left_is_given_up(server: FakeServer) -> None:
    server.hold(tokens=1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/generate", json=BODY, timeout=0.5)
    assert httpx.post(server.url + "/flush_cache?timeout=20", timeout=30).status_code == 200


# --- faults


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("/generate", "drop", (1,)), httpx.RemoteProtocolError),
        (Fault("/generate", "cut", (1,)), httpx.RemoteProtocolError),
        (Fault("/generate", "truncate", (1,)), ValueError),
        (Fault("/generate", "hang", (1,)), httpx.ReadTimeout),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_a_fault_befalls_its_call_alone(
    server: FakeServer, client: httpx.Client, fault: Fault, error: type[Exception]
) -> None:
    server.add(fault)
    with pytest.raises(error):
        client.post("/generate", json=BODY, timeout=0.5).json()
    assert client.post("/generate", json=BODY).json()["output_ids"]


def test_scripted_statuses_come_in_order(server: FakeServer, client: httpx.Client) -> None:
    server.add(Fault("/generate", "status", calls=(2,), status=503))
    server.add(Fault("/generate", "status", calls=(3,), status=400))
    found = [client.post("/generate", json=BODY).status_code for _ in range(4)]
    assert found == [200, 503, 400, 200]


def test_edited_answers_differ_where_they_should(server: FakeServer, client: httpx.Client) -> None:
    whole = client.post("/generate", json=BODY).json()

    def edited(edit: faults.Edit) -> dict[str, Any]:
        server.clear_faults()
        server.add(Fault("/generate", "edit", edit=edit))
        answer: dict[str, Any] = client.post("/generate", json=BODY).json()
        return answer

    def last(answer: dict[str, Any]) -> list[Any]:
        entry: list[Any] = answer["meta_info"]["output_token_logprobs"][-1]
        return entry

    assert np.isnan(last(edited(faults.nan_logprob))[0])
    assert last(edited(faults.null_logprob))[0] is None
    assert last(edited(faults.positive_logprob))[0] > 0
    assert last(edited(faults.bad_token))[1] == DENSE.vocab_size
    assert edited(faults.wrong_label)["meta_info"]["weight_versions"][0]["version"] == "strange"
    assert "routed_experts" not in edited(faults.no_routes)["meta_info"]
    np.testing.assert_array_equal(rows(edited(faults.too_few_rows)), rows(whole)[:-1])
    assert len(rows(edited(faults.too_many_rows))) == len(rows(whole)) + 1
    assert rows(edited(faults.expert_out_of_range)).max() == DENSE.moe.num_experts
    text = edited(faults.other_layers)["meta_info"]["routed_experts"]
    assert len(base64.b64decode(text)) == rows(whole).nbytes * 4 // 3


def test_a_server_may_claim_weights_that_it_does_not_have(
    server: FakeServer, client: httpx.Client, tmp_path: Path
) -> None:
    before = client.post("/generate", json=BODY).json()
    server.add(Fault("/update_weights_from_disk", "keep_weights"))
    body = {"model_path": write_weights(tmp_path / "one", "1"), "weight_version": "v1"}
    assert client.post("/update_weights_from_disk", json=body).json()["success"]
    after = client.post("/generate", json=BODY).json()
    assert after["output_ids"] == before["output_ids"]
    assert after["meta_info"]["weight_version"] == "v1"


def test_a_killed_server_resets_its_connections_and_forgets_its_weights(
    server: FakeServer, client: httpx.Client, tmp_path: Path
) -> None:
    url = server.url
    start = client.post("/generate", json=BODY).json()["output_ids"]
    body = {"model_path": write_weights(tmp_path / "one", "1"), "weight_version": "v1"}
    client.post("/update_weights_from_disk", json=body)
    server.hold(tokens=1)
    running = in_background(server, BODY)
    server.wait_held(1)
    server.stop()
    with pytest.raises(httpx.TransportError):
        running.result()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")
    server.restart()
    assert server.url == url
    assert server.weight_version == "default"
    assert httpx.post(url + "/generate", json=BODY).json()["output_ids"] == start


def test_a_token_outside_the_vocabulary_kills_it(server: FakeServer) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.post(server.url + "/generate", json=BODY | {"input_ids": [16]})
    server.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


def test_a_key_is_asked_for_everywhere_but_at_the_health_check() -> None:
    with FakeServer(SAMPLER, api_key="secret") as server:
        assert httpx.get(server.url + "/health").status_code == 200
        refused = httpx.get(server.url + "/model_info")
        assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})
        right = {"Authorization": "Bearer secret"}
        assert httpx.get(server.url + "/model_info", headers=right).status_code == 200
