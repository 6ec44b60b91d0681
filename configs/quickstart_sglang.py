"""The quickstart with two engines: JAX learns, a real SGLang server samples, both on two CPU cores.

    command    bash launch/quickstart_sglang.sh
    hardware   2 cores, no accelerator, 6 GB of memory
    expect     held-out accuracy from 33 % to 80 % in 6 minutes, most of them sampling

The model, the task and the cold start are those of quickstart.py. Rollouts come from the server
over HTTP, in float32 (fp8 needs a GPU), with its log-probabilities and routes; each step publishes
the weights through a folder and proves with a probe that the server has them.
"""

import dataclasses
import os
import runpy
from pathlib import Path

from jaxrl_llm.config import RolloutConfig, RunConfig
from jaxrl_llm.learner.publish import PublishConfig
from jaxrl_llm.rollout.sglang import SGLangConfig

QUICKSTART = runpy.run_path(str(Path(__file__).parent / "quickstart.py"))["get_config"]


def get_config() -> RunConfig:
    """The quickstart on the server at SGLANG_URL."""
    base: RunConfig = QUICKSTART()
    return dataclasses.replace(
        base,
        run_dir="runs/quickstart-sglang-{seed}",
        steps=40,
        rollout=RolloutConfig(
            groups=base.rollout.groups,
            samples=base.rollout.samples,
            max_new_tokens=base.rollout.max_new_tokens,
            sglang=SGLangConfig(
                servers=(os.environ.get("SGLANG_URL", "http://127.0.0.1:30000"),),
                max_length=base.rollout.max_length,
                concurrency=128,
                probe_tolerance=1e-3,
            ),
            publish=PublishConfig(dtype="float32"),
        ),
        evaluation=dataclasses.replace(base.evaluation, every=20),
        checkpoint=dataclasses.replace(base.checkpoint, every=10),
    )
