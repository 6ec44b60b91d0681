"""Sizes at which every row takes seconds, and a peer that does nothing."""

from pathlib import Path

from jaxrl_llm.bench.config import (
    BenchConfig,
    DecodeSizes,
    LearnerSizes,
    LogprobSizes,
    RoofSizes,
    SliceSizes,
)
from jaxrl_llm.model.config import ModelConfig, MoEConfig

MODEL = ModelConfig(
    vocab_size=24,
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_width=8),
)
PEER = Path(__file__).with_name("fake_peer.py")


def tiny(**changes: object) -> BenchConfig:
    """The benchmark at tiny sizes."""
    sizes = {
        "repeats": 2,
        "learner": LearnerSizes(MODEL, rows=2, length=16, more_experts=8),
        "logprobs": LogprobSizes(vocabulary=96, positions=1024),
        "decode": DecodeSizes(slots=2, prompt=5, new_tokens=8, waves=2),
        "slice": SliceSizes(MODEL, rows=2, length=16),
        "roof": RoofSizes(product=64, copy_mib=1),
    }
    return BenchConfig(**(sizes | changes))  # type: ignore[arg-type]
