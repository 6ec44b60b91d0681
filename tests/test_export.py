"""`jaxrl-llm export`: exact, whole for a loader of Qwen3-MoE, and never over another's files."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors import safe_open

from jaxrl_llm import assembly
from jaxrl_llm.assembly import initial_params
from jaxrl_llm.config import RunConfig
from jaxrl_llm.data.tokenizer import TokenizerConfig
from jaxrl_llm.engines import CONTEXT_MARGIN
from jaxrl_llm.export import TOKENIZER_FILES, export_policy
from jaxrl_llm.learner import state
from jaxrl_llm.main import main
from jaxrl_llm.model import hf
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.hf_config import Dtype, read_model_config
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.rollout.sglang import SGLangConfig
from jaxrl_llm.sharding import MeshConfig, make_layout
from tests.model.test_hf import assert_same_bits
from tests.tiny import saved_run, tiny_config, vary

WEIGHTS = ("config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json")


def load(folder: Path, model: ModelConfig) -> Params:
    assert read_model_config(folder) == model
    return hf.load_params(folder, model, make_layout(MeshConfig()))


def rounded(params: Params) -> Params:
    """To the nearest bfloat16, as float32."""

    def one(leaf: Any) -> np.ndarray:
        return np.asarray(leaf).astype(ml_dtypes.bfloat16).astype(np.float32)

    return jax.tree.map(one, params)


def written(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> str:
    """What the command says when it succeeds."""
    assert main(["export", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> str:
    """The one line that the command says when it fails."""
    assert main(["export", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ValueError: ")
    assert captured.err.count("\n") == 1
    return captured.err


def names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Params]:
    """A run with checkpoints of two steps, and the weights of the second."""
    config = tiny_config(tmp_path_factory.mktemp("export") / "run")
    return config, saved_run(config, 2, 5)


# ------------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_is_exported_from_its_newest_checkpoint(
    run: tuple[RunConfig, Params],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dtype: Dtype,
) -> None:
    config, params = run
    said = written(capsys, config.directory, tmp_path / "x", "--dtype", dtype)
    assert said.startswith(f"Written: {tmp_path / 'x'}, the weights of step 5 in {dtype}, ")
    found = load(tmp_path / "x", config.model)
    assert_same_bits(found, params if dtype == "float32" else rounded(params))
    with safe_open(tmp_path / "x" / WEIGHTS[1], framework="np") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {hf.FILE_DTYPES[dtype]}


def test_a_run_of_more_devices_than_there_are_here_is_exported(
    run: tuple[RunConfig, Params], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As that of a pod on another machine."""
    pod = shutil.copytree(run[0].directory, tmp_path / "pod")
    stored = json.loads((pod / "config.json").read_text())
    stored["learner"]["mesh"] |= {"data": 4, "fsdp": 16}
    (pod / "config.json").write_text(json.dumps(stored))
    written(capsys, pod, tmp_path / "x", "--dtype", "float32")
    assert_same_bits(load(tmp_path / "x", run[0].model), run[1])


def test_a_config_is_exported_as_its_run_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the default dtype; of the seed's weights, and no run directory is made."""
    (tmp_path / "config.py").write_text(
        "import dataclasses\nfrom pathlib import Path\nfrom tests.tiny import tiny_config\n"
        "def get_config():\n"
        f"    return dataclasses.replace(tiny_config(Path({str(tmp_path / 'run')!r})), seed=3)\n"
    )
    said = written(capsys, tmp_path / "config.py", tmp_path / "x")
    assert "the initial weights in bfloat16" in said
    assert "SGLang" not in said
    config = dataclasses.replace(tiny_config(tmp_path / "run"), seed=3)
    start = initial_params(config, make_layout(MeshConfig()))
    assert_same_bits(load(tmp_path / "x", config.model), rounded(start))
    assert not (tmp_path / "run").exists()


def test_an_export_has_no_optimizer(
    run: tuple[RunConfig, Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state is twice the size of the parameters."""

    def forbidden(*_: Any) -> Any:
        raise AssertionError("an optimizer was made")

    for module in (assembly, state):
        monkeypatch.setattr(module, "make_optimizer", forbidden)
        monkeypatch.setattr(module, "fresh_optimizer_state", forbidden)
    export_policy(run[0].directory, tmp_path / "x", "float32")
    export_policy(run[0], tmp_path / "y", "float32")
    assert names(tmp_path / "x") == names(tmp_path / "y") == WEIGHTS


def test_a_folder_that_a_run_starts_from_comes_back_byte_for_byte(
    run: tuple[RunConfig, Params], tmp_path: Path
) -> None:
    config, params = run
    export_policy(config.directory, tmp_path / "x", "float32")
    start = vary(config, "cold_start", weights=str(tmp_path / "x"))
    assert_same_bits(initial_params(start, make_layout(MeshConfig())), params)
    export_policy(start, tmp_path / "y", "float32")
    for name in WEIGHTS:
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes(), name


# ----------------------------------------------------------------------------- whole for a loader


def test_a_loader_finds_weights_index_and_settings(
    run: tuple[RunConfig, Params], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = run
    said = written(capsys, config.directory, tmp_path)
    assert names(tmp_path) == WEIGHTS
    assert "no tokenizer, a server needs --skip-tokenizer-init" in said
    index = json.loads((tmp_path / hf.INDEX).read_text())["weight_map"]
    assert set(index.values()) == {WEIGHTS[1]}
    with safe_open(tmp_path / WEIGHTS[1], framework="np") as file:
        assert set(index) == set(file.keys())
    settings = json.loads((tmp_path / "config.json").read_text())
    wanted = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "eos_token_id": [1],  # the character tokenizer's
        "pad_token_id": 0,
        "max_position_embeddings": config.rollout.engine.max_length + CONTEXT_MARGIN,
    }
    assert {name: settings[name] for name in wanted} == wanted


def test_the_context_is_that_of_the_servers_where_the_run_has_some(
    run: tuple[RunConfig, Params], tmp_path: Path
) -> None:
    sglang = SGLangConfig(servers=("http://127.0.0.1:1",), max_length=60)
    served = vary(vary(run[0], "rollout", sglang=sglang), "cold_start", weights=str(tmp_path / "x"))
    export_policy(run[0].directory, tmp_path / "x", "bfloat16")
    export_policy(served, tmp_path / "y", "bfloat16")  # and asks no server
    settings = json.loads((tmp_path / "y" / "config.json").read_text())
    assert settings["max_position_embeddings"] == 60 + CONTEXT_MARGIN


def test_a_tokenizer_goes_with_its_model(
    run: tuple[RunConfig, Params], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    vocabulary = {"<end>": 0, "<stop>": 1, "a": 2}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    words.save(str(beside / "words.json"))
    for name in (*TOKENIZER_FILES[1:], "model.safetensors", "README.md"):
        (beside / name).write_text(f"this is {name}")
    tokenizer = TokenizerConfig(
        kind="file",
        path=str(beside / "words.json"),
        stop_tokens=("<stop>", "<end>"),
        pad_token="<end>",
    )
    config = vary(run[0], "task", tokenizer=tokenizer)
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    saved_run(config, 1)
    said = written(capsys, config.directory, tmp_path / "x")
    assert f"tokenizer: {', '.join(TOKENIZER_FILES)}" in said
    assert names(tmp_path / "x") == tuple(sorted((*WEIGHTS, *TOKENIZER_FILES)))
    copied = tmp_path / "x" / "tokenizer.json"
    assert copied.read_bytes() == (beside / "words.json").read_bytes()
    for name in TOKENIZER_FILES[1:]:
        assert (tmp_path / "x" / name).read_text() == f"this is {name}"
    settings = json.loads((tmp_path / "x" / "config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"]) == ([1, 0], 0)


def test_dense_layers_are_exported_with_a_word_about_sglang(
    run: tuple[RunConfig, Params], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers computes them; SGLang would put random experts in their place."""
    moe = dataclasses.replace(run[0].model.moe, dense_layers=(1,), dense_width=12)
    config = vary(run[0], "model", moe=moe)
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    params = saved_run(config, 1)
    said = written(capsys, config.directory, tmp_path / "x", "--dtype", "float32")
    assert "not for SGLang, which has no dense layers: moe.dense_layers is (1,)" in said
    assert_same_bits(load(tmp_path / "x", config.model), params)
    settings = json.loads((tmp_path / "x" / "config.json").read_text())
    assert (settings["mlp_only_layers"], settings["intermediate_size"]) == ([1], 12)


# -------------------------------------------------------------------------------------- mistakes


def test_a_folder_with_anything_in_it_is_left_as_it_is(
    run: tuple[RunConfig, Params], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run directory above all: its config.json has the name of the model's."""
    directory = run[0].directory
    before, inside = (directory / "config.json").read_bytes(), names(directory)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "pytorch_model.bin").write_text("other weights")
    (tmp_path / "file").write_text("mine")
    for folder in (directory, tmp_path / "x", tmp_path / "file"):
        said = refused(capsys, directory, folder)
        assert f"{folder} is there already and is no empty folder; give a new one" in said
    assert (directory / "config.json").read_bytes() == before
    assert names(directory) == inside
    assert names(tmp_path / "x") == ("pytorch_model.bin",)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_source_without_weights_is_named_and_nothing_is_written(
    run: tuple[RunConfig, Params], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = dataclasses.replace(run[0], run_dir=str(tmp_path / "begun"))
    saved_run(begun)
    said = refused(capsys, begun.directory, tmp_path / "x")
    assert f"{begun.directory} has no checkpoint yet; let the run make one first" in said
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "nowhere.py", tmp_path / "empty"):
        said = refused(capsys, source, tmp_path / "x")
        assert f"{source} is neither a file nor a run directory" in said
        assert "give a config such as configs/quickstart.py, or the directory of a run" in said
    (tmp_path / "module.py").write_text("x = 1\n")
    said = refused(capsys, tmp_path / "module.py", tmp_path / "x")
    assert f"{tmp_path / 'module.py'} defines no get_config()" in said
    export_policy(run[0].directory, tmp_path / "model", "bfloat16")
    said = refused(capsys, tmp_path / "model", tmp_path / "x")
    assert f"{tmp_path / 'model' / 'config.json'} cannot be read as the settings of a run" in said
    assert not (tmp_path / "x").exists()


def test_an_unknown_dtype_is_refused_with_the_known_ones(
    run: tuple[RunConfig, Params], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run[0].directory), str(tmp_path / "x"), "--dtype", "float16"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert {"'float16'", "'float32'", "'bfloat16'"} <= set(re.findall("'\\w+'", said))
    assert not (tmp_path / "x").exists()
