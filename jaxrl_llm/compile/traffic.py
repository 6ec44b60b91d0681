"""Bytes that the instructions of a compiled program move: through HBM, and between devices.

What it is: per instruction, from the shapes of what it reads and writes. What it is not: loops
(costs.py), or what a cache saves.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from jaxrl_llm.compile.hlo import HBM, Computation, Instruction, Program, Shape

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
"""What devices exchange, by the opcode; an asynchronous one adds -start and -done."""

_NO_TRAFFIC = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "add-dependency",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # opcode -> the operand that is written


def hbm_traffic(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Bytes that an instruction reads from HBM and writes to it; what is fused stays on the chip.

    A slice or an update in place moves what it slices or updates, not the array that it is of.
    """
    opcode = instruction.opcode
    if opcode in _NO_TRAFFIC or opcode.endswith("-done"):
        return 0
    if "AllocateBuffer" in instruction.attributes:
        return 0
    moved = 0
    for name in set(instruction.operands):
        shapes = computation.shapes_of(name)
        moved += min(_in_hbm(shapes), _read(program, computation, name, instruction))
    # An asynchronous one gives its operand, its result and its state.
    shapes = instruction.shapes
    if opcode == "copy-start":
        shapes = instruction.shapes[:1]
    elif opcode.endswith("-start"):
        shapes = instruction.shapes[1:2]
    return moved + min(_in_hbm(shapes), _written(program, computation, instruction))


def _in_hbm(shapes: Sequence[Shape]) -> int:
    return sum(shape.bytes for shape in shapes if shape.space == HBM)


def _size(shapes: Sequence[Shape]) -> int:
    return sum(shape.bytes for shape in shapes)


def _inside(program: Program, instruction: Instruction) -> Computation | None:
    """What a fusion computes."""
    if instruction.opcode != "fusion":
        return None
    return program.computations[instruction.called("calls")]


def _read(program: Program, computation: Computation, name: str, reader: Instruction) -> int:
    """Bytes of the value `name` that one of its readers needs."""
    if inner := _inside(program, reader):
        return sum(
            _needed(program, inner, parameter)
            for parameter, number in inner.parameters.items()
            if reader.operands[number] == name
        )
    if reader.operands[0] == name and name not in reader.operands[1:]:
        if reader.opcode in _SLICES:
            return _size(reader.shapes)
        if reader.opcode in _UPDATES:
            return 0
    if reader.opcode in ("bitcast", "get-tuple-element"):
        return _needed(program, computation, reader.name)
    return _size(computation.shapes_of(name))


def _needed(program: Program, computation: Computation, name: str) -> int:
    """Bytes of the value `name` that all of its readers in a fusion need; at most all of it."""
    whole = _size(computation.shapes_of(name))
    readers = computation.users.get(name, [])
    if computation.root.name == name:
        return whole
    return min(whole, sum(_read(program, computation, name, reader) for reader in readers))


def _written(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Bytes of its result that an instruction makes anew."""
    if inner := _inside(program, instruction):
        return _written(program, inner, inner.root)
    if instruction.opcode == "tuple":
        # Of a tuple, some elements may stay on the chip.
        made = (computation.instructions[name] for name in instruction.operands)
        return sum(
            min(_in_hbm([shape]), _written(program, computation, part))
            for shape, part in zip(instruction.shapes, made, strict=False)
        )
    if instruction.opcode == "bitcast":
        return _written(program, computation, computation.instructions[instruction.operands[0]])
    if instruction.opcode in _UPDATES:
        return _size(computation.shapes_of(instruction.operands[_UPDATES[instruction.opcode]]))
    return _size(instruction.shapes)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One collective, once."""

    kind: str  # one of COLLECTIVES
    size: int  # bytes: the larger of what a device gives and what it gets
    received: float  # bytes that arrive at a device, at least


def exchange(computation: Computation, instruction: Instruction, devices: int) -> Exchange | None:
    """The collective that an instruction is or starts; None if it is none, or the end of one."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    given = sum(_size(computation.shapes_of(name)) for name in instruction.operands)
    # The result of an asynchronous one is (operand, result, state ...).
    shapes = instruction.shapes
    if instruction.opcode != kind and len(shapes) > 1:
        shapes = shapes[len(instruction.operands) : 2 * len(instruction.operands)]
    size = max(given, _size(shapes))
    group = _group(instruction, devices)
    others = (group - 1) / group
    factor = {"all-reduce": 2 * others, "collective-permute": 1.0, "collective-broadcast": 1.0}
    return Exchange(kind, size, size * factor.get(kind, others))


def _group(instruction: Instruction, devices: int) -> int:
    """Devices that exchange with one another.

    Written as {{0,1},{2,3}}, as [groups,size]<=[...] or as mesh['a'=2,'b'=4] {'b'}; none means all.
    """
    text = instruction.attributes
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(listed.group(1).split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(counted.group(1))
    if meshed := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", meshed.group(1)))
        # A part of an axis is 'a':(before)size.
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", meshed.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    return devices
