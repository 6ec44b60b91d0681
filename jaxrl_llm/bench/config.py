"""What `jaxrl-llm bench` measures, and at what sizes. It imports no jax."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from jaxrl_llm.model.config import ModelConfig, MoEConfig

Row = Literal["update", "cost", "replay", "logprobs", "decode", "publish", "start", "slice"]
"""A group of figures that are measured together; bench/rows/ has a module for each."""

MODEL = ModelConfig(
    vocab_size=8192,
    width=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    moe=MoEConfig(num_experts=32, experts_per_token=4, expert_width=256),
)
QWEN3_30B_A3B_SLICE = ModelConfig(
    vocab_size=151_936,
    width=2048,
    num_layers=4,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    moe=MoEConfig(num_experts=128, experts_per_token=8, expert_width=768),
)


@dataclasses.dataclass(frozen=True)
class LearnerSizes:
    """Of the rows update, cost and replay; the model is that of decode and publish too."""

    model: ModelConfig = MODEL
    rows: int = 4  # B
    length: int = 1024  # S, one sequence a row
    more_experts: int = 128  # of the model that must cost no more, at the same experts per token


@dataclasses.dataclass(frozen=True)
class LogprobSizes:
    """Of the row logprobs; D is the model's."""

    vocabulary: int = 151_936  # V
    positions: int = 2048


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
    """Of the row decode."""

    slots: int = 64  # requests decoded together
    prompt: int = 64  # tokens
    new_tokens: int = 128  # of a response; unequal ones are an eighth to fifteen eighths of it
    waves: int = 4  # requests for each slot, where lengths are unequal and where they are compared

    @property
    def lengths(self) -> tuple[int, int]:
        """Shortest and longest of unequal responses, whose mean is new_tokens."""
        shortest = max(self.new_tokens // 8, 1)
        return shortest, 2 * self.new_tokens - shortest


@dataclasses.dataclass(frozen=True)
class RoofSizes:
    """Of what the machine is measured by."""

    product: int = 0  # side of the square matrices; 0: 4,096 on a CPU, 8,192 elsewhere
    copy_mib: int = 512  # MiB that are read and written


@dataclasses.dataclass(frozen=True)
class SliceSizes:
    """Of the row slice: the first layers of Qwen3-30B-A3B."""

    model: ModelConfig = QWEN3_30B_A3B_SLICE
    rows: int = 8  # B
    length: int = 4096  # S


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What to measure. The sizes are those that the README's figures are of."""

    rows: tyro.conf.Positional[tuple[Row, ...]] = ()  # groups of figures to measure; none: all
    repeats: int = 5  # rounds; of what takes minutes, fewer
    # Python file with the functions of bench/peer.py; tests/bench/transformers_peer.py is one.
    peer: Path | None = None
    json: Path | None = None  # file to write all numbers to
    folder: Path | None = None  # on the disk to publish to; default: that of temporary files
    train: Path = Path("configs/quickstart.py")  # config whose start is timed
    learner: LearnerSizes = LearnerSizes()  # of update, cost, replay, decode and publish
    logprobs: LogprobSizes = LogprobSizes()  # of logprobs
    decode: DecodeSizes = DecodeSizes()  # of decode
    slice: SliceSizes = SliceSizes()  # of slice
    roof: RoofSizes = RoofSizes()  # of every row but start

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; it must be at least 1")
        if self.peer is not None and not self.peer.is_file():
            raise ValueError(f"--peer is {self.peer}, which is no file")
        if self.json is not None and not self.json.parent.is_dir():
            raise ValueError(f"--json is {self.json}, but {self.json.parent} is no folder")
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"--folder is {self.folder}, which is no folder")
