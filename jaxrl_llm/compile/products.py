"""FLOPs of the matrix products of a compiled program: what one instruction multiplies and adds.

A product of [M, K] and [K, N] is 2 M K N FLOPs. All else is left out: next to the products it is
little, and a model-FLOP utilisation does not count it. What it is not: loops (costs.py).
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from jaxrl_llm.compile.hlo import Computation, Instruction, Shape

# Kernels that the TPU compiler puts in by itself, without an estimate of their cost.
_SOFTMAX = "online-softmax"
_NO_PRODUCTS = "ragged-dot-metadata"  # which blocks of rows are of which group

# The passes of JAX's splash attention, which has no estimate either, and the products of each:
# scores and output; scores, the gradient of shares and that of queries; the first two of these and
# the gradients of keys and of values.
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)_")
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}

_LABELS = re.compile(r"(\w+)_(\w+)->(\w+)")


def product_flops(computation: Computation, instruction: Instruction) -> int:
    """FLOPs of a dot, a convolution or a kernel with a cost estimate; 0 for all else."""
    match instruction.opcode:
        case "dot":
            return _dot(computation, instruction)
        case "convolution":
            return _convolution(computation, instruction)
        case "custom-call" if instruction.origin == _SOFTMAX:
            return _softmax(computation, instruction)
        case "custom-call" if found := _SPLASH.search(instruction.origin):
            return _SPLASH_PRODUCTS[found.group(1)] * _splash_product(computation, instruction)
        case "custom-call":
            return instruction.number("flops") or 0
    return 0


def is_unknown_kernel(instruction: Instruction) -> bool:
    """Whether it is a kernel without a cost estimate, of which nothing is known."""
    return (
        instruction.opcode == "custom-call"
        and "tpu_custom_call" in instruction.value("custom_call_target")
        and instruction.number("flops") is None
        and instruction.origin not in (_SOFTMAX, _NO_PRODUCTS)
        and not _SPLASH.search(instruction.origin)
    )


def _operand(computation: Computation, instruction: Instruction, index: int) -> Shape:
    return computation.shapes_of(instruction.operands[index])[0]


def _dot(computation: Computation, instruction: Instruction) -> int:
    left = _operand(computation, instruction, 0).sizes
    contracted = instruction.integers("lhs_contracting_dims")
    return 2 * instruction.shapes[0].elements * math.prod(left[i] for i in contracted)


def _softmax(computation: Computation, instruction: Instruction) -> int:
    """The softmax of scores [..., Q, S] and its product with values [..., S, P]."""
    scores = _operand(computation, instruction, 0)
    values = _operand(computation, instruction, 1)
    return 2 * scores.elements * values.sizes[-1]


def _splash_product(computation: Computation, instruction: Instruction) -> int:
    """One product of queries [..., H, Q, P] with keys [..., S, P] in the blocks that are computed.

    Those are the blocks that the causal mask leaves, whole, also those on its edge. The segments of
    packed rows hide more, but the kernel computes it and masks. Where Q < S, devices share a row:
    counted is the mean of all shares, of which each device has an early and a late one.
    """
    rows, columns = _operand(computation, instruction, 0).sizes[-2:]  # what is known of each block
    shapes = (computation.shapes_of(name)[0] for name in instruction.operands)
    query, key = [shape.sizes for shape in shapes if re.match(r"b?f\d", shape.dtype)][:2]
    queries, keys = query[-2], key[-2]
    height, width = queries // rows, keys // columns
    ends = height * (1 + np.arange(keys // height))  # keys before the last query of a block
    area = int(np.sum(-(-ends // width))) * height * width * queries // keys
    return 2 * math.prod(query[:-2]) * query[-1] * area


def _convolution(computation: Computation, instruction: Instruction) -> int:
    """A convolution, as which a TPU computes every product.

    Dimensions of a batch become spatial ones, with dilation and padding so that each position meets
    its own only: those of the window that fall beside the data are no work.
    """
    labels = _LABELS.search(instruction.attributes)
    assert labels, f"{instruction.name} has no dim_labels"
    left_labels, right_labels, output_labels = labels.groups()
    left = _operand(computation, instruction, 0).sizes
    right = _operand(computation, instruction, 1).sizes
    output = instruction.shapes[0].sizes
    spatial = sum(label.isdigit() for label in output_labels)
    flops = 2 * right[right_labels.index("i")]  # of one feature group already
    flops *= output[output_labels.index("b")] * output[output_labels.index("f")]
    for number, window in enumerate(_windows(instruction, spatial)):
        label = str(number)
        flops *= _meetings(
            left[left_labels.index(label)],
            right[right_labels.index(label)],
            output[output_labels.index(label)],
            window,
        )
    return flops


class Window(NamedTuple):
    """How a convolution's window moves along one dimension."""

    stride: int
    low: int  # padding before the data
    spread: int  # 1 + the holes between elements of the data
    tap_spread: int  # 1 + the holes between taps


def _windows(instruction: Instruction, spatial: int) -> list[Window]:
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in found.group(1).split()) if found else {}

    def numbers(name: str, default: int) -> list[int]:
        if name not in fields:
            return [default] * spatial
        return [int(part.split("_")[0]) for part in fields[name].split("x")]

    columns = (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
    return [Window(*row) for row in zip(*(numbers(*c) for c in columns), strict=True)]


def _meetings(size: int, taps: int, outputs: int, window: Window) -> int:
    """Pairs of an output position and a tap of the window that meet an element of the data."""
    starts = np.arange(outputs) * window.stride - window.low
    count = 0
    for tap in range(taps):
        position = starts + tap * window.tap_spread
        inside = (position >= 0) & (position <= (size - 1) * window.spread)
        count += int(np.count_nonzero(inside & (position % window.spread == 0)))
    return count
