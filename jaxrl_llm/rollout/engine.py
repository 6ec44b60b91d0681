"""The inference engine's protocol: what the loop and the evaluation may ask of any sampler.

What it is: requests, failures as values, and three methods that the in-process engine (local.py)
and a server behind HTTP can both keep. What it is not: an implementation; it never imports jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from jaxrl_llm.types import Prompt, Rollout, SamplingParams

Params = Mapping[str, Any]
"""The model's parameters, a pure nested dict of arrays (see model/transformer.py)."""

FailureCause = Literal[
    "too_long",  # prompt and response cannot fit
    "bad_token",  # a token id is outside the vocabulary
    "unscorable",  # sampling settings whose distribution the engine cannot report
    "not_finite",  # NaN came out
    "refused",  # the server calls the request itself wrong
    "unreachable",  # no server answered in all attempts
    "timeout",  # no answer within the deadline, in all attempts
    "bad_answer",  # not the answer of a server that keeps the protocol
    "bad_routes",  # routes that must not be replayed (types.RouteError)
    "wrong_version",  # sampled by weights that were not published by this run
]
"""Why a request has no rollout."""


class EngineError(ValueError):
    """The run cannot go on: no server is left, or one does not hold the weights it should."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One response to sample.

    The seed fixes it: the same request under the same weights gives the same tokens, alone or among
    others. Requests that should differ, the samples of one group among them, need seeds of their
    own.
    """

    prompt: Prompt
    sample_index: int  # 0 .. N-1 within the group
    seed: int  # 0 .. 2^63 - 1
    sampling: SamplingParams
    # Versions by which tokens may lag behind the weights published last, where the engine has a
    # response already that an earlier process was sampling when it ended.
    max_staleness: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(
                f"request {self.prompt.prompt_id!r} sample {self.sample_index}: seed is "
                f"{self.seed}; it must be between 0 and 2^63 - 1"
            )


@dataclasses.dataclass(frozen=True)
class EngineFailure:
    """A request that has no rollout, as a value: callers count it, nothing is raised."""

    prompt_id: str
    sample_index: int
    cause: FailureCause
    message: str  # what happened and what to change, for the run log


@dataclasses.dataclass(frozen=True)
class EngineReport:
    """What an engine did and met since its last report, for the run log."""

    metrics: Mapping[str, float]  # engine/*
    events: tuple[str, ...]  # retries, servers lost and found; no secrets


class Responses(Protocol):
    """The outcomes of some requests, as they finish: an iterator that can be closed."""

    def __iter__(self) -> Iterator[Rollout | EngineFailure]: ...

    def __next__(self) -> Rollout | EngineFailure: ...

    def close(self) -> None:
        """Abandon what is unfinished; the engine stays usable."""
        ...


class Engine(Protocol):
    """A sampler of responses."""

    @property
    def overlaps(self) -> bool:
        """Whether it samples while the caller does something else than to ask for the next item."""
        ...

    def generate(self, requests: Sequence[Request]) -> Responses:
        """Sample every request; yields one Rollout or EngineFailure each, as they finish.

        An engine that overlaps begins at this call, another one when the first item is asked for.
        Raises EngineError where no request can be served any more.
        """
        ...

    def publish(self, params: Params, version: int) -> None:
        """Sample from these weights from now on.

        An engine in this process may read `params` themselves until the next publish. The learner
        may donate them, but has to publish what came of them before it asks for a response: asked
        earlier, such an engine raises. Tokens of responses already under way carry the version that
        sampled them. Raises EngineError if the weights cannot reach where they are needed.
        """
        ...

    def report(self) -> EngineReport:
        """What happened since the last call."""
        ...

    def close(self) -> None:
        """Release what the engine holds; it must not be used afterwards."""
        ...


def refusal(request: Request, *, vocab_size: int, max_length: int) -> EngineFailure | None:
    """The failure of a request that an engine of this size cannot serve, or None if it can.

    Every engine asks before it samples: a token id outside the vocabulary would index out of bounds
    here and take a whole server down elsewhere.

    Args:
      vocab_size: V; token ids are 0 .. V-1.
      max_length: tokens of prompt and response that fit together.
    """
    prompt, limit = request.prompt, request.sampling.max_new_tokens
    if prompt.tokens.size + limit > max_length:
        message = (
            f"prompt of {prompt.tokens.size} tokens and {limit} new ones exceed the engine's "
            f"max_length, {max_length}; raise it, or lower max_new_tokens"
        )
        return EngineFailure(prompt.prompt_id, request.sample_index, "too_long", message)
    outside = [int(t) for t in prompt.tokens if not 0 <= t < vocab_size]
    if outside:
        message = (
            f"token ids {outside[:5]} are outside the vocabulary, 0 to {vocab_size - 1}; "
            "the tokenizer is not the model's"
        )
        return EngineFailure(prompt.prompt_id, request.sample_index, "bad_token", message)
    return None
