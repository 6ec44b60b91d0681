"""The mesh and the rules from dimension names to mesh axes."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxrl_llm.sharding import (
    AXES,
    MeshConfig,
    ShardingRules,
    batch_sharding,
    make_mesh,
    parameter_shardings,
    spec,
)


def test_all_axes_exist_and_default_to_one_device() -> None:
    mesh = make_mesh(MeshConfig())
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1)
    assert mesh.devices.size == 1


def test_a_mesh_takes_the_devices_it_is_given() -> None:
    devices = jax.devices()[4:8]
    mesh = make_mesh(MeshConfig(expert=2, tensor=2), devices)
    assert list(mesh.devices.flat) == devices


def test_a_mesh_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data 2 x fsdp 1 x expert 8 x tensor 1 needs 16 devices"):
        make_mesh(MeshConfig(data=2, expert=8))
    with pytest.raises(ValueError, match="mesh axis tensor is 0"):
        MeshConfig(tensor=0)


def test_several_processes_must_use_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="needs 4 devices, there are 8"):
        make_mesh(MeshConfig(data=4))


def test_specs_follow_the_rules() -> None:
    assert spec(("layers", "expert", "embed", "mlp")) == PartitionSpec(
        None, "expert", "fsdp", "tensor"
    )
    assert spec(("batch", None)) == PartitionSpec(("data", "fsdp"), None)
    whole = dataclasses.replace(ShardingRules(), embed=())
    assert spec(("vocab", "embed"), whole) == PartitionSpec("tensor", None)


def test_one_mesh_axis_may_not_split_two_dimensions() -> None:
    with pytest.raises(ValueError, match=r"\['fsdp'\] would split two dimensions"):
        spec(("batch", "embed"))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['widht'\]; names are"):
        spec(("widht",))
    with pytest.raises(ValueError, match=r"rule embed names mesh axes \['fdsp'\]"):
        ShardingRules(embed=("fdsp",))


def test_parameters_split_as_named() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    tree = {"a": {"gate": np.zeros((3, 4, 6, 8))}, "norm": np.zeros(5)}
    names = {"a": {"gate": ("layers", "expert", "embed", "mlp")}, "norm": (None,)}
    placed = jax.device_put(tree, parameter_shardings(tree, names, mesh))
    assert placed["a"]["gate"].addressable_shards[0].data.shape == (3, 2, 3, 4)
    assert placed["norm"].sharding.is_fully_replicated


def test_a_dimension_that_does_not_divide_is_named() -> None:
    mesh = make_mesh(MeshConfig(expert=4))
    shapes = {"mlp": {"gate": jax.ShapeDtypeStruct((6, 8), np.float32)}}
    message = r"\['mlp'\]\['gate'\]: dimension 0 \(expert\) of size 6 .*\('expert',\) of size 4"
    with pytest.raises(ValueError, match=message):
        parameter_shardings(shapes, {"mlp": {"gate": ("expert", "embed")}}, mesh)


def test_batches_split_by_row_over_data_and_fsdp() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = jax.device_put(np.arange(8 * 3).reshape(8, 3), batch_sharding(mesh))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)}
