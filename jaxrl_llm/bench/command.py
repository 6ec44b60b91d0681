"""The command: rows one after another, each in a process of its own; it imports no jax itself."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import time
import traceback
from concurrent.futures.process import BrokenProcessPool
from typing import get_args

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from jaxrl_llm.bench.config import BenchConfig, Row
from jaxrl_llm.bench.figures import Findings, RowResult, make_table, to_json
from jaxrl_llm.bench.isolation import additions, in_fresh_process

FAILED = 1
"""Exit status where a row failed. A figure that misses what is wanted is a result, no failure."""
WIDTH = 110
"""Columns of what is printed into a file or a pipe."""
LEGEND = (
    "Every figure is the median over rounds in which all contestants of a row take turns, and a "
    "ratio the median of the rounds' ratios. Of roof: against the matrix product or the copy of "
    "the same rounds. GLIBC_TUNABLES: large arrays are in huge pages, as launch/*.sh have it too."
)


def run_bench(config: BenchConfig, console: Console) -> int:
    """Measures the rows of the config, prints a table of each as it ends, and writes the JSON."""
    if not console.is_terminal:
        console.width = WIDTH
    # For the processes to come.
    os.environ.update(additions(os.environ))
    machine = in_fresh_process(_facts)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), markup=False)
    console.print(LEGEND)
    results = []
    for row in config.rows or get_args(Row):
        console.print(f"\nMeasuring {row} ...")
        results.append(measure_row(row, config))
        show_row(results[-1], console)
    _summarise(results, console)
    if config.json is not None:
        settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        values = to_json(machine, settings, results)
        config.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        console.print(f"Written: {config.json}", soft_wrap=True)
    return FAILED if any(result.error for result in results) else 0


def measure_row(row: str, config: BenchConfig) -> RowResult:
    """A row in a process of its own; its failure, or that of the process, is a result too."""
    began = time.perf_counter()
    try:
        found = in_fresh_process(_attempt, row, config)
    except BrokenProcessPool:
        found = "its process was killed, as when memory runs out"
    seconds = time.perf_counter() - began
    if isinstance(found, str):
        return RowResult(row, seconds, None, found)
    return RowResult(row, seconds, found)


def show_row(result: RowResult, console: Console) -> None:
    """The table of a row and its notes."""
    console.print(make_table(result))
    for note in result.findings.notes if result.findings else ():
        console.print(Padding(Text(note), (0, 0, 0, 2)))


def _facts() -> dict[str, str | int]:
    from jaxrl_llm.bench.machine import machine_facts

    return machine_facts()


def _attempt(row: str, config: BenchConfig) -> Findings | str:
    """In the row's process: what it measured, or what it died of, as text that any pipe carries."""
    module = importlib.import_module(f"jaxrl_llm.bench.rows.{row}")
    try:
        findings: Findings = module.measure(config)
    except Exception as error:  # whatever it is, it belongs into the table
        if os.environ.get("JAXRL_LLM_TRACEBACK"):
            traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return findings


def _summarise(results: list[RowResult], console: Console) -> None:
    figures = [
        (result.row, found)
        for result in results
        if result.findings
        for found in result.findings.figures
    ]
    wanted = [pair for pair in figures if pair[1].holds is not None]
    missed = [f"{row}: {found.name}" for row, found in wanted if not found.holds]
    failed = [result.row for result in results if result.error]
    console.print(f"\n{len(wanted) - len(missed)} of {len(wanted)} figures are what is wanted.")
    for line in missed:
        console.print(f"missed   {line}", markup=False, highlight=False)
    for row in failed:
        console.print(f"failed   {row}", markup=False, highlight=False)
