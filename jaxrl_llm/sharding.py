"""The device mesh, and the one table that says which of its axes splits which dimension.

Parameters name their dimensions ("embed", "expert", ...); ShardingRules maps those names to mesh
axes. The mesh is explicit: the type of every array says how it is split, and a mismatch is an error
while tracing, never a silent copy. The model computes inside jax.shard_map, on each device's share,
and communicates only where it says so, through a Layout: whole() gathers the width of a parameter
that is split to save memory, total() adds what the devices of an axis have computed.

An axis of size 1 appears in no type and costs nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""All mesh axes, in the order of the devices: the last one's talk most and should be neighbours."""

BATCH_AXES = ("data", "fsdp", "expert")
"""The axes over which the rows of a batch are split."""

TOKEN_AXES = (*BATCH_AXES, "context")
"""The axes whose devices have different tokens: rows, and under "context" positions of a row."""

KERNEL_AXIS = "kernel"
"""One more axis of every mesh, always of one device: the border of library kernels, see kernels.py.
Arrays are not split over it and Layout.shard() leaves it out."""

LogicalNames = tuple[str | None, ...]
"""The name of every dimension of a parameter; None for one that is never split."""


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Dimension name of a parameter -> mesh axes that split it."""

    # Fully sharded data parallelism: split to save memory, gathered when a layer needs it.
    embed: tuple[str, ...] = ("fsdp", "expert", "context")  # model width, outside of experts
    expert_embed: tuple[str, ...] = ("fsdp", "context")  # model width, in an expert
    # Computed in shares, which are then added up or exchanged.
    heads: tuple[str, ...] = ("tensor",)  # heads x head size, of queries, keys and values
    mlp: tuple[str, ...] = ("tensor",)  # width inside an MLP or an expert
    vocab: tuple[str, ...] = ("tensor",)  # rows of the embedding, columns of the head
    expert: tuple[str, ...] = ("expert",)  # experts of one layer
    layers: tuple[str, ...] = ()  # the stacking axis of the layer scan

    def __post_init__(self) -> None:
        possible: dict[str, tuple[str, ...]] = {
            "embed": TOKEN_AXES,
            "expert_embed": TOKEN_AXES,
            "heads": ("tensor",),
            "mlp": ("tensor",),
            "vocab": ("tensor",),
            "expert": ("expert",),
            "layers": (),
        }
        for name, axes in vars(self).items():
            wrong = sorted(set(axes) - set(possible[name]))
            if wrong:
                raise ValueError(
                    f"rule {name} names mesh axes {wrong}; it can be split over {possible[name]}"
                )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis; their product is the number of devices used."""

    data: int = 1  # copies of the model, each on its share of the rows
    fsdp: int = 1  # shares of rows whose devices also split the parameters among them
    expert: int = 1  # shares of rows whose devices also split a layer's experts among them
    context: int = 1  # shares of the positions of a row, for long rows
    tensor: int = 1  # shares of attention heads, MLP width and vocabulary
    rules: ShardingRules = dataclasses.field(default_factory=ShardingRules)  # what splits what

    def __post_init__(self) -> None:
        for axis in AXES:
            if vars(self)[axis] < 1:
                raise ValueError(
                    f"mesh axis {axis} is {vars(self)[axis]}; use 1 to leave it unsplit"
                )

    @property
    def devices(self) -> int:
        """How many there must be."""
        return math.prod(vars(self)[axis] for axis in AXES)

    @property
    def rows(self) -> int:
        """The shares into which the rows of a batch are split."""
        return self.data * self.fsdp * self.expert


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules of what it splits; static under jit. Without a mesh: one device.

    whole(), total(), share() and vary() are for code inside shard().
    """

    mesh: Mesh | None = None  # with all of AXES, and KERNEL_AXIS
    rules: ShardingRules = ShardingRules()

    @property
    def platform(self) -> str:
        """Of its devices, which need not be here: "cpu", "gpu" or "tpu"."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform

    def split(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Those of these mesh axes that have more than one device."""
        return () if self.mesh is None else tuple(a for a in axes if self.mesh.shape[a] > 1)

    def size(self, axes: Sequence[str]) -> int:
        """Into how many shares these mesh axes split a dimension."""
        return math.prod(self.mesh.shape[axis] for axis in self.split(axes)) if self.mesh else 1

    def axes(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes, of more than one device, that split a dimension of this name."""
        table: dict[str, tuple[str, ...]] = vars(self.rules)
        if name is not None and name not in table:
            raise ValueError(f"no sharding rule for dimension {name!r}; names are {sorted(table)}")
        return () if name is None else self.split(table[name])

    def spec(self, names: LogicalNames) -> PartitionSpec:
        """The PartitionSpec of a parameter whose dimensions have these names.

        Raises ValueError for a name without a rule, and for a mesh axis that would split two
        dimensions.
        """
        used = [axis for name in names for axis in self.axes(name)]
        twice = sorted({axis for axis in used if used.count(axis) > 1})
        if twice:
            raise ValueError(
                f"mesh axes {twice} would split two dimensions of {names}; "
                "change one of their rules"
            )
        return PartitionSpec(*(self.axes(name) or None for name in names))

    @property
    def tokens(self) -> PartitionSpec:
        """Of arrays [B, S, ...]: rows and positions are split."""
        return PartitionSpec(self.split(BATCH_AXES) or None, self.split(("context",)) or None)

    def shard(self, function: Callable[..., Any], inward: Any, outward: Any) -> Callable[..., Any]:
        """The function applied to each device's share; the function itself without a mesh.

        inward, outward: a PartitionSpec for every argument and for the result, as of shard_map.

        Raises ValueError, while tracing, for an argument that is split otherwise: it is not copied.
        """
        if self.mesh is None:
            return function
        mapped = jax.sharding.auto_axes(
            jax.shard_map(function, in_specs=inward, out_specs=outward, axis_names=set(AXES)),
            # Left explicit, JAX 0.12 could not lower a reduce-scatter inside.
            axes=KERNEL_AXIS,
            out_sharding=jax.tree.map(self._named, outward, is_leaf=_is_spec),
        )
        # auto_axes() takes NumPy's arrays under jit only.
        mapped = jax.jit(mapped, inline=True)

        def checked(*arguments: Any) -> Any:
            # JAX itself does not check, in all of its versions, where an axis is left out.
            self._check_splits(function, inward, arguments)
            return mapped(*arguments)

        return checked

    def _check_splits(
        self, function: Callable[..., Any], inward: tuple[Any, ...], arguments: tuple[Any, ...]
    ) -> None:
        signature = inspect.signature(function)
        specs, values = (signature.bind(*each).arguments for each in (inward, arguments))

        def check(path: tuple[Any, ...], value: Any, spec: PartitionSpec) -> None:
            type_ = jax.typeof(value)
            found, wanted = self._splits(type_.sharding.spec), self._splits(spec)
            if found != wanted:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(
                    f"{name}, of shape {type_.shape}, has dimensions split over {found}, and the "
                    f"mesh and its rules want {wanted}; put it on the devices with jax.device_put "
                    "and the sharding of batch_sharding() or parameter_shardings()"
                )

        jax.tree_util.tree_map_with_path(check, values, jax.tree.broadcast(specs, values))

    def _named(self, spec: PartitionSpec) -> NamedSharding:
        assert self.mesh is not None, "an array without a mesh is on one device"
        return NamedSharding(self.mesh, spec)

    def _splits(self, spec: PartitionSpec) -> tuple[tuple[str, ...], ...]:
        """The axes that split each dimension, up to the last one that is split."""
        axes = [(part,) if isinstance(part, str) else part or () for part in spec]
        splits = [self.split(part) for part in axes]
        while splits and not splits[-1]:
            splits.pop()
        return tuple(splits)

    def vary(self, tree: Any, axes: Sequence[str]) -> Any:
        """The same values, typed as different on the devices of these axes.

        Where a value that devices share meets one that they do not, the gradient is summed over
        them: at this place, rather than where JAX would find that it has to be.
        """

        def one(x: jax.Array) -> jax.Array:
            missing = tuple(axis for axis in self.split(axes) if axis not in varying(x))
            return jax.lax.pcast(x, missing, to="varying") if missing else x

        return jax.tree.map(one, tree)

    def whole(self, x: jax.Array, names: LogicalNames) -> jax.Array:
        """A parameter's share with its model width gathered; its gradient is scattered back.

        One mesh axis after the other: of a collective over all devices at once a TPU makes an
        all-reduce, twice the traffic of a reduce-scatter and more than that of an all-gather.
        """
        x = self.vary(x, TOKEN_AXES)
        for dimension, axis in self.gathers(names):
            x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
        return x

    def gathers(self, names: LogicalNames) -> list[tuple[int, str]]:
        """The gathers that make a parameter's share whole, one dimension and mesh axis each."""
        return [
            (dimension, axis)
            for dimension, name in enumerate(names)
            if name in ("embed", "expert_embed")
            for axis in reversed(self.axes(name))  # the last one splits finest
        ]

    def total(self, x: jax.Array, name: str) -> jax.Array:
        """The sum of x over the devices that split a dimension of this name."""
        axes = self.axes(name)
        return jax.lax.psum(x, axes) if axes else x

    def share(self, name: str) -> jax.Array | int:
        """Which share of a dimension of this name this device has, from 0."""
        axes = self.axes(name)
        return jax.lax.axis_index(axes) if axes else 0


ONE_DEVICE = Layout()


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def varying(x: jax.Array) -> tuple[str, ...]:
    """The mesh axes on whose devices x is typed as different, inside Layout.shard().

    In the order of AXES: a set's order is another one in each process, and then so is the program.
    """
    axes = jax.typeof(x).manual_axis_type.varying
    return tuple(axis for axis in AXES if axis in axes)


def alike(tree: Any, other: Any = ()) -> Any:
    """The same values, all typed as different wherever one of them, or of the others, is."""
    axes = {axis for x in jax.tree.leaves((tree, other)) for axis in varying(x)}

    def one(x: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in AXES if axis in axes.difference(varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def reserve_threads(devices: int) -> None:
    """Threads enough for so many CPU devices, unless $PJRT_NPROC is set; before JAX makes them.

    A collective blocks one of XLA's threads, of which there are about as many as cores, and a
    device may run dozens at once. Devices that are out of threads wait for each other until XLA
    aborts.
    """
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(32 * devices, os.cpu_count() or 1)))


def make_layout(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The mesh of a config, with all of AXES, on `devices` or on the first of jax.devices().

    A job of several processes must use every device, or some of them would have no work and hang.
    With several CPU devices this process uses JAX's compilation cache no more: see below.
    """
    shape = tuple(vars(config)[axis] for axis in AXES)
    wanted = config.devices
    reserve_threads(wanted)
    available = jax.devices() if devices is None else list(devices)
    uneven = jax.process_count() > 1 and wanted != len(available)
    if wanted > len(available) or uneven:
        sizes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
        raise ValueError(
            f"the mesh {sizes} needs {wanted} devices, there are {len(available)}; "
            "change the axes so that their product fits"
        )
    if wanted > 1 and available[0].platform == "cpu":
        # A program that XLA reads back for CPUs has lost the order of its collectives. Devices that
        # come to them in different orders wait for each other for ever, in one process as well.
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # whether it is used was settled by the first program
    # jax.make_mesh would, on most TPUs, refuse axes that are no product of whole axes of the torus.
    grid = mesh_utils.create_device_mesh(
        (*shape, 1), available[:wanted], allow_split_physical_axes=True
    )
    types = (AxisType.Explicit,) * grid.ndim
    return Layout(Mesh(grid, (*AXES, KERNEL_AXIS), axis_types=types), config.rules)


def batch_sharding(layout: Layout) -> NamedSharding:
    """The sharding of every leaf of a TrainBatch: rows and positions split, all else whole."""
    assert layout.mesh is not None, "a batch without a mesh is just an array"
    return NamedSharding(layout.mesh, layout.tokens)


def replicated(layout: Layout) -> NamedSharding:
    """The sharding of what every device has whole."""
    assert layout.mesh is not None, "an array without a mesh is on one device"
    return NamedSharding(layout.mesh, PartitionSpec())


def whole_here(tree: Any) -> Any:
    """The arrays, all of whose shards this process sees: gathered on every device if it does not.

    Where it gathers, all processes of the job must call it.
    """

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        assert isinstance(x.sharding, NamedSharding), "an array of several processes has a mesh"
        everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
        return jax.device_put(x, everywhere).addressable_data(0)

    return jax.tree.map(one, tree)


def partitioned(function: Callable[..., Any], outward: NamedSharding) -> Callable[..., Any]:
    """A function written for whole arrays, on arrays that are split; its results get `outward`.

    The compiler finds the communication. For losses and metrics, which are pure functions of arrays
    with a number or two per token; not for the model.
    """
    return jax.sharding.auto_axes(function, axes=(*AXES, KERNEL_AXIS), out_sharding=outward)


def parameter_shardings(shapes: Any, axes: Any, layout: Layout) -> Any:
    """A NamedSharding for every parameter.

    Args:
      shapes: a tree of arrays or jax.ShapeDtypeStruct.
      axes: the same tree with LogicalNames for leaves (model.transformer.parameter_axes).

    Raises ValueError naming parameter, dimension and axes where a size does not divide.
    """

    def one(path: tuple[Any, ...], shape: Any, names: LogicalNames) -> NamedSharding:
        assert layout.mesh is not None, "parameters without a mesh have no sharding"
        for index, name in enumerate(names):
            split = layout.axes(name)
            if shape.shape[index] % layout.size(split):
                raise ValueError(
                    f"parameter {jax.tree_util.keystr(path)}: dimension {index} ({name}) "
                    f"of size {shape.shape[index]} does not divide over mesh axes {split} of "
                    f"size {layout.size(split)}; choose a size of those axes that divides it"
                )
        return NamedSharding(layout.mesh, layout.spec(names))

    return jax.tree_util.tree_map_with_path(one, shapes, axes)
