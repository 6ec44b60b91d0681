"""Whole runs on fake SGLang servers: settings, what a run left, and a learner that can be killed.

    python -m tests.sglang_runs CONFIG.json

is that learner: a process of its own with the devices and the rewards of the tests; or one of two,
with half of the devices, where the environment names them as jaxrl_llm.processes reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors.numpy import load_file, save_file

import tests.conftest  # noqa: F401 (before JAX starts: the learner's process has no pytest)
from jaxrl_llm import loop, processes
from jaxrl_llm.config import RunConfig, read_config, to_json
from jaxrl_llm.learner.publish import PublishConfig
from jaxrl_llm.learner.state import OptimizerConfig
from jaxrl_llm.rollout.sglang import SGLangConfig
from tests.learner.test_publish import failing_open
from tests.rollout.fake_samplers import ModelSampler
from tests.rollout.fake_sglang import FakeServer
from tests.test_loop import logged
from tests.tiny import even_lengths, tiny_config, vary

ROOT = Path(__file__).parent.parent


def served(run_dir: Path, servers: Sequence[FakeServer]) -> RunConfig:
    """The tiny run on servers that compute in float32, with updates that move the policy."""
    config = tiny_config(run_dir)
    sglang = SGLangConfig(
        servers=tuple(server.url for server in servers),
        max_length=28,
        concurrency=2,
        health_seconds=5,
        update_seconds=3,
        probe_tolerance=1e-3,
    )
    config = vary(config, "rollout", sglang=sglang, publish=PublishConfig(dtype="float32"))
    return vary(config, "learner", optimizer=OptimizerConfig(learning_rate=1e-2))


def elsewhere(config: RunConfig, run_dir: Path) -> RunConfig:
    return dataclasses.replace(config, run_dir=str(run_dir))


def trained(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the timings, and without what only servers know."""
    return [
        line | {"metrics": {k: v for k, v in line["metrics"].items() if k[:7] != "engine/"}}
        for line in logged(run_dir)
    ]


def written_rollouts(run_dir: Path) -> dict[str, str]:
    """Every group that was trained on or evaluated, by step."""
    return {path.name: path.read_text() for path in (run_dir / "rollouts").iterdir()}


def checkpoints(run_dir: Path) -> list[int]:
    """Steps of those that are whole."""
    return sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())


def journaled(run_dir: Path) -> list[tuple[str, int, set[int]]]:
    """(prompt_id, seed, versions) of every rollout in the journal."""
    paths = sorted(p for p in (run_dir / "in_flight").glob("*.jsonl") if p.stem.isdigit())
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    keys = [(json.loads(line["key"]), line["labels"]) for line in lines]
    return [(key[0], key[2], {int(version) for version in labels}) for key, labels in keys]


@contextlib.contextmanager
def learner(config: RunConfig, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with the run in it; killed at the end, with what it printed in folder/output."""
    path = folder / "config.json"
    path.write_text(json.dumps(to_json(config)))
    command = [sys.executable, "-m", "tests.sglang_runs", str(path)]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=os.environ
        )
        try:
            yield process
        finally:
            process.kill()  # SIGKILL
            process.wait()


# --- faults of the weights' folder, and of a server that reads it


@contextlib.contextmanager
def full(_: Path) -> Iterator[None]:
    with epath.testing.mock_epath(open=failing_open(errno.ENOSPC, after=5000)):
        yield


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    def refuse(original: Any, path: Any, *, exist_ok: bool) -> None:
        if Path(path).parent == folder:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        original(path, exist_ok=exist_ok)

    with epath.testing.mock_epath(makedirs=refuse):
        yield


@contextlib.contextmanager
def replaced_by_a_file(folder: Path) -> Iterator[None]:
    folder.mkdir(exist_ok=True)  # before the first weights there is none
    folder.rename(folder.with_name("aside"))
    folder.write_text("mine")
    yield
    folder.unlink()
    folder.with_name("aside").rename(folder)


class HalfLoading(ModelSampler):
    """Loads the experts of a folder, and keeps the other tensors that a server has now."""

    def __init__(self, server: FakeServer, folder: Path) -> None:
        super().__init__(server._sampler.model, max_length=48)
        self._folder = folder
        self._old = tensors_of(Path(server._path))

    def load(self, path: str) -> Any:
        mixed = shutil.copytree(path, self._folder / "mixed", dirs_exist_ok=True)
        for file in mixed.glob("*.safetensors"):
            new = load_file(file)
            save_file({n: new[n] if "experts" in n else self._old[n] for n in new}, file)
        return super().load(str(mixed))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {n: x for file in folder.glob("*.safetensors") for n, x in load_file(file).items()}


def main(path: str) -> None:
    if "JAX_PROCESS_ID" in os.environ:
        jax.config.update("jax_num_cpu_devices", 4)
        processes.join(8)
    with even_lengths():
        for record in loop.run(read_config(Path(path))):
            print(record.phase, record.step, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
