"""Where training starts, and what an evaluation of a checkpoint may touch."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm import assembly
from jaxrl_llm.assembly import assemble, evaluate_checkpoint, initial_state
from jaxrl_llm.config import RunConfig
from jaxrl_llm.learner.publish import PublishConfig
from jaxrl_llm.learner.state import abstract_state, make_optimizer, shardings_of
from jaxrl_llm.model import hf
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.rollout.sglang import SGLangConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from tests.learner.tiny import make_params
from tests.model.test_hf import assert_same_bits
from tests.rollout.fake_sglang import FakeServer, ModelSampler
from tests.tiny import saved_run, tiny_config, vary

# -------------------------------------------------------------------------------- given weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params]:
    """A checkpoint of tiny_config's model in float32, and what is in it."""
    folder = tmp_path_factory.mktemp("weights") / "model"
    model = tiny_config(folder).model
    params = make_params(model, seed=1)
    described = hf.config_json(
        model, dtype="float32", max_length=32, stop_token_ids=(1,), pad_token_id=None
    )
    hf.write(folder, hf.tensors(params, model, "float32"), described)
    return folder, params


def starting_from(folder: Path, run_dir: Path) -> RunConfig:
    return vary(tiny_config(run_dir), "cold_start", weights=str(folder))


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(data=2, fsdp=2, expert=2), MeshConfig(tensor=2)], ids=str
)
def test_training_starts_from_exactly_these_weights(
    weights: tuple[Path, Params], tmp_path: Path, mesh: MeshConfig
) -> None:
    folder, params = weights
    config = starting_from(folder, tmp_path / "run")
    state = initial_state(config, make_mesh(mesh))
    assert_same_bits(state.params, params)
    # The rest is what random weights start with: step 0, no momentum, every array in its place.
    optimizer = make_optimizer(config.cold_start.optimizer, config.cold_start.steps)
    wanted = abstract_state(config.model, optimizer, make_mesh(mesh))
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    assert shardings_of(state.params) == shardings_of(wanted.params)
    assert shardings_of(state.opt_state) == shardings_of(wanted.opt_state)
    assert int(state.step) == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))


def test_weights_of_another_model_are_refused_setting_by_setting(
    weights: tuple[Path, Params], tmp_path: Path
) -> None:
    config = starting_from(weights[0], tmp_path / "run")
    moe = dataclasses.replace(config.model.moe, num_experts=6, normalize_weights=False)
    config = vary(config, "model", num_layers=3, rope_theta=1e4, moe=moe)
    with pytest.raises(ValueError, match=r"^cold_start\.weights is ") as error:
        initial_state(config, make_mesh(MeshConfig()))
    assert str(error.value) == (
        f"cold_start.weights is {str(weights[0])!r}, a model with other settings ("
        "model.moe.normalize_weights: True != False; model.moe.num_experts: 4 != 6; "
        "model.num_layers: 2 != 3; model.rope_theta: 1000000.0 != 10000.0); "
        "set model to read_model_config of that folder"
    )
    read = dataclasses.replace(config, model=hf.read_model_config(weights[0]))
    assert_same_bits(initial_state(read, make_mesh(MeshConfig())).params, weights[1])


def assembled(config: RunConfig) -> None:
    with contextlib.ExitStack() as stack:
        assemble(config, stack)


def test_absent_weights_are_refused_before_the_run_directory_is_taken(
    weights: tuple[Path, Params], tmp_path: Path
) -> None:
    """So that the corrected setting is no other experiment than the one in the directory."""
    absent = starting_from(tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(ValueError, match=r"^cold_start\.weights is '.*/nowhere': .*config\.json"):
        initial_state(absent, make_mesh(MeshConfig()))
    with pytest.raises(ValueError, match=r"give a Hugging Face checkpoint's folder"):
        assembled(absent)
    found = starting_from(weights[0], tmp_path / "run")
    with pytest.raises(ValueError, match=r"model\.num_layers: 2 != 3"):
        assembled(vary(found, "model", num_layers=3))
    assembled(found)
    assert (tmp_path / "run" / "config.json").is_file()


def test_a_run_that_goes_on_needs_the_folder_no_more(tmp_path: Path) -> None:
    config = starting_from(tmp_path / "deleted", tmp_path / "run")
    saved_run(config, 1)
    assembled(config)


# -------------------------------------------------------------------- evaluation of a checkpoint


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    """It computes the model, so that the probe tells which weights it has."""
    model = tiny_config(Path("unused")).model
    sampler = ModelSampler(model, max_length=28, params=make_params(model, seed=99))
    with FakeServer(sampler) as made:
        yield made


def on_server(server: FakeServer, run_dir: Path) -> RunConfig:
    config = tiny_config(run_dir)
    sglang = SGLangConfig(servers=(server.url,), max_length=28, probe_tolerance=1e-3)
    publish = PublishConfig(dtype="float32")
    return vary(config, "rollout", max_new_tokens=4, sglang=sglang, publish=publish)


def evaluated(run_dir: Path) -> tuple[int, Any]:
    return evaluate_checkpoint(run_dir, samples=1, prompts=2, seed=0)


def test_the_servers_of_a_run_that_is_going_on_are_left_alone(
    server: FakeServer, tmp_path: Path
) -> None:
    config = on_server(server, tmp_path / "run")
    saved_run(config, 5)
    before = len(server.requests)
    with (
        assembly._locked(config.directory),
        pytest.raises(ValueError, match=r"another process is writing to .*; wait until it has"),
    ):
        evaluated(config.directory)
    assert len(server.requests) == before
    assert not (config.directory / "weights").exists()


def test_servers_sample_with_the_weights_of_the_checkpoint(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_server(server, tmp_path / "run")
    params = saved_run(config, 2, 5)
    before = len(server.requests)

    def while_locked(*args: Any, **options: Any) -> Any:
        with pytest.raises(ValueError, match="another process"), assembly._locked(config.directory):
            pass
        return evaluate(*args, **options)

    evaluate = assembly.evaluate
    monkeypatch.setattr(assembly, "evaluate", while_locked)
    step, result = evaluated(config.directory)
    assert step == 5
    assert result.failures == {}
    assert [len(group.rollouts) for group in result.groups] == [1, 1]
    asked = server.requests[before:]
    (update,) = (i for i, (path, _) in enumerate(asked) if path == "/update_weights_from_disk")
    sampled = [i for i, (path, _) in enumerate(asked) if path == "/generate"]
    assert update < min(sampled)
    # Prompts once each, greedily once each, and the probe, whose answer proved the weights.
    assert len(sampled) == 2 + 2 + 1
    published = hf.load_params(
        asked[update][1]["model_path"], config.model, make_mesh(MeshConfig())
    )
    assert_same_bits(published, params)
    with assembly._locked(config.directory):
        pass


def test_without_servers_a_run_may_be_evaluated_while_it_goes_on(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    saved_run(config, 5)
    with assembly._locked(config.directory):
        assert evaluated(config.directory)[0] == 5
