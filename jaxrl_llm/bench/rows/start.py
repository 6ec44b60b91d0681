"""From a command to its first update, and to its help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from jaxrl_llm.bench.config import BenchConfig
from jaxrl_llm.bench.figures import Findings, Wanted, figure

COMMAND = [sys.executable, "-c", "import sys; from jaxrl_llm.main import main; sys.exit(main())"]
WARM = 3
"""Starts with a warm cache, at most."""
PATIENCE = 600.0
"""Seconds after which a run without an update has failed."""
UPDATES = ("sft", "rl")
"""Phases of a run whose records are of updates."""


def measure(config: BenchConfig) -> Findings:
    """See the module."""
    if not config.train.is_file():
        raise ValueError(
            f"--train is {config.train}, which is no file here; start in a checkout, or name a "
            "config"
        )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        cold, *warm = (
            first_update(config.train, Path(folder) / f"run-{number}", environment)
            for number in range(1 + min(config.repeats, WARM))
        )
    helped = [_seconds_of_help() for _ in range(config.repeats)]
    figures = (
        figure("to the first update, cold cache", [cold], "s", wanted=Wanted("<=", 25.0)),
        figure("to the first update, warm cache", warm, "s", wanted=Wanted("<=", 10.0)),
        figure("jaxrl-llm --help", helped, "s", wanted=Wanted("<=", 1.0)),
    )
    notes = (
        "From the start of the process to the first record of an update in metrics.jsonl, every "
        "time with a new run directory; the first with an empty compilation cache. The first "
        "update of the quickstart is one of its cold start.",
        "With this command's environment: JAX looks for no TPU where it has a TPU's library alone.",
    )
    return Findings(f"jaxrl-llm train {config.train}", figures, notes)


def first_update(config: Path, run_dir: Path, environment: Mapping[str, str]) -> float:
    """Seconds until a run of the config has logged an update; the run is then stopped."""
    command = [*COMMAND, "train", str(config), "--run-dir", str(run_dir)]
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while not _has_update(run_dir / "metrics.jsonl"):
                if process.poll() is not None or time.perf_counter() - began > PATIENCE:
                    output.seek(0)
                    text = output.read().decode(errors="replace")[-1000:]
                    raise ValueError(f"{config} made no update: {text}")
                time.sleep(0.01)
            return time.perf_counter() - began
        finally:
            process.terminate()
            process.wait()


def _has_update(metrics: Path) -> bool:
    if not metrics.exists():
        return False
    lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return any(json.loads(line)["phase"] in UPDATES for line in lines)


def _seconds_of_help() -> float:
    began = time.perf_counter()
    subprocess.run([*COMMAND, "--help"], check=True, capture_output=True)
    return time.perf_counter() - began
