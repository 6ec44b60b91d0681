"""FLOPs of a model, against its parameters and numbers reckoned by hand."""

import dataclasses
import math

import jax

from jaxrl_llm.compile.model_flops import FORWARD, TRAINING, active_parameters, model_flops
from jaxrl_llm.learner.state import abstract_params
from jaxrl_llm.model.config import ModelConfig, MoEConfig
from jaxrl_llm.sharding import MeshConfig, make_layout
from tests.compile.small import LENGTH, MODEL, ROWS, forward_flops


def test_with_all_experts_active_are_all_matrices_but_the_embedding() -> None:
    moe = dataclasses.replace(
        MODEL.moe, experts_per_token=MODEL.moe.num_experts, dense_layers=(1,), dense_width=64
    )
    model = dataclasses.replace(MODEL, moe=moe)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model, make_layout(MeshConfig())))
    matrices = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in leaves
        if not path[-1].key.endswith("norm")
    }
    del matrices["['embed']"]
    assert active_parameters(model) == sum(math.prod(leaf.shape) for leaf in matrices.values())


def test_qwen3_30b_a3b_has_three_billion_active_parameters() -> None:
    model = ModelConfig(
        vocab_size=151936,
        width=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        moe=MoEConfig(num_experts=128, experts_per_token=8, expert_width=768),
    )
    # Its model card says 3.3 billion, of which the embedding is 0.3.
    assert round((active_parameters(model) + 151936 * 2048) / 1e8) == 34
    assert active_parameters(model) == 48 * (
        2048 * 128 * (32 + 4 + 4 + 32) + 2048 * 128 + 8 * 3 * 2048 * 768
    ) + (2048 * 151936)


def test_a_training_step_is_three_passes_and_half_of_the_scores_are_visible() -> None:
    parts = forward_flops(ROWS * LENGTH)
    del parts["rotation"]  # of positions: how it is computed, and no matrix of the model
    for part in ("gate and up", "down"):  # two of eight experts
        parts[part] //= 4
    parts["attention"] //= 2
    forward = model_flops(MODEL, rows=ROWS, length=LENGTH, passes=FORWARD)
    assert forward == sum(parts.values())
    assert model_flops(MODEL, rows=ROWS, length=LENGTH, passes=TRAINING) == 3 * forward
