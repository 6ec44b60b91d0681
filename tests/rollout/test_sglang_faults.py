"""What goes wrong with servers, one test a fault: the run goes on with what is left, or says why.

Times are bounds here, not waits: a fault is seen by the connection, the answer or the probe, unless
the test is about a deadline.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxrl_llm.rollout.engine import EngineError, EngineFailure
from jaxrl_llm.rollout.sglang import SGLangEngine
from tests.rollout import fake_faults
from tests.rollout.fake_faults import Edit, Fault, FaultKind
from tests.rollout.fake_sglang import FakeServer
from tests.rollout.sglang_engines import (
    ALONE,
    CONFIG,
    SAMPLER,
    WATCHFUL,
    check_sampled_by,
    engine,
    requests,
    rollouts,
    sampling_bodies,
    wait_until,
)

UPDATE = "/update_weights_from_disk"


@pytest.fixture
def one(server: FakeServer, tmp_path: Path) -> Iterator[SGLangEngine]:
    """One server with weights, which is asked again at once."""
    with engine([server], tmp_path, WATCHFUL) as made:
        made.publish("one", 0)
        yield made


def failures(outcomes: Any) -> list[EngineFailure]:
    found = list(outcomes)
    assert all(isinstance(outcome, EngineFailure) for outcome in found), found
    return found


# --- servers that vanish


def test_what_waits_for_a_server_that_is_taken_out_is_not_sent_to_it(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    """Its slots are free then; whoever took one would wait for request_seconds."""
    config = dataclasses.replace(WATCHFUL, concurrency=1)
    with engine([server, other], tmp_path, config) as made:
        made.publish("one", 0)
        for path in ("/generate", "/health", "/model_info", "/abort_request"):
            server.add(Fault(path, "hang"))
        check_sampled_by(rollouts(made.generate(requests(2, 4))), "one", 0, tmp_path)
        assert len(sampling_bodies(server)) == 1
        assert made.report().metrics["engine/retries"] == 1


def test_killed_while_it_samples(
    two: SGLangEngine, server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    server.hold(2)
    outcomes = two.generate(requests(4, 2))
    server.wait_held(4)
    server.stop()
    check_sampled_by(rollouts(outcomes), "one", 0, tmp_path)
    report = two.report()
    assert report.metrics["engine/servers"] == 1
    assert report.metrics["engine/servers_lost"] == 1
    assert report.metrics["engine/retries"] == 4
    assert [e for e in report.events if e.startswith(f"{server.url} was taken out: ")]
    assert len(sampling_bodies(other)) == 8


def test_the_last_one_killed(server: FakeServer, other: FakeServer, tmp_path: Path) -> None:
    with engine([server, other], tmp_path, ALONE) as made:
        made.publish("one", 0)
        server.hold(2)
        other.hold(2)
        outcomes = made.generate(requests(4))
        server.wait_held(2)
        other.wait_held(2)
        server.stop()
        other.stop()
        with pytest.raises(EngineError, match=r"no server was in use for 0\.5 s") as caught:
            list(outcomes)
        assert list(outcomes) == []
    for each in (server, other):
        assert f"{each.url}: health check: {each.url}/health: " in str(caught.value)


def test_killed_and_restarted_with_old_weights(
    one: SGLangEngine, server: FakeServer, tmp_path: Path
) -> None:
    """It is not believed, but updated and probed, and then used."""
    server.hold(2)
    outcomes = one.generate(requests(3, 2))
    server.wait_held(6)
    server.stop()
    server.restart()
    check_sampled_by(rollouts(outcomes), "one", 0, tmp_path)
    assert server.weight_version == "v0-one"


def test_restarted_with_old_weights_between_requests(
    two: SGLangEngine, server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    server.stop()
    server.restart()
    check_sampled_by(rollouts(two.generate(requests(4))), "one", 0, tmp_path)
    report = two.report()
    assert report.metrics["engine/bad_answers_wrong_version"] >= 1
    assert report.metrics["engine/servers"] == 1
    assert "tokens were sampled by weights labelled ['default']" in " ".join(report.events)
    two.publish("two", 1)
    check_sampled_by(rollouts(two.generate(requests(4))), "two", 1, tmp_path)
    assert two.report().metrics["engine/servers"] == 2
    assert server.weight_version == "v1-two"


def test_a_health_check_sees_that_a_server_was_restarted(
    one: SGLangEngine, server: FakeServer, tmp_path: Path
) -> None:
    server.stop()
    server.restart()
    wait_until(lambda: server.weight_version == "v0-one")
    check_sampled_by(rollouts(one.generate(requests(2))), "one", 0, tmp_path)
    assert one.report().metrics["engine/retries"] == 0


def test_refusing_connections_at_the_start(other: FakeServer, tmp_path: Path) -> None:
    with FakeServer(SAMPLER) as gone:
        pass
    with pytest.raises(EngineError) as caught:
        engine([gone, other], tmp_path).__enter__()
    assert f"{gone.url}/continue_generation: ConnectError" in str(caught.value)
    assert other.url not in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name == "sglang"]


def test_refusing_connections_later(two: SGLangEngine, server: FakeServer, tmp_path: Path) -> None:
    server.stop()
    check_sampled_by(rollouts(two.generate(requests(4))), "one", 0, tmp_path)
    two.publish("two", 1)
    check_sampled_by(rollouts(two.generate(requests(4))), "two", 1, tmp_path)
    assert two.report().metrics["engine/servers"] == 1


# --- servers that hang, or are slow


def test_hung(server: FakeServer, other: FakeServer, tmp_path: Path) -> None:
    """Its requests would wait request_seconds; the health check is sooner."""
    with engine([server, other], tmp_path, WATCHFUL) as made:
        made.publish("one", 0)
        server.add(Fault("/generate", "hang"))
        server.add(Fault("/health", "hang"))
        server.add(Fault("/pause_generation", "hang"))  # no coming back either
        check_sampled_by(rollouts(made.generate(requests(4))), "one", 0, tmp_path)
        report = made.report()
    assert f"{server.url} was taken out: health check: " in " ".join(report.events)
    assert "gave no answer in 0.5 s" in " ".join(report.events)


def test_hung_but_well_by_its_own_account(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, request_seconds=1, attempts=2)
    with engine([server, other], tmp_path, config) as made:
        made.publish("one", 0)
        server.add(Fault("/generate", "hang"))
        check_sampled_by(rollouts(made.generate(requests(4))), "one", 0, tmp_path)
        report = made.report()
        rids = {body["rid"] for body in sampling_bodies(server)}
        wait_until(lambda: {body["rid"] for body in server.bodies("/abort_request")} == rids)
    assert report.metrics["engine/servers"] == 1
    assert "2 failed requests in a row" in " ".join(report.events)


def test_hung_and_there_is_no_other(server: FakeServer, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, request_seconds=0.5, attempts=1)
    with engine([server], tmp_path, config) as made:
        made.publish("one", 0)
        server.add(Fault("/generate", "hang"))
        (failed,) = failures(made.generate(requests(1)))
    assert failed.cause == "timeout"
    assert f"{server.url}/generate gave no answer in 0.5 s (attempt 1)" in failed.message


def test_slow(two: SGLangEngine, server: FakeServer, tmp_path: Path) -> None:
    server.add(Fault("/generate", "delay", seconds=0.3))
    check_sampled_by(rollouts(two.generate(requests(4))), "one", 0, tmp_path)
    assert two.report().metrics["engine/retries"] == 0


# --- answers that are errors, or no answers


@pytest.mark.parametrize("status", [500, 503, 429, 401, 302])
def test_an_error_of_the_server_is_asked_of_the_other(
    two: SGLangEngine, server: FakeServer, tmp_path: Path, status: int
) -> None:
    server.add(Fault("/generate", "status", calls=(1,), status=status))
    check_sampled_by(rollouts(two.generate(requests(4))), "one", 0, tmp_path)
    metrics = two.report().metrics
    assert (metrics["engine/retries"], metrics["engine/servers"]) == (1, 2)


BROKEN: list[FaultKind] = ["truncate", "cut", "drop"]


@pytest.mark.parametrize("kind", BROKEN)
def test_an_answer_that_broke_on_the_way_is_asked_for_again(
    one: SGLangEngine, server: FakeServer, tmp_path: Path, kind: FaultKind
) -> None:
    server.add(Fault("/generate", kind, calls=(1,)))
    check_sampled_by(rollouts(one.generate(requests(2))), "one", 0, tmp_path)
    metrics = one.report().metrics
    assert (metrics["engine/retries"], metrics["engine/servers"]) == (1, 1)


def test_nothing_but_errors_costs_the_server(
    two: SGLangEngine, server: FakeServer, tmp_path: Path
) -> None:
    server.add(Fault("/generate", "status"))
    check_sampled_by(rollouts(two.generate(requests(8))), "one", 0, tmp_path)
    report = two.report()
    assert report.metrics["engine/servers"] == 1
    assert "3 failed requests in a row, the last: " in " ".join(report.events)
    assert "answered 500: " in " ".join(report.events)


def test_errors_between_good_answers_do_not(two: SGLangEngine, server: FakeServer) -> None:
    server.add(Fault("/generate", "status", calls=range(1, 40, 2)))
    for index in range(6):  # one at a time, or the good answers might all come last
        rollouts(two.generate(requests(index + 1)[-1:]))
    assert two.report().metrics["engine/servers"] == 2
    assert len(sampling_bodies(server)) == 6


def test_a_request_that_no_server_answers_fails(one: SGLangEngine, server: FakeServer) -> None:
    server.add(Fault("/generate", "status", calls=(1, 2, 3)))
    (failed,) = failures(one.generate(requests(1)))
    assert failed.cause == "unreachable"
    assert "(attempt 3)" in failed.message
    assert failed.message.startswith(f"{server.url}/generate answered 500: ")


def test_a_request_that_the_server_calls_wrong_is_not_repeated(
    two: SGLangEngine, server: FakeServer, other: FakeServer
) -> None:
    for each in (server, other):
        each.add(Fault("/generate", "status", status=400))
    failed = failures(two.generate(requests(8)))
    assert {failure.cause for failure in failed} == {"refused"}
    assert len(sampling_bodies(server)) + len(sampling_bodies(other)) == 8
    metrics = two.report().metrics
    assert (metrics["engine/retries"], metrics["engine/servers"]) == (0, 2)


# --- answers that are wrong


def test_an_aborted_answer_that_nobody_asked_for_is_repeated(
    one: SGLangEngine, server: FakeServer, tmp_path: Path
) -> None:
    server.hold(2)
    outcomes = one.generate(requests(2))
    server.wait_held(2)
    httpx.post(f"{server.url}/abort_request", json={"abort_all": True})
    server.release()
    check_sampled_by(rollouts(outcomes), "one", 0, tmp_path)
    metrics = one.report().metrics
    assert (metrics["engine/retries"], metrics["engine/resubmitted"]) == (2, 0)


WRONG: dict[str, tuple[Edit, str]] = {
    "NaN": (fake_faults.nan_logprob, "not_finite"),
    "null": (fake_faults.null_logprob, "not_finite"),
    "positive log-probability": (fake_faults.positive_logprob, "bad_answer"),
    "token outside the vocabulary": (fake_faults.bad_token, "bad_answer"),
    "no routes": (fake_faults.no_routes, "bad_routes"),
    "too few route rows": (fake_faults.too_few_rows, "bad_routes"),
    "too many route rows": (fake_faults.too_many_rows, "bad_routes"),
    "expert out of range": (fake_faults.expert_out_of_range, "bad_routes"),
    "another model's layers": (fake_faults.other_layers, "bad_routes"),
}


@pytest.mark.parametrize(("edit", "cause"), WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_a_failure_that_names_the_server_and_is_not_repeated(
    one: SGLangEngine, server: FakeServer, tmp_path: Path, edit: Edit, cause: str
) -> None:
    server.add(Fault("/generate", "edit", calls=(1,), edit=edit))
    outcomes = list(one.generate(requests(3)))
    (failed,) = [outcome for outcome in outcomes if isinstance(outcome, EngineFailure)]
    outcomes.remove(failed)
    assert failed.cause == cause
    assert failed.message.startswith(f"{server.url}: ")
    check_sampled_by(rollouts(outcomes), "one", 0, tmp_path)
    metrics = one.report().metrics
    assert metrics[f"engine/bad_answers_{cause}"] == 1
    assert (metrics["engine/retries"], metrics["engine/servers"]) == (0, 1)
    assert len(sampling_bodies(server)) == 3


def test_nothing_but_wrong_answers_costs_the_server(
    two: SGLangEngine, server: FakeServer, tmp_path: Path
) -> None:
    server.add(Fault("/generate", "edit", edit=fake_faults.nan_logprob))
    list(two.generate(requests(16)))
    assert two.report().metrics["engine/servers"] == 1
    check_sampled_by(rollouts(two.generate(requests(4))), "one", 0, tmp_path)


def test_tokens_of_weights_that_nobody_published_are_never_returned(
    two: SGLangEngine, server: FakeServer, tmp_path: Path
) -> None:
    server.add(Fault("/generate", "edit", calls=(1,), edit=fake_faults.wrong_label))
    check_sampled_by(rollouts(two.generate(requests(4))), "one", 0, tmp_path)
    metrics = two.report().metrics
    assert metrics["engine/bad_answers_wrong_version"] == 1
    assert metrics["engine/servers"] == 1


def test_if_all_servers_have_unknown_weights_the_request_fails(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    with engine([server, other], tmp_path, dataclasses.replace(CONFIG, attempts=2)) as made:
        made.publish("one", 0)
        for each in (server, other):
            each.add(Fault("/generate", "edit", edit=fake_faults.wrong_label))
        (failed,) = failures(made.generate(requests(1)))
        assert made.report().metrics["engine/servers"] == 0
    assert failed.cause == "wrong_version"
    assert "labelled ['strange']" in failed.message


# --- servers that are unfit


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "no route capture": ({"routes": False}, "not started with --enable-return-routed-experts"),
    "short context": ({"context": 63}, "takes at most 61 tokens of prompt and response"),
    "own sampling": (
        {"info": {"preferred_sampling_params": {"top_p": 0.5}}},
        "has preferred_sampling_params",
    ),
    "speculative": ({"info": {"speculative_algorithm": "EAGLE"}}, "speculative_algorithm 'EAGLE'"),
    "hierarchical cache": ({"info": {"enable_hierarchical_cache": True}}, "stale routes"),
    "disaggregated": ({"info": {"disaggregation_mode": "prefill"}}, "reaches one half"),
    "cuts prompts": ({"info": {"allow_auto_truncate": True}}, "cut prompts"),
    "embeds": ({"info": {"is_generation": False}}, "serves no model that generates"),
}


@pytest.mark.parametrize(("fields", "message"), UNFIT.values(), ids=UNFIT)
def test_an_unfit_server_is_refused_by_name_at_the_start(
    other: FakeServer, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with FakeServer(SAMPLER, **fields) as unfit, pytest.raises(EngineError) as caught:
        engine([other, unfit], tmp_path).__enter__()
    assert f"{unfit.url} " in str(caught.value)
    assert message in str(caught.value)
    assert other.url not in str(caught.value)
    assert not unfit.bodies("/generate")


def test_route_capture_is_needed_by_those_who_need_routes(tmp_path: Path) -> None:
    with (
        FakeServer(SAMPLER, routes=False) as server,
        engine([server], tmp_path, routes=False) as made,
    ):
        made.publish("one", 0)
        found = rollouts(made.generate(requests(2)))
    check_sampled_by(found, "one", 0, tmp_path)
    assert all(rollout.routes is None for rollout in found)


def test_what_is_no_sglang_server_is_refused(tmp_path: Path) -> None:
    class Stranger(FakeServer):
        def answer(self, path: str, *rest: Any) -> Any:
            return {"is_generation": True} if path.endswith("_info") else ""

    with Stranger(SAMPLER) as server, pytest.raises(EngineError, match="it is no SGLang server"):
        engine([server], tmp_path).__enter__()


def test_other_versions_and_ignored_seeds_are_noted(tmp_path: Path) -> None:
    with (
        FakeServer(SAMPLER, deterministic=False, info={"version": "0.6.0"}) as server,
        engine([server], tmp_path) as made,
    ):
        events = " ".join(made.report().events)
    assert f"{server.url} is sglang 0.6.0; this client knows 0.5.23" in events
    assert "it ignores seeds" in events


def test_a_server_that_a_killed_learner_left_paused_goes_on(
    server: FakeServer, tmp_path: Path
) -> None:
    httpx.post(f"{server.url}/pause_generation", json={"mode": "abort"})
    with engine([server], tmp_path) as made:
        assert server._paused is None
        made.publish("one", 0)
        check_sampled_by(rollouts(made.generate(requests(2))), "one", 0, tmp_path)
