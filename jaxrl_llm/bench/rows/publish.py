"""Weights to the in-process engine, and through a folder against the speed of its disk."""

from __future__ import annotations

import itertools
import os
import tempfile
from functools import partial
from pathlib import Path

from jaxrl_llm.bench.config import BenchConfig
from jaxrl_llm.bench.figures import Findings, Wanted, figure
from jaxrl_llm.bench.measure import Contestant, take_turns
from jaxrl_llm.bench.memory import array_bytes
from jaxrl_llm.bench.roof import make_roof
from jaxrl_llm.bench.workload import Setup, describe, make_setup
from jaxrl_llm.learner.publish import PublishConfig, Publisher
from jaxrl_llm.rollout.local import LocalEngine, LocalEngineConfig

ENGINE, FOLDER, DISK = "to the engine", "through a folder", "plain write and fsync"


def measure(config: BenchConfig) -> Findings:
    """See the module."""
    setup, roof = make_setup(config.learner.model), make_roof(config.roof)
    params, versions = setup.params(), itertools.count()
    size = array_bytes()
    engine = LocalEngine(LocalEngineConfig(), setup.model, decode_text=lambda tokens: "")
    engine.publish(params, next(versions))
    added = array_bytes() - size

    def hand_over() -> None:
        engine.publish(params, next(versions))
        array_bytes()  # waits for the engine's arrays

    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        publisher = _publisher(setup, Path(folder) / "run")
        first = publisher.publish(params, next(versions))
        written = sum(path.stat().st_size for path in Path(first.path).iterdir())
        contestants: dict[str, Contestant] = {
            **roof.contestants,
            ENGINE: hand_over,
            FOLDER: lambda: publisher.publish(params, next(versions)),
            DISK: partial(_write, Path(folder) / "plain", written, os.urandom(2**24)),
        }
        turns = take_turns(contestants, config.repeats)
    figures = (
        *roof.figures(turns),
        figure(f"{ENGINE}, float32", turns.seconds(ENGINE), "s"),
        figure(f"{ENGINE}, device memory added", [added], "B", wanted=Wanted("<=", 0)),
        figure(FOLDER, turns.seconds(FOLDER), "s"),
        *(
            figure(
                f"{name}, speed",
                turns.rate(name, written),
                "B/s",
                roof=roof.of_copy(turns, name, written),
            )
            for name in (FOLDER, DISK)
        ),
        figure(
            f"speed, {FOLDER} / {DISK}", turns.ratio(DISK, FOLDER), "x", wanted=Wanted(">=", 0.8)
        ),
    )
    notes = (
        f"In {config.folder or tempfile.gettempdir()}: {written / 2**20:,.1f} MiB a version, in "
        f"{PublishConfig().dtype} with checksums, flushed to disk; the plain write is as long.",
        "Of roof: against the copy in memory. Memory added: bytes of all arrays on the device, a "
        "shared buffer counted once.",
    )
    return Findings(describe(setup.model), figures, notes)


def _publisher(setup: Setup, run_dir: Path) -> Publisher:
    return Publisher(
        PublishConfig(), setup.model, run_dir, stop_token_ids=(), pad_token_id=None, max_length=1024
    )


def _write(path: Path, size: int, block: bytes) -> None:
    """A new file of so many bytes, this block again and again, on disk when this returns."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())
