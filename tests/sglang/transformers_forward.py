"""Forward passes of Hugging Face's own Qwen3-MoE, run by the Python of the server's environment.

    python transformers_forward.py FOLDER

FOLDER/jobs.json is a list of {"name", "save"}. Where "save" is given, a random model is first saved
to FOLDER/NAME: {"config", "dtype", "max_shard_size"}. Then the checkpoint in FOLDER/NAME is read
in float32 and applied to the tokens of FOLDER/tokens.npy, int[B, S]. FOLDER/NAME.npz gets

    logits f32[B, S, V], and routes int[L, B, S, K] as the routers returned them

and FOLDER/NAME.loaded.json what transformers made of config.json and of the tensors' names.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter


def save(folder: Path, config: dict[str, Any], dtype: str, max_shard_size: str) -> None:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Far from flat, so that routes and logits say something, and norms are not all ones.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)


def forward(folder: Path, tokens: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    model, info = Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    routes: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Qwen3MoeTopKRouter):
            module.register_forward_hook(lambda _module, _inputs, output: routes.append(output[2]))
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(tokens).long()).logits
    stacked = torch.stack([layer.reshape(*tokens.shape, -1) for layer in routes])
    loaded = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(info["mismatched_keys"]),
        "config": model.config.to_dict(),
    }
    return {"logits": logits.numpy(), "routes": stacked.numpy()}, loaded


def main(folder: Path) -> None:
    tokens = np.load(folder / "tokens.npy")
    for job in json.loads((folder / "jobs.json").read_text()):
        if job["save"] is not None:
            save(folder / job["name"], **job["save"])
        arrays, loaded = forward(folder / job["name"], tokens)
        np.savez(folder / f"{job['name']}.npz", **arrays)
        (folder / f"{job['name']}.loaded.json").write_text(json.dumps(loaded))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
