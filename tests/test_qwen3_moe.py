"""configs/qwen3_moe.py from a Hugging Face folder to its first step, at a size that fits a test."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors import safe_open

from jaxrl_llm import loop
from jaxrl_llm.config import RunConfig, load_config
from jaxrl_llm.model import hf
from jaxrl_llm.model.config import ModelConfig, MoEConfig
from jaxrl_llm.model.hf_config import config_json
from tests.learner.tiny import make_params
from tests.rollout.fake_samplers import ModelSampler
from tests.rollout.fake_sglang import FakeServer
from tests.tiny import vary

CONFIG = Path(__file__).parent.parent / "configs" / "qwen3_moe.py"
MODEL = ModelConfig(
    vocab_size=272,
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_width=8),
)
MAX_LENGTH = 32


def checkpoint(folder: Path) -> None:
    """Random weights, and a byte-level tokenizer with Qwen's tokens at the end of a turn."""
    described = config_json(
        MODEL, dtype="bfloat16", max_length=64, stop_token_ids=(256, 257), pad_token_id=257
    )
    hf.write(folder, hf.tensors(make_params(MODEL, seed=1), MODEL, "bfloat16"), described)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>", "<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def tensors(folder: Path) -> dict[str, bytes]:
    """Bytes of every tensor by name."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "flax") as file:
            for name in file.keys():  # noqa: SIM118 (it cannot be iterated over)
                found[name] = np.asarray(file.get_tensor(name)).tobytes()
    return found


def small(config: RunConfig, directory: Path) -> RunConfig:
    config = dataclasses.replace(config, run_dir=str(directory / "run"), steps=1)
    data = dataclasses.replace(config.task.data, data_dir=str(directory / "data"), heldout_size=4)
    config = vary(config, "task", data=data)
    config = vary(
        config,
        "rollout",
        groups=4,
        samples=2,
        max_new_tokens=8,
        sglang=dataclasses.replace(config.rollout.sglang, max_length=MAX_LENGTH),
    )
    config = vary(config, "learner", micro_batch_rows=2)
    return vary(config, "evaluation", samples=1, pass_k=1, resamples=100)


def test_the_template_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "model")
    rows = [{"prompt": f"{n} + {n} = \\boxed{{", "answer": str(2 * n)} for n in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = ModelSampler(MODEL, max_length=64, params=make_params(MODEL, seed=2))
    with FakeServer(other, context=64, chunk=20, api_key="secret") as server:
        monkeypatch.setenv("MODEL", str(tmp_path / "model"))
        monkeypatch.setenv("PROMPTS", str(tmp_path / "prompts.jsonl"))
        monkeypatch.setenv("SGLANG_URL", server.url)
        monkeypatch.setenv("SGLANG_API_KEY", "secret")
        config = load_config(CONFIG)
        assert config.model == MODEL
        before, step, after = loop.run(small(config, tmp_path))
    assert (before.phase, step.phase, after.phase) == ("eval", "rl", "eval")
    assert step.metrics["routing/provenance_sampler"] == 1
    assert step.metrics["engine/rollouts"] == 4 + 4 * 2  # the evaluation before, the step
    (first,) = (tmp_path / "run" / "weights").glob("v000000-*")
    assert tensors(first) == tensors(tmp_path / "model")
    # Both sides compute the same weights, each in its precision.
    assert abs(step.metrics["policy/kl_sampler_old"]) < 0.01
    sampled = [rollout for group in step.groups for rollout in group.rollouts]
    assert all(np.all(rollout.tokens < MODEL.vocab_size) for rollout in sampled)
    for path in (tmp_path / "run").rglob("*"):
        assert not (path.is_file() and b"secret" in path.read_bytes()), path
