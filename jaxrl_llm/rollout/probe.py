"""Whether a server samples from the weights it was given: the probe, and how it is judged.

What it is: one fixed request, asked of every server after every publish, and the comparison of what
it reports with the learner's own log-probabilities of the same tokens. What it is not: a measure of
the discrepancy during the run (mismatch/* are that), or what is done about a wrong server
(updates.py).

Two things give a server away. Its log-probabilities are further from the learner's than the
tolerance: other weights, another model, a broken kernel. Or the prompt's are bit for bit those that
it reported before the publish, though the learner's have moved: it was left on the old weights. The
second sees what the first cannot, since one update often moves the policy less than the two engines
differ; it needs a server that repeats itself bit for bit, and an answer from before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxrl_llm.rollout.engine import Params, Request
from jaxrl_llm.rollout.servers import Weights
from jaxrl_llm.types import Rollout

Score = Callable[[Any, np.ndarray, np.ndarray | None, float], np.ndarray]
"""The learner's log-probabilities of tokens[1:], through the sampler's experts if they are known.

(params, tokens i32[T], routes int16[S, L, K] or None, temperature) -> f32[S]; learner/probe.py.
"""

KEPT_VERSIONS = 8
"""Publishes whose log-probabilities of the probe's prompt are remembered, to name old weights."""

MOVED_SHARE = 0.01
"""Share of the tolerance by which the learner must have moved to expect another answer."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server reported for the probe."""

    rollout: Rollout
    prompt_logprobs: np.ndarray  # f32[P - 1], of prompt tokens 1 on, nats, at temperature 1


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an answer says about the server's weights."""

    error: float  # nats; mean |server - learner|, the larger of prompt's and response's
    right: bool
    holds: Weights | None  # the publish that its prompt log-probabilities fit best, if one fits

    def describe(self, url: str) -> str:
        """One server's line in an error."""
        held = (
            "no version that this run published"
            if self.holds is None
            else f"version {self.holds.version} ({self.holds.label})"
        )
        return f"{url} holds {held}, {self.error:.3g} nats off the learner"


class Probe:
    """The fixed request, and what was learned about it at the publishes so far."""

    def __init__(self, request: Request, score: Score, tolerance: float) -> None:
        """`tolerance` in nats.

        Raises ValueError for a prompt of one token, which has no log-probabilities.
        """
        if request.prompt.tokens.size < 2:
            raise ValueError(
                f"the probe's prompt has {request.prompt.tokens.size} token; its log-probabilities "
                "are compared, so it needs at least 2, better 16 or more"
            )
        self.request = request
        self._score = score
        self._tolerance = tolerance
        self._learner: dict[Weights, np.ndarray] = {}  # f32[P - 1], oldest publish first
        self._heard: dict[str, tuple[Weights, np.ndarray]] = {}  # by server, at its last publish

    def judge(
        self, params: Params, weights: Weights, answers: Mapping[str, Answer]
    ) -> dict[str, Verdict]:
        """A verdict on every server's answer, by its URL. `params` are those of `weights`."""
        verdicts = {}
        # Servers that obey seeds sample the same.
        scored: dict[tuple[bytes, str], tuple[np.ndarray, np.ndarray]] = {}
        for url, answer in answers.items():
            rollout = answer.rollout
            key = (rollout.tokens.tobytes(), rollout.route_digest)
            if key not in scored:
                scored[key] = self._expected(params, answer)
            prompt, response = scored[key]
            self._learner.setdefault(weights, prompt)
            sampled = answer.rollout.sampler_logprobs[answer.rollout.loss_mask]
            error = max(_distance(answer.prompt_logprobs, prompt), _distance(sampled, response))
            right = error <= self._tolerance and not self._left_behind(url, weights, answer)
            verdicts[url] = Verdict(error, right, weights if right else self._held(answer))
        for url, verdict in verdicts.items():
            if verdict.right:
                self._heard[url] = (weights, answers[url].prompt_logprobs)
        for old in list(self._learner)[:-KEPT_VERSIONS]:
            del self._learner[old]
        return verdicts

    def fits(self, url: str, weights: Weights, answer: Answer) -> bool:
        """Whether a server brought back to weights judged before has them, by the prompt alone."""
        distance = _distance(answer.prompt_logprobs, self._learner[weights])
        if distance > self._tolerance or self._left_behind(url, weights, answer):
            return False
        self._heard[url] = (weights, answer.prompt_logprobs)
        return True

    def _expected(self, params: Params, answer: Answer) -> tuple[np.ndarray, np.ndarray]:
        """The learner's log-probabilities of the prompt, f32[P - 1], and of the response, f32[n].

        Servers report prompts at temperature 1, and greedy samples too.
        """
        rollout, temperature = answer.rollout, self.request.sampling.temperature
        split = self.request.prompt.tokens.size - 1
        plain = np.asarray(self._score(params, rollout.tokens, rollout.routes, 1.0))
        if plain.shape != (rollout.tokens.size - 1,):
            raise ValueError(
                f"the learner scored {rollout.tokens.size} tokens as {plain.shape}; expected one "
                "log-probability for each token but the first"
            )
        if temperature in (0.0, 1.0):
            return plain[:split], plain[split:]
        scored = self._score(params, rollout.tokens, rollout.routes, temperature)
        return plain[:split], np.asarray(scored)[split:]

    def _left_behind(self, url: str, weights: Weights, answer: Answer) -> bool:
        if url not in self._heard or self._heard[url][0] not in self._learner:
            return False
        before, heard = self._heard[url]
        moved = _distance(self._learner[weights], self._learner[before])
        return moved > MOVED_SHARE * self._tolerance and np.array_equal(
            heard, answer.prompt_logprobs
        )

    def _held(self, answer: Answer) -> Weights | None:
        distances = {w: _distance(answer.prompt_logprobs, p) for w, p in self._learner.items()}
        nearest = min(distances, key=lambda weights: distances[weights])
        return nearest if distances[nearest] <= self._tolerance else None


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    """Mean absolute difference of f32[n]; infinite where one of them is not finite."""
    distance = float(np.mean(np.abs(left.astype(np.float64) - right)))
    return distance if np.isfinite(distance) else float("inf")
