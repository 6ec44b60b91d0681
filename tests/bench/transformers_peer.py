"""The peer of `jaxrl-llm bench --peer`: transformers' Qwen3MoeForCausalLM in torch, at its best.

It keeps the protocol of jaxrl_llm/bench/peer.py and imports nothing of ours, so that it runs in
any environment with torch and transformers.
"""

import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3MoeForCausalLM
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

EXPERTS = "grouped_mm"
"""transformers' fastest way to train Qwen3-MoE: products over tokens sorted by their experts."""

GENERATE = {
    f"{experts}, {cache} cache": (experts, cache)
    for experts in ("grouped_mm", "eager")
    for cache in ("dynamic", "static")
}
"""Modes of generate: how experts are computed and how keys and values are kept.

Not among them is batched_mm, which copies the experts' weights for every token: 25 GiB for prompts
of 4,096 tokens in all.
"""


def name() -> str:
    libraries = ", ".join(f"{package} {version(package)}" for package in ("transformers", "torch"))
    return f"Qwen3MoeForCausalLM of {libraries}, experts {EXPERTS}"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(folder: Path) -> Qwen3MoeForCausalLM:
    """The checkpoint, float32, with all of the machine's cores at its service."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation(EXPERTS)
    return model.to(device())


def make_step(
    folder: Path, tokens: np.ndarray, *, dtype: str, learning_rate: float
) -> Callable[[], float]:
    model = load(folder).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, eps=1e-8, weight_decay=0.0, fused=True
    )
    moved = torch.from_numpy(tokens).long().to(device())
    inputs, targets = moved[:, :-1].contiguous(), moved[:, 1:].reshape(-1)
    narrow = torch.autocast(device().type, torch.bfloat16, enabled=dtype == "bfloat16")

    def step() -> float:
        with narrow:
            logits = model(input_ids=inputs, use_cache=False).logits
        flat = logits.reshape(-1, logits.shape[-1]).float()
        loss = torch.nn.functional.cross_entropy(flat, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for a GPU: its copy is queued behind the update

    return step


def make_generate(
    folder: Path, prompts: np.ndarray, new_tokens: int
) -> dict[str, Callable[[], np.ndarray]]:
    model = load(folder).eval()
    inputs = torch.from_numpy(prompts).long().to(device())

    def mode(experts: str, cache: str) -> Callable[[], np.ndarray]:
        # Compiled generation needs a C++ compiler and minutes on a CPU, and does not start here.
        how = {} if cache == "dynamic" else {"cache_implementation": cache, "disable_compile": True}

        def generate() -> np.ndarray:
            model.set_experts_implementation(experts)
            with torch.inference_mode():
                return model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=new_tokens,
                    max_new_tokens=new_tokens,
                    pad_token_id=0,
                    **how,
                ).numpy(force=True)

        return generate

    return {name: mode(*settings) for name, settings in GENERATE.items()}
