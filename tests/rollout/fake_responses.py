"""One response of the fake server: what it has sampled so far, and the answer made of that."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.rollout.fake_faults import encode_routes
from tests.rollout.fake_samplers import Sampler, Sampling

RECORDED = json.loads(
    (Path(__file__).parent.parent / "recorded" / "sglang_0.5.23.json").read_text()
)


@dataclasses.dataclass(eq=False)
class Generation:
    """A response under way; `rows` says from which row on which weights wrote the routes."""

    rid: str
    prompt: list[int]
    sampling: Sampling
    sampled: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)
    spans: list[tuple[str, int]] = dataclasses.field(default_factory=list)  # label, first token
    rows: list[tuple[Any, int]] = dataclasses.field(default_factory=list)  # weights, first row
    finish: dict[str, Any] | None = None
    held: bool = False
    retracted: bool = False
    retractions: int = 0
    cached: int = 0

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *(token for token, _, _ in self.sampled)]

    def take(self, sampled: list[tuple[int, float, float]], weights: Any, label: str) -> None:
        """Append tokens that `weights` sampled."""
        if self.retracted:  # the prefix was computed anew: all of its routes are the new weights'
            self.rows, self.retracted = [], False
        if not self.rows or self.rows[-1][0] is not weights:
            first = len(self.tokens) - 1 if self.rows else 0
            self.rows.append((weights, first))
        if not self.spans or self.spans[-1][0] != label:
            self.spans.append((label, len(self.sampled)))
        self.sampled += sampled
        last, limit = self.sampled[-1][0], self.sampling.max_new_tokens
        if not self.sampling.ignore_eos and last in self.sampling.stop_token_ids:
            self.finish = {"type": "stop", "matched": last}
        elif len(self.sampled) >= limit:
            self.finish = {"type": "length", "length": limit}


_NOT_TIMES = {
    "id",
    "finish_reason",
    "prompt_tokens",
    "weight_version",
    "num_retractions",
    "input_token_logprobs",
    "output_token_logprobs",
    "output_token_logprobs_length",
    "reasoning_tokens",
    "completion_tokens",
    "cached_tokens",
    "weight_versions",
    "cached_tokens_details",
    "routed_experts",
    "dp_rank",
}


def response(
    generation: Generation, body: dict[str, Any], sampler: Sampler, reported: str
) -> dict[str, Any]:
    """The answer of /generate, with the keys of the recorded one in their order.

    `reported` is the label of the server's weights by now.
    """
    sampled, tokens, prompt = generation.sampled, generation.tokens, generation.prompt
    ids = [token for token, _, _ in sampled]
    assert generation.finish is not None
    recorded = RECORDED["basic"]["response"]["meta_info"]
    meta: dict[str, Any] = {
        "id": generation.rid,
        "finish_reason": generation.finish,
        "prompt_tokens": len(prompt),
        "weight_version": reported,
        "num_retractions": generation.retractions,
    }
    if body.get("return_logprob"):
        meta["input_token_logprobs"] = _input_logprobs(generation, body, sampler)
        meta["output_token_logprobs"] = [[logprob, token, None] for token, logprob, _ in sampled]
        meta["output_token_logprobs_length"] = len(sampled)
    if body.get("return_sampling_mask"):
        meta["output_token_sampling_mask"] = [[token] for token in ids]
        meta["output_token_sampling_logprobs"] = [kept for _, _, kept in sampled]
        meta["output_token_sampling_mask_length"] = len(sampled)
    meta["reasoning_tokens"] = 0
    meta["completion_tokens"] = len(sampled)
    meta["cached_tokens"] = generation.cached
    ends = [*(start for _, start in generation.spans[1:]), len(sampled)]
    meta["weight_versions"] = [
        {"version": label, "start": start, "end": end}
        for (label, start), end in zip(generation.spans, ends, strict=True)
    ]
    details = {"device": generation.cached, "host": 0}
    meta["cached_tokens_details"] = details if generation.cached else None
    if body.get("return_routed_experts") and generation.rows:
        first = [start for _, start in generation.rows] + [len(tokens) - 1]
        parts = [
            sampler.routes(weights, tokens[:-1])[start:end]
            for (weights, start), end in zip(generation.rows, first[1:], strict=True)
        ]
        rows = np.concatenate(parts)[body.get("routed_experts_start_len") or 0 :]
        meta["routed_experts"] = encode_routes(rows)
    meta["dp_rank"] = None
    # Times are the recorded ones: an answer is a function of its request.
    meta |= {name: value for name, value in recorded.items() if name not in _NOT_TIMES}
    stopped = generation.finish["type"] == "stop"
    text = " ".join(map(str, ids[:-1] if stopped else ids))
    return {"text": text, "output_ids": ids, "meta_info": meta}


def _input_logprobs(
    generation: Generation, body: dict[str, Any], sampler: Sampler
) -> list[list[Any]]:
    start, prompt = body.get("logprob_start_len"), generation.prompt
    if start is None or start < 0 or not generation.rows:  # aborted before it was computed
        return []
    weights = generation.rows[0][0]
    values = [None, *sampler.score(weights, prompt, 1.0).tolist()]
    values[start] = None
    return [
        [value, token, None] for value, token in zip(values[start:], prompt[start:], strict=True)
    ]
