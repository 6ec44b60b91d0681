"""Qwen3-30B-A3B by the paper's recipe on a TPU v6e-64: that of the v5p-64 on chips of 32 GB.

    command    jaxrl-llm train configs/qwen3_30b_a3b_v6e_64.py --multihost    (on every host)
    check      jaxrl-llm compile configs/qwen3_30b_a3b_v6e_64.py --topology v6e:8x8
    hardware   v6e-64, which is 64 chips in 8x8, for the learner; GPU machines with SGLang
    expect     README, "Will it fit?": a tenth of the memory stays free

All but the learner's layout is that of qwen3_30b_a3b_v5p_64.py; the environment is the same too.

Two devices share a row: a device has a third of a v5p's memory, and activations of 32,768 positions
would not fit.
"""

import dataclasses
import runpy
from pathlib import Path

from jaxrl_llm.config import RunConfig
from jaxrl_llm.sharding import MeshConfig, ShardingRules

V5P_64 = runpy.run_path(str(Path(__file__).parent / "qwen3_30b_a3b_v5p_64.py"))["get_config"]
EVERYWHERE = ("data", "fsdp", "context")


def get_config() -> RunConfig:
    """The experiment on $MODEL."""
    base: RunConfig = V5P_64()
    return dataclasses.replace(
        base,
        run_dir="runs/qwen3-30b-a3b-v6e-{seed}",
        learner=dataclasses.replace(
            base.learner,
            micro_batch_rows=1,  # one for two devices, 32 at a time
            compute=dataclasses.replace(base.learner.compute, remat="block", logprob_chunk=1024),
            mesh=MeshConfig(
                data=8,
                fsdp=4,
                context=2,
                rules=ShardingRules(embed=EVERYWHERE, expert_embed=EVERYWHERE),
            ),
        ),
    )
