"""Checkpoints: exact both ways, streamed, every tensor in its place, every fault named."""

import dataclasses
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxrl_llm.model import hf
from jaxrl_llm.model.config import ModelConfig, MoEConfig
from jaxrl_llm.model.hf_config import Dtype, config_json, read_model_config
from jaxrl_llm.model.transformer import Params, parameter_count
from jaxrl_llm.sharding import MeshConfig, make_layout
from tests.learner.tiny import make_params
from tests.model.tiny import TINY

TIED = dataclasses.replace(TINY, tie_embeddings=True)
MESHES = (MeshConfig(), MeshConfig(data=2, fsdp=4), MeshConfig(fsdp=2, expert=2, tensor=2))


def described(config: ModelConfig = TINY, dtype: Dtype = "float32") -> dict[str, Any]:
    return config_json(config, dtype=dtype, max_length=32, stop_token_ids=(1,), pad_token_id=None)


def export(
    folder: Path, params: Params, config: ModelConfig = TINY, dtype: Dtype = "float32"
) -> Path:
    tensors = hf.tensors(params, config, dtype)
    hf.write(folder, tensors, described(config, dtype), max_shard_bytes=6000)
    return folder


def stored(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, read by the safetensors library."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: value for file in files for name, value in file.items()}


def one_file(folder: Path, tensors: dict[str, np.ndarray], config: ModelConfig = TINY) -> Path:
    """A checkpoint of these tensors, written by the safetensors library."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(described(config)))
    return folder


def assert_same_bits(found: Params, wanted: Params) -> None:
    def compare(path: tuple[Any, ...], a: Any, b: Any) -> None:
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), jax.tree_util.keystr(path)
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, found, wanted)


# ------------------------------------------------------------------------------- exact both ways


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_float32_comes_back_bit_for_bit_on_any_mesh(
    tmp_path: Path, config: ModelConfig, mesh: MeshConfig
) -> None:
    params = make_params(config)
    export(tmp_path / "a", params, config)
    assert read_model_config(tmp_path / "a") == config
    loaded = hf.load_params(tmp_path / "a", config, make_layout(mesh))
    assert_same_bits(loaded, params)
    export(tmp_path / "b", loaded, config)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def finite_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Numbers of all magnitudes, subnormal ones and both zeros among them."""
    values = rng.integers(0, 2**16, shape, np.uint16).view(dtype)
    return np.where(np.isfinite(values.astype(np.float32)), values, np.array(-0.0, dtype))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_16_bit_files_are_read_without_loss(tmp_path: Path, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    shapes = {name: value.shape for name, value in hf.tensors(make_params(TINY), TINY, "float32")}
    before = {name: finite_bits(rng, shape, dtype) for name, shape in shapes.items()}
    loaded = hf.load_params(one_file(tmp_path / "x", before), TINY, make_layout(MESHES[2]))
    after = dict(hf.tensors(loaded, TINY, "float32"))
    for name, value in before.items():
        assert value.astype(np.float32).tobytes() == after[name].tobytes(), name


def test_a_bfloat16_file_is_written_back_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {name: value.shape for name, value in hf.tensors(make_params(TINY), TINY, "float32")}
    before = {n: finite_bits(rng, shape, ml_dtypes.bfloat16) for n, shape in shapes.items()}
    loaded = hf.load_params(one_file(tmp_path / "x", before), TINY, make_layout(MESHES[2]))
    after = stored(export(tmp_path / "y", loaded, dtype="bfloat16"))
    assert {n: v.tobytes() for n, v in after.items()} == {n: v.tobytes() for n, v in before.items()}


def test_float32_is_rounded_to_the_nearest_bfloat16() -> None:
    params = make_params(TINY)
    for (name, rounded), (_, value) in zip(
        hf.tensors(params, TINY, "bfloat16"), hf.tensors(params, TINY, "float32"), strict=True
    ):
        assert rounded.dtype == ml_dtypes.bfloat16
        assert rounded.tobytes() == value.astype(ml_dtypes.bfloat16).tobytes(), name


# -------------------------------------------------------------------------- every tensor in place


def test_tensors_have_the_names_and_the_orientation_of_hugging_face() -> None:
    """TINY is layer 0 MoE, 1 dense, 2 and 3 MoE: three segments."""
    params = make_params(TINY)
    found = dict(hf.tensors(params, TINY, "float32"))
    first, dense, last = (params["segments"][key] for key in ("00", "01", "02"))
    wanted = {
        "model.embed_tokens.weight": params["embed"],
        "model.norm.weight": params["final_norm"],
        "lm_head.weight": params["head"].T,
        "model.layers.0.input_layernorm.weight": first["attention_norm"][0],
        "model.layers.0.mlp.gate.weight": first["mlp"]["router"][0].T,
        "model.layers.0.mlp.experts.7.gate_proj.weight": first["mlp"]["gate"][0, 7].T,
        "model.layers.1.mlp.down_proj.weight": dense["mlp"]["down"][0].T,
        "model.layers.1.mlp.up_proj.weight": dense["mlp"]["up"][0].T,
        "model.layers.1.post_attention_layernorm.weight": dense["mlp_norm"][0],
        "model.layers.1.self_attn.k_norm.weight": dense["attention"]["k_norm"][0],
        "model.layers.2.self_attn.q_proj.weight": last["attention"]["q"][0].T,
        "model.layers.3.self_attn.k_proj.weight": last["attention"]["k"][1].T,
        "model.layers.3.self_attn.v_proj.weight": last["attention"]["v"][1].T,
        "model.layers.3.self_attn.o_proj.weight": last["attention"]["o"][1].T,
        "model.layers.3.self_attn.q_norm.weight": last["attention"]["q_norm"][1],
        "model.layers.3.mlp.experts.2.down_proj.weight": last["mlp"]["down"][1, 2].T,
        "model.layers.3.mlp.experts.5.up_proj.weight": last["mlp"]["up"][1, 5].T,
    }
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert len(found) == 3 + 4 * 8 + 3 + 3 * (1 + 3 * 8)
    assert sum(value.size for value in found.values()) == parameter_count(TINY)


def test_a_tied_head_is_written_out(tmp_path: Path) -> None:
    """SGLang has a head of its own, which no tensor would otherwise fill."""
    params = make_params(TIED)
    found = stored(export(tmp_path / "x", params, TIED))
    np.testing.assert_array_equal(found["lm_head.weight"], params["embed"])
    del found["lm_head.weight"]  # transformers leaves it out
    loaded = hf.load_params(one_file(tmp_path / "y", found, TIED), TIED, make_layout(MeshConfig()))
    assert_same_bits(loaded, params)


def test_files_keep_to_their_size_and_the_index_names_them(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, vocab_size=96)  # an embedding of 6,144 bytes
    written = hf.write(
        tmp_path,
        hf.tensors(make_params(config), config, "float32"),
        described(config),
        max_shard_bytes=6000,
    )
    assert {file.name for file in written} == {path.name for path in tmp_path.iterdir()}
    index = json.loads((tmp_path / hf.INDEX).read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    total = 0
    for path in files:
        tensors = load_file(path)
        size = sum(value.nbytes for value in tensors.values())
        assert size <= 6000 or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {path.name}
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
        total += size
    assert len(files) >= total / 6000
    assert index["metadata"]["total_size"] == total == 4 * parameter_count(config)


# -------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_an_import_reads_every_number_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: MeshConfig
) -> None:
    """Also where several devices hold the same shard."""
    export(tmp_path, make_params(TINY))
    sizes: list[int] = []

    class Slice:
        def __init__(self, inner: Any) -> None:
            self.get_shape, self.get_dtype, self.inner = inner.get_shape, inner.get_dtype, inner

        def __getitem__(self, index: Any) -> np.ndarray:
            value = self.inner[index]
            sizes.append(value.size)
            return value

    class File:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __enter__(self) -> "File":
            inner = self.inner.__enter__()
            self.keys = inner.keys
            self.get_slice = lambda name: Slice(inner.get_slice(name))
            return self

        def __exit__(self, *error: object) -> None:
            self.inner.__exit__(*error)

    monkeypatch.setattr(hf, "safe_open", lambda *a, **k: File(safe_open(*a, **k)))
    hf.load_params(tmp_path, TINY, make_layout(mesh))
    assert sum(sizes) == parameter_count(TINY)


def test_an_export_fetches_a_layer_of_a_parameter_and_the_next_ahead() -> None:
    fetched: list[tuple[int, ...]] = []
    arrays: list[weakref.ref[jax.Array]] = []

    def recording(params: Params, piece: hf.Piece) -> jax.Array:
        assert sum(reference() is not None for reference in arrays) <= 1
        result = hf.fetch(params, piece)
        fetched.append(result.shape)
        arrays.append(weakref.ref(result))
        return result

    stream = hf.tensors(make_params(TINY), TINY, "float32", recording)
    assert fetched == []
    next(stream)
    assert fetched == [(16, 16), (16,)]
    for _ in stream:
        pass
    assert len(fetched) == len(hf.pieces(TINY, "float32"))
    assert (8, 16, 8) in fetched  # all experts of one layer, [E, D, F]
    assert max(len(shape) for shape in fetched) == 3


def test_a_file_is_written_without_collecting_its_tensors(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def fresh() -> Iterator[tuple[str, np.ndarray]]:
        for name, value in hf.tensors(make_params(TINY), TINY, "float32"):
            assert sum(reference() is not None for reference in alive) <= 1
            copy = np.array(value)
            alive.append(weakref.ref(copy))
            yield name, copy
            del copy

    written = hf.write(tmp_path, fresh(), described())
    assert len(written) == 3
    assert len(alive) > 90


# ------------------------------------------------------------------------------- faults of tensors


def faulty(folder: Path) -> Path:
    tensors = dict(hf.tensors(make_params(TINY), TINY, "float32"))
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(4, np.float32)
    tensors["model.norm.weight"] = np.zeros(3, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy().reshape(8, 32)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.int32)
    del tensors["model.layers.3.mlp.experts.2.up_proj.weight"]
    del tensors["model.layers.1.mlp.down_proj.weight"]
    return one_file(folder, tensors)


def test_all_faulty_tensors_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not hold the tensors") as caught:
        hf.load_params(faulty(tmp_path / "x"), TINY, make_layout(MeshConfig()))
    for part in (
        "missing: model.layers.1.mlp.down_proj.weight, model.layers.3.mlp.experts.2.up_proj.weight",
        "unknown: model.layers.0.self_attn.q_proj.bias",
        "lm_head.weight [8, 32] for [16, 16]",
        "model.norm.weight [3] for [16]",
        "of a type other than F32, BF16, F16: model.embed_tokens.weight I32",
    ):
        assert part in str(caught.value)


def test_a_long_list_of_faulty_tensors_is_cut_and_counted(tmp_path: Path) -> None:
    folder = one_file(tmp_path / "x", {"other": np.zeros(1, np.float32)})
    total = sum(1 for _ in hf.tensors(make_params(TINY), TINY, "float32"))
    with pytest.raises(ValueError, match=f"and {total - 20} more; unknown: other"):
        hf.load_params(folder, TINY, make_layout(MeshConfig()))


def test_a_head_that_contradicts_the_tie_is_refused(tmp_path: Path) -> None:
    tensors = dict(hf.tensors(make_params(TIED), TIED, "float32"))
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + np.eye(16, dtype=np.float32)
    folder = one_file(tmp_path / "x", tensors, TIED)
    with pytest.raises(ValueError, match=r"lm_head.weight differs .* tie_word_embeddings is true"):
        hf.load_params(folder, TIED, make_layout(MeshConfig()))


def test_a_cut_file_an_absent_file_and_a_tensor_in_two_files_are_named(tmp_path: Path) -> None:
    mesh: Mesh = make_layout(MeshConfig())
    folder = export(tmp_path / "x", make_params(TINY))
    files = sorted(folder.glob("*.safetensors"))
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{files[1].name} cannot be read"):
        hf.load_params(folder, TINY, mesh)
    files[1].unlink()
    with pytest.raises(ValueError, match=rf"{files[1].name} cannot be read"):
        hf.load_params(folder, TINY, mesh)
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match="is in two files"):
        hf.load_params(folder, TINY, mesh)
    (folder / hf.INDEX).write_text("{}")
    with pytest.raises(ValueError, match=rf"{hf.INDEX} is no index"):
        hf.load_params(folder, TINY, mesh)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda found: found[:-1], "asks for lm_head.weight.* there came no tensor"),
        (lambda found: found[1:], "asks for model.embed_tokens.weight"),
        (lambda found: [*found, found[0]], "more tensors than config.json describes"),
        (
            lambda found: [(n, v.astype(np.float16)) for n, v in found],
            r"came .*, float16\[16, 16\]",
        ),
        (lambda found: [(n, v.reshape(-1)) for n, v in found], r"came .*, float32\[256\]"),
    ],
)
def test_tensors_that_are_not_those_of_the_config_are_not_written(
    tmp_path: Path, change: Any, named: str
) -> None:
    found = list(hf.tensors(make_params(TINY), TINY, "float32"))
    with pytest.raises(ValueError, match=named):
        hf.write(tmp_path, change(found), described())


def test_a_folder_with_weights_is_not_written_over(tmp_path: Path) -> None:
    export(tmp_path, make_params(TINY))
    with pytest.raises(ValueError, match="has weights already"):
        export(tmp_path, make_params(TINY))


# ------------------------------------------------------------------------------------ config.json


def read(folder: Path, **changes: Any) -> ModelConfig:
    """The config of `described` with some fields changed; those that become ... are left out."""
    values = described() | changes
    kept = {name: value for name, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return read_model_config(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": ...},  # as transformers 5 saves it
        {"rope_parameters": ..., "rope_scaling": ...},  # as transformers 4 does
        {"rope_scaling": {"type": "default"}, "rope_parameters": ...},
        {"num_experts": ..., "num_local_experts": 8},
        {"head_dim": ...},
        {"head_dim": None},
        {"tie_word_embeddings": ...},
        {"decoder_sparse_step": ..., "attention_bias": ..., "use_sliding_window": ...},
        {"layer_types": ["full_attention"] * 4},
    ],
)
def test_both_generations_of_config_json_are_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert read(tmp_path, **changes) == TINY


def test_dense_layers_follow_both_of_their_fields(tmp_path: Path) -> None:
    def dense(**changes: Any) -> tuple[int, ...]:
        return read(tmp_path, **changes).moe.dense_layers

    assert dense(mlp_only_layers=[]) == ()
    assert dense(mlp_only_layers=None) == ()
    assert dense(mlp_only_layers=[3, 0]) == (0, 3)
    assert dense(mlp_only_layers=[], decoder_sparse_step=2) == (0, 2)
    assert dense(mlp_only_layers=[3], decoder_sparse_step=2) == (0, 2, 3)
    assert read(tmp_path, mlp_only_layers=[], intermediate_size=...).moe.dense_width == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, r"architectures is \['Qwen3ForCausalLM'\]"),
        ({"architectures": ...}, "architectures is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config is"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters is"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_scaling is"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters is"),
        ({"rope_theta": 1e4}, r"rope_theta is \[10000.0, 1000.0\]"),
        ({"rope_theta": ..., "rope_parameters": ...}, "rope_theta is absent"),
        ({"norm_topk_prob": ...}, "norm_topk_prob is None"),
        ({"num_experts": 8.0}, "num_experts is 8.0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"mlp_only_layers": [4]}, r"mlp_only_layers names \[4\]"),
        ({"num_experts_per_tok": 9}, "experts_per_token is 9"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        read(tmp_path, **changes)


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json cannot be read \(No such file"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json holds no JSON object"):
        read_model_config(tmp_path)


def test_every_setting_of_a_model_is_in_its_config_json(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=33,
        width=24,
        num_layers=5,
        num_heads=6,
        num_kv_heads=3,
        head_dim=2,
        rope_theta=12345.0,
        norm_eps=3e-5,
        tie_embeddings=True,
        moe=MoEConfig(
            num_experts=5,
            experts_per_token=4,
            expert_width=7,
            normalize_weights=False,
            dense_layers=(0, 4),
            dense_width=11,
        ),
    )
    (tmp_path / "config.json").write_text(json.dumps(described(config)))
    assert read_model_config(tmp_path) == config
