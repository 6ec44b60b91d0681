"""The text of a compiled XLA program (HLO) as values: computations, instructions, shapes, loops.

What it is: a reader of jax.stages.Compiled.as_text(), as the CPU and the TPU compiler write it, and
the number of times each loop runs. What it is not: a count of anything that is computed (costs.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

HBM = 0
"""The memory space of ordinary device memory; a TPU's others are on its chip or on the host."""

_BITS = re.compile(r"[a-z]+(\d+)")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_END = re.compile(r'^\}(, execution_thread="\w+")?\s*$')  # a SparseCore's computation says so
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a result; a tuple is several."""

    dtype: str  # as XLA writes it: f32, bf16, s32, pred
    sizes: tuple[int, ...]
    space: int = HBM  # memory space

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """Bytes, without the padding of tiles; 0 for a token."""
        if self.dtype == "pred":
            return self.elements
        bits = _BITS.match(self.dtype)
        return -(-self.elements * int(bits.group(1)) // 8) if bits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]  # names
    arguments: str  # what is between the parentheses: the value of a constant, an index
    attributes: str  # all that follows, as text

    def called(self, attribute: str) -> str:
        """The computation that an attribute such as calls= or body= names; "" if it is not there.

        Of several, as of a conditional's branches, see `callees`.
        """
        found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes)
        return found.group(1) if found else ""

    def callees(self, attribute: str) -> tuple[str, ...]:
        """The computations in braces after an attribute such as branch_computations."""
        found = re.search(rf"\b{attribute}=\{{([^}}]*)\}}", self.attributes)
        return tuple(_NAME.findall(found.group(1))) if found else ()

    def value(self, attribute: str) -> str:
        """The text after an attribute such as dim_labels=, up to a comma; "" if it is not there."""
        found = re.search(rf"\b{attribute}=([^,\s]+)", self.attributes)
        return found.group(1) if found else ""

    def integers(self, attribute: str) -> tuple[int, ...]:
        """The numbers in braces after an attribute such as lhs_contracting_dims."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found.group(1).split(",") if n) if found else ()

    def number(self, field: str) -> int | None:
        """A number in the instruction's JSON, such as flops; None if it is not there."""
        found = re.search(rf'"{field}":"?(-?\d+)"?', self.attributes)
        return int(found.group(1)) if found else None

    @property
    def cycles(self) -> int | None:
        """The TPU compiler's estimate of how long it takes; None where it has none."""
        found = self.number("estimated_cycles")
        # It says so by the largest number there is, or by none at all.
        return found if found is not None and 0 <= found < 2**63 - 1 else None

    @property
    def origin(self) -> str:
        """The operation of the JAX program that it came from; its own name if that is not known."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else self.name


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program: its instructions by name, in order."""

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    def shapes_of(self, name: str) -> tuple[Shape, ...]:
        """The result of one of its instructions."""
        return self.instructions[name].shapes

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """Its parameters and their numbers."""
        found = self.instructions.values()
        return {i.name: int(i.arguments) for i in found if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> the instructions that read it."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found


@dataclasses.dataclass(frozen=True)
class Program:
    """A whole compiled program, of one device."""

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """The program that a text describes. ValueError if it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    instructions: dict[str, Instruction] = {}
    root: Instruction | None = None
    for line in _logical_lines(text):
        if header := _HEADER.match(line):
            name, instructions, root = header.group(2), {}, None
            entry = name if header.group(1) else entry
        elif _END.match(line) and name:
            if root is not None:
                computations[name] = Computation(name, instructions, root)
            name = ""
        elif name and (found := _LINE.match(line)):
            instruction = _instruction(found.group(2), found.group(3))
            instructions[instruction.name] = instruction
            root = instruction if found.group(1) else root
    if entry not in computations:
        raise ValueError("the text is no compiled XLA program: it has no ENTRY computation")
    return Program(computations, entry)


def _logical_lines(text: str) -> Iterator[str]:
    """Lines; one that goes on with text of a kernel's author, which may break it, is made whole."""
    pending = ""
    for line in text.splitlines():
        if _END.match(line) or _HEADER.match(line) or _LINE.match(line):
            yield pending
            pending = line
        else:
            pending += line
    yield pending


def _instruction(name: str, text: str) -> Instruction:
    """`SHAPE opcode(OPERANDS), ATTRIBUTES` as a value; a shape in parentheses is a tuple."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shapes, rest = text[:end], text[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    arguments = rest[start + 1 : stop]
    return Instruction(
        name=name,
        opcode=rest[:start],
        shapes=tuple(_shapes(shapes)),
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments,
        attributes=rest[stop + 1 :],
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


@functools.lru_cache(maxsize=65536)
def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, sizes, layout in _SHAPE.findall(text):
        space = _SPACE.search(layout)
        numbers = tuple(int(n) for n in re.findall(r"\d+", sizes))
        found.append(Shape(dtype, numbers, int(space.group(1)) if space else HBM))
    return tuple(found)


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a while runs; None if that depends on data.

    The CPU compiler writes it down. The TPU's does not: there it is read from a condition
    `counter < constant` with a constant start and step, which is what lax.scan, lax.map and
    lax.fori_loop with static bounds become.
    """
    if known := _TRIPS.search(loop.attributes):
        return int(known.group(1))
    condition = program.computations[loop.called("condition")]
    body = program.computations[loop.called("body")]
    test = condition.root
    if test.opcode != "compare" or test.value("direction") != "LT":
        return None
    index = _element(condition, test.operands[0])
    limit = _constant(condition, test.operands[1])
    if index is None or limit is None:
        return None
    start = _constant(computation, _item(computation, loop.operands[0], index))
    change = body.instructions.get(_plain(body, _item(body, body.root.name, index)))
    if start is None or change is None or change.opcode != "add":
        return None
    steps = [_constant(body, name) for name in change.operands if _element(body, name) != index]
    if len(steps) != 1 or not steps[0] or steps[0] < 0:
        return None
    return max(0, -(-(limit - start) // steps[0]))


def _plain(computation: Computation, name: str) -> str:
    """The instruction whose value `name` has, through copies."""
    while name in computation.instructions:
        instruction = computation.instructions[name]
        if instruction.opcode not in ("copy", "bitcast", "copy-start", "copy-done"):
            break
        name = instruction.operands[0]
    return name


def _item(computation: Computation, name: str, index: int) -> str:
    """The name of one element of a tuple; "" where it is not put together in this computation."""
    made = computation.instructions.get(_plain(computation, name))
    return made.operands[index] if made is not None and made.opcode == "tuple" else ""


def _element(computation: Computation, name: str) -> int | None:
    """Which element of the computation's parameter a name is; None if it is something else."""
    instruction = computation.instructions.get(_plain(computation, name))
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(instruction.value("index"))


def _constant(computation: Computation, name: str) -> int | None:
    instruction = computation.instructions.get(_plain(computation, name))
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None
