"""Prompt datasets: prepared once with TFDS as ArrayRecord files, then read at random.

What it is: the builder, the settings that identify a dataset, and the order in which a run goes
through it. What it is not: the reading of raw rows (sources.py), nor TensorFlow: TFDS writes and
reads ArrayRecord without it.

A dataset is stored under data_dir in a folder named by a digest of everything its content depends
on (settings, contents of the files, library version): a second run reads what the first one wrote,
and a changed file makes a new dataset. It appears under its name only when complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds

from jaxrl_llm.data import sources, tasks
from jaxrl_llm.data.tokenizer import Tokenizer
from jaxrl_llm.types import Prompt

Split = Literal["train", "heldout"]

PLACEHOLDER = "{prompt}"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which prompts, and how many of them are held out for evaluation."""

    # "addition": the quickstart task; "jsonl": `files`; "reasoning_gym": a task of that library.
    kind: Literal["addition", "jsonl", "reasoning_gym"] = "addition"
    # Folder of prepared datasets; created if missing, shared by runs.
    data_dir: str = "~/.cache/jaxrl_llm/datasets"
    # Seed of generated problems and of the choice of held-out prompts.
    seed: int = 0
    # addition, reasoning_gym: number of problems generated for training.
    size: int = 4096
    # Number of prompts held out (reasoning_gym: fewer train prompts remain if problems repeat).
    heldout_size: int = 256
    # jsonl: files with one {"prompt", "answer"} object per line ("id", "demonstration" optional).
    files: tuple[str, ...] = ()
    # jsonl: files of held-out prompts; if empty, heldout_size prompts of `files` are held out.
    heldout_files: tuple[str, ...] = ()
    # reasoning_gym: name of the task, such as "chain_sum".
    task: str = ""
    # reasoning_gym: settings of the task as a JSON object, such as '{"max_terms": 4}'.
    task_settings: str = "{}"
    # Text given to the model; {prompt} stands for the prompt. Other braces are left as they are.
    template: str = PLACEHOLDER

    def __post_init__(self) -> None:
        for name in ("size", "heldout_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data {name} is {getattr(self, name)}; it must be at least 1")
        if PLACEHOLDER not in self.template:
            raise ValueError(f"data template is {self.template!r}; it must contain {PLACEHOLDER}")
        if (self.kind == "jsonl") != bool(self.files):
            raise ValueError(
                f"data kind is {self.kind!r} and files is {self.files}; "
                'files belong to kind "jsonl", which needs at least one'
            )
        if self.heldout_files and self.kind != "jsonl":
            raise ValueError(f'data heldout_files is {self.heldout_files}; set kind to "jsonl"')
        if (self.kind == "reasoning_gym") != bool(self.task):
            raise ValueError(
                f"data kind is {self.kind!r} and task is {self.task!r}; "
                'a task belongs to kind "reasoning_gym", which needs one'
            )
        self.parsed_task_settings()

    def parsed_task_settings(self) -> dict[str, Any]:
        """task_settings as a dict; ValueError if it is no JSON object."""
        try:
            settings = json.loads(self.task_settings)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"data task_settings is {self.task_settings!r}, which is not JSON: {error}"
            ) from error
        if not isinstance(settings, dict) or {"size", "seed"} & set(settings):
            raise ValueError(
                f"data task_settings is {self.task_settings!r}; give a JSON object without size "
                "and seed, which are settings of their own"
            )
        return settings


@dataclasses.dataclass
class PromptBuilderConfig(tfds.core.BuilderConfig):
    """TFDS's name of one dataset (a digest) with the settings it is built from."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)


class PromptDataset(tfds.core.GeneratorBasedBuilder):
    """Splits "train" and "heldout" of {"id", "prompt", "answer", "demonstration"} texts."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        names = ("id", "prompt", "answer", "demonstration")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Prompts with verifiable answers.",
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in names}),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # rows stay in the order in which they were read
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        rows = read_rows(self.builder_config.data)
        self.info.metadata["duplicates"] = rows.duplicates
        return {
            "train": self._generate_examples(rows.train),
            "heldout": self._generate_examples(rows.heldout),
        }

    def _generate_examples(self, rows: Sequence[sources.Row]) -> Iterator[tuple[int, dict]]:
        for index, row in enumerate(rows):
            yield (
                index,
                {
                    "id": row.prompt_id,
                    "prompt": row.prompt,
                    "answer": row.answer,
                    "demonstration": row.demonstration,
                },
            )


@dataclasses.dataclass(frozen=True)
class PromptSource:
    """One split of a prepared dataset: len(source) and source[index] -> Prompt."""

    records: Sequence[dict[str, bytes]]
    tokenizer: Tokenizer
    template: str
    duplicates: int  # rows of the whole dataset left out since their prompt was there already
    dataset: str  # the dataset_digest it was prepared with

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Prompt:
        """The prompt at 0 <= index < len(self); ValueError where the tokenizer cannot write it."""
        if not 0 <= index < len(self):
            raise IndexError(f"prompt index {index} is outside [0, {len(self)})")
        record = {name: value.decode("utf-8") for name, value in self.records[index].items()}
        text = self.template.replace(PLACEHOLDER, record["prompt"])
        try:
            token_ids = self.tokenizer.encode(text)
        except ValueError as error:
            raise ValueError(f"prompt {record['id']!r}: {error}") from error
        return Prompt(
            record["id"],
            np.array(token_ids, np.int32),
            text,
            record["answer"],
            record["demonstration"],
        )


def load_prompts(config: DataConfig, tokenizer: Tokenizer, split: Split) -> PromptSource:
    """One split of the configured dataset, prepared first if it is not there yet."""
    builder = prepare(config)
    return PromptSource(
        builder.as_data_source(split=split),
        tokenizer,
        config.template,
        int(builder.info.metadata["duplicates"]),
        builder.builder_config.name,
    )


def prepare(config: DataConfig) -> PromptDataset:
    """The dataset's builder, after writing the dataset if it is not there yet."""
    with _quiet():
        builder = _builder(config)
        if builder.data_path.exists():
            return builder
        pathlib.Path(config.data_dir).expanduser().mkdir(parents=True, exist_ok=True)
        try:
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
        except OSError:
            # Another process finished the same dataset first: its files are as good as ours.
            if not builder.data_path.exists():
                raise
        return _builder(config)


def dataset_digest(config: DataConfig) -> str:
    """32 hexadecimal digits that change whenever the stored dataset would."""
    identity: dict[str, Any] = {"kind": config.kind, "seed": config.seed}
    if config.kind != "jsonl":
        identity["size"] = config.size
    if not config.heldout_files:
        identity["heldout_size"] = config.heldout_size
    if config.kind == "addition":
        # Some problems stand for the code that makes them: their layout may change with it.
        identity["problems"] = [dataclasses.astuple(p) for p in tasks.generate(config.seed, 16)]
    if config.kind == "jsonl":
        identity["files"] = [_file_digest(path) for path in config.files]
        identity["heldout_files"] = [_file_digest(path) for path in config.heldout_files]
    if config.kind == "reasoning_gym":
        identity["task"] = config.task
        identity["task_settings"] = config.parsed_task_settings()
        identity["library"] = importlib.metadata.version("reasoning_gym")
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def read_rows(config: DataConfig) -> sources.SplitRows:
    """The rows of both splits, read or generated anew; ValueError for a bad row."""
    if config.kind == "jsonl":
        rows = sources.jsonl_rows(config.files)
        if config.heldout_files:
            return sources.separate_rows(rows, sources.jsonl_rows(config.heldout_files))
    elif config.kind == "reasoning_gym":
        rows = sources.reasoning_gym_rows(
            config.task,
            config.parsed_task_settings(),
            seed=config.seed,
            count=config.size + config.heldout_size,
        )
    else:
        rows = sources.addition_rows(seed=config.seed, count=config.size + config.heldout_size)
    return sources.split_rows(rows, heldout=config.heldout_size, seed=config.seed)


def prompt_indices(size: int, cursor: int, count: int, seed: int) -> np.ndarray:
    """The prompts numbered cursor .. cursor + count - 1 of an endless shuffled order: int64[count].

    Every run of `size` prompts from a multiple of `size` (an epoch) holds each index once. The
    order is a pure function of (size, seed), so the cursor is all a checkpoint needs. Each epoch
    shuffles two fixed halves separately, so that up to size // 2 prompts in a row are distinct
    even across the end of an epoch; ValueError where the prompts asked for are not distinct.
    """
    if size < 1 or cursor < 0 or count < 1:
        raise ValueError(f"size {size}, cursor {cursor} or count {count} is out of range")
    if count > size:
        raise ValueError(f"{count} prompts at once of {size}; ask for fewer or give more prompts")
    first, last = cursor // size, (cursor + count - 1) // size
    order = np.concatenate([_epoch_order(size, epoch, seed) for epoch in range(first, last + 1)])
    chosen = order[cursor - first * size :][:count]
    if len(np.unique(chosen)) < count:
        raise ValueError(
            f"{count} prompts at once repeat some of {size} across the end of an epoch; ask for at "
            f"most {max(1, size // 2)}, or a number that divides {size}"
        )
    return chosen


def _epoch_order(size: int, epoch: int, seed: int) -> np.ndarray:
    halves = np.array_split(np.random.default_rng([seed, 0]).permutation(size), 2)
    rng = np.random.default_rng([seed, 1, epoch])
    return np.concatenate([rng.permutation(half) for half in halves])


def _builder(config: DataConfig) -> PromptDataset:
    return PromptDataset(
        data_dir=pathlib.Path(config.data_dir).expanduser(),
        config=PromptBuilderConfig(name=dataset_digest(config), data=config),
        file_format="array_record",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep TFDS from writing to the terminal, where a run draws its progress."""
    logger = logging.getLogger("absl")
    level = logger.level
    tfds.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _file_digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"data file {path!r} cannot be read: {error}; check the path") from error
