"""Where prompts come from: JSONL files, reasoning-gym tasks, and the addition task, as rows.

What it is: readers that check every row and say which file, line and field is wrong, and the
deterministic division into a train and a held-out part with no prompt in both. What it is not: the
stored dataset (prompts.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from jaxrl_llm.data import tasks

FIELDS = {"prompt": True, "answer": True, "id": False, "demonstration": False}
"""Fields of a JSONL row that are read -> whether a row needs them. Other fields are allowed."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One task instance before tokenization."""

    prompt_id: str
    prompt: str
    answer: str
    demonstration: str
    origin: str  # where it was read, for errors


@dataclasses.dataclass(frozen=True)
class SplitRows:
    """The two parts of a dataset."""

    train: list[Row]
    heldout: list[Row]
    duplicates: int  # rows left out since another row has the same prompt and answer


def addition_rows(*, seed: int, count: int) -> list[Row]:
    """Problems of the quickstart task."""
    return [
        Row(problem.prompt, problem.prompt, problem.answer, problem.demonstration, "addition")
        for problem in tasks.generate(seed, count)
    ]


def reasoning_gym_rows(task: str, settings: dict[str, Any], *, seed: int, count: int) -> list[Row]:
    """Questions and answers of a reasoning-gym task.

    Only tasks with one right answer, given as text, can be verified by comparing; ValueError for
    others, for an unknown task and for settings it does not take.
    """
    import reasoning_gym  # slow to import, and few runs need it

    try:
        dataset = reasoning_gym.create_dataset(task, size=count, seed=seed, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"reasoning-gym task {task!r} with settings {settings} was refused: {error}"
        ) from error
    rows = []
    for index, entry in enumerate(dataset):
        origin = f"reasoning-gym {task} entry {index}"
        if not isinstance(entry["answer"], str) or not entry["answer"].strip():
            raise ValueError(
                f"{origin}: answer is {entry['answer']!r}; this task has no single answer to "
                "compare with, choose another one"
            )
        rows.append(Row(f"{task}-{index}", entry["question"], entry["answer"], "", origin))
    return rows


def jsonl_rows(paths: Sequence[str]) -> list[Row]:
    """All rows of JSONL files, in order; ValueError naming file, line and field for a bad one.

    A row is an object with texts "prompt" and "answer" and optionally "id" and "demonstration";
    without "id" a digest of the prompt is taken. Blank lines are allowed.
    """
    return [row for path in paths for row in _rows_of_file(path)]


def split_rows(rows: Sequence[Row], *, heldout: int, seed: int) -> SplitRows:
    """Hold out `heldout` rows, chosen by a digest of seed and prompt.

    The choice of one row does not depend on the others' order, and few change when rows are added.
    """
    distinct, duplicates = _distinct(rows)
    if len(distinct) <= heldout:
        raise ValueError(
            f"the dataset has {len(distinct)} distinct prompts and heldout_size is {heldout}; "
            "lower heldout_size or give more prompts"
        )
    ranked = sorted(distinct, key=lambda row: _digest(f"{seed}\n{row.prompt}"))
    chosen = {row.prompt_id for row in ranked[:heldout]}
    return SplitRows(
        [row for row in distinct if row.prompt_id not in chosen],
        [row for row in distinct if row.prompt_id in chosen],
        duplicates,
    )


def separate_rows(train: Sequence[Row], heldout: Sequence[Row]) -> SplitRows:
    """Two given parts; prompts of the held-out part are taken out of the train part."""
    distinct, duplicates = _distinct([*heldout, *train])
    held = {row.prompt for row in heldout}
    parts = SplitRows(
        [row for row in distinct if row.prompt not in held],
        [row for row in distinct if row.prompt in held],
        duplicates,
    )
    if not parts.train or not parts.heldout:
        raise ValueError(
            f"the dataset has {len(parts.train)} train prompts and {len(parts.heldout)} held-out "
            "prompts after removing duplicates; both parts need at least one"
        )
    return parts


def _rows_of_file(path: str) -> Iterator[Row]:
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _parse_row(line, f"{path} line {number}")


def _parse_row(line: str, origin: str) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}: not JSON ({error}); write one object per line") from error
    if not isinstance(value, dict):
        raise ValueError(f"{origin}: a {type(value).__name__}; write one object per line")
    for field, required in FIELDS.items():
        if field not in value and required:
            raise ValueError(f"{origin}: field {field!r} is missing; every row needs it")
        if field in value:
            _check_text(value[field], field, origin)
    prompt_id = value.get("id", _digest(value["prompt"])[:16])
    return Row(prompt_id, value["prompt"], value["answer"], value.get("demonstration", ""), origin)


def _check_text(text: object, field: str, origin: str) -> None:
    if not isinstance(text, str):
        raise ValueError(
            f"{origin}: field {field!r} is {text!r}, a {type(text).__name__}; write it as a text"
        )
    if not text.strip() and field != "demonstration":
        raise ValueError(f"{origin}: field {field!r} is empty; give a text or remove the row")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{origin}: field {field!r} is not valid Unicode ({error}); repair the text"
        ) from error


def _distinct(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """The first row of each prompt, and how many others there were; contradictions are errors."""
    by_prompt: dict[str, Row] = {}
    by_id: dict[str, Row] = {}
    for row in rows:
        first = by_prompt.setdefault(row.prompt, row)
        if first.answer != row.answer:
            raise ValueError(
                f"{row.origin}: same prompt as {first.origin} but answer {row.answer!r} instead of "
                f"{first.answer!r}; remove one of them"
            )
        if first is not row:
            continue
        other = by_id.setdefault(row.prompt_id, row)
        if other is not row:
            raise ValueError(
                f"{row.origin}: field 'id' is {row.prompt_id!r}, as in {other.origin}; "
                "make ids unique or leave them out"
            )
    return list(by_prompt.values()), len(rows) - len(by_prompt)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
