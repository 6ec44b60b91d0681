"""Prints, for each choice of kernels, the kernels of a compiled TPU train step; run as a program.

Two layers of 128-wide heads and experts, in rows of 1,024 tokens that two devices share, with the
experts on two more. In a process of its own, since the TPU compiler settles what devices there are.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from typing import Any

from jaxrl_llm.compile.hlo import parse
from jaxrl_llm.compile.products import is_unknown_kernel, product_flops
from jaxrl_llm.compile.programs import make_programs
from jaxrl_llm.compile.topology import topology_layout
from jaxrl_llm.config import RunConfig
from jaxrl_llm.model.config import ComputeConfig, ModelConfig, MoEConfig
from jaxrl_llm.sharding import MeshConfig
from tests.compile.small import get_config

ROWS, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 8, 1024, 4, 2, 128
MODEL = ModelConfig(
    vocab_size=256,
    width=128,
    num_layers=2,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_width=128),
)
MESH = MeshConfig(expert=2, context=2)


def config_of(compute: ComputeConfig) -> RunConfig:
    """The small config with this model, in two micro-batches."""
    config = get_config()
    learner = dataclasses.replace(config.learner, row_length=LENGTH, mesh=MESH, compute=compute)
    return dataclasses.replace(config, model=MODEL, learner=learner)


def kernels(compute: ComputeConfig) -> dict[str, Any]:
    """Name -> FLOPs of each call of the train step's kernels, and those without a known cost."""
    layout = topology_layout("v5e:2x2", MESH)
    (program,) = make_programs(config_of(compute), layout, ("train",), rows=ROWS)
    text = program.step.lower(*program.arguments).compile().as_text()
    found: dict[str, list[int]] = collections.defaultdict(list)
    unknown = []
    for computation in parse(text).computations.values():
        for instruction in computation.instructions.values():
            if instruction.value("custom_call_target") != '"tpu_custom_call"':
                continue
            name = instruction.name.split(".")[0]
            found[name].append(product_flops(computation, instruction))
            unknown += [instruction.origin] * is_unknown_kernel(instruction)
    return {"calls": found, "unknown": unknown}


if __name__ == "__main__":
    choices = [argument.split() for argument in sys.argv[1:]]
    computes = [
        ComputeConfig(dtype="bfloat16", attention=attention, dispatch=dispatch, logprob_chunk=64)  # type: ignore[arg-type]
        for attention, dispatch in choices
    ]
    print(json.dumps([kernels(compute) for compute in computes]))
