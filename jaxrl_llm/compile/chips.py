"""The TPU chips that programs are compiled for, in numbers. What it is not: anything measured."""

from __future__ import annotations

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which is one JAX device."""

    name: str  # as a topology begins: "v5p:4x4x4"
    # What the TPU compiler gives to a program, bytes: its own figure, from the error that it ends
    # with where a program needs more ("exceeds available HBM (95.74G)", libtpu 0.0.42). It is less
    # than the chip has; the rest is the system's.
    hbm: int
    # The rest is from Google's pages, docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: peak compute
    # (bf16), HBM bandwidth, and half of the bidirectional interchip interconnect bandwidth; that of
    # v4 is from arXiv 2304.01433, six links of 50 GB/s.
    flops: float  # per second, bfloat16
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second that all links together receive
    # That of the cycles in which the compiler reckons. Of v4, v5e and v5p it is peak compute
    # / (matrix units x 128 x 128 x 2). For v6e no source gives one that its peak and its two units
    # of 256 x 256 agree with: this is the clock at which the compiler's cycles for a plain stream
    # through HBM come to 81 % of the bandwidth, as on v5e.
    clock: float  # Hz


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(30.75 * GIB), 275e12, 1200e9, 300e9, 1.05e9),
        Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 200e9, 1.5e9),
        Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, 600e9, 1.75e9),
        Chip("v6e", int(31.25 * GIB), 918e12, 1638e9, 400e9, 1.75e9),
    )
}


def chip_of(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """Chip and shape of a topology such as "v5p:4x4x4". ValueError for a name of another form."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){0,2})(?:_twisted|_untwisted)?", topology)
    if not found or found.group(1) not in CHIPS:
        raise ValueError(
            f"--topology is {topology!r}; it must be one of {', '.join(CHIPS)} and the chips along "
            "each axis, such as v5p:4x4x4, v6e:8x8 or v5e:2x4"
        )
    return CHIPS[found.group(1)], tuple(int(size) for size in found.group(2).split("x"))
