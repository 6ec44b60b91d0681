"""The command line: `jaxrl-llm train | eval | report`.

What it is: argument parsing (tyro, from the frozen config dataclasses), the progress display and the
handling of signals. What it is not: the job, which is loop.run. Everything heavy is imported inside
the command that needs it, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from jaxrl_llm.config import RunConfig
    from jaxrl_llm.loop import StepRecord

INTERRUPTED = 130  # exit status after Ctrl-C or SIGTERM, as a shell reports it


@dataclasses.dataclass(frozen=True)
class Train:
    """Run an experiment, or go on with one that was stopped.

    Every setting of the experiment is a flag: `jaxrl-llm train CONFIG --help` lists them all.
    """

    config: tyro.conf.Positional[Path]  # Python file with get_config() -> RunConfig


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluate the newest checkpoint of a run on its held-out prompts."""

    run: tyro.conf.Positional[Path]  # run directory
    samples: int | None = None  # samples per prompt (k of avg@k, pass@k); default: the run's own
    prompts: int | None = None  # held-out prompts to use; default: the run's own
    seed: int = 0  # seed of the sampling


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw the plots and the HTML page of a run directory; a run in progress too."""

    run: tyro.conf.Positional[Path]  # run directory


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    console = Console()
    try:
        if len(arguments) >= 2 and arguments[0] == "train" and not arguments[1].startswith("-"):
            return train(Path(arguments[1]), arguments[2:], console)
        command = tyro.cli(Command, args=arguments, prog="jaxrl-llm")  # type: ignore[call-overload]
        if isinstance(command, Eval):
            return evaluate(command, console)
        if isinstance(command, Report):
            return report(command.run, console)
        return train(command.config, [], console)
    except (ValueError, OSError) as error:
        # Bad input carries its own explanation; a traceback would bury it.
        if os.environ.get("JAXRL_LLM_TRACEBACK"):
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        Console(stderr=True).print(str(error), markup=False, highlight=False)
        return 1
