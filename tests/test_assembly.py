"""Where training starts, and what an evaluation of a checkpoint may touch."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm import stored
from jaxrl_llm.assembly import assemble, initial_params
from jaxrl_llm.config import RunConfig, read_config
from jaxrl_llm.learner.publish import PublishConfig, Publisher, PublishError
from jaxrl_llm.learner.state import abstract_state, init_state, make_optimizer, shardings_of
from jaxrl_llm.lock import locked
from jaxrl_llm.main import main
from jaxrl_llm.model import hf
from jaxrl_llm.model.config import ComputeConfig
from jaxrl_llm.model.hf_config import config_json, read_model_config
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.rollout.sglang import SGLangConfig
from jaxrl_llm.sharding import MeshConfig, make_layout
from jaxrl_llm.stored import evaluate_checkpoint, newest_checkpoint
from tests.learner.tiny import make_params
from tests.model.test_hf import assert_same_bits
from tests.rollout.fake_samplers import ModelSampler
from tests.rollout.fake_sglang import FakeServer
from tests.tiny import saved_run, tiny_config, vary

# -------------------------------------------------------------------------------- given weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params]:
    """A checkpoint of tiny_config's model in float32, and what is in it."""
    folder = tmp_path_factory.mktemp("weights") / "model"
    model = tiny_config(folder).model
    params = make_params(model, seed=1)
    described = config_json(
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
    optimizer = make_optimizer(config.cold_start.optimizer, config.cold_start.steps)
    state = init_state(initial_params(config, make_layout(mesh)), optimizer)
    assert_same_bits(state.params, params)
    # The rest is what random weights start with: step 0, no momentum, every array in its place.
    wanted = abstract_state(config.model, optimizer, make_layout(mesh))
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
        initial_params(config, make_layout(MeshConfig()))
    assert str(error.value) == (
        f"cold_start.weights is {str(weights[0])!r}, a model with other settings ("
        "model.moe.normalize_weights: True != False; model.moe.num_experts: 4 != 6; "
        "model.num_layers: 2 != 3; model.rope_theta: 1000000.0 != 10000.0); "
        "set model to read_model_config of that folder"
    )
    read = dataclasses.replace(config, model=read_model_config(weights[0]))
    assert_same_bits(initial_params(read, make_layout(MeshConfig())), weights[1])


def assembled(config: RunConfig) -> None:
    with contextlib.ExitStack() as stack:
        assemble(config, stack)


def test_absent_weights_are_refused_before_the_run_directory_is_taken(
    weights: tuple[Path, Params], tmp_path: Path
) -> None:
    """So that the corrected setting is no other experiment than the one in the directory."""
    absent = starting_from(tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(ValueError, match=r"^cold_start\.weights is '.*/nowhere': .*config\.json"):
        initial_params(absent, make_layout(MeshConfig()))
    with pytest.raises(ValueError, match=r"give a Hugging Face checkpoint's folder"):
        assembled(absent)
    found = starting_from(weights[0], tmp_path / "run")
    with pytest.raises(ValueError, match=r"model\.num_layers: 2 != 3"):
        assembled(vary(found, "model", num_layers=3))
    assembled(found)
    assert (tmp_path / "run" / "config.json").is_file()


def test_a_kernel_that_the_devices_lack_is_refused_before_the_run_directory_is_taken(
    tmp_path: Path,
) -> None:
    compute = ComputeConfig(attention="cudnn", dtype="bfloat16")
    config = vary(tiny_config(tmp_path / "run"), "learner", compute=compute)
    with pytest.raises(
        ValueError, match=r"attention is cudnn, .* this is a cpu; use auto, or plain"
    ):
        assembled(config)
    assert not config.directory.exists()


def test_a_publication_is_checked_before_it_is_started_from(tmp_path: Path) -> None:
    """A flipped bit of a weight is a weight: nothing else would notice."""
    model = tiny_config(tmp_path).model
    writer = Publisher(
        PublishConfig(dtype="float32"),
        model,
        tmp_path / "other",
        stop_token_ids=(1,),
        pad_token_id=None,
        max_length=32,
    )
    published = Path(writer.publish(make_params(model, seed=1), 3).path)
    config = starting_from(published, tmp_path / "run")
    mesh = make_layout(MeshConfig())
    assert_same_bits(initial_params(config, mesh), make_params(model, seed=1))
    (file,) = published.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(PublishError, match=rf"^{published} is no whole .*: {file.name} is damaged"):
        initial_params(config, mesh)


def test_a_run_that_goes_on_needs_the_folder_no_more(tmp_path: Path) -> None:
    config = starting_from(tmp_path / "deleted", tmp_path / "run")
    saved_run(config, 1)
    assembled(config)


# -------------------------------------------------------------------- evaluation of a checkpoint


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    """It computes the model, so that the probe tells which weights it has."""
    with FakeServer(sampler(99)) as made:
        yield made


def sampler(seed: int) -> ModelSampler:
    """It has other weights than any run here."""
    model = tiny_config(Path("unused")).model
    return ModelSampler(model, max_length=28, params=make_params(model, seed=seed))


def on_server(server: FakeServer, run_dir: Path) -> RunConfig:
    config = tiny_config(run_dir)
    sglang = SGLangConfig(servers=(server.url,), max_length=28, probe_tolerance=1e-3)
    publish = PublishConfig(dtype="float32")
    return vary(config, "rollout", max_new_tokens=4, sglang=sglang, publish=publish)


def evaluated(run_dir: Path, *servers: str) -> tuple[int, Any]:
    return evaluate_checkpoint(run_dir, samples=1, prompts=2, seed=0, servers=servers)


def test_a_run_goes_on_with_other_servers_and_another_folder(
    server: FakeServer, tmp_path: Path
) -> None:
    config = on_server(server, tmp_path / "run")
    assembled(config)
    sglang = dataclasses.replace(config.rollout.sglang, probe_tolerance=0.1, journal=False)
    folder = PublishConfig(dtype="float32", folder=str(tmp_path / "shared"), keep=3)
    with FakeServer(sampler(99)) as other:
        sglang = dataclasses.replace(sglang, servers=(other.url,))
        moved = vary(config, "rollout", sglang=sglang, publish=folder)
        assembled(moved)
        assert other.requests  # it was asked whether it is fit
    assert read_config(config.directory / "config.json") == moved
    assert (tmp_path / "shared" / "run").is_dir()
    in_process = vary(config, "rollout", sglang=SGLangConfig(max_length=28))
    with pytest.raises(
        ValueError, match=r"holds a run with other settings \(rollout\.sglang\.serv"
    ):
        assembled(in_process)


def test_two_runs_do_not_publish_into_one_folder_at_once(
    server: FakeServer, tmp_path: Path
) -> None:
    publish = PublishConfig(dtype="float32", folder=str(tmp_path / "shared"))
    first, second, namesake = (
        vary(on_server(server, tmp_path / place), "rollout", publish=publish)
        for place in ("a/seed-0", "a/seed-1", "b/seed-0")
    )
    with contextlib.ExitStack() as stack:
        assemble(first, stack)
        assembled(second)
        with pytest.raises(ValueError, match=r"writing to .*/shared/seed-0; .* publish\.folder"):
            assembled(namesake)
    assembled(namesake)


def test_the_servers_of_a_run_that_is_going_on_are_left_alone(
    server: FakeServer, tmp_path: Path
) -> None:
    config = on_server(server, tmp_path / "run")
    saved_run(config, 5)
    before = len(server.requests)
    with (
        locked(config.directory, ""),
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
        with pytest.raises(ValueError, match="another process"), locked(config.directory, ""):
            pass
        return evaluate(*args, **options)

    evaluate = stored.evaluate
    monkeypatch.setattr(stored, "evaluate", while_locked)
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
        asked[update][1]["model_path"], config.model, make_layout(MeshConfig())
    )
    assert_same_bits(published, params)
    with locked(config.directory, ""):
        pass


def test_an_evaluation_may_have_servers_of_its_own(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = on_server(server, tmp_path / "run")
    saved_run(config, 5)
    before = len(server.requests)
    with FakeServer(sampler(98)) as one, FakeServer(sampler(97)) as two:
        arguments = ["--samples", "1", "--prompts", "4", "--servers", one.url, two.url]
        assert main(["eval", str(config.directory), *arguments]) == 0
        for other in (one, two):
            assert "/generate" in [path for path, _ in other.requests]
    assert len(server.requests) == before
    assert "step 5" in capsys.readouterr().out
    assert read_config(config.directory / "config.json") == config
    saved_run(tiny_config(tmp_path / "local"), 5)
    with pytest.raises(ValueError, match=r"/local is a run without servers.*leave out --servers"):
        evaluated(tmp_path / "local", server.url)


def test_an_evaluation_publishes_in_the_run_it_was_given(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run wrote a relative path into its config, and the directory was moved since."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    config = dataclasses.replace(on_server(server, tmp_path / "run"), run_dir="run")
    saved_run(config, 5)
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "moved")
    # What has its old place now is another run's.
    saved_run(config, 2)
    other = tmp_path / "run" / "weights" / "v000009-0123456789ab"
    other.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluated(Path("moved"))[0] == 5
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["moved"]
    assert len(list((tmp_path / "elsewhere" / "moved" / "weights").glob("v*"))) == 1
    assert list(other.parent.iterdir()) == [other]


def test_only_the_parameters_of_a_checkpoint_are_read_to_use_them(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    params = saved_run(config, 5)
    state = newest_checkpoint(config).state
    assert_same_bits(state.params, params)
    assert state.opt_state is None


def test_without_servers_a_run_may_be_evaluated_while_it_goes_on(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    saved_run(config, 5)
    with locked(config.directory, ""):
        assert evaluated(config.directory)[0] == 5
