"""config.json of Hugging Face checkpoints of Qwen3-MoE, in and out.

It is read as transformers 4 and 5 save it, and written so that both and SGLang read it. What this
is not: the weights beside it (hf.py), or any model other than Qwen3-MoE.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxrl_llm.model.config import ModelConfig, MoEConfig

ARCHITECTURE = "Qwen3MoeForCausalLM"
CONFIG = "config.json"

Dtype = Literal["float32", "bfloat16"]
"""What tensors are written as."""

PathLike = str | os.PathLike[str]


def read_model_config(folder: PathLike) -> ModelConfig:
    """The architecture that a checkpoint's config.json describes.

    Raises ValueError naming file, field, value and remedy where it is no Qwen3-MoE model, lacks a
    field, or asks for something that this model does not compute.
    """
    path = Path(folder) / CONFIG
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give a Hugging Face checkpoint's folder"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch the checkpoint again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; fetch the checkpoint again")
    return parse_config(values, str(path))


def config_json(
    config: ModelConfig,
    *,
    dtype: Dtype,
    max_length: int,
    stop_token_ids: Sequence[int],
    pad_token_id: int | None,
) -> dict[str, Any]:
    """The config.json of a checkpoint, for write().

    Args:
      dtype: of the tensors beside it.
      max_length: the most tokens of a sequence; a server's context length.
      stop_token_ids: a server ends a response at each of them.
      pad_token_id: None if there is none.
    """
    moe, rope = config.moe, {"rope_theta": config.rope_theta, "rope_type": "default"}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3_moe",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "rms_norm_eps": config.norm_eps,
        # transformers 5 reads the base of the rotation from the table, 4 from the field.
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.expert_width,
        "norm_topk_prob": moe.normalize_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(moe.dense_layers),
        "intermediate_size": moe.dense_width or moe.expert_width,
        "max_position_embeddings": max_length,
        "eos_token_id": list(stop_token_ids) or None,
        "pad_token_id": pad_token_id,
        "bos_token_id": None,
        "use_cache": True,
        # Likewise the name of this field: transformers 5, then 4.
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def parse_config(values: Mapping[str, Any], source: str) -> ModelConfig:
    """The architecture of a config.json's values; `source` names it in errors."""
    named = values.get("architectures")
    if named != [ARCHITECTURE]:
        raise ValueError(
            f"{source}: architectures is {named}, which is not supported; use a checkpoint of "
            f"{ARCHITECTURE}"
        )
    _refuse_unsupported(values, source)

    def get(field: str, kind: type | tuple[type, ...]) -> Any:
        value = values.get(field)
        # In Python a bool is an int; in a config it is a mistake.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(
                f"{source}: {field} is {value!r}; add it as the model's publisher has it"
            )
        return value

    layers, width, heads = (
        get(field, int) for field in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    dense = _dense_layers(values, layers, source)
    # transformers 5 saves the number of experts under its common name.
    experts = "num_experts" if "num_experts" in values else "num_local_experts"
    moe = MoEConfig(
        num_experts=get(experts, int),
        experts_per_token=get("num_experts_per_tok", int),
        expert_width=get("moe_intermediate_size", int),
        normalize_weights=get("norm_topk_prob", bool),
        dense_layers=dense,
        dense_width=get("intermediate_size", int) if dense else 0,
    )
    return ModelConfig(
        vocab_size=get("vocab_size", int),
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=get("num_key_value_heads", int),
        head_dim=width // heads if values.get("head_dim") is None else get("head_dim", int),
        rope_theta=_rope_theta(values, source),
        norm_eps=float(get("rms_norm_eps", (int, float))),
        tie_embeddings="tie_word_embeddings" in values and get("tie_word_embeddings", bool),
        moe=moe,
    )


def _refuse_unsupported(values: Mapping[str, Any], source: str) -> None:
    computed: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "use_sliding_window": (False, None),
        "dual_chunk_attention_config": (None,),
        "quantization_config": (None,),
    }
    for field, allowed in computed.items():
        value = values.get(field, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{source}: {field} is {value!r}, which this model does not compute, only "
                f"{allowed[0]!r}; convert the checkpoint or use another one"
            )
    kinds = set(values.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise ValueError(
            f"{source}: layer_types has {sorted(kinds)}, which this model does not compute, only "
            "'full_attention'; use another checkpoint"
        )


def _dense_layers(values: Mapping[str, Any], layers: int, source: str) -> tuple[int, ...]:
    """Layers without experts: transformers' rule of two fields."""
    step, listed = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers") or []
    if type(step) is not int or step < 1:
        raise ValueError(f"{source}: decoder_sparse_step is {step!r}; it must be at least 1")
    outside = [layer for layer in listed if layer not in range(layers)]
    if outside:
        raise ValueError(f"{source}: mlp_only_layers names {outside}; layers are 0 to {layers - 1}")
    return tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)


def _rope_theta(values: Mapping[str, Any], source: str) -> float:
    """The base of the rotation: a field of transformers 4, in a table of transformers 5."""
    field = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    table = values.get(field) or {}
    kind = table.get("rope_type", table.get("type", "default"))
    unknown = sorted(set(table) - {"rope_theta", "rope_type", "type"})
    if kind != "default" or unknown:
        raise ValueError(
            f"{source}: {field} is {table}, a scaled rotary embedding, which this model does not "
            f"compute; set {field} to null where sequences fit the model's own length"
        )
    found = [part["rope_theta"] for part in (values, table) if part.get("rope_theta") is not None]
    if not found or any(theta != found[0] for theta in found):
        raise ValueError(f"{source}: rope_theta is {found or 'absent'}; give one, the model's")
    return float(found[0])
