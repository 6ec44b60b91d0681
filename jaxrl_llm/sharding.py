"""The device mesh and the table that says which of its axes splits which dimension.

Parameters name their dimensions ("embed", "expert", ...); ShardingRules maps those names to mesh
axes; the compiler does the rest. What it is not: a place where arrays are computed.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "tensor")
"""All mesh axes. They always exist; most have size 1."""

BATCH_AXES = ("data", "fsdp")
"""The axes over which rows of a batch are split."""

LogicalNames = tuple[str | None, ...]
"""The name of every dimension of an array; None for one that is never split."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis; their product is the number of devices used."""

    data: int = 1  # copies of the model, each on its share of the rows
    fsdp: int = 1  # shares of rows whose devices also split the parameters among them
    expert: int = 1  # shares of the experts of a layer
    tensor: int = 1  # shares of attention heads, MLP width and vocabulary

    def __post_init__(self) -> None:
        for axis in AXES:
            size = dataclasses.asdict(self)[axis]
            if size < 1:
                raise ValueError(f"mesh axis {axis} is {size}; use 1 to leave it unsplit")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical dimension name -> mesh axes that split it. Vary it with dataclasses.replace."""

    batch: tuple[str, ...] = BATCH_AXES  # rows
    embed: tuple[str, ...] = ("fsdp",)  # model width, in parameters only
    heads: tuple[str, ...] = ("tensor",)  # query heads x head size
    kv_heads: tuple[str, ...] = ("tensor",)  # key or value heads x head size
    mlp: tuple[str, ...] = ("tensor",)  # width inside an MLP or an expert
    expert: tuple[str, ...] = ("expert",)  # experts of one layer
    vocab: tuple[str, ...] = ("tensor",)  # rows of the embedding, columns of the head
    layers: tuple[str, ...] = ()  # the stacking axis of the layer scan

    def __post_init__(self) -> None:
        for name, axes in dataclasses.asdict(self).items():
            unknown = sorted(set(axes) - set(AXES))
            if unknown:
                raise ValueError(f"rule {name} names mesh axes {unknown}; they are {AXES}")


DEFAULT_RULES = ShardingRules()


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all of AXES, on `devices` or on the first of jax.devices().

    A job of several processes must use every device, or some of them would have no work and hang.
    """
    shape = tuple(dataclasses.asdict(config)[axis] for axis in AXES)
    wanted = config.data * config.fsdp * config.expert * config.tensor
    if wanted > 1:
        # Of CPU devices: a collective blocks one of XLA's threads, of which there are about as many
        # as cores, and a device may run dozens at once. Devices that are out of threads wait for
        # each other until XLA aborts. Read when JAX makes its devices, so it must be set before.
        os.environ.setdefault("PJRT_NPROC", str(max(32 * wanted, os.cpu_count() or 1)))
    available = jax.devices() if devices is None else list(devices)
    uneven = jax.process_count() > 1 and wanted != len(available)
    if wanted > len(available) or uneven:
        sizes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
        raise ValueError(
            f"the mesh {sizes} needs {wanted} devices, there are {len(available)}; "
            "change the axes so that their product fits"
        )
    automatic = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, automatic, devices=available[:wanted])


def spec(names: LogicalNames, rules: ShardingRules = DEFAULT_RULES) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these names.

    Raises ValueError for a name without a rule and for a mesh axis that would split two dimensions.
    """
    table: dict[str, tuple[str, ...]] = dataclasses.asdict(rules)
    unknown = [name for name in names if name is not None and name not in table]
    if unknown:
        raise ValueError(f"no sharding rule for dimensions {unknown}; names are {sorted(table)}")
    entries = [() if name is None else table[name] for name in names]
    used = [axis for axes in entries for axis in axes]
    twice = sorted({axis for axis in used if used.count(axis) > 1})
    if twice:
        raise ValueError(
            f"mesh axes {twice} would split two dimensions of {names}; change one of their rules"
        )
    return PartitionSpec(*(axes or None for axes in entries))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every leaf of a TrainBatch: rows split, all else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def parameter_shardings(
    shapes: Any, axes: Any, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> Any:
    """A NamedSharding for every parameter.

    Args:
      shapes: a tree of arrays or jax.ShapeDtypeStruct.
      axes: the same tree with LogicalNames for leaves (model.transformer.parameter_axes).

    Raises ValueError naming parameter, dimension and axes where a size does not divide.
    """

    def one(path: tuple[Any, ...], shape: Any, names: LogicalNames) -> NamedSharding:
        partition = spec(names, rules)
        for index, entry in enumerate(partition):
            split = (entry,) if isinstance(entry, str) else entry or ()
            parts = math.prod(mesh.shape[axis] for axis in split)
            if shape.shape[index] % parts:
                raise ValueError(
                    f"parameter {jax.tree_util.keystr(path)}: dimension {index} ({names[index]}) "
                    f"of size {shape.shape[index]} does not divide over mesh axes {split} of "
                    f"size {parts}; choose a size of those axes that divides it"
                )
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(one, shapes, axes)
