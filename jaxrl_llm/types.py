"""Host data: frozen dataclasses of numpy arrays that travel between data, engines and the learner.

What it is: the vocabulary every part speaks (prompts, sampling settings, rollouts, groups) and the
checks that keep a malformed rollout from getting further than its constructor. What it is not:
device data (see arrays.py); this module never imports jax.

The alignment rule
------------------
A sequence of T tokens makes S = T - 1 forward passes. Position s consumes ``inputs[s] = tokens[s]``
and predicts ``targets[s] = tokens[s + 1]``. Everything indexed by s (the mask, every
log-probability, the advantage, the weight version and the routes) belongs to that forward pass:

    tokens            t0   t1   t2   t3   t4      T = 5; t0 t1 are the prompt, t2 t3 t4 were sampled
    position s         0    1    2    3           S = 4
    inputs[s]         t0   t1   t2   t3
    targets[s]        t1   t2   t3   t4
    loss_mask[s]       F    T    T    T           True iff targets[s] was sampled by the policy
    routes[s]         e0   e1   e2   e3           experts used while inputs[s] was consumed

The last sampled token is never an input, so it has no routes and needs none.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
from typing import Any, Literal

import numpy as np

NO_ROUTE = -1
"""Expert id of a token without routes; it fills all K slots of the token together."""

NOT_SAMPLED = -1
"""Weight version of a position whose target was not sampled by the policy."""

Finish = Literal["stop", "length", "abort"]

# Where the experts of a position come from: the provenance codes, int8, one for each position.
#
#     code              whose experts        why
#     NOT_REPLAYED      the live router's    padding, or no routing replay is configured
#     SAMPLER_ROUTES    the sampler's        r3: the inference engine reported them
#     OLD_ROUTES        pi_old's             r2: the scoring pass chose them
#     ROUTES_UNREPORTED the live router's    r3: the engine reported no routes for this rollout
#     ROUTES_MISSING    the live router's    r3: the rollout has routes, this token has NO_ROUTE
NOT_REPLAYED, SAMPLER_ROUTES, OLD_ROUTES, ROUTES_UNREPORTED, ROUTES_MISSING = range(5)

PROVENANCE: dict[int, str] = {
    NOT_REPLAYED: "not_replayed",
    SAMPLER_ROUTES: "sampler",
    OLD_ROUTES: "old",
    ROUTES_UNREPORTED: "unreported",
    ROUTES_MISSING: "missing",
}
"""Every provenance code -> the name it is logged under."""

RouteFallback = Literal["error", "live"]
"""What becomes of a token that a replay gives no routes: refused, or left to the live router."""

RouteCause = Literal[
    "dtype",  # not integers
    "shape",  # not [rows, layers, K]
    "row_count",  # not one row for each forward pass
    "layer_count",  # neither the MoE layers nor all hidden layers
    "dense_layer",  # expert ids where the model has no experts
    "range",  # an id that is no expert
    "partial_row",  # NO_ROUTE in some but not all slots of a token
    "zero_layer",  # a layer that was never written
    "duplicate",  # an expert twice in one row
    "missing",  # no routes where a replay requires them
    "digest",  # routes that are not bound to these tokens
]


class RouteError(ValueError):
    """Routes that must not be replayed. `cause` is for machines, the message for people."""

    def __init__(self, cause: RouteCause, message: str) -> None:
        super().__init__(message)
        self.cause: RouteCause = cause


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One task instance, tokenized."""

    prompt_id: str  # unique over a dataset
    tokens: np.ndarray  # i32[P]
    text: str
    answer: str  # the verifier's reference answer
    demonstration: str = (
        ""  # worked response for a supervised cold start; "" where the dataset has none
    )

    def __post_init__(self) -> None:
        _check_array(f"prompt {self.prompt_id!r}", "tokens", self.tokens, np.int32, (None,))
        if self.tokens.size == 0:
            raise ValueError(
                f"prompt {self.prompt_id!r}: tokens is empty; a prompt needs at least one token"
            )


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Settings that affect the sampled distribution."""

    max_new_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0  # 0 is greedy; log-probabilities are then those at temperature 1
    top_p: float = 1.0  # nucleus: fewest tokens whose probability reaches top_p; 1 keeps all
    top_k: int = 0  # the k likeliest tokens; 0 keeps all

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; use 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or positive")


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One sampled response and what the inference engine reported; see the alignment rule."""

    prompt_id: str
    sample_index: int  # 0 .. N-1 within its group
    tokens: np.ndarray  # i32[T], prompt then response, the stop token included
    loss_mask: np.ndarray  # bool[S]
    sampler_logprobs: np.ndarray  # f32[S], nats, after temperature; 0 where not sampled
    routes: np.ndarray | None  # int16[S, L, K]; None if the engine reports none
    weight_version: np.ndarray  # i32[S]; NOT_SAMPLED where not sampled
    text: str  # the response decoded, without the stop token
    finish: Finish
    reward: float | None = None  # None until verified
    verdict: str = ""  # the verifier's cause, for example "correct" or "no_answer"
    route_digest: str = ""  # binds routes to tokens, see route_digest(); "" iff routes is None

    def __post_init__(self) -> None:
        name = self.name
        _check_array(name, "tokens", self.tokens, np.int32, (None,))
        if self.tokens.size < 2:
            raise ValueError(
                f"{name}: tokens has shape {self.tokens.shape}; "
                "a prompt and a sampled token are needed"
            )
        positions = self.tokens.size - 1
        _check_array(name, "loss_mask", self.loss_mask, np.bool_, (positions,))
        _check_array(name, "sampler_logprobs", self.sampler_logprobs, np.float32, (positions,))
        _check_array(name, "weight_version", self.weight_version, np.int32, (positions,))
        if self.routes is not None:
            _check_array(name, "routes", self.routes, np.int16, (positions, None, None))
        if (self.routes is None) != (self.route_digest == ""):
            raise RouteError(
                "digest",
                f"{name}: routes is {'None' if self.routes is None else 'given'} but route_digest "
                f"is {self.route_digest!r}; attach routes with rollout.routes.with_routes and take "
                "them off with without_routes",
            )
        sampled = self.sampler_logprobs[self.loss_mask]
        if not np.all(np.isfinite(sampled)) or np.any(sampled > 0):
            raise ValueError(
                f"{name}: sampler_logprobs of sampled tokens must be finite and at most 0; got "
                f"values in [{np.min(sampled)}, {np.max(sampled)}], which cannot be trained on"
            )

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"rollout {self.prompt_id!r} sample {self.sample_index}"

    @property
    def response_length(self) -> int:
        """Number of sampled tokens."""
        return int(np.count_nonzero(self.loss_mask))


@dataclasses.dataclass(frozen=True)
class Group:
    """All finished rollouts of one prompt: the unit over which advantages are centred."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    def __post_init__(self) -> None:
        strangers = {r.prompt_id for r in self.rollouts} - {self.prompt.prompt_id}
        if strangers:
            raise ValueError(
                f"group {self.prompt.prompt_id!r} holds rollouts of others: {sorted(strangers)}"
            )


def route_digest(rollout: Rollout, routes: np.ndarray) -> str:
    """32 hexadecimal digits that bind routes to the rollout they arrived with.

    BLAKE2b over prompt_id, sample_index, the tokens, and the routes with their shape and dtype: any
    other routes, and these routes on any other rollout, have another digest.
    """
    digest = hashlib.blake2b(digest_size=16)
    header = (rollout.prompt_id, rollout.sample_index, rollout.tokens.size)
    digest.update(repr((*header, routes.dtype.str, routes.shape)).encode())
    for array in (rollout.tokens, routes):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def bind_routes(rollout: Rollout, routes: np.ndarray) -> Rollout:
    """The rollout with routes int16[S, L, K] and the digest that binds them to its tokens.

    It looks at no route; engines call rollout.routes.with_routes, which checks them first.
    """
    return dataclasses.replace(rollout, routes=routes, route_digest=route_digest(rollout, routes))


def check_digest(rollout: Rollout) -> None:
    """Raises RouteError, naming the rollout, if its routes are not those that arrived with it."""
    if rollout.routes is None:
        return
    found = route_digest(rollout, rollout.routes)
    if found != rollout.route_digest:
        raise RouteError(
            "digest",
            f"{rollout.name}: its routes have the digest {found}, but {rollout.route_digest} "
            "arrived with its tokens; one of them was changed, shifted or taken from another "
            "rollout since: keep arrays of a rollout as they arrived",
        )


def without_routes(rollout: Rollout) -> Rollout:
    """The rollout without its routes and their digest."""
    return dataclasses.replace(rollout, routes=None, route_digest="")


def group_without_routes(group: Group) -> Group:
    """The group with rollouts that are."""
    return Group(group.prompt, tuple(without_routes(rollout) for rollout in group.rollouts))


def group_to_json(group: Group) -> dict[str, Any]:
    """A group as plain JSON values, exact: arrays become {"dtype", "shape", "base64"}."""
    return {
        "prompt": _to_json(group.prompt),
        "rollouts": [_to_json(rollout) for rollout in group.rollouts],
    }


def group_from_json(value: dict[str, Any]) -> Group:
    """Inverse of group_to_json; raises ValueError for a value that is not one of its results."""
    try:
        prompt = Prompt(**_from_json(value["prompt"]))
        return Group(prompt, tuple(Rollout(**_from_json(rollout)) for rollout in value["rollouts"]))
    except (KeyError, TypeError, binascii.Error) as error:
        raise ValueError(f"not a stored group: {error!r}") from error


def _to_json(record: Prompt | Rollout) -> dict[str, Any]:
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {
        name: _array_to_json(v) if isinstance(v, np.ndarray) else v for name, v in values.items()
    }


def _from_json(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _array_from_json(v) if isinstance(v, dict) else v for name, v in values.items()}


def _array_to_json(array: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": data}


def _array_from_json(value: dict[str, Any]) -> np.ndarray:
    data = base64.b64decode(value["base64"], validate=True)
    return np.frombuffer(data, dtype=np.dtype(value["dtype"])).reshape(value["shape"]).copy()


def _check_array(
    owner: str, name: str, array: np.ndarray, dtype: type, shape: tuple[int | None, ...]
) -> None:
    matches = len(array.shape) == len(shape) and all(
        w is None or w == a for a, w in zip(array.shape, shape, strict=True)
    )
    if array.dtype != dtype or not matches:
        wanted = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
        found = f"{array.dtype}{list(array.shape)}"
        raise ValueError(f"{owner}: {name} is {found}; expected {np.dtype(dtype).name}{wanted}")
