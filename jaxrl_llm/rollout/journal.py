"""Finished rollouts on disk, until a checkpoint has them: a killed learner samples nothing twice.

What it is: a folder with two files of JSON lines for each weight version, and the rule which of
them a later process may use. A rollout is used again for the very same request (prompt, sample,
seed and sampling settings), and only if the weights that sampled each of its tokens are the run's
own: known by label, which is a digest of them, not by version, which a resumed run counts anew.

    labels.jsonl           {"version": 12, "label": "v12-3fa9.."}, as published, the last one counts
    000012.rollouts.jsonl  {"key": .., "group": ..}, whose newest token is of version 12
    000012.jsonl           {"key": .., "labels": {"12": "v12-3fa9.."}, "start": .., "size": ..}

A rollout with routes takes megabytes, so a process that starts reads the short lines alone. Each is
written after the rollout that it stands for; a rollout without one was cut short by a kill.

What it is not: a checkpoint, which holds the groups that the learner has taken. Lines reach the
operating system before add() returns, so they outlive the process, if not the machine. It never
imports jax.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.rollout.engine import EngineError, Request
from jaxrl_llm.types import Group, Rollout, group_from_json, group_to_json

LABELS, SHORT, ROLLOUTS = "labels.jsonl", ".jsonl", ".rollouts.jsonl"


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Where a recorded rollout is."""

    labels: Mapping[int, str]  # of every version that sampled one of its tokens
    path: Path
    start: int  # bytes
    size: int


class Journal:
    """See the module. One process writes a folder; its threads may share the journal."""

    def __init__(self, folder: Path) -> None:
        """Reads what earlier processes left; what a kill cut short is removed.

        Args:
          folder: made if missing.

        Raises ValueError, naming file and line, for a line that no journal wrote.
        """
        self._folder = folder
        self._lock = threading.Lock()
        self._entries: dict[str, list[_Entry]] = {}  # by key, oldest first
        self._recorded: dict[int, str] = {}  # version -> last label, of earlier processes
        self._published: dict[int, str] = {}  # version -> last label, of this process
        self._current: int | None = None  # version of the last publication
        self._forgotten = 0  # versions below are not kept
        folder.mkdir(parents=True, exist_ok=True)
        for _, line in _lines(folder / LABELS, {"version", "label"}):
            self._recorded[line["version"]] = line["label"]
        for version in self._versions():
            self._read(version)

    def __len__(self) -> int:
        """Number of rollouts held."""
        with self._lock:
            return sum(len(entries) for entries in self._entries.values())

    def published(self, label: str, version: int) -> None:
        """Weights went out: `version` means those of `label` from now on."""
        with self._lock:
            _append(self._folder / LABELS, {"version": version, "label": label})
            self._published[version] = label
            self._current = version

    def add(self, request: Request, rollout: Rollout) -> None:
        """Record a finished rollout before anyone takes it, unless forget() was told to delete it.

        Raises:
          ValueError: a token's version was never published.
          EngineError: the folder cannot be written.
        """
        with self._lock:
            versions = np.unique(rollout.weight_version[rollout.loss_mask]).tolist()
            unknown = [version for version in versions if version not in self._published]
            if unknown:
                raise ValueError(
                    f"{rollout.name}: weight versions {unknown} were not published by this "
                    f"process; it published {sorted(self._published)}"
                )
            if versions[-1] < self._forgotten:  # it was being read when its request was given up
                return
            labels = {version: self._published[version] for version in versions}
            short, path = self._paths(versions[-1])
            key = _key(request)
            group = group_to_json(Group(request.prompt, (rollout,)))
            start, size = _append(path, {"key": key, "group": group})
            _append(short, {"key": key, "labels": labels, "start": start, "size": size})
            self._entries.setdefault(key, []).append(_Entry(labels, path, start, size))

    def find(self, request: Request) -> Rollout | None:
        """The newest recorded rollout of this very request that may be used now, or None.

        It may if the run's own weights sampled all of it, and its oldest token lags behind the
        weights published last by no more than request.max_staleness.

        Raises ValueError for a rollout of another prompt under the same prompt_id, and, naming file
        and line, for one that no journal wrote.
        """
        key = _key(request)
        with self._lock:
            stalest = request.max_staleness
            entries = reversed(self._entries.get(key, []))
            entry = next((e for e in entries if self._usable(e, stalest)), None)
            if entry is None:
                return None
            with entry.path.open("rb") as file:
                file.seek(entry.start)
                data = file.read(entry.size)
        group = _group(data, key, entry)
        if not np.array_equal(group.prompt.tokens, request.prompt.tokens):
            raise ValueError(
                f"{entry.path} holds a rollout of prompt {request.prompt.prompt_id!r} with other "
                "tokens; the data or the tokenizer changed: remove the folder"
            )
        return group.rollouts[0]

    def forget(self, version_below: int) -> None:
        """Delete rollouts whose newest token is older, and keep none that is added later."""
        with self._lock:
            self._forgotten = max(self._forgotten, version_below)
            for version in self._versions():
                if version < version_below:
                    for path in self._paths(version):  # the short lines first
                        path.unlink(missing_ok=True)
            kept = {
                key: [entry for entry in entries if max(entry.labels) >= version_below]
                for key, entries in self._entries.items()
            }
            self._entries = {key: entries for key, entries in kept.items() if entries}

    def _usable(self, entry: _Entry, max_staleness: int) -> bool:
        current = self._current
        if current is None:
            return False
        # Of a version that this process did not publish, the last label on disk is that of the
        # weights which the run went through; newer ones than the current are refused below.
        known = self._recorded | self._published
        if any(known.get(version) != label for version, label in entry.labels.items()):
            return False
        return current - max_staleness <= min(entry.labels) and max(entry.labels) <= current

    def _read(self, version: int) -> None:
        """Take up what earlier processes recorded; rollouts without a short line are cut off."""
        short, path = self._paths(version)
        end = 0
        held = path.stat().st_size if path.exists() else 0
        for number, line in _lines(short, {"key", "labels", "start", "size"}):
            labels = {int(known): label for known, label in line["labels"].items()}
            entry = _Entry(labels, path, line["start"], line["size"])
            end = entry.start + entry.size
            if end > held:
                raise _damaged(
                    short,
                    number,
                    f"its rollout ends at byte {end} of {path.name}, which has {held}",
                )
            self._entries.setdefault(line["key"], []).append(entry)
        if end < held:
            os.truncate(path, end)

    def _versions(self) -> list[int]:
        """Those with a file, of whichever kind."""
        return sorted({int(path.name.split(".")[0]) for path in self._folder.glob("[0-9]*.jsonl")})

    def _paths(self, version: int) -> tuple[Path, Path]:
        """The files of a version: short lines, and rollouts."""
        name = f"{version:06}"
        return self._folder / (name + SHORT), self._folder / (name + ROLLOUTS)


def _key(request: Request) -> str:
    """Everything that fixes a response but the weights."""
    return json.dumps(
        [
            request.prompt.prompt_id,
            request.sample_index,
            request.seed,
            dataclasses.asdict(request.sampling),
        ]
    )


def _append(path: Path, value: dict[str, Any]) -> tuple[int, int]:
    """Write a line; returns where it begins and its size in bytes. All of it, or nothing."""
    data = json.dumps(value).encode() + b"\n"
    try:
        with path.open("ab", buffering=0) as file:
            start = file.tell()
            if file.write(data) != len(data):
                os.ftruncate(file.fileno(), start)
                raise OSError(f"only part of {len(data)} bytes could be written")
    except OSError as error:
        raise EngineError(
            f"the journal of rollouts cannot write {path}: {error}; free the disk or set "
            "journal to False, which samples again what a killed learner had not stored"
        ) from error
    return start, len(data)


def _lines(path: Path, keys: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, value) of every line, from 1 on; what follows the last newline is cut off."""
    if not path.exists():
        return
    start = 0
    with path.open("r+b") as file:
        for number, data in enumerate(file, 1):
            if not data.endswith(b"\n"):
                os.ftruncate(file.fileno(), start)
                return
            try:
                value = _fields(data, keys)
            except (TypeError, ValueError) as error:
                raise _damaged(path, number, error) from error
            yield number, value
            start += len(data)


def _group(data: bytes, key: str, entry: _Entry) -> Group:
    """What a line with a rollout holds; ValueError naming it if it is not the entry's."""
    try:
        value = _fields(data, {"key", "group"})
        if value["key"] != key:
            raise ValueError(f"it is of the request {value['key']}; expected {key}")
        return group_from_json(value["group"])
    except (TypeError, ValueError) as error:
        number = 1
        with entry.path.open("rb") as file:
            while file.tell() < entry.start:
                file.readline()
                number += 1
        raise _damaged(entry.path, number, error) from error


def _fields(data: bytes, keys: Collection[str]) -> dict[str, Any]:
    """A line's value; TypeError or ValueError if it is none with these keys."""
    value: dict[str, Any] = json.loads(data)
    if set(value) != keys:
        raise ValueError(f"its fields are {sorted(value)}; expected {sorted(keys)}")
    return value


def _damaged(path: Path, number: int, reason: object) -> ValueError:
    # Rollouts without their short lines are cut off: to remove these removes all of a version.
    file = path.name.replace(ROLLOUTS, SHORT)
    return ValueError(f"{path}, line {number}: {reason}; the journal is damaged: remove {file}")
