"""The journal of finished rollouts: what a restarted run may use of it, and what it must not."""

import concurrent.futures
import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.rollout.engine import EngineError, Request
from jaxrl_llm.rollout.journal import Journal
from jaxrl_llm.types import NOT_SAMPLED, Prompt, Rollout, SamplingParams, bind_routes
from tests.rollout.engines import assert_same

SAMPLING = SamplingParams(3, stop_token_ids=(1,), temperature=0.1)


def make_request(sample: int = 0, *, staleness: int = 0) -> Request:
    prompt = Prompt("p", np.array([5, 6], np.int32), text="five six", answer="eleven")
    return Request(prompt, sample, 2**60 + 7, SAMPLING, staleness)


def make_rollout(request: Request, *versions: int) -> Rollout:
    """Three sampled tokens with numbers that text would round."""
    rng = np.random.default_rng(request.sample_index)
    rollout = Rollout(
        prompt_id="p",
        sample_index=request.sample_index,
        tokens=np.array([5, 6, 7, 8, 1], np.int32),
        loss_mask=np.array([False, True, True, True]),
        sampler_logprobs=np.append(np.float32(0), -rng.random(3, np.float32) / 3),
        routes=None,
        weight_version=np.array([NOT_SAMPLED, *(versions * 3)[:3]], np.int32),
        text="sieben 8",
        finish="stop",
    )
    return bind_routes(rollout, rng.integers(0, 300, (4, 2, 2)).astype(np.int16))


def journal(folder: Path, label: str, version: int) -> Journal:
    """As a process that starts with these weights opens it."""
    made = Journal(folder)
    made.published(label, version)
    return made


def test_a_restarted_run_gets_the_rollout_back_bit_for_bit(tmp_path: Path) -> None:
    request = make_request()
    rollout = make_rollout(request, 3)
    first = journal(tmp_path, "v3-aa", 3)
    assert first.find(request) is None
    first.add(request, rollout)
    again = journal(tmp_path, "v3-aa", 3)
    assert len(again) == 1
    found = again.find(request)
    assert found is not None
    assert_same(found, rollout)
    assert found.route_digest == rollout.route_digest


def test_nothing_is_found_before_the_weights_are_known(tmp_path: Path) -> None:
    request = make_request()
    journal(tmp_path, "v3-aa", 3).add(request, make_rollout(request, 3))
    assert Journal(tmp_path).find(request) is None


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(make_request(), seed=1),
        dataclasses.replace(make_request(), sample_index=1),
        dataclasses.replace(
            make_request(), prompt=Prompt("q", make_request().prompt.tokens, "", "")
        ),
        dataclasses.replace(make_request(), sampling=dataclasses.replace(SAMPLING, top_k=5)),
        dataclasses.replace(
            make_request(), sampling=dataclasses.replace(SAMPLING, stop_token_ids=())
        ),
    ],
    ids=["seed", "sample", "prompt", "top_k", "stop"],
)
def test_another_request_gets_nothing(tmp_path: Path, other: Request) -> None:
    request = make_request()
    book = journal(tmp_path, "v3-aa", 3)
    book.add(request, make_rollout(request, 3))
    assert book.find(request) is not None
    assert book.find(other) is None


def test_a_prompt_whose_tokens_changed_is_an_error(tmp_path: Path) -> None:
    request = make_request()
    book = journal(tmp_path, "v3-aa", 3)
    book.add(request, make_rollout(request, 3))
    changed = dataclasses.replace(request.prompt, tokens=np.array([5, 9], np.int32))
    with pytest.raises(ValueError, match="'p' with other tokens"):
        book.find(dataclasses.replace(request, prompt=changed))


def test_the_same_version_of_other_weights_is_not_found(tmp_path: Path) -> None:
    """A run that does not repeat itself exactly, resumed one step earlier: version 3 is another."""
    request = make_request(staleness=5)
    journal(tmp_path, "v3-aa", 3).add(request, make_rollout(request, 3))
    resumed = journal(tmp_path, "v2-cc", 2)
    assert resumed.find(request) is None
    resumed.published("v3-bb", 3)
    assert resumed.find(request) is None
    resumed.published("v3-aa", 3)
    assert resumed.find(request) is not None


def test_the_newest_usable_rollout_wins(tmp_path: Path) -> None:
    request = make_request(staleness=1)
    book = journal(tmp_path, "v3-aa", 3)
    book.add(request, make_rollout(request, 3))
    book.published("v4-aa", 4)
    book.add(request, make_rollout(request, 4))
    for start in ("v4-aa", 4), ("v3-aa", 3):
        found = journal(tmp_path, *start).find(request)
        assert found is not None
        assert found.weight_version[-1] == start[1]


@pytest.mark.parametrize(
    ("versions", "staleness", "found"),
    [
        ((4,), 0, True),
        ((3,), 0, False),
        ((3,), 1, True),
        ((3, 4), 0, False),
        ((3, 4), 1, True),
        ((2, 4), 1, False),  # its oldest token counts
        ((2, 4), 2, True),
    ],
)
def test_a_rollout_may_be_as_stale_as_its_request_allows(
    tmp_path: Path, versions: tuple[int, ...], staleness: int, found: bool
) -> None:
    """Its sampling does not depend on that: an evaluation with the same seed takes none of it."""
    request = make_request(staleness=staleness)
    book = journal(tmp_path, "v2-aa", 2)
    book.published("v3-aa", 3)
    book.published("v4-aa", 4)
    book.add(make_request(), make_rollout(request, *versions))
    for again in book, journal(tmp_path, "v4-aa", 4):
        assert (again.find(request) is not None) == found


def test_older_tokens_need_the_weights_that_the_run_went_through(tmp_path: Path) -> None:
    request = make_request(staleness=1)
    book = journal(tmp_path, "v2-aa", 2)
    book.add(request, make_rollout(request, 2))
    other = journal(tmp_path, "v1-aa", 1)
    other.published("v2-bb", 2)
    other.published("v3-bb", 3)
    assert journal(tmp_path, "v3-bb", 3).find(request) is None
    other.published("v2-aa", 2)
    assert journal(tmp_path, "v3-bb", 3).find(request) is not None


def test_a_run_that_was_rolled_back_does_not_use_the_steps_it_gave_up(tmp_path: Path) -> None:
    request = make_request(staleness=2)
    book = journal(tmp_path, "v3-aa", 3)
    book.published("v4-aa", 4)
    book.add(request, make_rollout(request, 4))
    book.published("v3-aa", 3)
    assert book.find(request) is None
    assert journal(tmp_path, "v3-aa", 3).find(request) is None


def test_what_no_request_can_ask_for_is_deleted(tmp_path: Path) -> None:
    requests = [make_request(sample) for sample in range(3)]
    book = journal(tmp_path, "v2-aa", 2)
    book.add(requests[0], make_rollout(requests[0], 2))
    book.published("v3-aa", 3)
    book.add(requests[1], make_rollout(requests[1], 2, 3))
    book.add(requests[2], make_rollout(requests[2], 3))
    assert len(book) == 3
    book.forget(version_below=3)
    assert len(book) == len(Journal(tmp_path)) == 2
    names = ["000003.jsonl", "000003.rollouts.jsonl", "labels.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert book.find(requests[2]) is not None
    book.add(requests[0], make_rollout(requests[0], 3))
    assert book.find(requests[0]) is not None


def test_what_was_being_read_when_its_weights_were_forgotten_is_not_kept(tmp_path: Path) -> None:
    requests = [make_request(sample, staleness=2) for sample in range(2)]
    book = journal(tmp_path, "v2-aa", 2)
    book.published("v3-aa", 3)
    book.forget(version_below=3)
    book.add(requests[0], make_rollout(requests[0], 2))
    book.add(requests[1], make_rollout(requests[1], 2, 3))
    for again in book, journal(tmp_path, "v3-aa", 3):
        assert [again.find(request) is not None for request in requests] == [False, True]


def test_tokens_of_unpublished_weights_are_not_recorded(tmp_path: Path) -> None:
    request = make_request()
    book = journal(tmp_path, "v3-aa", 3)
    with pytest.raises(ValueError, match=r"\[4\] were not published"):
        book.add(request, make_rollout(request, 3, 4))
    assert len(book) == len(Journal(tmp_path)) == 0


FILES = ("000003.rollouts.jsonl", "000003.jsonl")
"""Of version 3, in the order in which a rollout is written to them."""


@pytest.mark.parametrize("name", [*FILES, "labels.jsonl"])
def test_a_line_that_a_kill_cut_short_costs_that_line_alone(tmp_path: Path, name: str) -> None:
    requests = [make_request(sample) for sample in range(2)]
    book = journal(tmp_path, "v3-aa", 3)
    book.add(requests[0], make_rollout(requests[0], 3))
    path = tmp_path / name
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    again = journal(tmp_path, "v3-aa", 3)
    assert len(again) == 1
    again.add(requests[1], make_rollout(requests[1], 3))
    last = journal(tmp_path, "v3-aa", 3)
    for request in requests:
        found = last.find(request)
        assert found is not None
        assert_same(found, make_rollout(request, 3))


def test_a_kill_at_any_byte_costs_the_rollout_that_was_being_written(tmp_path: Path) -> None:
    """And leaves nothing behind that the next process could not go on from."""
    requests = [make_request(sample) for sample in range(3)]
    book = journal(tmp_path / "whole", "v3-aa", 3)
    sizes, whole = [], []
    for request in requests[:2]:
        book.add(request, make_rollout(request, 3))
        whole = [(tmp_path / "whole" / name).read_bytes() for name in FILES]
        sizes.append([len(data) for data in whole])
    kills = [(body, sizes[0][1]) for body in range(sizes[0][0], sizes[1][0], 9)]
    kills += [(sizes[1][0], short) for short in range(sizes[0][1], sizes[1][1])]
    for number, cut in enumerate(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, data, size in zip(FILES, whole, cut, strict=True):
            (folder / name).write_bytes(data[:size])
        again = journal(folder, "v3-aa", 3)
        assert len(again) == 1
        assert [(folder / name).stat().st_size for name in FILES] == sizes[0]
        again.add(requests[2], make_rollout(requests[2], 3))
        last = journal(folder, "v3-aa", 3)
        assert last.find(requests[1]) is None
        for request in requests[0], requests[2]:
            found = last.find(request)
            assert found is not None
            assert_same(found, make_rollout(request, 3))


def test_a_kill_between_the_two_files_costs_the_rollout(tmp_path: Path) -> None:
    """The rollout goes first: a short line without it would be damage."""
    request = make_request()
    book = journal(tmp_path, "v3-aa", 3)
    opened: list[Path] = []

    def killed(path: Path, *args: object, **settings: object) -> object:
        if opened:
            raise KeyboardInterrupt
        opened.append(path)
        return unpatched(path, *args, **settings)

    unpatched: Any = Path.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", killed)
        with pytest.raises(KeyboardInterrupt):
            book.add(request, make_rollout(request, 3))
    again = journal(tmp_path, "v3-aa", 3)
    assert again.find(request) is None
    again.add(request, make_rollout(request, 3))
    assert journal(tmp_path, "v3-aa", 3).find(request) is not None


def test_a_kill_while_it_forgets_leaves_nothing_to_find(tmp_path: Path) -> None:
    """The short lines go first: without them nobody looks for rollouts that are gone."""
    request = make_request()
    book = journal(tmp_path, "v3-aa", 3)
    book.add(request, make_rollout(request, 3))

    def killed(path: Path, *, missing_ok: bool) -> None:
        assert missing_ok
        unlink(path)
        raise KeyboardInterrupt

    unlink = Path.unlink
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            book.forget(version_below=4)
    again = journal(tmp_path, "v3-aa", 3)
    assert again.find(request) is None
    again.add(request, make_rollout(request, 3))
    assert journal(tmp_path, "v3-aa", 3).find(request) is not None


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_line_is_named(tmp_path: Path, name: str) -> None:
    """At the start or, where it is a rollout's, when that is looked for."""
    book = journal(tmp_path, "v3-aa", 3)
    for sample in range(3):
        book.add(make_request(sample), make_rollout(make_request(sample), 3))
    path = tmp_path / name
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00" + lines[1][1:] + lines[2])
    with pytest.raises(ValueError, match=rf"{name}, line 2: .*: remove 000003.jsonl$"):
        journal(tmp_path, "v3-aa", 3).find(make_request(1))
    (tmp_path / "000003.jsonl").unlink()
    assert len(Journal(tmp_path)) == 0


def test_a_start_reads_no_rollouts(tmp_path: Path) -> None:
    """They are megabytes each: damage is seen only when the rollout is looked for."""
    book = journal(tmp_path, "v3-aa", 3)
    for sample in range(3):
        book.add(make_request(sample), make_rollout(make_request(sample), 3))
    path = tmp_path / "000003.rollouts.jsonl"
    path.write_bytes(b"\x00" * path.stat().st_size)
    assert len(journal(tmp_path, "v3-aa", 3)) == 3


def test_a_rollout_of_another_request_is_not_taken_for_this_one(tmp_path: Path) -> None:
    book = journal(tmp_path, "v3-aa", 3)
    for sample in range(2):
        book.add(make_request(sample), make_rollout(make_request(sample), 3))
    path = tmp_path / "000003.rollouts.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[1] + lines[0])
    with pytest.raises(ValueError, match=r"rollouts.jsonl, line 1: it is of the request"):
        book.find(make_request(0))


@pytest.mark.parametrize("left", [0, 7, None])
def test_a_rollout_that_is_missing_is_named(tmp_path: Path, left: int | None) -> None:
    """As after the machine has failed, or somebody removed the large file alone."""
    book = journal(tmp_path, "v3-aa", 3)
    for sample in range(2):
        book.add(make_request(sample), make_rollout(make_request(sample), 3))
    path = tmp_path / "000003.rollouts.jsonl"
    data = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(data[: len(data) - left - 1])
    number = 1 if left is None else 2
    message = rf"000003.jsonl, line {number}: its rollout ends at byte .*: remove 000003.jsonl$"
    with pytest.raises(ValueError, match=message):
        Journal(tmp_path)


@pytest.mark.parametrize("line", ["7", "[]", '{"key": "k"}'])
def test_a_line_of_another_kind_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "000003.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"000003.jsonl, line 1: .*: remove 000003.jsonl$"):
        Journal(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_stops_the_run_by_name(tmp_path: Path, name: str) -> None:
    request = make_request()
    book = journal(tmp_path, "v3-aa", 3)
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(EngineError, match=rf"cannot write .*{name}.*No space left"):
        book.add(request, make_rollout(request, 3))
    assert book.find(request) is None
    (tmp_path / name).unlink()  # there is space again
    book.add(request, make_rollout(request, 3))
    for again in book, journal(tmp_path, "v3-aa", 3):
        found = again.find(request)
        assert found is not None
        assert_same(found, make_rollout(request, 3))


def test_threads_may_share_it(tmp_path: Path) -> None:
    requests = [make_request(sample) for sample in range(64)]
    book = journal(tmp_path, "v3-aa", 3)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda request: book.add(request, make_rollout(request, 3)), requests))
        found = list(pool.map(book.find, requests))
    for request, rollout in zip(requests, found, strict=True):
        assert rollout is not None
        assert_same(rollout, make_rollout(request, 3))
    assert len(Journal(tmp_path)) == 64


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.rollout.test_journal import journal, make_request, make_rollout
book = journal(Path(sys.argv[1]), "v3-aa", 3)
for sample in range(2):
    book.add(make_request(sample), make_rollout(make_request(sample), 3))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_added_outlives_a_killed_process(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    book = journal(tmp_path, "v3-aa", 3)
    for sample in range(2):
        found = book.find(make_request(sample))
        assert found is not None
        assert_same(found, make_rollout(make_request(sample), 3))


def test_lines_are_json_that_names_its_weights(tmp_path: Path) -> None:
    request = make_request()
    book = journal(tmp_path, "v2-aa", 2)
    book.published("v3-aa", 3)
    book.add(request, make_rollout(request, 2, 3))
    (line,) = (tmp_path / "000003.jsonl").read_text().splitlines()
    assert json.loads(line)["labels"] == {"2": "v2-aa", "3": "v3-aa"}
    (rollout,) = (tmp_path / "000003.rollouts.jsonl").read_text().splitlines()
    assert json.loads(rollout)["key"] == json.loads(line)["key"]
