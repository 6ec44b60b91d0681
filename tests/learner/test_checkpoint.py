"""Checkpoints: exact round trips, what is kept, and what becomes of interrupted and damaged ones.

The states here are small stand-ins with a real optimizer; no model is compiled.
"""

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from jaxrl_llm.learner import checkpoint
from jaxrl_llm.learner.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    Checkpoints,
    _checksum,
    restore,
)
from jaxrl_llm.learner.state import (
    OptimizerConfig,
    TrainState,
    fresh_optimizer_state,
    make_optimizer,
)
from jaxrl_llm.sharding import MeshConfig, make_layout

HOST = {"cursor": 7, "share": 0.1 + 0.2, "groups": [{"id": "a", "text": "é\n"}], "none": None}


ONE = MeshConfig()


def make_state(seed: int, mesh_config: MeshConfig = ONE, rows: int = 16) -> TrainState:
    """Parameters and AdamW moments of random bits, at step `seed`."""
    mesh = make_layout(mesh_config).mesh
    rng = np.random.default_rng(seed)
    matrix = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    whole = NamedSharding(mesh, PartitionSpec())
    params = {
        "embed": jax.device_put(rng.normal(size=(rows, 8)).astype(np.float32), matrix),
        "final_norm": jax.device_put(rng.normal(size=(8,)).astype(np.float32), whole),
    }
    state = TrainState(jax.device_put(jnp.int32(0), whole), params, None)
    state = fresh_optimizer_state(state, make_optimizer(OptimizerConfig(warmup_steps=3), 10))

    def noise(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.int32:
            return jax.device_put(jnp.int32(seed), leaf.sharding)
        return jax.device_put(rng.normal(size=leaf.shape).astype(np.float32), leaf.sharding)

    return jax.tree.map(noise, state)


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(left: TrainState, right: TrainState) -> None:
    """Bit for bit, structure and dtypes included."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_all(directory: Path, steps: list[int], config: CheckpointConfig) -> None:
    with Checkpoints(directory, config) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step), HOST | {"cursor": step})


def kept(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir())


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A directory with good checkpoints of steps 1 and 2."""
    save_all(tmp_path / "saved", [1, 2], CheckpointConfig())
    return tmp_path / "saved"


def test_a_round_trip_is_exact(two: Path) -> None:
    state = make_state(2)
    found = restore(two, abstract(state))
    assert found is not None
    assert found.step == 2
    assert found.host == HOST | {"cursor": 2}
    assert_same(found.state, state)
    older = restore(two, abstract(state), step=1)
    assert older is not None
    assert_same(older.state, make_state(1))


def without_optimizer(state: TrainState) -> TrainState:
    return dataclasses.replace(abstract(state), opt_state=None)


def test_the_parameters_alone_are_as_exact(two: Path) -> None:
    state = make_state(2)
    found = restore(two, without_optimizer(state))
    assert found is not None
    assert_same(found.state, dataclasses.replace(state, opt_state=None))
    assert (found.step, found.host) == (2, HOST | {"cursor": 2})


def test_parameters_alone_are_read_alone_and_checked(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []
    read = checkpoint._read

    def flipping(reader: Any, step: int, items: dict[str, Any]) -> dict[str, Any]:
        found = read(reader, step, items)
        if "state" in found:
            asked.append(set(found["state"]))
            params = found["state"]["params"]
            wrong = np.array(params["embed"])
            wrong[3, 3] *= 2
            params["embed"] = jax.device_put(wrong, params["embed"].sharding)
        return found

    monkeypatch.setattr(checkpoint, "_read", flipping)
    with pytest.raises(CheckpointError, match=r"is damaged: \.params\['embed'\] changed since"):
        restore(two, without_optimizer(make_state(2)))
    assert asked == [{"step", "params"}] * 2  # of the newest, and of the one before it


def test_nothing_saved_is_nothing_to_restore(tmp_path: Path) -> None:
    assert restore(tmp_path / "absent", abstract(make_state(0))) is None
    assert not (tmp_path / "absent").exists()
    assert restore(tmp_path, abstract(make_state(0))) is None


@pytest.mark.parametrize("target", [MeshConfig(fsdp=4, tensor=2), MeshConfig(data=2), MeshConfig()])
def test_another_mesh_gets_the_same_values(tmp_path: Path, target: MeshConfig) -> None:
    state = make_state(1, MeshConfig(fsdp=2, tensor=4))
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state, {})
    wanted = abstract(make_state(1, target))
    found = restore(tmp_path, wanted)
    assert found is not None
    assert_same(found.state, state)
    shardings = jax.tree.map(lambda a, b: a.sharding == b.sharding, found.state, wanted)
    assert jax.tree.all(shardings)


def test_the_state_may_be_donated_while_it_is_being_written(tmp_path: Path) -> None:
    """save() must have copied what it needs: the next update reuses the memory."""
    state = make_state(1, rows=1 << 18)
    before = jax.tree.map(np.array, state)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state, {})
        wanted = abstract(state)
        for _ in range(5):
            state = jax.block_until_ready(update(state))
    found = restore(tmp_path, wanted)
    assert found is not None
    assert_same(found.state, before)


def test_the_newest_and_every_so_many_th_are_kept(tmp_path: Path) -> None:
    save_all(tmp_path, list(range(1, 9)), CheckpointConfig(every=1, keep_last=2, keep_every=3))
    assert kept(tmp_path) == [3, 6, 7, 8]
    save_all(tmp_path, [9, 10], CheckpointConfig(every=1, keep_last=1))
    assert kept(tmp_path) == [10]


def test_checkpoints_between_regular_ones_do_not_push_these_out(tmp_path: Path) -> None:
    """As a run makes them that is stopped often."""
    config = CheckpointConfig(every=4, keep_last=2)
    save_all(tmp_path, [4, 8, 9, 10, 11], config)
    assert kept(tmp_path) == [4, 8, 10, 11]
    save_all(tmp_path, [12], config)
    assert kept(tmp_path) == [8, 11, 12]


def test_when_a_checkpoint_is_due(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "a", CheckpointConfig(every=3)) as checkpoints:
        assert [step for step in range(1, 10) if checkpoints.due(step)] == [3, 6, 9]
    with Checkpoints(tmp_path / "b", CheckpointConfig(every=0)) as checkpoints:
        assert not any(checkpoints.due(step) for step in range(10))


def test_a_step_is_saved_once_and_time_does_not_run_back(two: Path) -> None:
    with Checkpoints(two, CheckpointConfig()) as checkpoints:
        assert checkpoints.latest == 2
        assert not checkpoints.save(2, make_state(9), {})
        with pytest.raises(CheckpointError, match=r"step 2, newer than step 1"):
            checkpoints.save(1, make_state(1), {})
    found = restore(two, abstract(make_state(2)))
    assert found is not None
    assert_same(found.state, make_state(2))


def test_a_host_state_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with (
        Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
        pytest.raises(TypeError, match="not JSON serializable"),
    ):
        checkpoints.save(1, make_state(1), {"array": np.zeros(3)})


KILLED = """
import os, signal, sys
from pathlib import Path
from jaxrl_llm.learner.checkpoint import CheckpointConfig, Checkpoints
from tests.learner.test_checkpoint import HOST, make_state

directory = Path(sys.argv[1])
checkpoints = Checkpoints(directory, CheckpointConfig(keep_last=1))
checkpoints.save(1, make_state(1), HOST)
checkpoints.wait()
checkpoints.save(2, make_state(2, rows=1 << 21), HOST)
while not any("tmp" in path.name for path in directory.iterdir()):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_during_a_save_leaves_the_last_good_one(tmp_path: Path) -> None:
    """Even with keep_last=1: the old one goes only when the new one is whole."""
    directory = tmp_path / "saved"
    command = [sys.executable, "-c", KILLED, str(directory)]
    root = Path(__file__).parent.parent.parent
    child = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    assert child.returncode == -signal.SIGKILL
    names = sorted(path.name for path in directory.iterdir())
    assert len(names) == 2, "the kill must have come in the middle of the second save"
    assert names[0] == "1"
    assert names[1].startswith("2.")

    state = make_state(1)
    found = restore(directory, abstract(state))
    assert found is not None
    assert found.step == 1
    assert_same(found.state, state)
    assert len(list(directory.iterdir())) == 2, "reading must not disturb a save in progress"
    with Checkpoints(directory, CheckpointConfig()) as checkpoints:
        assert checkpoints.save(3, make_state(3), HOST)
    assert kept(directory) == [1, 3]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def assert_offers_step_1(directory: Path, wanted: TrainState, cause: str) -> None:
    """Restoring names checkpoint 2 and the cause; doing what the message says restores 1."""
    bad = directory / "2"
    with pytest.raises(CheckpointError, match=cause) as error:
        restore(directory, wanted)
    message = str(error.value)
    assert message.startswith(f"{bad} ")
    assert f"last good checkpoint is of step 1: delete {bad} to go on from there" in message
    remove(bad)
    found = restore(directory, wanted)
    assert found is not None
    assert found.step == 1


@pytest.fixture
def collect_garbage() -> Iterator[None]:
    yield
    gc.collect()


def noisy(test: Callable[..., None]) -> Callable[..., None]:
    """For reads that fail: Orbax leaves their coroutines, never awaited, to the garbage collector.

    They are collected before the next test, whose warnings are errors.
    """
    unraisable = "ignore::pytest.PytestUnraisableExceptionWarning"
    return pytest.mark.usefixtures("collect_garbage")(pytest.mark.filterwarnings(unraisable)(test))


# Arrays above 1 KiB lie in the first file, smaller ones in the second.
FILES = ("state/ocdbt.process_0/d/*", "state/d/*", "state/manifest.ocdbt", "state/_METADATA")


@noisy
@pytest.mark.parametrize("damage", [truncate, flip, remove])
@pytest.mark.parametrize("file", [*FILES, "record/data.json"])
def test_damaged_files_are_found(tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, make_state(1, rows=256), HOST)
        checkpoints.save(2, make_state(2, rows=256), HOST)
    (path,) = (tmp_path / "2").glob(file)
    damage(path)
    assert_offers_step_1(tmp_path, abstract(make_state(2, rows=256)), "is damaged")


@noisy
@pytest.mark.parametrize("part", ["state", "record"])
def test_missing_parts_are_found(two: Path, part: str) -> None:
    remove(two / "2" / part)
    assert_offers_step_1(two, abstract(make_state(2)), "is damaged")


@noisy
def test_the_way_on_leads_past_all_that_is_damaged(tmp_path: Path) -> None:
    save_all(tmp_path, [1, 2, 3, 4], CheckpointConfig(keep_last=4))
    for step in ("2", "4"):
        remove(tmp_path / step / "state" / "manifest.ocdbt")
    with pytest.raises(CheckpointError, match=f"of step 3: delete {tmp_path / '4'} to go on"):
        restore(tmp_path, abstract(make_state(4)))
    remove(tmp_path / "3" / "state")
    ways = f"of step 1: delete {tmp_path / '2'}, {tmp_path / '3'}, {tmp_path / '4'} to go on"
    with pytest.raises(CheckpointError, match=ways):
        restore(tmp_path, abstract(make_state(4)))


def test_every_flipped_bit_changes_the_checksum() -> None:
    """Whatever its place in a byte and in the array."""
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    sums = {int(_checksum(array))}
    for byte in range(array.nbytes):
        for bit in range(8):
            changed = bytearray(array.tobytes())
            changed[byte] ^= 1 << bit
            sums.add(int(_checksum(np.frombuffer(changed, np.float32).reshape(array.shape))))
    assert len(sums) > 8 * array.nbytes
    assert int(_checksum(array[::-1])) not in sums


def other_shape(state: TrainState) -> TrainState:
    other = abstract(make_state(2, rows=24))
    return other if state.opt_state is not None else dataclasses.replace(other, opt_state=None)


def other_dtype(state: TrainState) -> TrainState:
    """Orbax would convert without a word."""
    embed = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=state.params["embed"].sharding)
    return dataclasses.replace(state, params=state.params | {"embed": embed})


def other_tree(state: TrainState) -> TrainState:
    params = dict(state.params)
    return dataclasses.replace(state, params=params | {"head": params.pop("embed")})


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (other_shape, r"\['embed'\] is float32\[16, 8\] there and float32\[24, 8\] here"),
        (other_dtype, r"\['embed'\] is float32\[16, 8\] there and bfloat16\[16, 8\] here"),
        (other_tree, r"\['embed'\] is float32\[16, 8\] there and absent here"),
    ],
)
def test_another_model_is_told_apart(
    two: Path, change: Callable[[TrainState], TrainState], cause: str
) -> None:
    for wanted in (abstract(make_state(2)), without_optimizer(make_state(2))):
        with pytest.raises(CheckpointError, match=cause) as error:
            restore(two, change(wanted))
        assert str(error.value).startswith(f"{two / '2'} is of another model or optimizer")
        assert "No older checkpoint can be restored" in str(error.value)


def test_another_optimizer_is_told_apart_and_does_not_matter_to_parameters(two: Path) -> None:
    state = make_state(2)
    plain = dataclasses.replace(abstract(state), opt_state={"mu": abstract(state).params})
    with pytest.raises(CheckpointError, match=r"is of another model or optimizer: \.opt_state"):
        restore(two, plain)
    found = restore(two, dataclasses.replace(plain, opt_state=None))
    assert found is not None
    assert_same(found.state, dataclasses.replace(state, opt_state=None))


@noisy
def test_another_programs_files_are_told_apart(two: Path) -> None:
    with ocp.training.Checkpointer(two) as foreign:
        foreign.save(3, {"weights": jnp.zeros(3)})
    with pytest.raises(CheckpointError, match=r"3 is of another program or is damaged.*step 2"):
        restore(two, abstract(make_state(2)))
    remove(two / "3")
    (two / "3").mkdir()
    (two / "3" / "weights.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"3 is of another program or is damaged.*step 2"):
        restore(two, abstract(make_state(2)))


def test_a_record_of_another_format_is_told_apart(two: Path) -> None:
    path = two / "2" / "record" / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "other"}))
    assert_offers_step_1(two, abstract(make_state(2)), "not written by this program")


def test_a_step_that_does_not_exist(two: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7, only of \[1, 2\]"):
        restore(two, abstract(make_state(2)), step=7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": -1}, "every is -1"),
        ({"keep_last": 0}, "keep_last is 0"),
        ({"every": 20, "keep_every": 30}, "multiple of checkpoint.every"),
        ({"every": 0, "keep_every": 30}, "multiple of checkpoint.every"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**settings)
