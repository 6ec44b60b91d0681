"""Weights on their way to servers: what fails is repeated, proven wrong, or named; never trusted.

Times are bounds here, not waits, as in test_sglang_faults.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

from jaxrl_llm.rollout.engine import EngineError
from jaxrl_llm.rollout.probe import Probe
from jaxrl_llm.rollout.sglang import SGLangEngine
from tests.rollout.fake_faults import Fault
from tests.rollout.fake_samplers import HashSampler
from tests.rollout.fake_sglang import FakeServer
from tests.rollout.sglang_engines import (
    ALONE,
    CONFIG,
    MODEL,
    WATCHFUL,
    Learner,
    check_sampled_by,
    engine,
    release_at_update,
    requests,
    rollouts,
    wait_until,
)

UPDATE = "/update_weights_from_disk"


# --- weights that do not arrive


def test_an_update_that_fails_once_is_repeated(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    with engine([server, other], tmp_path, WATCHFUL) as made:
        made.publish("one", 0)
        server.add(Fault(UPDATE, "status", calls=(1,)))
        made.publish("two", 1)
        report = made.report()
        check_sampled_by(rollouts(made.generate(requests(4))), "two", 1, tmp_path)
    assert report.metrics["engine/update_retries"] == 1
    assert report.metrics["engine/servers"] == 2
    assert f"repeating an update: {server.url}{UPDATE} answered 500" in " ".join(report.events)


NO_UPDATE = [
    Fault(UPDATE, "status"),
    Fault(UPDATE, "status", status=400),
    Fault(UPDATE, "drop"),
    Fault("/pause_generation", "status"),
    Fault("/continue_generation", "status"),
    Fault("/model_info", "status"),
    Fault("/generate", "status"),
]


@pytest.mark.parametrize("fault", NO_UPDATE, ids=lambda fault: f"{fault.path} {fault.kind}")
def test_a_server_that_cannot_be_updated_is_taken_out_and_the_run_goes_on(
    server: FakeServer, other: FakeServer, tmp_path: Path, fault: Fault
) -> None:
    with engine([server, other], tmp_path, WATCHFUL) as made:
        made.publish("one", 0)
        server.add(fault)
        made.publish("two", 1)
        report = made.report()
        check_sampled_by(rollouts(made.generate(requests(4))), "two", 1, tmp_path)
        assert report.metrics["engine/servers"] == 1
        assert f"{server.url} was taken out: it did not " in " ".join(report.events)
        server.clear_faults()
        wait_until(lambda: made.report().metrics["engine/servers"] == 2)
        assert server.weight_version == "v1-two"


def test_an_update_that_hangs_costs_the_server(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    with engine([server, other], tmp_path, dataclasses.replace(CONFIG, update_seconds=1)) as made:
        made.publish("one", 0)
        server.add(Fault(UPDATE, "hang"))
        made.publish("two", 1)
        assert f"{server.url} was taken out: it did not load version 1 within 1 s" in (
            made.report().events
        )
        check_sampled_by(rollouts(made.generate(requests(4))), "two", 1, tmp_path)


def test_a_cache_that_was_not_flushed_is_flushed(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights changed, but something ran: the server still names the old ones, so it is told again.

    Without that it would go on with keys and values of the old weights.
    """
    flushes = iter([False])
    flush_now = server._flush_now
    with engine([server], tmp_path, WATCHFUL) as made:
        made.publish("one", 0)
        monkeypatch.setattr(server, "_flush_now", lambda: next(flushes, flush_now()))
        made.publish("two", 1)
        report = made.report()
        check_sampled_by(rollouts(made.generate(requests(2))), "two", 1, tmp_path)
    assert report.metrics["engine/update_retries"] == 1
    assert "the cache was not flushed" in " ".join(report.events)
    assert len(server.bodies("/pause_generation")) == 3


def test_weights_that_no_server_takes_stop_the_run(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    with engine([server, other], tmp_path, dataclasses.replace(WATCHFUL, attempts=2)) as made:
        made.publish("one", 0)
        server.add(Fault(UPDATE, "status"))
        other.stop()
        with pytest.raises(EngineError) as caught:
            made.publish("two", 1)
        message = str(caught.value)
        assert message.startswith("no server took version 1 (v1-two): ")
        assert f"{server.url}: it did not load version 1: {server.url}{UPDATE} answered 500" in (
            message
        )
        assert f"{other.url}: it did not pause: {other.url}/pause_generation: Connect" in message
        assert made.report().metrics["engine/servers"] == 0


def test_weights_that_cannot_be_written_leave_the_servers_as_they_are(
    server: FakeServer, tmp_path: Path
) -> None:
    class Full(Learner):
        def write(self, params: str, version: int) -> Any:
            if version == 1:
                raise ValueError("No space left on device")
            return super().write(params, version)

    with engine([server], tmp_path, learner=Full) as made:
        made.publish("one", 0)
        with pytest.raises(ValueError, match="No space left"):
            made.publish("two", 1)
        check_sampled_by(rollouts(made.generate(requests(2))), "one", 0, tmp_path)


# --- never two updates at once, which would end the server


def test_a_publish_waits_for_the_update_of_a_server_that_is_coming_back(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    with engine([server, other], tmp_path, WATCHFUL) as made:
        made.publish("one", 0)
        server.stop()
        server.restart()
        server.add(Fault(UPDATE, "delay", calls=(1,), seconds=0.5))
        server.wait_requests(UPDATE, 2)
        made.publish("two", 1)
        assert made.report().metrics["engine/servers"] == 2
        check_sampled_by(rollouts(made.generate(requests(4))), "two", 1, tmp_path)
    assert [body["weight_version"] for body in server.bodies(UPDATE)] == [
        *("v0-one", "v0-one"),
        "v1-two",
    ]


def test_a_server_that_loads_too_slowly_is_not_updated_again_before_it_has_loaded(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    config = dataclasses.replace(WATCHFUL, update_seconds=0.3)
    with engine([server, other], tmp_path, config) as made:
        made.publish("one", 0)
        server.add(Fault(UPDATE, "delay", calls=(1,), seconds=1.5))  # two tries to come back
        made.publish("two", 1)
        assert made.report().metrics["engine/servers"] == 1
        wait_until(lambda: made.report().metrics["engine/servers"] == 2)
        check_sampled_by(rollouts(made.generate(requests(4))), "two", 1, tmp_path)
    assert len(server.bodies(UPDATE)) == 3


def test_an_update_without_an_answer_is_not_repeated_at_once(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    """The server may be at it still."""
    with engine([server, other], tmp_path) as made:
        made.publish("one", 0)
        server.add(Fault(UPDATE, "drop"))
        made.publish("two", 1)
        report = made.report()
        assert report.metrics["engine/servers"] == 1
        assert report.metrics["engine/update_retries"] == 0
    assert len(server.bodies(UPDATE)) == 2


# --- servers with other weights than they say


def test_a_server_left_on_old_weights_stops_the_run_which_says_where_which_version_is(
    two: SGLangEngine, server: FakeServer, other: FakeServer
) -> None:
    server.add(Fault(UPDATE, "keep_weights"))
    with pytest.raises(EngineError) as caught:
        two.publish("two", 1)
    message = str(caught.value)
    assert message.startswith("version 1 (v1-two) was published twice, but a server samples from")
    assert f"{server.url} holds version 0 (v0-one), " in message
    assert f"{other.url} holds version 1 (v1-two), 0 nats off the learner" in message
    assert server.weight_version == other.weight_version == "v1-two"  # by their own account
    assert two.report().metrics["engine/servers"] == 0


def test_a_server_left_on_old_weights_is_seen_however_close_they_are(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    """Within the tolerance the probe sees that the answer is bit for bit the old one."""
    config = dataclasses.replace(CONFIG, probe_tolerance=20)
    with engine([server, other], tmp_path, config) as made:
        made.publish("one", 0)
        other.add(Fault(UPDATE, "keep_weights"))
        with pytest.raises(EngineError, match=rf"{other.url} holds version 0 \(v0-one\), "):
            made.publish("two", 1)


def test_the_first_weights_are_proven_too(server: FakeServer, tmp_path: Path) -> None:
    server.add(Fault(UPDATE, "keep_weights"))
    with engine([server], tmp_path) as made:
        with pytest.raises(EngineError, match=f"{server.url} holds no version that this run pub"):
            made.publish("one", 0)
        with pytest.raises(RuntimeError, match="no weights"):
            made.generate(requests(1))


def test_a_second_update_is_enough(
    two: SGLangEngine, server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    server.add(Fault(UPDATE, "keep_weights", calls=(1,)))
    two.publish("two", 1)
    check_sampled_by(rollouts(two.generate(requests(4))), "two", 1, tmp_path)
    report = two.report()
    assert report.metrics["engine/servers"] == 2
    assert "version 1 is sent once more" in " ".join(report.events)
    assert (len(server.bodies(UPDATE)), len(other.bodies(UPDATE))) == (3, 2)


def test_what_was_under_way_when_a_publish_failed_is_not_returned(
    server: FakeServer, tmp_path: Path
) -> None:
    config = dataclasses.replace(ALONE, on_publish="in_place")
    with engine([server], tmp_path, config) as made:
        made.publish("one", 0)
        server.hold(2)
        outcomes = made.generate(requests(2))
        server.wait_held(2)
        server.add(Fault(UPDATE, "keep_weights"))
        release_at_update(server, 2)
        with pytest.raises(EngineError, match="was published twice"):
            made.publish("two", 1)
        with pytest.raises(EngineError, match="version 1 was published in vain"):
            next(outcomes)


class Half(HashSampler):
    """Of version 1 it reads some tensors and keeps the others: it has weights of no version."""

    def load(self, path: str) -> bytes:
        new = super().load(path)
        return hashlib.blake2b(new).digest() if path.endswith("v1-two") else new


def test_a_server_with_some_tensors_of_the_new_weights_stops_the_run(
    other: FakeServer, tmp_path: Path
) -> None:
    with FakeServer(Half(MODEL)) as half, engine([half, other], tmp_path) as made:
        made.publish("one", 0)
        with pytest.raises(EngineError) as caught:
            made.publish("two", 1)
        assert half.weight_version == "v1-two"  # by its own account
        assert f"{half.url} holds no version that this run published, " in str(caught.value)
        assert f"{other.url} holds version 1 (v1-two), 0 nats off" in str(caught.value)
        assert made.report().metrics["engine/servers"] == 0


# --- servers that come back with other weights


def test_a_server_that_comes_back_with_wrong_weights_is_not_used(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    with engine([server, other], tmp_path, WATCHFUL) as made:
        made.publish("one", 0)
        updates = len(server.bodies(UPDATE))
        server.add(Fault(UPDATE, "keep_weights"))
        server.stop()
        server.restart()
        server.wait_requests(UPDATE, updates + 3)  # it was tried, found wrong, and tried again
        assert made.report().metrics["engine/servers"] == 1
        server.clear_faults()
        wait_until(lambda: made.report().metrics["engine/servers"] == 2)
        check_sampled_by(rollouts(made.generate(requests(4))), "one", 0, tmp_path)


def test_a_server_that_comes_back_with_the_weights_it_had_is_seen_however_close_they_are(
    server: FakeServer, other: FakeServer, tmp_path: Path
) -> None:
    config = dataclasses.replace(WATCHFUL, probe_tolerance=20)
    with engine([server, other], tmp_path, config) as made:
        made.publish("one", 0)
        server.add(Fault(UPDATE, "status", calls=range(1, config.attempts + 1)))
        server.add(Fault(UPDATE, "keep_weights"))
        made.publish("two", 1)
        tries = 2  # the first found it wrong
        server.wait_requests(UPDATE, 1 + config.attempts + tries)
        assert made.report().metrics["engine/servers"] == 1
        server.clear_faults()
        wait_until(lambda: made.report().metrics["engine/servers"] == 2)
        check_sampled_by(rollouts(made.generate(requests(4))), "two", 1, tmp_path)


def test_a_mistake_of_ours_in_the_background_stops_the_run(
    server: FakeServer, other: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()

    def fits(*_: object) -> bool:
        asked.set()
        raise ZeroDivisionError

    with engine([server, other], tmp_path, WATCHFUL) as sampler:
        sampler.publish("one", 0)
        monkeypatch.setattr(Probe, "fits", fits)
        server.stop()
        server.restart()
        assert asked.wait(30)
        with pytest.raises(ZeroDivisionError):
            sampler.publish("two", 1)


def went_back(server: FakeServer, folder: Path) -> None:
    """Killed, and started again with the weights of version 0, which it names rightly."""
    server.stop()
    server.restart(weights=str(folder / "v0-one"), label="v0-one")


def test_a_server_that_went_back_to_older_weights_is_taken_out(
    two: SGLangEngine, server: FakeServer, tmp_path: Path
) -> None:
    """Its answers say truly which version sampled them, but it is not the one they should be of."""
    two.publish("two", 1)
    went_back(server, tmp_path)
    check_sampled_by(rollouts(two.generate(requests(4))), "two", 1, tmp_path)
    report = two.report()
    assert report.metrics["engine/bad_answers_wrong_version"] >= 1
    assert report.metrics["engine/servers"] == 1
    two.publish("three", 2)
    check_sampled_by(rollouts(two.generate(requests(4))), "three", 2, tmp_path)
    assert two.report().metrics["engine/servers"] == 2


def test_a_server_that_went_back_is_updated_and_probed_before_it_is_used_again(
    server: FakeServer, tmp_path: Path
) -> None:
    with engine([server], tmp_path, WATCHFUL) as made:
        made.publish("one", 0)
        made.publish("two", 1)
        server.hold(2)
        outcomes = made.generate(requests(3, 2))
        server.wait_held(6)
        asked = len(server.bodies("/generate"))
        went_back(server, tmp_path)
        check_sampled_by(rollouts(outcomes), "two", 1, tmp_path)
        assert server.weight_version == "v1-two"
        paths = [path for path, _ in server.requests]
        updated = len(paths) - 1 - paths[::-1].index(UPDATE)
        later = [body for path, body in server.requests[updated:] if path == "/generate"]
        assert later[0]["logprob_start_len"] == 0  # the probe
        assert len(later) == 1 + 6
        assert len(server.bodies("/generate")) >= asked + 7


def test_what_older_weights_answered_while_new_ones_were_published_keeps_its_version(
    server: FakeServer, tmp_path: Path
) -> None:
    """No server went back here: the request was sent before the publish."""
    config = dataclasses.replace(CONFIG, on_publish="in_place")
    with engine([server], tmp_path, config) as made:
        made.publish("one", 0)
        server.hold(2)
        outcomes = made.generate(requests(2))
        server.wait_held(2)
        server.add(Fault("/pause_generation", "delay", calls=(1,), seconds=0.3))
        server.release()
        made.publish("two", 1)
        check_sampled_by(rollouts(outcomes), "one", 0, tmp_path)
        assert made.report().metrics["engine/servers"] == 1
