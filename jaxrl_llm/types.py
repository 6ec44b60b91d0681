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
from typing import Any, Literal

import numpy as np

NO_ROUTE = -1
"""Expert id of a token without routes; it fills all K slots of the token together."""

NOT_SAMPLED = -1
"""Weight version of a position whose target was not sampled by the policy."""

Finish = Literal["stop", "length", "abort"]


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

    def __post_init__(self) -> None:
        name = f"rollout {self.prompt_id!r} sample {self.sample_index}"
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
        sampled = self.sampler_logprobs[self.loss_mask]
        if not np.all(np.isfinite(sampled)) or np.any(sampled > 0):
            raise ValueError(
                f"{name}: sampler_logprobs of sampled tokens must be finite and at most 0; got "
                f"values in [{np.min(sampled)}, {np.max(sampled)}], which cannot be trained on"
            )

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
