"""The devices of a TPU topology on a machine that has none, from the compiler in libtpu.

What it is: devices that programs can be compiled for. What it is not: devices that run anything.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from jax.experimental import topologies

from jaxrl_llm.compile.chips import chip_of
from jaxrl_llm.sharding import AXES, Layout, MeshConfig, make_layout

_ENVIRONMENT = {
    # There is no metadata server to ask, and there are no workers to find.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # asked for, but the topology's name decides
    # libtpu lets one process of a machine load it, for the sake of the chips. We use none.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


def topology_layout(topology: str, config: MeshConfig) -> Layout:
    """A mesh over all devices of a topology such as "v5p:4x4x4".

    This process gets no other devices than the host's: call it before jax.devices().
    Raises ValueError for an unknown topology, for a mesh of another number of devices, and where
    libtpu is not installed.
    """
    devices = _devices(topology)
    sizes = {axis: vars(config)[axis] for axis in AXES}
    if math.prod(sizes.values()) != len(devices):
        product = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ValueError(
            f"learner.mesh is {product} = {math.prod(sizes.values())} devices, and --topology "
            f"{topology} has {len(devices)}; change an axis, such as --learner.mesh.fsdp, or the "
            "topology, until they agree"
        )
    return make_layout(config, devices)


def _devices(topology: str) -> list[Any]:
    chip, shape = chip_of(topology)
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError(
            "libtpu, which has the TPU compiler, is not installed; run: "
            'pip install "jaxrl-llm[tpu]" (on a machine without a TPU as well)'
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # A TPU machine's chips are not taken, and libtpu is not asked for chips where there are none.
    jax.config.update("jax_platforms", "cpu")
    # A program from the cache would have no time of compilation to report.
    jax.config.update("jax_enable_compilation_cache", False)
    options: dict[str, Any] = {}
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # two cores are one device, as on v5p
    if math.prod(shape) < 4:
        options["chips_per_host_bounds"] = (*shape, *(1,) * (3 - len(shape)))
    try:
        return list(
            topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
        )
    except JaxRuntimeError as error:
        raise ValueError(
            f"--topology is {topology!r}, which the TPU compiler refuses ({error}); give a shape "
            "that exists, such as v5p:4x4x4, v6e:8x8 or v5e:2x4"
        ) from error
