"""SGLang's wire format, both ways: requests become JSON bodies, JSON answers become rollouts.

What it is: pure functions. `payload` says everything that affects the sampled distribution, so that
no default of a server slips in; `parse` trusts nothing, and each refusal names the field, what was
found and what was expected. What it is not: HTTP, retries, or the choice of a server (servers.py);
callers add which server it was. It never imports jax.

Written against sglang 0.5.23, POST /generate. An answer and the alignment rule of types.py:

    output_token_logprobs[i]   the i-th sampled token, tokens[P + i], and its log-probability:
                               position s = P - 1 + i
    routed_experts row s       the experts of tokens[s] as an input: position s, with no shift
    weight_versions            spans of i, each with the label of the weights that sampled it

Tokens are taken from output_token_logprobs: a server may drop a trailing stop token from output_ids
while it keeps its log-probability and its row of routes.

Cost for 32,768 tokens, 48 layers, top-8 (a body of 68 MB) on one core: json.loads 0.15 to 0.2 s,
parse 0.3 to 0.55 s, of which 0.05 s is not the routes.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.rollout.engine import FailureCause, Request
from jaxrl_llm.rollout.routes import with_routes
from jaxrl_llm.types import NOT_SAMPLED, Finish, Rollout, RouteError, SamplingParams

LARGEST_TOP_K = 4096
"""The most tokens per step for which SGLang reports the truncated distribution."""

GREEDY_BELOW = 1e-6
"""SGLang takes temperatures below this for 0."""

ROUNDING = 1e-6
"""Nats by which a log-probability may exceed 0: a softmax that rounds up to 1. It is taken as 0."""

LOWEST = float(np.finfo(np.float32).min)
"""The least log-probability that a rollout can hold."""


class BadAnswer(ValueError):
    """An answer that is no rollout. `cause` is for machines, the message for people."""

    def __init__(self, cause: FailureCause, message: str) -> None:
        super().__init__(message)
        self.cause: FailureCause = cause


@dataclasses.dataclass(frozen=True)
class Contract:
    """What answers are read against."""

    model: ModelConfig  # that the servers serve
    versions: Mapping[str, int]  # label of weights that may have answered -> their version
    routes: bool  # whether routes were asked for
    keep_spanning_routes: bool  # also those of a response that several versions sampled
    decode_text: Callable[[Sequence[int]], str]  # response tokens -> Rollout.text


def unscorable(sampling: SamplingParams) -> str:
    """Why a server cannot report the distribution that it samples from, or "" if it can.

    Its plain log-probabilities are those before top-p and top-k; the renormalised ones come with
    the sampling mask, which needs 1 < top_k <= LARGEST_TOP_K.
    """
    if sampling.temperature == 0:
        return ""
    if sampling.temperature < GREEDY_BELOW:
        return (
            f"temperature is {sampling.temperature}, which the server would take for greedy "
            f"sampling; use 0, or at least {GREEDY_BELOW}"
        )
    if _truncates(sampling) and not 1 < sampling.top_k <= LARGEST_TOP_K:
        return (
            f"top_p is {sampling.top_p} and top_k is {sampling.top_k}; the server reports the "
            f"log-probabilities of a truncated distribution for top_k from 2 to {LARGEST_TOP_K} "
            "alone: set such a top_k, or neither (top_p 1, top_k 0)"
        )
    return ""


def payload(
    request: Request,
    *,
    rid: str,
    routes: bool,
    prompt_logprobs: bool = False,
    cache_key: str = "",
) -> dict[str, Any]:
    """The body of POST /generate: JSON values only.

    Args:
      request: not refused by engine.refusal, and scorable.
      rid: names the generation for /abort_request; a server refuses one that is still in use.
      routes: ask for the experts of every input token.
      prompt_logprobs: ask for those of the prompt too; nothing of it is taken from the cache then.
      cache_key: requests share cached prefixes with those of the same key only. One for each
        publish keeps apart what other weights left in the cache, where an update does not flush it
        (pause mode in_place) or a response went on after it.

    Raises ValueError for sampling settings that are unscorable.
    """
    reason = unscorable(request.sampling)
    if reason:
        raise ValueError(reason)
    body: dict[str, Any] = {
        "rid": rid,
        "input_ids": request.prompt.tokens.tolist(),
        "sampling_params": _sampling_params(request),
        "stream": False,
        "return_logprob": True,
        "logprob_start_len": 0 if prompt_logprobs else -1,
        "return_text_in_logprobs": False,
        "return_sampling_mask": _truncates(request.sampling),
        "return_routed_experts": routes,
        "routed_experts_start_len": 0,
    }
    return body | ({"extra_key": cache_key} if cache_key else {})


def _sampling_params(request: Request) -> dict[str, Any]:
    """Every field that can change the distribution, neutral where we have no such setting.

    logit_bias alone is left out: it has no neutral value that costs nothing.
    """
    sampling, truncates = request.sampling, _truncates(request.sampling)
    return {
        "max_new_tokens": sampling.max_new_tokens,
        "min_new_tokens": 0,
        "stop_token_ids": list(sampling.stop_token_ids),
        # With it SGLang ignores stop_token_ids too. Without it, the end-of-sequence ids of the
        # served model stop as well; parse refuses one that was not asked for.
        "ignore_eos": not sampling.stop_token_ids,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if truncates else 1.0,
        "top_k": sampling.top_k if truncates else -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "n": 1,
        # Fixes a response among requests of its kind: where a greedy or a truncated one shares the
        # batch, all of it is drawn by another routine, from the same distributions.
        "sampling_seed": request.seed,
        "stop": None,
        "stop_regex": None,
        "json_schema": None,
        "regex": None,
        "ebnf": None,
        "structural_tag": None,
        "custom_params": None,
        "beam_width": None,
        "watermark": None,
    }


def _truncates(sampling: SamplingParams) -> bool:
    """Whether top-p or top-k change the distribution; greedy sampling takes no notice of them."""
    return sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)


def is_abort(value: Any) -> bool:
    """Whether the answer is that of an aborted generation, which holds only part of a response.

    Raises BadAnswer for what is no answer at all.
    """
    return _finish_reason(_meta(value))["type"] == "abort"


def parse(value: Any, request: Request, contract: Contract) -> Rollout:
    """The answer to payload(request), already decoded from JSON, as a rollout.

    Its weight_version is per token, from the spans of the answer. A response that weights of more
    than one label sampled keeps its routes only if the contract says so: they are those of no one
    forward pass (after a retraction, all rows are the newest weights', while the log-probabilities
    of the older tokens stay the older weights').

    Raises:
      BadAnswer: with the cause "bad_answer", "not_finite" or "wrong_version"; also for an aborted
        answer: ask is_abort first.
      RouteError: routes that must not be replayed; the causes of routes.check_routes, "missing"
        where they were asked for and did not come, and "dtype" for what is no base64.
    """
    meta = _meta(value)
    _expect("prompt_tokens", _integer(meta, "prompt_tokens"), request.prompt.tokens.size)
    sampled, logprobs = _sampled(meta, request.sampling, contract.model.vocab_size)
    if _truncates(request.sampling):
        logprobs = _renormalised(meta, len(sampled))
    _check_output_ids(value, sampled, request.sampling)
    finish = _finish(meta, sampled, request.sampling)
    labels = _labels(meta, len(sampled))
    prompt = request.prompt.tokens
    before = prompt.size - 1
    positions = before + len(sampled)
    stopped = finish == "stop"
    rollout = Rollout(
        prompt_id=request.prompt.prompt_id,
        sample_index=request.sample_index,
        tokens=np.concatenate([prompt, np.array(sampled, np.int32)]),
        loss_mask=np.arange(positions) >= before,
        sampler_logprobs=np.concatenate([np.zeros(before, np.float32), logprobs]),
        routes=None,
        weight_version=np.array(
            [NOT_SAMPLED] * before + _versions(labels, contract.versions), np.int32
        ),
        text=contract.decode_text(sampled[:-1] if stopped else sampled),
        finish=finish,
    )
    if not contract.routes or (len(set(labels)) > 1 and not contract.keep_spanning_routes):
        return rollout
    return with_routes(rollout, _routes(meta, contract.model, rollout), contract.model)


def prompt_logprobs(value: Any, request: Request, vocab_size: int) -> np.ndarray:
    """f32[P - 1], nats, at temperature 1: those of prompt tokens 1 .. P-1 given the ones before.

    The answer is that to payload(request, prompt_logprobs=True). Raises BadAnswer.
    """
    name = "input_token_logprobs"
    entries = _list(_meta(value), name)
    prompt = request.prompt.tokens.tolist()
    _expect(f"length of {name}", len(entries), len(prompt))
    ids = [_pair(f"{name}[{i}]", entry)[1] for i, entry in enumerate(entries)]
    # The last id of the vocabulary is written as 0, and only here (logprob_result_processor.py).
    ids = [
        last if (found, last) == (0, vocab_size - 1) else found
        for found, last in zip(ids, prompt, strict=True)
    ]
    _expect(f"token ids of {name}", ids, prompt)
    # The first token has none: nothing stands before it.
    return np.array(
        [_logprob(f"{name}[{i}]", entry[0]) for i, entry in enumerate(entries) if i > 0],
        np.float32,
    )


# --- the parts of an answer, each checked against what was asked ---


def _sampled(
    meta: Mapping[str, Any], sampling: SamplingParams, vocab_size: int
) -> tuple[list[int], np.ndarray]:
    """Sampled tokens, and f32[n] their log-probabilities before truncation."""
    name = "output_token_logprobs"
    entries = _list(meta, name)
    _expect("completion_tokens", _integer(meta, "completion_tokens"), len(entries))
    _expect(f"{name}_length", _integer(meta, f"{name}_length"), len(entries))
    if not 1 <= len(entries) <= sampling.max_new_tokens:
        raise _bad(f"length of {name}", len(entries), f"1 to {sampling.max_new_tokens}")
    pairs = [_pair(f"{name}[{i}]", entry) for i, entry in enumerate(entries)]
    tokens = [token for _, token in pairs]
    for index, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise _bad(f"token id of {name}[{index}]", token, f"0 to {vocab_size - 1}")
    logprobs = [_logprob(f"{name}[{i}]", logprob) for i, (logprob, _) in enumerate(pairs)]
    return tokens, np.array(logprobs, np.float32)


def _renormalised(meta: Mapping[str, Any], count: int) -> np.ndarray:
    """f32[n], log-probabilities over the tokens that top-p and top-k kept."""
    name = "output_token_sampling_logprobs"
    values = _list(meta, name)
    _expect(f"length of {name}", len(values), count)
    return np.array([_logprob(f"{name}[{i}]", v) for i, v in enumerate(values)], np.float32)


def _check_output_ids(
    value: Mapping[str, Any], sampled: list[int], sampling: SamplingParams
) -> None:
    """They may lack a trailing stop token, and differ in nothing else."""
    found = _list(value, "output_ids")
    without = sampled[:-1] if sampled[-1] in sampling.stop_token_ids else sampled
    if found not in (sampled, without):
        raise _bad("output_ids", found, f"the tokens of output_token_logprobs, {_short(sampled)}")


def _finish(meta: Mapping[str, Any], sampled: list[int], sampling: SamplingParams) -> Finish:
    """Why it ended, which the tokens must bear out."""
    reason = _finish_reason(meta)
    stops = [i for i, token in enumerate(sampled) if token in sampling.stop_token_ids]
    if stops and stops[0] < len(sampled) - 1:
        raise _bad("sampled tokens", _short(sampled), f"none behind the stop token at {stops[0]}")
    if reason["type"] == "stop":
        matched = reason.get("matched")
        if isinstance(matched, str) and matched.startswith("NaN"):
            raise BadAnswer(
                "not_finite",
                f"finish_reason is {reason}: the served weights are damaged or overflow",
            )
        if not stops or matched != sampled[-1]:
            raise _bad(
                "finish_reason",
                reason,
                f"the last token, {sampled[-1]}, as one of stop_token_ids, "
                f"{list(sampling.stop_token_ids)}; the served model's end-of-sequence ids belong "
                "among them",
            )
        return "stop"
    if reason["type"] == "length":
        if stops or len(sampled) != sampling.max_new_tokens:
            raise _bad(
                f"finish_reason of {len(sampled)} tokens, the last {sampled[-1]},",
                reason,
                f"that of a response which ends at a stop token or at {sampling.max_new_tokens}",
            )
        return "length"
    raise _bad("finish_reason", reason, "type 'stop' or 'length'")


def _labels(meta: Mapping[str, Any], count: int) -> list[str]:
    """The label of the weights that sampled each token, from contiguous spans."""
    name = "weight_versions"
    labels: list[str] = []
    for index, span in enumerate(_list(meta, name)):
        where = f"{name}[{index}]"
        if not isinstance(span, dict) or not isinstance(span.get("version"), str):
            raise _bad(where, span, "an object with version (a string), start and end")
        start, end = _integer(span, "start", where), _integer(span, "end", where)
        if start != len(labels) or not start < end <= count:
            raise _bad(where, span, f"start {len(labels)} and an end up to {count}")
        labels += [span["version"]] * (end - start)
    _expect(f"tokens in {name}", len(labels), count)
    return labels


def _versions(labels: Sequence[str], known: Mapping[str, int]) -> list[int]:
    strangers = sorted(set(labels) - set(known))
    if strangers:
        raise BadAnswer(
            "wrong_version",
            f"tokens were sampled by weights labelled {strangers}; the request was sent for those "
            f"labelled {sorted(known)}",
        )
    return [known[label] for label in labels]


def _routes(meta: Mapping[str, Any], model: ModelConfig, rollout: Rollout) -> np.ndarray:
    """int32[S, all hidden layers, K], by declared shape and type: none travels with the bytes."""
    text = meta.get("routed_experts")
    if not isinstance(text, str):
        raise RouteError(
            "missing",
            f"{rollout.name}: routed_experts is {_short(text)}, though asked for; start the server "
            "with --enable-return-routed-experts, and see that no gateway in front drops them",
        )
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RouteError(
            "dtype", f"{rollout.name}: routed_experts is no base64, {error}; expected int32 in it"
        ) from error
    rows, layers, slots = rollout.tokens.size - 1, model.num_layers, model.moe.experts_per_token
    size = np.dtype("<i4").itemsize
    if len(data) == size * rows * layers * slots:
        return np.frombuffer(data, "<i4").reshape(rows, layers, slots)
    expected = f"int32[{rows}, {layers}, {slots}], {size * rows * layers * slots} bytes"
    found = f"{rollout.name}: routed_experts has {len(data)} bytes"
    if len(data) % (size * rows * slots) == 0:
        raise RouteError(
            "layer_count",
            f"{found}, {len(data) // (size * rows * slots)} layers for these {rows} rows; expected "
            f"{expected}: the server serves another model",
        )
    if len(data) % (size * layers * slots) == 0:
        raise RouteError(
            "row_count",
            f"{found}, {len(data) // (size * layers * slots)} rows of this model; expected "
            f"{expected}: one row for every token but the last, cached ones too",
        )
    raise RouteError("shape", f"{found}; expected {expected}")


# --- JSON values ---


def _meta(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _bad("answer", value, "an object: one request, one response")
    meta = value.get("meta_info")
    if not isinstance(meta, dict):
        raise _bad("meta_info", meta, "an object")
    return meta


def _finish_reason(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    reason = meta.get("finish_reason")
    if not isinstance(reason, dict) or not isinstance(reason.get("type"), str):
        raise _bad("finish_reason", reason, "an object with a type")
    return reason


def _list(owner: Mapping[str, Any], name: str) -> list[Any]:
    value = owner.get(name)
    if not isinstance(value, list):
        raise _bad(name, value, "a list")
    return value


def _integer(owner: Mapping[str, Any], name: str, where: str = "") -> int:
    value = owner.get(name)
    if type(value) is not int:  # a bool is an int to isinstance
        raise _bad(f"{where}.{name}" if where else name, value, "an integer")
    return value


def _pair(name: str, entry: Any) -> tuple[Any, int]:
    """(log-probability, token id) of an entry [log-probability, token id, text or null]."""
    if not isinstance(entry, list) or len(entry) != 3 or type(entry[1]) is not int:
        raise _bad(name, entry, "[log-probability, token id, null]")
    return entry[0], entry[1]


def _logprob(name: str, value: Any) -> float:
    """A number up to 0; JSON spells NaN as NaN or as null."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise BadAnswer(
            "not_finite",
            f"{name}: the log-probability is {value}; expected a number up to 0: the served "
            "weights are damaged or overflow",
        )
    if type(value) not in (int, float) or not LOWEST <= value <= ROUNDING:
        raise _bad(f"log-probability of {name}", value, "a number up to 0")
    return min(float(value), 0.0)


def _expect(name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise _bad(name, found, _short(expected))


def _bad(name: str, found: Any, expected: str) -> BadAnswer:
    return BadAnswer("bad_answer", f"{name} is {_short(found)}; expected {expected}")


def _short(value: Any) -> str:
    """As Python writes it, cut: an answer has megabytes."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
