"""Checkpoints: the whole state of a run on disk, atomic and asynchronous. Orbax is used only here.

    DIRECTORY/120/state/    TrainState, every array in shards (Orbax, OCDBT)
    DIRECTORY/120/record/   JSON: what every array is and a checksum of it, and the host's own state

A checkpoint is written beside its place and renamed into it when it is whole, so a kill at any
moment leaves the last good one. Reading one back is checked end to end, whatever happened to the
files or the mesh in between: Orbax converts a dtype and returns flipped bits without a word.
What this is not: knowledge of what the host's state means (assembly.py).
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from jaxrl_llm.arrays import Array
from jaxrl_llm.learner.state import TrainState

FORMAT = "jaxrl_llm checkpoint 3"

CHECKPOINTS = "checkpoints"
"""Folder of a run directory."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names its path, the cause and a way on."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved and which checkpoints stay."""

    every: int = 20  # steps between checkpoints; 0: only when the run stops
    keep_last: int = 2  # newest checkpoints that stay, and newest of those of every so many steps
    keep_every: int = 0  # those of every so many steps stay for good; 0: none

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("keep_last", 1), ("keep_every", 0)):
            value = vars(self)[name]
            if value < least:
                raise ValueError(f"checkpoint.{name} is {value}; it must be at least {least}")
        if self.keep_every and (not self.every or self.keep_every % self.every):
            raise ValueError(
                f"checkpoint.keep_every is {self.keep_every} but checkpoints are made every "
                f"{self.every} steps; make it a multiple of checkpoint.every"
            )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was saved at a step."""

    step: int
    state: TrainState
    host: dict[str, Any]  # JSON values


class Checkpoints:
    """The checkpoints of one run, open for writing. One at a time may be open on a directory.

    What an interrupted save left behind is removed before the first save. save() returns once the
    arrays are copied off the devices, so the state may be donated next; close(), or leaving the
    context, waits until all is on disk. A save that failed on the way raises at the next save or
    close.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(config.keep_last)]
        if config.every:
            keep.append(_LatestRegular(config))
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        self._every = config.every
        self._writer = ocp.training.Checkpointer(
            Path(directory).absolute(),
            context=_context(),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def latest(self) -> int | None:
        """The newest step that is saved or being saved."""
        newest = self._writer.latest
        return None if newest is None else newest.step

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are saved or being saved, ascending."""
        return tuple(checkpoint.step for checkpoint in self._writer.checkpoints)

    def due(self, step: int) -> bool:
        """Whether the config asks for a checkpoint of this step."""
        return bool(self._every) and step % self._every == 0

    def save(self, step: int, state: TrainState, host: dict[str, Any]) -> bool:
        """Starts saving; False if the checkpoint of this step is there already.

        Args:
          step: of the run, from 0; it names the checkpoint.
          state: on the devices; it may be donated as soon as this returns.
          host: JSON values, for whatever else the run needs to go on.

        Raises CheckpointError where newer checkpoints exist: they belong to another run.
        """
        latest = self.latest
        if latest == step:
            return False
        if latest is not None and latest > step:
            raise CheckpointError(
                f"{self._writer.directory} holds a checkpoint of step {latest}, newer than step "
                f"{step} to be saved; delete what is newer, or use another run directory"
            )
        items = {"state": state, "record": _record(state, host)}
        self._writer.save_checkpointables_async(step, items, force=True)
        return True

    def wait(self) -> None:
        """Returns when every save is on disk; raises if one failed."""
        self._writer.wait()

    def close(self) -> None:
        """wait(), and release what writing needed."""
        self._writer.close()


def restore(directory: Path, abstract: TrainState, step: int | None = None) -> Checkpoint | None:
    """The checkpoint of `step`, by default the newest; None if there is none at all.

    Args:
      directory: that of Checkpoints; nothing in it is changed.
      abstract: learner.state.abstract_state; arrays come back with its shardings, which may be of
        another mesh than the one they were saved from. If its opt_state is None, the optimizer's
        state is neither read nor checked.
      step: which one.

    Raises CheckpointError, which names the newest older checkpoint that can be restored, if this
    one is damaged, or is of another model, optimizer or program.
    """
    directory = Path(directory).absolute()
    if not directory.is_dir():
        return None
    with ocp.training.Checkpointer(directory, context=_context()) as reader:
        steps = [checkpoint.step for checkpoint in reader.checkpoints]
        if step is None and not steps:
            return None
        if step is not None and step not in steps:
            raise CheckpointError(f"{directory} has no checkpoint of step {step}, only of {steps}")
        wanted = steps[-1] if step is None else step
        try:
            return _load(reader, wanted, abstract)
        except _Unusable as cause:
            message = f"{directory / str(wanted)} {cause}"
        for older in reversed([step for step in steps if step < wanted]):
            try:
                _load(reader, older, abstract)
            except _Unusable:
                continue
            newer = ", ".join(str(directory / str(step)) for step in steps if step > older)
            raise CheckpointError(
                f"{message}. The last good checkpoint is of step {older}: delete {newer} to go on "
                "from there"
            )
        raise CheckpointError(
            f"{message}. No older checkpoint can be restored: use the settings it was written "
            "with, or another run directory"
        )


@dataclasses.dataclass(frozen=True)
class _LatestRegular:
    """An Orbax preservation policy: stopping a run often does not push its regular ones out."""

    config: CheckpointConfig

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        regular = [c.step for c in checkpoints if c.step % self.config.every == 0]
        newest = sorted(regular)[-self.config.keep_last :]
        return [checkpoint.step in newest for checkpoint in checkpoints]


class _Unusable(Exception):
    """Why a checkpoint cannot be restored, as the end of a sentence that begins with its path."""


def _context() -> ocp.Context:
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="record")
    context.checkpointables.registry = registry
    context.pytree.loading.partial_load = True  # what is not asked for is not read
    return context


def _record(state: TrainState, host: dict[str, Any]) -> dict[str, Any]:
    body = json.dumps({"leaves": _types(state), "checksums": _checksums(state), "host": host})
    return {"format": FORMAT, "body": body, "crc32": zlib.crc32(body.encode())}


def _load(reader: Any, step: int, abstract: TrainState) -> Checkpoint:
    """Raises _Unusable."""
    try:
        record = _read(reader, step, {"record": None})["record"]
    except _Unusable as cause:
        raise _Unusable(f"is of another program or {cause}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise _Unusable("was not written by this program")
    if zlib.crc32(str(record.get("body")).encode()) != record.get("crc32"):
        raise _Unusable("is damaged: its record has changed")
    body = json.loads(record["body"])
    here, there, sums = _types(abstract), body["leaves"], body["checksums"]
    saved = dict(zip(there, sums, strict=True))
    if abstract.opt_state is None:
        there = {name: kind for name, kind in there.items() if not name.startswith(".opt_state")}
    different = [n for n in sorted(there.keys() | here.keys()) if there.get(n) != here.get(n)]
    if different:
        name = different[0]
        raise _Unusable(
            f"is of another model or optimizer: {name} is {there.get(name, 'absent')} there and "
            f"{here.get(name, 'absent')} here, and so on for {len(different)} of {len(here)} arrays"
        )
    # As a dict: Orbax takes no None, and knows the fields of a dataclass by their names.
    asked = {name: part for name, part in vars(abstract).items() if part is not None}
    found = _read(reader, step, {"state": asked})["state"]
    state = TrainState(found["step"], found["params"], found.get("opt_state"))
    pairs = zip(here, _checksums(state), strict=True)
    changed = [name for name, read in pairs if saved[name] != read]
    if changed:
        raise _Unusable(f"is damaged: {', '.join(changed)} changed since it was saved")
    return Checkpoint(step, state, body["host"])


def _read(reader: Any, step: int, items: dict[str, Any]) -> dict[str, Any]:
    try:
        return reader.load_checkpointables(step, items)
    except Exception as error:  # Orbax and TensorStore raise all kinds, bare Exception among them
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = " ".join(f"{type(root).__name__}: {root}".split())[:200]
        raise _Unusable(f"is damaged: {reason}") from None


def _types(state: TrainState) -> dict[str, str]:
    """Name of every array -> its dtype and shape, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _checksums(state: TrainState) -> list[int]:
    """A number for every array: the same on any mesh, and another if one bit of it flips."""
    return [int(x) for x in jax.device_get([_checksum(x) for x in jax.tree.leaves(state)])]


@jax.jit
def _checksum(x: Array) -> Array:
    """Sum of the bytes with odd weights that depend on their index, u32[] modulo 2^32.

    Integers add in any order, so it does not matter how x is sharded; and an odd weight carries a
    changed bit into the sum whatever the other bytes are.
    """
    data = jax.lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.uint32)
    weights = jnp.zeros((), jnp.uint32)
    for axis in range(data.ndim):
        weights = weights * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(
            jnp.uint32, data.shape, axis
        )
    return jnp.sum(data * (2 * weights + 1), dtype=jnp.uint32)
