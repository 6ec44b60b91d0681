"""The SGLang engine on servers that do what they should: requests, weights, and what is kept."""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.rollout.engine import EngineError, EngineFailure
from jaxrl_llm.rollout.journal import Journal
from jaxrl_llm.rollout.servers import COUNTS
from jaxrl_llm.rollout.sglang import SGLangConfig
from jaxrl_llm.types import NOT_SAMPLED, Prompt, SamplingParams
from tests.rollout.engines import assert_same
from tests.rollout.fake_faults import Fault
from tests.rollout.fake_http import Refusal
from tests.rollout.fake_sglang import FakeServer
from tests.rollout.sglang_engines import (
    CONFIG,
    MODEL,
    SAMPLER,
    SAMPLING,
    Learner,
    check_sampled_by,
    engine,
    release_at_update,
    request,
    requests,
    rollouts,
    sampling_bodies,
    wait_until,
)

# --- requests


def test_every_request_becomes_what_the_server_sampled(server: FakeServer, tmp_path: Path) -> None:
    with engine([server], tmp_path) as made:
        made.publish("one", 3)
        found = rollouts(made.generate(requests(3, 2)))
    check_sampled_by(found, "one", 3, tmp_path)
    assert [(r.prompt_id, r.sample_index) for r in found] == [
        (f"p{prompt}", sample) for prompt in range(3) for sample in range(2)
    ]
    assert all(r.routes is not None and r.finish == "length" for r in found)
    assert found[0].text == " ".join(map(str, found[0].tokens[4:]))
    assert found[0].weight_version[0] == NOT_SAMPLED


def test_it_samples_before_anyone_asks_for_an_item(server: FakeServer, tmp_path: Path) -> None:
    with engine([server], tmp_path) as made:
        made.publish("one", 0)
        outcomes = made.generate(requests(2))
        server.wait_requests("/generate", 1 + 2)  # the probe, too
        assert made.overlaps
        assert len(rollouts(outcomes)) == 2
        assert list(outcomes) == []


def test_calls_may_be_open_together(server: FakeServer, tmp_path: Path) -> None:
    with engine([server], tmp_path) as made:
        made.publish("one", 0)
        first, second = made.generate(requests(2)), made.generate(requests(4))
        assert [r.prompt_id for r in rollouts(second)] == ["p0", "p1", "p2", "p3"]
        assert [r.prompt_id for r in rollouts(first)] == ["p0", "p1"]


def test_the_same_requests_give_the_same_rollouts_in_any_order_on_any_servers(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    asked = requests(4, 3)
    with engine([server], tmp_path) as made:
        made.publish("one", 0)
        alone = rollouts(made.generate(asked))
    # Later answers first: what was asked first is slow.
    server.add(Fault("/generate", "delay", calls=range(2, 5), seconds=0.1))
    with engine([server, other], tmp_path) as made:
        made.publish("one", 0)
        for left, right in zip(alone, rollouts(made.generate(asked[::-1])), strict=True):
            assert_same(left, right)


def test_samples_of_a_prompt_share_a_server_and_prompts_go_where_least_is_under_way(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    with engine([server, other], tmp_path) as made:
        made.publish("one", 0)
        server.hold(1)
        other.hold(1)
        outcomes = made.generate(requests(4, 2))
        server.wait_held(4)
        other.wait_held(4)
        server.release()
        other.release()
        rollouts(outcomes)
    prompts = [
        {tuple(body["input_ids"]) for body in sampling_bodies(each)} for each in (server, other)
    ]
    assert [len(found) for found in prompts] == [2, 2]
    assert not prompts[0] & prompts[1]


def test_no_more_requests_are_under_way_than_allowed(server: FakeServer, tmp_path: Path) -> None:
    beside: list[int] = []  # others under way whenever an answer was sent
    with engine([server], tmp_path, dataclasses.replace(CONFIG, concurrency=2)) as made:
        made.publish("one", 0)
        server.add(Fault("/generate", "edit", edit=lambda *_: beside.append(server.running)))
        server.hold(1)
        outcomes = made.generate(requests(2, 4))
        server.wait_held(2)
        server.release()
        assert len(rollouts(outcomes)) == 8
    assert len(beside) == 8
    assert max(beside) <= 1


def test_what_no_server_can_serve_is_not_asked(server: FakeServer, tmp_path: Path) -> None:
    def change(index: int, **fields: Any) -> Any:
        return dataclasses.replace(request(index), **fields)

    bad = Prompt("p1", np.array([5, MODEL.vocab_size], np.int32), text="", answer="")
    asked = [
        change(0, sampling=SamplingParams(CONFIG.max_length)),
        change(1, prompt=bad),
        change(2, sampling=SamplingParams(4, top_p=0.5)),
        request(3),
    ]
    with engine([server], tmp_path) as made:
        made.publish("one", 0)
        outcomes = list(made.generate(asked))
    causes = {o.prompt_id: o.cause for o in outcomes if isinstance(o, EngineFailure)}
    assert causes == {"p0": "too_long", "p1": "bad_token", "p2": "unscorable"}
    assert len(outcomes) == 4
    assert [body["input_ids"] for body in sampling_bodies(server)] == [
        request(3).prompt.tokens.tolist()
    ]


def test_truncated_sampling_is_scored_as_it_was_done(server: FakeServer, tmp_path: Path) -> None:
    asked = dataclasses.replace(request(0), sampling=SamplingParams(6, top_p=0.9, top_k=4))
    with engine([server], tmp_path) as made:
        made.publish("one", 0)
        (found,) = rollouts(made.generate([asked]))
    weights = SAMPLER.load(str(tmp_path / "v0-one"))
    plain = SAMPLER.score(weights, found.tokens.tolist(), 1.0)[found.loss_mask]
    assert np.all(found.sampler_logprobs[found.loss_mask] > plain)


def test_every_request_says_all_that_affects_its_distribution(
    server: FakeServer, tmp_path: Path
) -> None:
    with engine([server], tmp_path) as made:
        made.publish("one", 0)
        rollouts(made.generate(requests(1, 3)))
    bodies = sampling_bodies(server)
    assert sorted(body["sampling_params"]["sampling_seed"] for body in bodies) == [0, 1, 2]
    assert len({body["rid"] for body in bodies}) == 3
    for body in bodies:
        assert body["sampling_params"]["temperature"] == SAMPLING.temperature
        assert body["return_routed_experts"]


# --- ending early


def test_close_aborts_what_is_under_way_and_leaves_the_engine_usable(
    server: FakeServer, tmp_path: Path
) -> None:
    with engine([server], tmp_path) as made:
        made.publish("one", 0)
        server.hold(1)
        outcomes = made.generate(requests(4))  # no item of it is ever asked for
        server.wait_held(4)
        outcomes.close()
        rids = {body["rid"] for body in sampling_bodies(server)}
        wait_until(lambda: {body["rid"] for body in server.bodies("/abort_request")} == rids)
        assert list(outcomes) == []
        server.release()
        check_sampled_by(rollouts(made.generate(requests(2))), "one", 0, tmp_path)


def test_closing_the_engine_aborts_what_is_under_way(server: FakeServer, tmp_path: Path) -> None:
    with engine([server], tmp_path) as made:
        made.publish("one", 0)
        server.hold(1)
        outcomes = made.generate(requests(3))
        server.wait_held(3)
        made.close()
        made.close()
        assert len(server.bodies("/abort_request")) == 3
        with pytest.raises(RuntimeError, match="closed"):
            next(outcomes)
        with pytest.raises(RuntimeError, match="closed"):
            made.generate(requests(1))
    assert not [thread for thread in threading.enumerate() if thread.name == "sglang"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that was started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_reaches_who_waits_and_nothing_is_lost(
    server: FakeServer, tmp_path: Path
) -> None:
    main = threading.main_thread().ident
    assert main is not None
    with engine([server], tmp_path) as made:
        made.publish("one", 0)
        server.hold(1)
        outcomes = made.generate(requests(2))
        server.wait_held(2)
        timer = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (it may come before next waits)
            timer.start()
            next(outcomes)
        timer.join()
        server.release()
        assert len(rollouts(outcomes)) == 2


def test_without_weights_it_says_what_to_do(server: FakeServer, tmp_path: Path) -> None:
    with (
        engine([server], tmp_path) as made,
        pytest.raises(RuntimeError, match=r"call publish\(\) before generate\(\)"),
    ):
        made.generate(requests(1))


# --- weights


def test_new_weights_reach_every_server_before_a_rollout_carries_their_number(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    servers = (server, other)
    with engine(servers, tmp_path) as made:
        made.publish("one", 0)
        check_sampled_by(rollouts(made.generate(requests(4))), "one", 0, tmp_path)
        before = [len(each.requests) for each in servers]
        made.publish("two", 1)
        report = made.report()
        check_sampled_by(rollouts(made.generate(requests(4))), "two", 1, tmp_path)
    for each, count in zip(servers, before, strict=True):
        assert [path for path, _ in each.requests[count : count + 5]] == [
            "/pause_generation",
            "/update_weights_from_disk",
            "/model_info",
            "/continue_generation",
            "/generate",  # the probe
        ]
        assert each.weight_version == "v1-two"
        paths = [body["model_path"] for body in each.bodies("/update_weights_from_disk")]
        assert paths == [str(tmp_path / "v0-one"), str(tmp_path / "v1-two")]
    assert report.metrics["engine/probe_error"] < 1e-6
    assert report.metrics["engine/servers"] == 2


@pytest.mark.parametrize(("mode", "flush"), [("abort", 1), ("retract", 1), ("in_place", 0)])
def test_the_mode_of_a_publish_is_the_configured_one(
    server: FakeServer, tmp_path: Path, mode: Any, flush: int
) -> None:
    with engine([server], tmp_path, dataclasses.replace(CONFIG, on_publish=mode)) as made:
        made.publish("one", 0)
    assert server.bodies("/pause_generation") == [{"mode": mode}]
    assert [b["flush_cache"] for b in server.bodies("/update_weights_from_disk")] == [bool(flush)]


def test_abort_starts_responses_again_with_the_new_weights(
    server: FakeServer, tmp_path: Path
) -> None:
    with engine([server], tmp_path) as made:
        made.publish("one", 0)
        server.hold(2)
        outcomes = made.generate(requests(2, 2))
        server.wait_held(4)
        release_at_update(server, 2)
        made.publish("two", 1)
        check_sampled_by(rollouts(outcomes), "two", 1, tmp_path)
        metrics = made.report().metrics
    assert metrics["engine/resubmitted"] == 4
    assert metrics["engine/retries"] == 0
    assert metrics["engine/spanning"] == 0
    bodies = sampling_bodies(server)
    assert len({body["rid"] for body in bodies}) == 8
    # The seed fixes a response under given weights, whoever asks how often.
    seeds = [body["sampling_params"]["sampling_seed"] for body in bodies]
    assert sorted(seeds[:4]) == sorted(seeds[4:])


@pytest.mark.parametrize("mode", ["retract", "in_place"])
@pytest.mark.parametrize("keep", [False, True])
def test_responses_that_go_on_have_the_version_of_each_token(
    server: FakeServer, tmp_path: Path, mode: Any, keep: bool
) -> None:
    config = dataclasses.replace(CONFIG, on_publish=mode, keep_spanning_routes=keep)
    with engine([server], tmp_path, config) as made:
        made.publish("one", 0)
        server.hold(2)
        outcomes = made.generate(requests(2))
        server.wait_held(2)
        release_at_update(server, 2)
        made.publish("two", 5)
        found = rollouts(outcomes)
        metrics = made.report().metrics
    for rollout in found:
        assert rollout.weight_version[rollout.loss_mask].tolist() == [0, 0, 5, 5, 5, 5]
        assert (rollout.routes is not None) == keep
    assert metrics["engine/spanning"] == 2
    assert metrics["engine/resubmitted"] == 0


def test_a_publish_waits_for_no_response(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    """An answer that arrives while weights are published is read afterwards, as what it is."""
    with engine([server, other], tmp_path) as made:
        made.publish("one", 0)
        # The other server's update is slow: this one's answers arrive in the meantime.
        other.add(Fault("/update_weights_from_disk", "delay", seconds=0.3))
        outcomes = made.generate(requests(6, 2))
        made.publish("two", 1)
        found = rollouts(outcomes)
    for version, params in ((0, "one"), (1, "two")):
        mine = [r for r in found if r.weight_version[-1] == version]
        check_sampled_by(mine, params, version, tmp_path)


def test_what_could_not_be_cleaned_up_is_an_event(server: FakeServer, tmp_path: Path) -> None:
    class Untidy(Learner):
        def write(self, params: str, version: int) -> Any:
            written = super().write(params, version)
            return dataclasses.replace(written, leftovers=("v0 could not be removed",))

    with engine([server], tmp_path, learner=Untidy) as made:
        made.publish("one", 0)
        assert "v0 could not be removed" in made.report().events


# --- the journal


def test_what_the_journal_has_is_not_sampled_again(server: FakeServer, tmp_path: Path) -> None:
    asked = requests(2, 2)
    with engine([server], tmp_path, journal=Journal(tmp_path / "journal")) as made:
        made.publish("one", 0)
        first = rollouts(made.generate(asked[:3]))
    # The learner was killed, and its last weights are published again.
    with engine([server], tmp_path, journal=Journal(tmp_path / "journal")) as made:
        made.publish("one", 0)
        again = rollouts(made.generate(asked))
        metrics = made.report().metrics
    for left, right in zip(first, again, strict=False):
        assert_same(left, right)
    assert (metrics["engine/from_journal"], metrics["engine/rollouts"]) == (3, 1)
    assert len(sampling_bodies(server)) == 4


def test_a_journal_that_cannot_be_written_stops_the_run(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise EngineError("the journal of rollouts cannot write: No space left on device")

    journal = Journal(tmp_path / "journal")
    with engine([server], tmp_path, journal=journal) as made:
        made.publish("one", 0)
        monkeypatch.setattr(journal, "add", full)
        with pytest.raises(EngineError, match="No space left"):
            list(made.generate(requests(3)))


# --- secrets


KEY = "a-key-nobody-may-see"


def test_the_api_key_is_sent_and_never_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Indiscreet(FakeServer):
        """Its errors repeat the header."""

        tells = False

        def authorised(self, path: str, header: str | None) -> bool:
            if self.tells and path == "/generate":
                raise Refusal(500, {"error": {"message": f"got {header}"}})
            return super().authorised(path, header)

    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SGLANG_API_KEY", KEY)
    config = dataclasses.replace(CONFIG, attempts=1)
    with Indiscreet(SAMPLER, api_key=KEY) as server, engine([server], tmp_path, config) as made:
        made.publish("one", 0)
        rollouts(made.generate(requests(1)))
        server.tells = True
        (failed,) = made.generate(requests(1))
        report = made.report()
    assert isinstance(failed, EngineFailure)
    assert "got Bearer <the API key>" in failed.message
    assert KEY not in repr((failed, report)) + caplog.text


@pytest.mark.parametrize("given", ["", "another-key"])
def test_a_wrong_api_key_is_refused_by_the_servers_name_and_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", given)
    with FakeServer(SAMPLER, api_key=KEY) as server, pytest.raises(EngineError) as caught:
        engine([server], tmp_path).__enter__()
    assert f"{server.url}/" in str(caught.value)
    assert "answered 401" in str(caught.value)
    assert "sglang.api_key_env" in str(caught.value)
    assert KEY not in str(caught.value)
    assert "another-key" not in str(caught.value)


def test_a_key_that_no_header_can_carry_is_refused_and_not_told(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", "two words")
    with pytest.raises(ValueError, match="API key") as caught:
        engine([server], tmp_path).__enter__()
    assert "two words" not in str(caught.value)


# --- report and config


def test_a_report_has_every_count_once(server: FakeServer, tmp_path: Path) -> None:
    with engine([server], tmp_path) as made:
        made.publish("one", 0)
        rollouts(made.generate(requests(3)))
        first, second = made.report(), made.report()
    names = {f"engine/{name}" for name in (*COUNTS, "servers", "probe_error")}
    assert set(first.metrics) == set(second.metrics) == names
    assert (first.metrics["engine/rollouts"], second.metrics["engine/rollouts"]) == (3, 0)
    assert first.events == (f"{server.url} is in use, with the weights v0-one",)
    assert second.events == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"servers": ("127.0.0.1:30000",)}, "write http://HOST:PORT"),
        ({"servers": ("http://127.0.0.1:30000/",)}, "write http://HOST:PORT"),
        ({"servers": ("http://127.0.0.1:30000/v1",)}, "write http://HOST:PORT"),
        ({"servers": ("http://user:word@host:1",)}, r"the API key into \$SGLANG_API_KEY"),
        ({"servers": ("http://a:1", "http://a:1")}, "names a server twice"),
        ({"attempts": 0}, "sglang.attempts is 0; it must be positive"),
        ({"probe_tolerance": float("nan")}, "sglang.probe_tolerance is nan"),
        ({"health_seconds": -1.0}, "sglang.health_seconds is -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        SGLangConfig(**fields)
    assert "word" not in str(raised.value)


def test_an_engine_needs_a_server(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sglang\.servers is empty"):
        engine([], tmp_path).__enter__()
