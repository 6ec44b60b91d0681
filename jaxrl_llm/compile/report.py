"""Compile a program and say what it needs: memory, FLOPs, traffic, and the time they would take.

What it is: numbers of one device from the compiler's output, and rules that turn them into seconds.
What it is not: a measurement; the time is what the compiler and the data sheet promise.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from jaxrl_llm.compile.chips import Chip
from jaxrl_llm.compile.costs import Cost, program_cost
from jaxrl_llm.compile.hlo import parse
from jaxrl_llm.compile.programs import StepProgram


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one device, bytes."""

    arguments: int  # parameters, optimizer and batch, as they come in
    outputs: int  # results that get memory of their own: not those that take an argument's
    donated: int  # results that take the memory of an argument
    temporaries: int  # the most that exists at once in between
    code: int  # the program itself

    @property
    def total(self) -> int:
        """All of it at the worst moment."""
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Times:
    """What one step takes, seconds."""

    # Computation by the compiler's own cycles; instructions without any by the roofline.
    compute: float
    without_cycles: float  # the part of `compute` that is by the roofline
    waited: float  # collectives with nothing beside them, at the full rate of all links
    hidden: float  # collectives that computation runs beside
    roofline: float  # the longest of FLOPs, HBM and links, each at its peak: no step is faster

    @property
    def step(self) -> float:
        """The estimate: the longer of computation and what it hides, and what it waits for."""
        return max(self.compute, self.hidden) + self.waited


@dataclasses.dataclass(frozen=True)
class Report:
    """What is known of one program."""

    name: str
    rows: int  # of its batch, over all devices; 0: it has none
    length: int  # positions of a row
    compile_seconds: float
    model_flops: int  # of all devices together
    failure: str = ""  # the compiler's words, where it finds that the program does not fit
    memory: Memory | None = None  # this and what follows is None after a failure
    cost: Cost | None = None
    times: Times | None = None
    # FLOPs of all devices over model FLOPs, what is computed in vain; None without model FLOPs.
    repeated: float | None = None
    utilisation: float | None = None  # model FLOPs per second by times.step, share of the peak

    def free(self, chip: Chip) -> float:
        """Share of the chip's HBM that is left; negative where the program does not fit."""
        return -1.0 if self.memory is None else 1 - self.memory.total / chip.hbm


def compile_program(program: StepProgram, chip: Chip, devices: int) -> Report:
    """Compile for this chip and read what came out."""
    start = time.perf_counter()
    report = Report(program.name, program.rows, program.length, 0.0, program.model_flops)
    try:
        compiled = program.step.lower(*program.arguments).compile()
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - start
        return dataclasses.replace(report, compile_seconds=seconds, failure=str(error))
    seconds, flops = time.perf_counter() - start, program.model_flops
    cost = program_cost(parse(compiled.as_text()), chip, devices)
    times = step_times(cost, chip)
    return dataclasses.replace(
        report,
        compile_seconds=seconds,
        memory=_memory(compiled),
        cost=cost,
        times=times,
        repeated=devices * cost.flops / flops if flops else None,
        utilisation=flops / (devices * chip.flops * times.step) if flops else None,
    )


def _memory(compiled: jax.stages.Compiled) -> Memory:
    analysis: Any = compiled.memory_analysis()
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        donated=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )


def step_times(cost: Cost, chip: Chip) -> Times:
    """Seconds from cycles, bytes and FLOPs."""
    waited, hidden = (
        sum(getattr(traffic, name) for traffic in cost.collectives.values()) / chip.ici_bandwidth
        for name in ("waited", "hidden")
    )
    peaks = (cost.flops / chip.flops, cost.bytes / chip.hbm_bandwidth, waited + hidden)
    return Times(
        compute=cost.cycles / chip.clock + cost.rest,
        without_cycles=cost.rest,
        waited=waited,
        hidden=hidden,
        roofline=max(peaks),
    )
