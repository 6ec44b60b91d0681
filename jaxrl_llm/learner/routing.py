"""What a pass over a batch replays, and what is logged of it.

What it is: the checks that a batch holds what its routing replay needs. What it is not: the choice
of the routes that each factor uses, which is step.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp

from jaxrl_llm.arrays import (
    NOT_REPLAYED,
    Mean,
    ReplayedRoutes,
    RouteFallback,
    RouterOutput,
    TrainBatch,
)
from jaxrl_llm.losses.diagnostics import agreement_metrics, provenance_metrics, replay_coverage

Replay = Literal["none", "r2", "r3"]


def replayed_routes(
    batch: TrainBatch, replay: Replay, fallback: RouteFallback, *, gates: bool
) -> ReplayedRoutes | None:
    """The routes of the batch, with its gate values if `gates`; None where nothing is replayed.

    Raises ValueError for a batch without the routes or gates that the settings replay; only r3 with
    the fallback "live" goes on without routes.
    """
    if replay == "none":
        return None
    if batch.routes is None and replay == "r3" and fallback == "live":
        return None
    if batch.routes is None:
        raise ValueError(
            f"learner.replay is {replay} but the batch has no routes: for r3 the inference engine "
            "must report them, for r2 the batch must come from prepare()"
        )
    if not gates:
        return ReplayedRoutes(batch.routes)
    if batch.gates is None:
        raise ValueError(
            "learner.replay_gates is set but the batch has no gates; give it what prepare() "
            "returns, from a score step with the same settings"
        )
    return ReplayedRoutes(batch.routes, batch.gates)


def routing_metrics(
    router: RouterOutput,
    batch: TrainBatch,
    replayed: ReplayedRoutes | None,
    replay: Replay,
    *,
    layers: Sequence[int],
) -> dict[str, Mean]:
    """Whether a pass used what it was given, whose experts these were, and what it would have used.

    Args:
      router: of the pass.
      batch: loss_mask and provenance are read. The latter is that of the batch's routes, so it does
        not count where none are replayed.
      replayed: what the pass was given.
      replay: the setting.
      layers: indices of the MoE layers among all layers, for the names.

    Returns:
      routing/replay_coverage, routing/provenance_* and routing/fallback_fraction, and where routes
      were given, routing/live_agreement and routing/live_overlap_layer_*.

    Raises ValueError for a batch without provenance under a replay.
    """
    mask, provenance = batch.loss_mask, batch.provenance
    if replay == "none":
        provenance = jnp.full(mask.shape, NOT_REPLAYED, jnp.int8)
    if provenance is None:
        raise ValueError(
            f"learner.replay is {replay} but the batch has no provenance; collate() and prepare() "
            "write it"
        )
    routes = None if replayed is None else replayed.experts
    metrics = {"routing/replay_coverage": replay_coverage(router.experts, routes, mask)}
    if routes is not None:
        metrics |= agreement_metrics(router.logits, routes, mask, layers=layers, kind="live_")
    return metrics | provenance_metrics(provenance, mask)
