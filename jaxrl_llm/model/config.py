"""The shape of a Qwen3-MoE model and how it is computed. What it is not: any computation."""

from __future__ import annotations

import dataclasses
from typing import Literal

Dispatch = Literal["auto", "dense", "blocked", "ragged", "megablox"]
Attention = Literal["auto", "plain", "blocked", "splash", "cudnn"]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The sparse MLP of a layer, and which layers have a dense one instead."""

    num_experts: int = 8  # E
    experts_per_token: int = 2  # K
    expert_width: int = 32  # F, the width inside one expert
    normalize_weights: bool = True  # a token's gate values sum to 1 (norm_topk_prob)
    dense_layers: tuple[int, ...] = ()  # layers with a dense MLP, as global indices from 0
    dense_width: int = 0  # width inside the MLP of those layers

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}; it must be between 1 and "
                f"num_experts, {self.num_experts}"
            )
        if self.num_experts > 2**15 - 1:
            raise ValueError(f"num_experts is {self.num_experts}; routes are stored as int16")
        if self.expert_width < 1:
            raise ValueError(f"expert_width is {self.expert_width}; it must be positive")
        if len(set(self.dense_layers)) < len(self.dense_layers):
            raise ValueError(f"dense_layers, {self.dense_layers}, names a layer twice")
        if self.dense_layers and self.dense_width < 1:
            raise ValueError(
                f"dense_width is {self.dense_width}, but layers {self.dense_layers} are dense; "
                "give their MLP a width"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: everything that the shapes and values of a forward pass depend on."""

    vocab_size: int = 16  # V
    width: int = 64  # D
    num_layers: int = 2  # dense and MoE layers together
    num_heads: int = 4  # query heads
    num_kv_heads: int = 2  # key and value heads, each shared by num_heads / num_kv_heads queries
    head_dim: int = 16  # size of one head, even
    rope_theta: float = 1e6  # base of the rotary frequencies
    norm_eps: float = 1e-6  # added to the mean square in every RMSNorm
    tie_embeddings: bool = False  # the head is the embedding transposed
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)  # experts and their layers

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in sizes:
            size = dataclasses.asdict(self)[name]
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be positive")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, no multiple of num_kv_heads, {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even number")
        outside = [layer for layer in self.moe.dense_layers if not 0 <= layer < self.num_layers]
        if outside:
            raise ValueError(f"dense_layers names {outside}; layers are 0 to {self.num_layers - 1}")
        if not self.moe_layer_indices:
            raise ValueError("dense_layers names every layer; leave at least one MoE layer")

    @property
    def moe_layer_indices(self) -> tuple[int, ...]:
        """Global indices of the MoE layers: routes[..., l, :] belongs to the l-th of them."""
        return tuple(sorted(set(range(self.num_layers)) - set(self.moe.dense_layers)))

    @property
    def num_moe_layers(self) -> int:
        """L."""
        return len(self.moe_layer_indices)

    @property
    def segments(self) -> tuple[tuple[bool, int], ...]:
        """Maximal runs of layers of one kind, in order, as (is MoE, number of layers)."""
        runs: list[tuple[bool, int]] = []
        for layer in range(self.num_layers):
            is_moe = layer not in self.moe.dense_layers
            if runs and runs[-1][0] == is_moe:
                runs[-1] = (is_moe, runs[-1][1] + 1)
            else:
                runs.append((is_moe, 1))
        return tuple(runs)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a forward pass is computed; beyond rounding it changes no value but of padding."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # activations; router and head stay float32
    # What of a layer is computed again for its gradient: all (block), all but what attention by
    # blocks or by splash gave (attention, for long rows), all but products with parameters (dots),
    # nothing (none).
    remat: Literal["none", "block", "attention", "dots"] = "block"
    dispatch: Dispatch = "auto"  # how tokens meet experts; auto picks by backend and batch
    # auto: splash on TPUs, cudnn on GPUs, plain where they cannot; on CPUs blocked for long rows.
    attention: Attention = "auto"
    attention_chunk: int = 0  # plain attention: queries at once, to save memory; 0: all of them
    logprob_chunk: int = 128  # positions whose logits are computed at once
    # Keep the logits of all positions for the gradient, 4 bytes for each token and vocabulary entry
    # of a micro-batch; else they are computed again.
    keep_logits: bool = False

    def __post_init__(self) -> None:
        if self.attention_chunk < 0:
            raise ValueError(f"attention_chunk is {self.attention_chunk}; use 0 for no chunks")
        if self.logprob_chunk < 1:
            raise ValueError(f"logprob_chunk is {self.logprob_chunk}; it must be at least 1")
