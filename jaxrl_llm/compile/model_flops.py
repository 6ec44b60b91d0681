"""FLOPs of a model as they are usually reckoned, whatever a program computes to get its result.

What it is: the numerator of a model-FLOP utilisation (arXiv 2204.02311, appendix B): products with
the parameters that a token meets, and attention; no recomputation, no padding of experts. What it
is not: the FLOPs of a compiled program (costs.py).
"""

from __future__ import annotations

from jaxrl_llm.model.config import ModelConfig

FORWARD, TRAINING = 1, 3
"""Passes of each kind of step, a gradient being worth two forward passes."""


def active_parameters(model: ModelConfig) -> int:
    """Entries of the matrices that one token is multiplied with, the head's among them.

    The embedding is looked up, and norm scales are no matrices.
    """
    width, moe = model.width, model.moe
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = width * (2 * heads + 2 * kv_heads)
    router = width * moe.num_experts
    experts = 3 * width * moe.expert_width * moe.experts_per_token
    dense = 3 * width * moe.dense_width
    layers = model.num_layers * attention
    layers += model.num_moe_layers * (router + experts)
    layers += (model.num_layers - model.num_moe_layers) * dense
    return layers + width * model.vocab_size


def model_flops(model: ModelConfig, *, rows: int, length: int, passes: int) -> int:
    """FLOPs of `passes` forward passes over rows of `length` tokens that are one sequence each.

    2 for each active parameter and token, and per layer 2 products of queries with the keys and
    the values before them, which are half of the row on average.
    """
    tokens = rows * length
    attention = 2 * model.num_layers * model.num_heads * model.head_dim * length
    return passes * tokens * (2 * active_parameters(model) + attention)
