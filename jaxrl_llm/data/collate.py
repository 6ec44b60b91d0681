"""Rollouts and demonstrations into mini-batches of fixed shape, by padding or packing.

What it is: the one place where variable-length host data becomes a TrainBatch of numpy arrays,
under the alignment rule of types.py: a rollout of T tokens occupies S = T - 1 consecutive positions
of one row, and what the rollout says about position s lands at (row, start + s). What it is not:
the device (callers place the arrays), or the choice of what to train on.

Placement is a pure function of the lengths, so per-position results are unpacked by planning again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl_llm.arrays import TrainBatch
from jaxrl_llm.data.demonstrations import Demonstration
from jaxrl_llm.types import (
    NO_ROUTE,
    NOT_REPLAYED,
    ROUTES_MISSING,
    ROUTES_UNREPORTED,
    SAMPLER_ROUTES,
    Rollout,
    RouteError,
    RouteFallback,
    check_digest,
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where each sequence lies in the batch."""

    row: np.ndarray  # i32[n]
    start: np.ndarray  # i32[n], position of its first forward pass in the row
    segment: np.ndarray  # i32[n], its segment id in the row, from 1
    rows: int  # rows that hold anything


def place(lengths: Sequence[int], *, length: int, pack: bool) -> Placement:
    """Lay sequences of `lengths` forward passes into rows of `length` positions.

    pack=False gives each a row of its own, in order. pack=True is first-fit decreasing: longest
    first (ties in order), each into the first row with room. Raises ValueError for one that is
    longer than a row.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and sizes.max() > length:
        raise ValueError(
            f"sequence {int(sizes.argmax())} needs {sizes.max()} positions; a row has {length}"
        )
    if not pack:
        order = np.arange(sizes.size, dtype=np.int32)
        zeros = np.zeros(sizes.size, np.int32)
        return Placement(order, zeros, zeros + 1, sizes.size)
    row, start, segment = (np.zeros(sizes.size, np.int32) for _ in range(3))
    used: list[int] = []
    held: list[int] = []
    for index in np.argsort(-sizes, kind="stable"):
        size = int(sizes[index])
        target = next((r for r, taken in enumerate(used) if taken + size <= length), len(used))
        if target == len(used):
            used.append(0)
            held.append(0)
        held[target] += 1
        row[index], start[index], segment[index] = target, used[target], held[target]
        used[target] += size
    return Placement(row, start, segment, len(used))


def rows_needed(lengths: Sequence[int], *, length: int, pack: bool) -> int:
    """Rows that collate needs for sequences of `lengths` forward passes (tokens - 1)."""
    return place(lengths, length=length, pack=pack).rows


def collate(
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    *,
    step: int,
    rows: int,
    length: int,
    pack: bool,
    route_fallback: RouteFallback = "live",
) -> TrainBatch:
    """A mini-batch of numpy arrays from rollouts and one advantage for each.

    Args:
      rollouts: any number whose placement fits `rows`; rows left over are padding.
      advantages: f32[len(rollouts)], written on the sampled positions of each rollout.
      step: learner step now; staleness is step - weight_version on the mask.
      rows, length: shape [B, S] of the result.
      pack: several rollouts per row (first-fit decreasing), or one.
      route_fallback: "error" refuses a rollout or a token without routes; "live" leaves it to the
        live router, and provenance says so.

    Returns a TrainBatch without old_logprobs, ref_logprobs and gates. Its routes are None if no
    rollout has any; otherwise rollouts without routes, and padding, hold NO_ROUTE. Its provenance
    is that of a replay of these routes.
    Raises ValueError, naming the prompt, for a rollout longer than a row, one sampled by weights
    newer than `step`, or routes of unequal shape; and when the rows do not suffice. Raises
    RouteError, of cause "digest" for routes that did not arrive with these tokens, and "missing"
    where route_fallback is "error".
    """
    advantages = np.asarray(advantages)
    if advantages.shape != (len(rollouts),) or advantages.dtype != np.float32:
        raise ValueError(
            f"advantages is {advantages.dtype}{list(advantages.shape)}; "
            f"expected float32[{len(rollouts)}], one for each rollout"
        )
    names = [rollout.name for rollout in rollouts]
    placement = _place_all([r.tokens for r in rollouts], names, rows, length, pack)
    batch = _empty(rows, length)
    for rollout in rollouts:
        check_digest(rollout)
    routes = _empty_routes(rollouts, names, rows, length)
    for index, rollout in enumerate(rollouts):
        where = _write_tokens(batch, placement, index, rollout.tokens, rollout.loss_mask)
        staleness = np.where(rollout.loss_mask, step - rollout.weight_version, 0)
        if np.any(staleness < 0):
            raise ValueError(
                f"{names[index]}: weight_version reaches {rollout.weight_version.max()} but the "
                f"learner is at step {step}; a rollout cannot be newer than its learner"
            )
        batch["staleness"][where] = staleness
        batch["sampler_logprobs"][where] = np.where(rollout.loss_mask, rollout.sampler_logprobs, 0)
        batch["advantages"][where] = np.where(rollout.loss_mask, advantages[index], 0)
        batch["provenance"][where] = _provenance(rollout, route_fallback)
        if routes is not None and rollout.routes is not None:
            routes[where] = rollout.routes
    batch["routes"] = routes
    return TrainBatch(**batch)


def collate_demonstrations(
    demonstrations: Sequence[Demonstration], *, rows: int, length: int, pack: bool
) -> TrainBatch:
    """A supervised mini-batch: loss_mask on the responses, advantage 1 there, nothing sampled.

    sampler_logprobs and staleness are 0 and there are no routes. Raises ValueError, naming the
    prompt, for a demonstration longer than a row, and when the rows do not suffice.
    """
    names = [f"demonstration {d.prompt_id!r}" for d in demonstrations]
    placement = _place_all([d.tokens for d in demonstrations], names, rows, length, pack)
    batch = _empty(rows, length)
    for index, demonstration in enumerate(demonstrations):
        where = _write_tokens(
            batch, placement, index, demonstration.tokens, demonstration.loss_mask
        )
        batch["advantages"][where] = demonstration.loss_mask
    return TrainBatch(**batch)


def unpack(values: np.ndarray, rollouts: Sequence[Rollout], *, pack: bool) -> list[np.ndarray]:
    """Values [B, S, ...] of a collated batch back to one array [S_i, ...] for each rollout."""
    lengths = [r.tokens.size - 1 for r in rollouts]
    placement = place(lengths, length=values.shape[1], pack=pack)
    return [
        values[placement.row[i], placement.start[i] : placement.start[i] + size]
        for i, size in enumerate(lengths)
    ]


def _place_all(
    tokens: Sequence[np.ndarray], names: Sequence[str], rows: int, length: int, pack: bool
) -> Placement:
    """`place`, with errors that name the sequence and the settings."""
    for name, sequence in zip(names, tokens, strict=True):
        if sequence.size - 1 > length:
            raise ValueError(
                f"{name}: {sequence.size} tokens need {sequence.size - 1} positions, a row has "
                f"{length}; raise the row length or lower max_new_tokens"
            )
    placement = place([t.size - 1 for t in tokens], length=length, pack=pack)
    if placement.rows > rows:
        raise ValueError(
            f"{len(tokens)} sequences need {placement.rows} rows of {length} positions, the batch "
            f"has {rows}; raise its rows or their length"
        )
    return placement


def _empty(rows: int, length: int) -> dict[str, Any]:
    """The fields of a batch that is all padding; numpy arrays, where TrainBatch says jax arrays."""
    shape = (rows, length)
    integers = ("inputs", "targets", "positions", "segment_ids", "staleness")
    fields: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in integers}
    fields["loss_mask"] = np.zeros(shape, np.bool_)
    fields["sampler_logprobs"] = np.zeros(shape, np.float32)
    fields["advantages"] = np.zeros(shape, np.float32)
    fields["provenance"] = np.full(shape, NOT_REPLAYED, np.int8)
    return fields


def _provenance(rollout: Rollout, fallback: RouteFallback) -> np.ndarray:
    """int8[S]: whose experts each position uses when the rollout's routes are replayed."""
    if rollout.routes is None:
        codes = np.full(rollout.tokens.size - 1, ROUTES_UNREPORTED, np.int8)
    else:
        missing = rollout.routes[:, 0, 0] == NO_ROUTE  # it fills all slots of a token together
        codes = np.where(missing, ROUTES_MISSING, SAMPLER_ROUTES).astype(np.int8)
    without = np.flatnonzero(codes != SAMPLER_ROUTES)
    if without.size and fallback == "error":
        raise RouteError(
            "missing",
            f"{rollout.name}: {without.size} of its {codes.size} positions have no routes, the "
            f"first is {without[0]}, and the replay of the sampler's routes needs them all; make "
            "the engine report routes of every input token, prompts included, or set "
            "learner.route_fallback to live",
        )
    return codes


def _empty_routes(
    rollouts: Sequence[Rollout], names: Sequence[str], rows: int, length: int
) -> np.ndarray | None:
    """int16[B, S, L, K] of NO_ROUTE, or None if no rollout has routes."""
    shapes = {
        r.routes.shape[1:]: n for r, n in zip(rollouts, names, strict=True) if r.routes is not None
    }
    if not shapes:
        return None
    if len(shapes) > 1:
        raise ValueError(
            "routes differ in [layers, experts per token]: "
            + ", ".join(f"{name} has {list(shape)}" for shape, name in shapes.items())
            + "; all engines must serve the same model"
        )
    return np.full((rows, length, *next(iter(shapes))), NO_ROUTE, np.int16)


def _write_tokens(
    batch: dict[str, Any],
    placement: Placement,
    index: int,
    tokens: np.ndarray,
    loss_mask: np.ndarray,
) -> tuple[int, slice]:
    """Write what every sequence has; returns where in [B, S] its positions are."""
    size = tokens.size - 1
    start = int(placement.start[index])
    where = (int(placement.row[index]), slice(start, start + size))
    batch["inputs"][where] = tokens[:-1]
    batch["targets"][where] = tokens[1:]
    batch["positions"][where] = np.arange(size)
    batch["segment_ids"][where] = placement.segment[index]
    batch["loss_mask"][where] = loss_mask
    return where
