"""The mesh and the rules from dimension names to mesh axes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxrl_llm.sharding import (
    AXES,
    KERNEL_AXIS,
    ONE_DEVICE,
    MeshConfig,
    ShardingRules,
    batch_sharding,
    make_layout,
    parameter_shardings,
    partitioned,
    replicated,
)

ROOT = Path(__file__).parent.parent


def test_all_axes_exist_and_default_to_one_device() -> None:
    mesh = make_layout(MeshConfig()).mesh
    assert mesh.axis_names == (*AXES, KERNEL_AXIS)
    assert dict(mesh.shape) == dict.fromkeys(mesh.axis_names, 1)
    assert mesh.devices.size == 1


def test_a_mesh_takes_the_devices_it_is_given() -> None:
    devices = jax.devices()[4:8]
    layout = make_layout(MeshConfig(expert=2, tensor=2), devices)
    assert list(layout.mesh.devices.flat) == devices


CACHED = """
import sys
from pathlib import Path
import tests.conftest  # eight devices
import jax
from jaxrl_llm.sharding import MeshConfig, make_layout
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
for factor, devices in enumerate((1, 1, 2, 1)):
    make_layout(MeshConfig(fsdp=devices))
    jax.jit(lambda x: x * factor)(1.0)
    print(len(list(Path(sys.argv[1]).glob("*-cache"))))
"""


def test_programs_of_several_cpu_devices_are_in_no_cache(tmp_path: Path) -> None:
    """Read back they can wait for ever; and a step of a layout may be compiled at any time."""
    command = [sys.executable, "-c", CACHED, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    first, second, *later = map(int, ended.stdout.split())
    assert 0 < first < second
    assert later == [second, second]


def test_a_mesh_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data 2 x fsdp 1 x expert 8 x context 1 x tensor 1 needs 16 devices"
    ):
        make_layout(MeshConfig(data=2, expert=8))
    with pytest.raises(ValueError, match="mesh axis tensor is 0"):
        MeshConfig(tensor=0)


def test_several_processes_must_use_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="needs 4 devices, there are 8"):
        make_layout(MeshConfig(data=4))


EXPERT = ("layers", "expert", "expert_embed", "mlp")


def test_specs_follow_the_rules() -> None:
    layout = make_layout(MeshConfig(fsdp=2, expert=2, tensor=2))
    assert layout.spec(EXPERT) == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert layout.spec(("embed", None)) == PartitionSpec(("fsdp", "expert"), None)
    assert layout.tokens == PartitionSpec(("fsdp", "expert"), None)
    rules = ShardingRules(embed=(), expert_embed=(), mlp=())
    other = make_layout(MeshConfig(data=2, expert=2, context=2, rules=rules))
    assert other.spec(EXPERT) == PartitionSpec(None, "expert", None, None)
    assert other.spec(("embed", "heads")) == PartitionSpec(None, None)
    assert other.tokens == PartitionSpec(("data", "expert"), "context")


def test_an_axis_of_one_device_is_in_no_type() -> None:
    assert make_layout(MeshConfig()).spec(EXPERT) == PartitionSpec(None, None, None, None)
    assert ONE_DEVICE.tokens == PartitionSpec(None, None)


def test_one_mesh_axis_may_not_split_two_dimensions() -> None:
    rules = ShardingRules(expert_embed=("fsdp", "expert"))
    with pytest.raises(ValueError, match=r"\['expert'\] would split two dimensions"):
        make_layout(MeshConfig(expert=2, rules=rules)).spec(EXPERT)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'widht'; names are"):
        ONE_DEVICE.spec(("widht",))
    with pytest.raises(ValueError, match=r"rule embed names mesh axes \['fdsp'\]"):
        ShardingRules(embed=("fdsp",))
    with pytest.raises(ValueError, match=r"rule heads names mesh axes \['fsdp'\]; .*\('tensor',\)"):
        ShardingRules(heads=("fsdp",))


def test_parameters_split_as_named() -> None:
    layout = make_layout(MeshConfig(fsdp=2, expert=2, tensor=2))
    tree = {"a": {"gate": np.zeros((3, 4, 6, 8))}, "norm": np.zeros(5)}
    names = {"a": {"gate": EXPERT}, "norm": (None,)}
    placed = jax.device_put(tree, parameter_shardings(tree, names, layout))
    assert placed["a"]["gate"].addressable_shards[0].data.shape == (3, 2, 3, 4)
    assert placed["norm"].sharding.is_fully_replicated


def test_a_dimension_that_does_not_divide_is_named() -> None:
    layout = make_layout(MeshConfig(expert=4))
    shapes = {"mlp": {"gate": jax.ShapeDtypeStruct((6, 8), np.float32)}}
    message = r"\['mlp'\]\['gate'\]: dimension 0 \(expert\) of size 6 .*\('expert',\) of size 4"
    with pytest.raises(ValueError, match=message):
        parameter_shardings(shapes, {"mlp": {"gate": ("expert", "mlp")}}, layout)


def test_batches_split_by_row_and_position() -> None:
    layout = make_layout(MeshConfig(data=2, expert=2, context=2))
    rows = jax.device_put(np.arange(8 * 6).reshape(8, 6), batch_sharding(layout))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)}


def test_a_split_that_does_not_match_is_an_error_not_a_copy() -> None:
    layout = make_layout(MeshConfig(data=2))
    rows, whole = batch_sharding(layout), replicated(layout)

    def add(batch: dict[str, jax.Array], scale: jax.Array, absent: None) -> jax.Array:
        return batch["x"] * scale + batch["y"]

    split = layout.shard(add, (layout.tokens, PartitionSpec(), layout.tokens), layout.tokens)
    x, one = np.ones((4, 2)), jax.device_put(np.ones(()), whole)
    good, bad = jax.device_put(x, rows), jax.device_put(x, whole)
    np.testing.assert_array_equal(jax.jit(split)({"x": good, "y": good}, one, None), 2 * x)
    message = r"batch.y, of shape \(4, 2\), .* over \(\), .* want \(\('data',\),\); put it"
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(ValueError, match=message):
            wrap(split)({"x": good, "y": bad}, one, None)


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}])
def test_numpy_arrays_go_to_the_devices_of_the_others(sizes: dict[str, int]) -> None:
    """Outside of jit too, as tests and notebooks use the model."""
    layout = make_layout(MeshConfig(**sizes), jax.devices()[2:4])
    scaled = layout.shard(lambda x, y: x * y, (PartitionSpec(), layout.tokens), layout.tokens)
    one, rows = jax.device_put(np.ones(()), replicated(layout)), np.arange(8.0).reshape(4, 2)
    for wrap in (lambda f: f, jax.jit):
        product = wrap(scaled)(one, rows)
        np.testing.assert_array_equal(product, rows)
        assert product.sharding.device_set == set(layout.mesh.devices.flat)


def test_pure_functions_see_whole_arrays() -> None:
    """A sum over segments that cross the devices of a row, and its gradient."""
    layout = make_layout(MeshConfig(data=2, context=4))
    x = np.arange(16.0, dtype=np.float32).reshape(2, 8)

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jnp.cumsum(x, axis=1)))

    placed = jax.device_put(x, batch_sharding(layout))
    split = jax.jit(jax.value_and_grad(partitioned(loss, replicated(layout))))(placed)
    np.testing.assert_allclose(split[0], loss(x), rtol=1e-6)
    np.testing.assert_allclose(split[1], jax.grad(loss)(x), rtol=1e-6)
    assert split[1].sharding == placed.sharding
