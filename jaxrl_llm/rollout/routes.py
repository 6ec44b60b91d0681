"""Routes on arrival: what an engine sent becomes routes that can be replayed, or a RouteError.

What it is: the one door through which routes enter a Rollout, for every engine. Each check names
prompt, sample, layer and position of the first offender, how many there are and what to do. What it
is not: a decoder of any wire format, or the decision what happens to a refused rollout.

What no check can see is well-formed routes of other tokens, such as two samples of one length
exchanged inside the engine. Once routes are in, the digest sees that too (types.route_digest).

Cost of with_routes for 32,768 tokens, 48 layers, top-8 (25 MB) on one core: 0.04 to 0.1 s for the
checks and 0.03 s for the digest, which collate pays once more.
"""

from __future__ import annotations

import itertools

import numpy as np

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.types import NO_ROUTE, Rollout, RouteCause, RouteError, bind_routes


def with_routes(rollout: Rollout, ids: np.ndarray, model: ModelConfig) -> Rollout:
    """The rollout with its routes, checked and bound to its tokens by a digest.

    Args:
      rollout: without routes.
      ids: what the engine sent with these very tokens, see check_routes.
      model: the model it served.

    Raises RouteError.
    """
    positions = rollout.tokens.size - 1
    return bind_routes(rollout, check_routes(ids, model, positions=positions, owner=rollout.name))


def check_routes(ids: np.ndarray, model: ModelConfig, *, positions: int, owner: str) -> np.ndarray:
    """Expert ids as an engine sends them -> routes int16[S, L, K], or a RouteError that says why.

    Args:
      ids: of any integer dtype, [S, layers, K]. The layers are the L MoE layers, or all hidden
        layers as SGLang sends them; then those of dense layers must be blank (0 or NO_ROUTE) and
        are dropped by their global index. NO_ROUTE in all slots of a token means it has no routes.
      positions: S, the forward passes of the rollout.
      owner: names the rollout in messages.

    Raises:
      RouteError: with the cause "dtype", "shape", "row_count", "layer_count", "dense_layer",
        "range", "partial_row", "zero_layer" or "duplicate".
    """
    _check_form(ids, model, positions, owner)
    layers = list(model.moe_layer_indices)
    if ids.shape[1] != len(layers):
        _check_dense_layers(ids, model, owner)
        ids = ids[:, layers]
    experts = model.moe.num_experts
    lowest = ids.min(initial=0)
    if lowest < NO_ROUTE or ids.max(initial=0) >= experts:
        outside = np.logical_or(ids < NO_ROUTE, ids >= experts)
        _refuse(
            "range",
            np.any(outside, axis=-1),
            layers,
            f"{owner}: expert ids outside 0 to {experts - 1}",
            "the engine serves another model than the learner",
        )
    routes = ids.astype(np.int16)
    if lowest == NO_ROUTE:
        blank = routes == NO_ROUTE
        _refuse(
            "partial_row",
            (blank & ~blank.all(axis=(1, 2), keepdims=True)).any(axis=-1),
            layers,
            f"{owner}: NO_ROUTE in some but not all slots of a token",
            "report the experts of all slots and layers of a token, or NO_ROUTE in all of them",
        )
    _check_written(routes, layers, experts, owner)
    _refuse(
        "duplicate",
        _repeated(routes),
        layers,
        f"{owner}: an expert twice among those of one token",
        "a router never does that; the routes were overwritten in part or decoded wrongly",
    )
    return routes


def _check_form(ids: np.ndarray, model: ModelConfig, positions: int, owner: str) -> None:
    """dtype and shape."""
    found = f"{owner}: routes are {ids.dtype}{list(ids.shape)}"
    if not np.issubdtype(ids.dtype, np.integer):
        raise RouteError("dtype", f"{found}; expert ids are integers; decode them as the engine's")
    slots = model.moe.experts_per_token
    if ids.ndim != 3 or ids.shape[2] != slots:
        raise RouteError(
            "shape",
            f"{found}; expected [{positions}, layers, {slots}]; reshape them by the served model's "
            "layers and experts per token",
        )
    if ids.shape[0] != positions:
        raise RouteError(
            "row_count",
            f"{found}, {ids.shape[0]} rows for {positions} forward passes; every token but the "
            "last is an input and has one row, cached prompt tokens too: ask for the routes from "
            "position 0 on",
        )
    if ids.shape[1] not in (model.num_moe_layers, model.num_layers):
        raise RouteError(
            "layer_count",
            f"{found}, {ids.shape[1]} layers for a model of {model.num_layers}, of which "
            f"{model.num_moe_layers} have experts; the engine serves another model, or some of "
            "its layers were lost",
        )


def _check_dense_layers(ids: np.ndarray, model: ModelConfig, owner: str) -> None:
    dense = sorted(model.moe.dense_layers)
    _refuse(
        "dense_layer",
        ((ids[:, dense] != 0) & (ids[:, dense] != NO_ROUTE)).any(axis=-1),
        dense,
        f"{owner}: expert ids in a dense layer",
        "engine and learner disagree about which layers are dense, so every layer may be misplaced",
    )


def _check_written(routes: np.ndarray, layers: list[int], experts: int, owner: str) -> None:
    """No layer is 0 throughout: that is what a buffer holds into which nobody wrote.

    With K > 1 it is impossible (an expert twice). With K = 1 it would mean that every token of the
    prompt and the response chose expert 0: possible in a few tokens, or after a router collapsed.
    Both look like lost routes, and replaying lost routes is the worse mistake.
    """
    if experts == 1:
        return
    unwritten = [
        layer for index, layer in enumerate(layers) if len(routes) and not routes[:, index].any()
    ]
    if unwritten:
        raise RouteError(
            "zero_layer",
            f"{owner}: layer {unwritten[0]} has expert 0 at every position and in every slot, from "
            f"position 0 on ({len(unwritten)} of {len(layers)} layers do): a buffer that was never "
            "written; check that the engine captures routes and that nothing in front of it drops "
            "them",
        )


def _repeated(routes: np.ndarray) -> np.ndarray:
    """Whether an expert stands twice in the slots of a token: [S, L, K] -> bool[S, L].

    All pairs of slots, each slot an array of its own: several times faster than to sort the slots.
    """
    slots = np.ascontiguousarray(np.moveaxis(routes, -1, 0))
    repeated = np.zeros(routes.shape[:-1], np.bool_)
    for left, right in itertools.combinations(slots, 2):
        repeated |= left == right
    return repeated & (slots[0] != NO_ROUTE)


def _refuse(
    cause: RouteCause, offends: np.ndarray, layers: list[int], problem: str, remedy: str
) -> None:
    """Raise RouteError if any of offends bool[S, layers] is true; layers are global indices."""
    if not offends.any():
        return
    position, index = np.argwhere(offends)[0]
    raise RouteError(
        cause,
        f"{problem}: {np.count_nonzero(offends)} times, first at layer {layers[index]}, position "
        f"{position}; {remedy}",
    )
