"""Checkpoints against transformers itself, in the server's environment: both directions."""

import dataclasses
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jaxrl_llm.model import hf
from jaxrl_llm.model.config import ComputeConfig, ModelConfig, MoEConfig
from jaxrl_llm.model.hf_config import Dtype, config_json, read_model_config
from jaxrl_llm.model.transformer import Params, make_forward, unembed
from jaxrl_llm.sharding import MeshConfig, make_layout
from tests.learner.tiny import make_params
from tests.model.tiny import one_segment

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).with_name("transformers_forward.py")
ROWS, LENGTH = 4, 24

MOE = ModelConfig(
    vocab_size=40,
    width=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=5e3,
    norm_eps=1e-5,
    moe=MoEConfig(num_experts=8, experts_per_token=3, expert_width=12),
)


def with_moe(**changes: Any) -> ModelConfig:
    return dataclasses.replace(MOE, moe=dataclasses.replace(MOE.moe, **changes))


OURS: dict[str, tuple[ModelConfig, Dtype]] = {
    "moe": (MOE, "float32"),
    "dense_layer": (with_moe(dense_layers=(1,), dense_width=20), "float32"),
    "tied": (dataclasses.replace(MOE, tie_embeddings=True), "float32"),
    "not_normalised": (with_moe(normalize_weights=False), "float32"),
    "bfloat16": (MOE, "bfloat16"),
}
"""Models that we write and transformers reads."""

BASE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "rope_theta": 5e3,
}
THEIRS: dict[str, dict[str, Any]] = {
    "theirs_bfloat16": {"config": BASE, "dtype": "bfloat16", "max_shard_size": "6KB"},
    "theirs_float32": {
        "config": BASE | {"tie_word_embeddings": True, "norm_topk_prob": False},
        "dtype": "float32",
        "max_shard_size": "1GB",
    },
    "theirs_float16": {
        "config": BASE | {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
        "dtype": "float16",
        "max_shard_size": "20KB",
    },
}
"""Models that transformers writes and we read."""


@dataclasses.dataclass(frozen=True)
class Work:
    """A folder in which transformers has been."""

    folder: Path
    tokens: np.ndarray  # i32[B, S]

    def arrays(self, name: str) -> Mapping[str, np.ndarray]:
        with np.load(self.folder / f"{name}.npz") as file:
            return dict(file)

    def loaded(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.loaded.json").read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """One process for all models: importing torch and transformers takes most of its time."""
    folder = tmp_path_factory.mktemp("transformers")
    tokens = np.random.default_rng(0).integers(0, MOE.vocab_size, (ROWS, LENGTH), np.int32)
    np.save(folder / "tokens.npy", tokens)
    for name, (config, dtype) in OURS.items():
        described = config_json(
            config, dtype=dtype, max_length=64, stop_token_ids=(3, 5), pad_token_id=0
        )
        tensors = hf.tensors(make_params(config), config, dtype)
        hf.write(folder / name, tensors, described, max_shard_bytes=20_000)
    jobs = [{"name": name, "save": None} for name in OURS]
    jobs += [{"name": name, "save": how} for name, how in THEIRS.items()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    venv = Path(os.environ.get("SGLANG_VENV") or cache / "jaxrl_llm" / "sglang_cpu")
    python = venv / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{venv} is not there; bash launch/sglang_cpu.sh --install makes it")
    command = [str(python), str(SCRIPT), str(folder)]
    # The learner's packages stay out of it, and nothing is asked of the network.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return Work(folder, tokens)


def ours(config: ModelConfig, params: Params, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits f32[B, S, V] and routes i32[L, B, S, K] of our forward pass."""

    @jax.jit
    def run(params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        forward = make_forward(config, ComputeConfig(remat="none"))
        output = forward(params, *one_segment(tokens), None)
        logits = jnp.matmul(output.hidden, unembed(params, config), precision="highest")
        return logits, output.router.experts

    logits, routes = run(params, tokens)
    return np.asarray(logits), np.asarray(routes)


def check_equal(work: Work, name: str, config: ModelConfig, params: Params) -> None:
    theirs = work.arrays(name)
    logits, routes = ours(config, params, work.tokens)
    assert np.ptp(logits) > 1  # else a tolerance of 1e-4 says little
    np.testing.assert_allclose(logits, theirs["logits"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(routes, theirs["routes"])


@pytest.mark.parametrize("name", OURS)
def test_transformers_computes_what_we_compute_with_our_checkpoint(work: Work, name: str) -> None:
    config, dtype = OURS[name]
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), make_params(config))
    check_equal(work, name, config, rounded)


@pytest.mark.parametrize("name", OURS)
def test_transformers_takes_all_of_our_tensors_and_settings(work: Work, name: str) -> None:
    config, _ = OURS[name]
    loaded = work.loaded(name)
    assert [loaded["missing"], loaded["unexpected"], loaded["mismatched"]] == [[], [], []]
    settings = loaded["config"]
    assert settings["rope_parameters"] == {"rope_theta": config.rope_theta, "rope_type": "default"}
    assert settings["num_local_experts"] == config.moe.num_experts
    assert settings["mlp_only_layers"] == list(config.moe.dense_layers)
    assert settings["tie_word_embeddings"] == config.tie_embeddings
    assert settings["eos_token_id"] == [3, 5]
    assert settings["pad_token_id"] == 0
    assert settings["max_position_embeddings"] == 64


@pytest.mark.parametrize("name", THEIRS)
def test_we_compute_what_transformers_computes_with_its_checkpoint(work: Work, name: str) -> None:
    config = read_model_config(work.folder / name)
    layout = make_layout(MeshConfig(fsdp=2, expert=2, tensor=2))
    params = hf.load_params(work.folder / name, config, layout)
    check_equal(work, name, config, jax.device_get(params))


@pytest.mark.parametrize("name", ["theirs_bfloat16", "theirs_float32"])
def test_a_checkpoint_of_transformers_leaves_as_it_came(work: Work, name: str) -> None:
    folder = work.folder / name
    config = read_model_config(folder)
    params = hf.load_params(folder, config, make_layout(MeshConfig(expert=8)))
    written = dict(hf.tensors(params, config, THEIRS[name]["dtype"]))
    read = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for tensor in file.keys():  # noqa: SIM118  (it is no mapping)
                value = file.get_tensor(tensor)
                assert value.dtype == written[tensor].dtype, tensor
                assert value.tobytes() == written[tensor].tobytes(), tensor
                read += 1
    # A tied head is written out for SGLang, and transformers does not.
    assert read == len(written) - config.tie_embeddings


def test_dense_layers_of_transformers_are_those_it_says(work: Work) -> None:
    config = read_model_config(work.folder / "theirs_float16")
    assert config.moe.dense_layers == (0, 2, 3)
    assert work.arrays("theirs_float16")["routes"].shape[0] == config.num_moe_layers == 1
