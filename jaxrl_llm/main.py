"""The command line: `jaxrl-llm train | eval | export | report | compile | first-order | bench`.

What it is: argument parsing (tyro, from the frozen config dataclasses) and the handling of signals.
What it is not: the job, which is loop.run. Everything heavy is imported inside the command that
needs it, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import tyro
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from jaxrl_llm.config import RunConfig

DOES_NOT_FIT = 4  # exit status where a compiled program leaves too little memory free
INTERRUPTED = 130  # exit status after Ctrl-C or SIGTERM, as a shell reports it
MULTIHOST = "--multihost"
STOPPED_EARLY = 3  # exit status of a run that its early warning ended


@dataclasses.dataclass(frozen=True)
class Train:
    """Run an experiment, or go on with one that was stopped.

    Every setting of the experiment is a flag: `jaxrl-llm train CONFIG --help` lists them all.
    """

    config: tyro.conf.Positional[Path]  # Python file with get_config() -> RunConfig
    # This is one of several processes of a job, as on every host of a TPU pod. Elsewhere than on
    # TPUs, under Slurm and Open MPI the environment must name them: JAX_COORDINATOR_ADDRESS,
    # JAX_NUM_PROCESSES, JAX_PROCESS_ID.
    multihost: bool = False


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluate the newest checkpoint of a run on its held-out prompts."""

    run: tyro.conf.Positional[Path]  # run directory
    samples: int | None = None  # samples per prompt (k of avg@k, pass@k); default: the run's own
    prompts: int | None = None  # held-out prompts to use; default: the run's own
    seed: int = 0  # seed of the sampling
    # SGLang servers in place of the run's own, each as http://HOST:PORT; default: the run's own.
    servers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a policy as a Hugging Face checkpoint, which SGLang and transformers read.

    SOURCE is a run directory (its newest checkpoint) or a config (the weights it starts from).
    """

    source: tyro.conf.Positional[Path]  # run directory, or Python file with get_config()
    folder: tyro.conf.Positional[Path]  # where to write; a new or an empty one
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the tensors


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw the plots and the HTML page of a run directory; a run in progress too."""

    run: tyro.conf.Positional[Path]  # run directory


@dataclasses.dataclass(frozen=True)
class Compile:
    """Compile a config's steps for a TPU pod without one: memory, FLOPs, collectives, time.

    Every setting of the experiment is a flag after these, as with train.
    Exits with 4 where less of a chip's memory is free than asked for.
    """

    config: tyro.conf.Positional[Path]  # Python file with get_config() -> RunConfig
    topology: str  # chips along each axis of the pod slice, such as v5p:4x4x4 or v5e:2x4
    # Steps to compile; of a publish to servers, the piece of a parameter that is largest.
    programs: tuple[Literal["train", "score", "publish"], ...] = ("train", "score", "publish")
    rows: int = 0  # rows of a mini-batch, of all devices; 0: one for each response, also if packed
    free: float = 0.1  # share of a chip's memory that must be left
    json: Path | None = None  # file to write all numbers to


@dataclasses.dataclass(frozen=True)
class FirstOrder:
    """Measure when the token-level gradient is the sequence-level one, on tiny exact policies.

    Draws its cosine against engine precision and against staleness. Every setting is a flag:
    `jaxrl-llm first-order --help` lists them all.
    """


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure speed and memory against the machine's limit and against a peer.

    `jaxrl-llm bench update decode` measures some rows of the table, without names all. Exits with 1
    where a row failed. Every size is a flag: `jaxrl-llm bench --help` lists them all.
    """


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Compile, tyro.conf.subcommand("compile")]
    | Annotated[FirstOrder, tyro.conf.subcommand("first-order")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # libraries that narrate what they do
    console = Console()
    try:
        if len(arguments) >= 2 and arguments[0] == "train" and not arguments[1].startswith("-"):
            return train(Path(arguments[1]), arguments[2:], console)
        if len(arguments) >= 2 and arguments[0] == "compile" and not arguments[1].startswith("-"):
            return compile_steps(arguments[1:], console)
        if arguments[:1] == ["first-order"]:
            return first_order(arguments[1:], console)
        if arguments[:1] == ["bench"]:
            return bench(arguments[1:], console)
        command = tyro.cli(Command, args=arguments, prog="jaxrl-llm")
        if isinstance(command, Eval):
            return evaluate(command, console)
        if isinstance(command, Export):
            return export(command, console)
        if isinstance(command, Report):
            return report(command.run, console)
        if isinstance(command, Compile):
            return compile_steps(arguments[1:], console)
        if isinstance(command, FirstOrder):
            return first_order([], console)
        if isinstance(command, Bench):
            return bench([], console)
        return train(command.config, ["--multihost"] * command.multihost, console)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError) as error:
        # Bad input carries its own explanation; a traceback would bury it.
        if os.environ.get("JAXRL_LLM_TRACEBACK"):
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1


def train(path: Path, overrides: list[str], console: Console) -> int:
    """Run a config file with command-line overrides; see Train."""
    settings = [argument for argument in overrides if argument != MULTIHOST]
    config = _overridden(path, settings, f"train {path}")
    _use_compilation_cache()
    from jaxrl_llm import loop, processes
    from jaxrl_llm.display import Display
    from jaxrl_llm.learner.watch import EarlyStop

    if MULTIHOST in overrides:
        processes.join(config.learner.mesh.devices)
        console.quiet = not processes.first()
    console.print(f"Run directory: {config.directory}")
    try:
        with (
            _stop_requests(console) as stop,
            contextlib.closing(loop.run(config, stop.is_set)) as records,
            Display(config, console) as display,
        ):
            for record in records:
                display.show(record)
    except EarlyStop as reason:
        console.print(str(reason), markup=False, highlight=False)
        return STOPPED_EARLY
    except loop.Stopped:
        console.print("Stopped with a checkpoint. The same command goes on from here.")
        return INTERRUPTED
    return processes.from_first(lambda: _outcome(config, console))


def _outcome(config: RunConfig, console: Console) -> int:
    """Show what a run that has ended came to."""
    from jaxrl_llm.display import summary

    console.print(summary(config.directory))
    return report(config.directory, console)


def evaluate(command: Eval, console: Console) -> int:
    """Evaluate the newest checkpoint of a run; see Eval."""
    _use_compilation_cache()
    from jaxrl_llm.stored import evaluate_checkpoint

    step, result = evaluate_checkpoint(
        command.run,
        samples=command.samples,
        prompts=command.prompts,
        seed=command.seed,
        servers=command.servers,
    )
    table = Table("metric", "value", title=f"{command.run}, step {step}")
    for name, value in result.metrics().items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    return 0


def export(command: Export, console: Console) -> int:
    """Write a policy as a Hugging Face checkpoint; see Export."""
    _use_compilation_cache()
    from jaxrl_llm.config import load_config
    from jaxrl_llm.export import export_policy

    source = load_config(command.source) if command.source.is_file() else command.source
    what = export_policy(source, command.folder, command.dtype)
    console.print(f"Written: {command.folder}, {what}", soft_wrap=True)
    return 0


def report(run: Path, console: Console) -> int:
    """Draw a run directory; see Report."""
    from jaxrl_llm.report import write_report

    console.print(f"Report: {write_report(run)}", soft_wrap=True)
    return 0


def compile_steps(arguments: list[str], console: Console) -> int:
    """Compile a config for a topology; see Compile."""
    command, overrides = tyro.cli(
        Compile, args=arguments, prog="jaxrl-llm compile", return_unknown_args=True
    )
    config = _overridden(command.config, overrides, f"compile {command.config}")
    from jaxrl_llm.compile.chips import chip_of
    from jaxrl_llm.compile.programs import make_programs
    from jaxrl_llm.compile.report import compile_program
    from jaxrl_llm.compile.table import make_table, notes, to_json
    from jaxrl_llm.compile.topology import topology_layout
    from jaxrl_llm.sharding import AXES

    if not 0 <= command.free < 1:
        raise ValueError(f"--free is {command.free}; it must be a share, from 0 to below 1")
    if command.json is not None and not command.json.parent.is_dir():
        raise ValueError(f"--json is {command.json}, but {command.json.parent} is no folder")
    chip, _ = chip_of(command.topology)
    layout = topology_layout(command.topology, config.learner.mesh)
    devices = layout.size(AXES)
    reports = []
    for program in make_programs(config, layout, command.programs, rows=command.rows):
        console.print(
            f"Compiling {program.name} for the {devices} devices of {command.topology} ..."
        )
        reports.append(compile_program(program, chip, devices))
    title = f"{command.config} on {command.topology}"
    console.print(make_table(title, reports, chip))
    for line in notes(reports):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if command.json is not None:
        values = to_json(command.topology, devices, chip, reports)
        command.json.write_text(json.dumps(values, indent=2) + "\n")
        console.print(f"Written: {command.json}", soft_wrap=True)
    tight = [report.name for report in reports if report.free(chip) < command.free]
    if tight:
        console.print(f"Less than {command.free:.0%} of memory is free in: {', '.join(tight)}")
    return DOES_NOT_FIT if tight else 0


def _overridden(path: Path, overrides: list[str], command: str) -> RunConfig:
    """The config of a file with command-line overrides."""
    from jaxrl_llm.config import RunConfig, load_config

    return tyro.cli(
        RunConfig,
        default=load_config(path),
        args=overrides,
        prog=f"jaxrl-llm {command}",
        description=f"Settings of the experiment, with the values that {path} gives them.",
    )


def first_order(overrides: list[str], console: Console) -> int:
    """Run the study of the first-order approximation; see FirstOrder."""
    from jaxrl_llm.first_order.output import table, write_study
    from jaxrl_llm.first_order.study import StudyConfig, Sweep, run_study

    config = tyro.cli(StudyConfig, args=overrides, prog="jaxrl-llm first-order")
    _use_compilation_cache()
    study = run_study(config, console.print)
    for sweep in get_args(Sweep):
        console.print(f"\nSweep of {sweep}: mean ± standard error over {config.seeds} policies")
        console.print(table(study, sweep), soft_wrap=True, highlight=False)
    for path in write_study(study, Path(config.output)):
        console.print(f"Written: {path}", soft_wrap=True)
    return 0


def bench(overrides: list[str], console: Console) -> int:
    """Measure the rows of the benchmark; see Bench."""
    from jaxrl_llm.bench.command import run_bench
    from jaxrl_llm.bench.config import BenchConfig

    return run_bench(tyro.cli(BenchConfig, args=overrides, prog="jaxrl-llm bench"), console)


@contextlib.contextmanager
def _stop_requests(console: Console) -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second signal interrupts at once."""
    requested = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        console.print("Stopping after this step; once more to stop now and lose it.")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless the environment names another."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "jaxrl_llm" / "compiled"))
    # Small programs count as well: a run compiles dozens of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
