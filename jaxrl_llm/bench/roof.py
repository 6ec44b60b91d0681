"""What the machine can do: a large matrix product and a large copy, in the same rounds as the rest.

On a CPU the product is in float32, elsewhere in bfloat16: the type that the learner computes in.
The copy reads and writes one array in place, whose pages are there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrl_llm.bench.config import RoofSizes
from jaxrl_llm.bench.figures import Figure, figure
from jaxrl_llm.bench.measure import Contestant, Turns

PRODUCT, COPY = "roof: matrix product", "roof: copy"
PRODUCTS = 16
"""In a round on an accelerator."""
COPIES = 8
"""Passes in a round: one alone is over in hundredths of a second, and mostly noise."""


@dataclasses.dataclass(frozen=True)
class Roof:
    """The two contestants, and the work that each does in a round."""

    contestants: Mapping[str, Contestant]
    flops: float  # of the product
    bytes: float  # that the copy reads and writes
    product: str  # the product, for the table

    def of_product(self, turns: Turns, name: str, flops: float) -> list[float]:
        """FLOPs per second of a contestant over the product's: MFU, for the FLOPs of a model."""
        return [flops / self.flops / ratio for ratio in turns.ratio(name, PRODUCT)]

    def of_copy(self, turns: Turns, name: str, size: float) -> list[float]:
        """Bytes per second of a contestant over the copy's."""
        return [size / self.bytes / ratio for ratio in turns.ratio(name, COPY)]

    def figures(self, turns: Turns) -> tuple[Figure, ...]:
        """What the roof was in these rounds."""
        copy = f"{COPY} in place, {self.bytes / 2**21 / COPIES:g} MiB"
        return (
            figure(f"{PRODUCT}, {self.product}", turns.rate(PRODUCT, self.flops), "FLOP/s"),
            figure(copy, turns.rate(COPY, self.bytes), "B/s"),
        )


def computes_in() -> str:
    """The type that the learner and the product compute in on this backend."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def make_roof(sizes: RoofSizes) -> Roof:
    """On the first device of this process."""
    dtype = computes_in()
    side = sizes.product or (4096 if dtype == "float32" else 8192)
    left, right = jnp.ones((side, side), dtype), jnp.ones((side, side), dtype)
    multiply = jax.jit(jnp.matmul)
    touch = jax.jit(lambda x: x + 1, donate_argnums=0)
    held = [jnp.zeros(sizes.copy_mib * 2**18, jnp.float32)]
    # On an accelerator one is over before the host has noticed.
    products = 1 if dtype == "float32" else PRODUCTS

    def product() -> None:
        for _ in range(products):
            last = multiply(left, right)
        last.block_until_ready()

    def copy() -> None:
        for _ in range(COPIES):
            held[0] = touch(held[0])
        held[0].block_until_ready()

    return Roof(
        {PRODUCT: product, COPY: copy},
        flops=2.0 * side**3 * products,
        bytes=2.0 * sizes.copy_mib * 2**20 * COPIES,
        product=f"{side:,}^3, {dtype}",
    )
