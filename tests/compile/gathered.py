"""Prints the collectives of gathering a parameter and of its gradient; run as a program.

Arguments: configs and topologies by turns. In a process of its own, since the TPU compiler settles
what devices there are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxrl_llm.compile.chips import chip_of
from jaxrl_llm.compile.costs import program_cost
from jaxrl_llm.compile.hlo import parse
from jaxrl_llm.compile.topology import topology_layout
from jaxrl_llm.config import load_config
from jaxrl_llm.sharding import AXES, parameter_shardings

NAMES = ("expert", "expert_embed", "mlp")


def sizes(path: str, topology: str) -> dict[str, float]:
    """Kind -> bytes, for the experts' first matrix of one layer."""
    config = load_config(Path(path))
    layout, model = topology_layout(topology, config.learner.mesh), config.model
    shape = (model.moe.num_experts, model.width, model.moe.expert_width)
    matrix = jax.ShapeDtypeStruct(shape, jnp.float32)
    sharding = parameter_shardings(matrix, NAMES, layout)
    spec = layout.spec(NAMES)

    def share(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(jnp.sin(layout.whole(x, NAMES))))(x)

    step = jax.jit(layout.shard(share, (spec,), spec))
    argument = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    text = step.lower(argument).compile().as_text()
    cost = program_cost(parse(text), chip_of(topology)[0], layout.size(AXES))
    return {kind: traffic.size for kind, traffic in cost.collectives.items()}


if __name__ == "__main__":
    pairs = zip(sys.argv[1::2], sys.argv[2::2], strict=True)
    print(json.dumps([sizes(*pair) for pair in pairs]))
