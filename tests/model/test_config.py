"""Which layers are which, and settings that cannot be."""

import dataclasses
from typing import Any

import pytest

from jaxrl_llm.model.config import ComputeConfig, ModelConfig, MoEConfig
from tests.model.tiny import TINY


def with_dense(layers: tuple[int, ...], num_layers: int = 6) -> ModelConfig:
    moe = MoEConfig(dense_layers=layers, dense_width=4)
    return ModelConfig(num_layers=num_layers, moe=moe)


def test_segments_are_maximal_runs_of_one_kind() -> None:
    assert with_dense(()).segments == ((True, 6),)
    assert with_dense((0, 3, 4)).segments == ((False, 1), (True, 2), (False, 2), (True, 1))


def test_moe_layers_keep_their_global_index() -> None:
    assert with_dense((4, 0, 3)).moe_layer_indices == (1, 2, 5)
    assert with_dense((4, 0, 3)).num_moe_layers == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_kv_heads": 3}, "num_kv_heads, 3"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"moe": MoEConfig(dense_layers=(4,), dense_width=4)}, r"dense_layers names \[4\]"),
        ({"moe": MoEConfig(dense_layers=(0, 1, 2, 3), dense_width=4)}, "every layer"),
    ],
)
def test_impossible_models_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"experts_per_token": 9}, "experts_per_token is 9"),
        ({"num_experts": 40_000}, "int16"),
        ({"expert_width": 0}, "expert_width is 0"),
        ({"dense_layers": (0,)}, "dense_width is 0"),
        ({"dense_layers": (1, 1), "dense_width": 4}, "twice"),
    ],
)
def test_impossible_experts_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MoEConfig(**values)


def test_impossible_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="attention_chunk is -1"):
        ComputeConfig(attention_chunk=-1)
    with pytest.raises(ValueError, match="logprob_chunk is 0"):
        ComputeConfig(logprob_chunk=0)
