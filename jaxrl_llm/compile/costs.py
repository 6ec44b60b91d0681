"""What a compiled program costs one device, its loops counted as often as they run.

XLA's own cost_analysis() counts the body of a loop once: of a model whose layers are scanned, one
layer. This walks the compiled program from its entry and multiplies. Recomputation (remat), what
the partitioner repeats on several devices and what the compiler removed are therefore all in it.
What it is not: a measurement, or the cost of the model as it is usually reckoned (model_flops.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxrl_llm.compile.chips import Chip
from jaxrl_llm.compile.hlo import Computation, Instruction, Program, trip_count
from jaxrl_llm.compile.products import is_unknown_kernel, product_flops
from jaxrl_llm.compile.traffic import Exchange, exchange, hbm_traffic


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind."""

    count: float = 0
    size: float = 0  # bytes, of each the larger of what a device gives and what it gets
    waited: float = 0  # bytes received in collectives that nothing else runs beside
    hidden: float = 0  # bytes received in those that computation may run beside

    def __add__(self, other: Traffic) -> Traffic:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Traffic(*(a + b for a, b in pairs))

    def times(self, count: int) -> Traffic:
        """That many of them."""
        return Traffic(*(count * value for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a stretch of a program costs one device."""

    flops: float = 0  # of matrix products
    bytes: float = 0  # through HBM
    cycles: float = 0  # the compiler's estimate, of the instructions that it gives one
    rest: float = 0  # seconds, by flops and bytes, of those that it gives none; collectives apart
    collectives: Mapping[str, Traffic] = dataclasses.field(default_factory=dict)  # by kind
    once: frozenset[str] = frozenset()  # loops counted once: how often they run depends on data
    unknown: frozenset[str] = frozenset()  # kernels of which nothing is known, counted as nothing

    def __add__(self, other: Cost) -> Cost:
        kinds = sorted({*self.collectives, *other.collectives})
        mine, theirs = self.collectives, other.collectives
        none = Traffic()
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.cycles + other.cycles,
            self.rest + other.rest,
            {kind: mine.get(kind, none) + theirs.get(kind, none) for kind in kinds},
            self.once | other.once,
            self.unknown | other.unknown,
        )

    def times(self, count: int) -> Cost:
        """That many of it."""
        return dataclasses.replace(
            self,
            flops=count * self.flops,
            bytes=count * self.bytes,
            cycles=count * self.cycles,
            rest=count * self.rest,
            collectives={kind: value.times(count) for kind, value in self.collectives.items()},
        )


def program_cost(program: Program, chip: Chip, devices: int) -> Cost:
    """The cost of a whole program on each of so many devices."""
    walk = _Walk(program, chip, devices, {})
    return _computation(walk, program.entry)


@dataclasses.dataclass(frozen=True)
class _Walk:
    program: Program
    chip: Chip
    devices: int
    known: dict[str, Cost]  # of the computations met so far


def _computation(walk: _Walk, name: str) -> Cost:
    if name not in walk.known:
        computation = walk.program.computations[name]
        total = Cost()
        for instruction in computation.instructions.values():
            total += _instruction(walk, computation, instruction)
        walk.known[name] = total
    return walk.known[name]


def _instruction(walk: _Walk, computation: Computation, instruction: Instruction) -> Cost:
    match instruction.opcode:
        case "while":
            count = trip_count(walk.program, computation, instruction)
            body = _computation(walk, instruction.called("body"))
            if count is None:
                return dataclasses.replace(body, once=body.once | {instruction.origin})
            return body.times(count)
        case "conditional":
            names = instruction.callees("branch_computations") or tuple(
                instruction.called(f"{branch}_computation") for branch in ("true", "false")
            )
            # The most expensive branch, so that the total is never too low.
            branches = [_computation(walk, name) for name in names]
            return max(branches, key=lambda cost: (cost.flops, cost.bytes))
        case "call":
            return _computation(walk, instruction.called("to_apply"))
        case "async-start" | "call-start":  # the second is a SparseCore's
            called = instruction.called("calls") or instruction.called("to_apply")
            return _beside(_computation(walk, called))
    return _single(walk, computation, instruction)


def _single(walk: _Walk, computation: Computation, instruction: Instruction) -> Cost:
    """The cost of an instruction that runs as one: a fusion with all that is in it."""
    asynchronous = instruction.opcode.endswith("-start")
    moved = exchange(computation, instruction, walk.devices)
    size = hbm_traffic(walk.program, computation, instruction)
    if moved is not None:
        cost = _exchanged(moved)
        return dataclasses.replace(_beside(cost) if asynchronous else cost, bytes=size)
    inner = _fused(walk, computation, instruction)
    cycles, rest = instruction.cycles, 0.0
    if cycles is None and not asynchronous:
        rest = max(inner.flops / walk.chip.flops, size / walk.chip.hbm_bandwidth)
    return dataclasses.replace(inner, bytes=size, cycles=cycles or 0, rest=rest)


def _exchanged(moved: Exchange) -> Cost:
    return Cost(collectives={moved.kind: Traffic(1, moved.size, moved.received, 0)})


def _fused(walk: _Walk, computation: Computation, instruction: Instruction) -> Cost:
    """Products, collectives and unknown kernels of an instruction and of what is fused in it."""
    if instruction.opcode != "fusion":
        flops = product_flops(computation, instruction)
        unknown = is_unknown_kernel(instruction)
        return Cost(flops=flops, unknown=frozenset({instruction.origin} if unknown else ()))
    inner = walk.program.computations[instruction.called("calls")]
    total = Cost()
    for part in inner.instructions.values():
        moved = exchange(inner, part, walk.devices)
        if moved is None:
            total += _fused(walk, inner, part)
        elif inner.name.startswith("all-reduce-scatter"):
            # A sum of which each device keeps its slice. The sum is written, not computed whole.
            half = dataclasses.replace(moved, kind="reduce-scatter", received=moved.received / 2)
            total += _exchanged(half)
        elif "async_collective_fusion_config" not in part.attributes:
            total += _exchanged(moved)
        elif _starts(inner, part):
            total += _beside(_exchanged(moved))
    return total


def _starts(inner: Computation, part: Instruction) -> bool:
    """Whether a collective starts here, of those that a TPU spreads over several fusions.

    To run beside them: the first hands it to a call of AsyncCollectiveStart, and each of the others
    repeats the instruction.
    """
    readers = inner.users.get(part.name, [])
    return any("AsyncCollectiveStart" in reader.attributes for reader in readers)


def _beside(cost: Cost) -> Cost:
    """The same, its collectives running beside other work."""
    return dataclasses.replace(
        cost,
        collectives={
            kind: dataclasses.replace(t, waited=0, hidden=t.waited + t.hidden)
            for kind, t in cost.collectives.items()
        },
    )
