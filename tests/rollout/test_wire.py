"""SGLang's wire format: what is sent, what is read, and everything that is refused."""

import base64
import copy
import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.model.config import ModelConfig, MoEConfig
from jaxrl_llm.rollout import wire
from jaxrl_llm.rollout.engine import Request
from jaxrl_llm.types import NOT_SAMPLED, Prompt, RouteError, SamplingParams
from tests.rollout.engines import assert_same
from tests.rollout.fake_faults import encode_routes
from tests.rollout.fake_responses import RECORDED
from tests.test_alignment import TRACED

# Of the recorded answers, and of those built here: its first layer is dense.
SERVED = ModelConfig(vocab_size=512, num_layers=2, moe=MoEConfig(8, 2))
MODEL = ModelConfig(
    vocab_size=16, num_layers=2, moe=MoEConfig(8, 2, dense_layers=(0,), dense_width=8)
)


def words(ids: Any) -> str:
    return " ".join(map(str, ids))


def make_request(tokens: list[int], sampling: SamplingParams, *, index: int = 0) -> Request:
    prompt = Prompt("traced", np.array(tokens, np.int32), text="", answer="")
    return Request(prompt, index, seed=2**62 + 1, sampling=sampling)


def contract(
    model: ModelConfig = MODEL,
    *,
    versions: dict[str, int] | None = None,
    routes: bool = True,
    keep: bool = False,
) -> wire.Contract:
    known = {"default": 0} if versions is None else versions
    return wire.Contract(model, known, routes, keep_spanning_routes=keep, decode_text=words)


def recorded(name: str) -> tuple[dict[str, Any], Request]:
    """A recorded answer, and a request that it answers."""
    record = RECORDED[name]
    params = record["request"]["sampling_params"]
    sampling = SamplingParams(
        params["max_new_tokens"],
        tuple(params.get("stop_token_ids", ())),
        params["temperature"],
        params.get("top_p", 1.0),
        params.get("top_k", 0),
    )
    return copy.deepcopy(record["response"]), make_request(record["request"]["input_ids"], sampling)


# --- what is read from the real server


def test_a_recorded_answer_becomes_a_rollout() -> None:
    value, request = recorded("basic")
    rollout = wire.parse(value, request, contract(SERVED))
    meta = value["meta_info"]
    assert rollout.tokens.tolist() == [*range(5, 13), 234, 149, 353, 123, 454, 411]
    assert rollout.loss_mask.tolist() == [False] * 7 + [True] * 6
    assert not rollout.sampler_logprobs[:7].any()
    np.testing.assert_array_equal(
        rollout.sampler_logprobs[7:],
        np.float32([entry[0] for entry in meta["output_token_logprobs"]]),
    )
    assert rollout.weight_version.tolist() == [NOT_SAMPLED] * 7 + [0] * 6
    assert rollout.routes is not None
    assert rollout.routes.shape == (13, 2, 2)
    assert rollout.routes[0].tolist() == [[1, 3], [5, 2]]
    assert rollout.routes[12].tolist() == [[1, 0], [1, 5]]
    assert (rollout.text, rollout.finish) == (words([234, 149, 353, 123, 454, 411]), "length")


def test_the_stop_token_is_a_token_but_no_text() -> None:
    value, request = recorded("stop_token")
    rollout = wire.parse(value, request, contract(SERVED, routes=False))
    assert rollout.tokens[-1] == 284
    assert rollout.response_length == 3
    assert (rollout.text, rollout.finish) == ("132 137", "stop")
    assert rollout.routes is None


def test_a_server_that_drops_the_stop_token_from_its_id_list_loses_nothing() -> None:
    value, request = recorded("stop_token")
    whole = wire.parse(value, request, contract(SERVED, routes=False))
    value["output_ids"].pop()
    assert_same(wire.parse(value, request, contract(SERVED, routes=False)), whole)
    value["output_ids"].pop()
    with pytest.raises(wire.BadAnswer, match="output_ids"):
        wire.parse(value, request, contract(SERVED, routes=False))


def test_a_truncated_distribution_is_reported_renormalised() -> None:
    value, request = recorded("top_p")
    assert (request.sampling.top_p, request.sampling.top_k) == (0.3, 20)
    rollout = wire.parse(value, request, contract(SERVED, routes=False))
    found = rollout.sampler_logprobs[rollout.loss_mask]
    meta = value["meta_info"]
    np.testing.assert_array_equal(found, np.float32(meta["output_token_sampling_logprobs"]))
    plain = np.array([entry[0] for entry in meta["output_token_logprobs"]])
    assert np.all(found > plain + 0.5), "renormalising must raise them"


def test_an_aborted_answer_is_told_from_a_finished_one() -> None:
    aborted = RECORDED["aborted"]["response"]
    assert wire.is_abort(aborted)
    assert not wire.is_abort(RECORDED["basic"]["response"])
    request = make_request(list(range(5, 13)), SamplingParams(100))
    with pytest.raises(wire.BadAnswer, match="finish_reason"):
        wire.parse(aborted, request, contract(SERVED, versions={"p-in_place": 0}))


@pytest.mark.parametrize("value", [None, [], "", {"meta_info": []}, {"meta_info": {}}])
def test_what_is_no_answer_is_no_abort_either(value: Any) -> None:
    with pytest.raises(wire.BadAnswer):
        wire.is_abort(value)


def test_prompt_log_probabilities_begin_at_the_second_token() -> None:
    value, request = recorded("basic")
    found = wire.prompt_logprobs(value, request, SERVED.vocab_size)
    assert found.dtype == np.float32
    assert found.shape == (7,)
    assert found[0] == np.float32(-6.701637268066406)
    entries = value["meta_info"]["input_token_logprobs"]
    entries[3][1] += 1
    with pytest.raises(wire.BadAnswer, match="token ids of input_token_logprobs"):
        wire.prompt_logprobs(value, request, SERVED.vocab_size)
    entries[3][1] -= 1
    entries[3][0] = None
    with pytest.raises(wire.BadAnswer, match=r"input_token_logprobs\[3\]") as caught:
        wire.prompt_logprobs(value, request, SERVED.vocab_size)
    assert caught.value.cause == "not_finite"
    entries[3][:2] = [-1.0, 0]  # as sglang writes the last id of the vocabulary
    with pytest.raises(wire.BadAnswer, match="token ids of input_token_logprobs"):
        wire.prompt_logprobs(value, request, SERVED.vocab_size)
    wire.prompt_logprobs(value, request, vocab_size=int(request.prompt.tokens[3]) + 1)
    value, request = recorded("greedy")
    with pytest.raises(wire.BadAnswer, match="length of input_token_logprobs is 0; expected 8"):
        wire.prompt_logprobs(value, request, SERVED.vocab_size)


# --- the alignment rule


def traced_answer() -> tuple[dict[str, Any], Request]:
    """The rollout that tests/test_alignment.py traces from here to the loss, as it arrives.

    tokens 11 12 | 13 14 1: two of the prompt, three sampled by the versions 9, 8 and 7, one each.
    Every token but the last has a row of two layers; the first of them is dense.
    """
    rows = np.array(
        [
            [[0, 0], [0, 1]],  # while 11 was consumed
            [[0, 0], [2, 3]],  # 12
            [[0, 0], [4, 5]],  # 13
            [[0, 0], [6, 7]],  # 14
        ]
    )
    value = {
        "text": "13 14",
        "output_ids": [13, 14, 1],
        "meta_info": {
            "finish_reason": {"type": "stop", "matched": 1},
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "output_token_logprobs": [[-0.1, 13, None], [-0.2, 14, None], [-0.3, 1, None]],
            "output_token_logprobs_length": 3,
            "weight_versions": [
                {"version": "nine", "start": 0, "end": 1},
                {"version": "eight", "start": 1, "end": 2},
                {"version": "seven", "start": 2, "end": 3},
            ],
            "routed_experts": encode_routes(rows),
        },
    }
    return value, make_request([11, 12], SamplingParams(5, stop_token_ids=(1,)))


VERSIONS = {"nine": 9, "eight": 8, "seven": 7}


def test_the_traced_rollout_arrives_where_the_alignment_rule_wants_it() -> None:
    value, request = traced_answer()
    against = wire.Contract(MODEL, VERSIONS, True, True, decode_text=lambda ids: "")
    rollout = wire.parse(json.loads(json.dumps(value)), request, against)
    assert_same(rollout, TRACED)
    assert rollout.route_digest == TRACED.route_digest


def test_routes_of_several_versions_are_left_out_unless_asked_for() -> None:
    value, request = traced_answer()
    assert wire.parse(value, request, contract(versions=VERSIONS, keep=True)).routes is not None
    rollout = wire.parse(value, request, contract(versions=VERSIONS))
    assert rollout.routes is None
    assert rollout.weight_version.tolist() == [NOT_SAMPLED, 9, 8, 7]
    for span in value["meta_info"]["weight_versions"]:
        span["version"] = "nine"
    assert wire.parse(value, request, contract(versions=VERSIONS)).routes is not None


@st.composite
def answers(draw: st.DrawFn) -> tuple[dict[str, Any], Request, wire.Contract, list[dict[str, Any]]]:
    """An answer, and what each of its tokens is, one by one."""
    dense = draw(st.booleans())
    layers = draw(st.integers(1 + dense, 4))
    experts, slots = 9, draw(st.integers(2, 4))
    moe = MoEConfig(experts, slots, dense_layers=(1,) if dense else (), dense_width=4)
    model = ModelConfig(vocab_size=50, num_layers=layers, moe=moe)
    ids = st.integers(0, 40)
    prompt = draw(st.lists(ids, min_size=1, max_size=5))
    sampled = draw(st.lists(ids, min_size=1, max_size=6))
    stopped = draw(st.booleans())
    if stopped:
        sampled[-1] = 45
    routing = st.permutations(range(experts)).map(lambda order: order[:slots])
    tokens: list[dict[str, Any]] = [{"id": token} for token in prompt]
    label = 0
    for token in sampled:
        label += draw(st.integers(0, 1))
        logprob = draw(st.floats(-20, 0, width=32))
        tokens.append({"id": token, "logprob": logprob, "label": f"w{label}"})
    for token in tokens[:-1]:
        token["experts"] = [draw(routing) for _ in range(layers)]
        if dense:
            token["experts"][1] = [0] * slots
    spans: list[dict[str, Any]] = []
    for index, token in enumerate(tokens[len(prompt) :]):
        if not spans or spans[-1]["version"] != token["label"]:
            spans.append({"version": token["label"], "start": index, "end": index})
        spans[-1]["end"] += 1
    entries = [[token["logprob"], token["id"], None] for token in tokens[len(prompt) :]]
    stop = {"type": "stop", "matched": 45}
    length = {"type": "length", "length": len(sampled)}
    value = {
        "output_ids": sampled,
        "meta_info": {
            "finish_reason": stop if stopped else length,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(sampled),
            "output_token_logprobs": entries,
            "output_token_logprobs_length": len(entries),
            "weight_versions": spans,
        },
    }
    flat = [e for token in tokens[:-1] for layer in token["experts"] for e in layer]
    data = b"".join(e.to_bytes(4, "little") for e in flat)
    value["meta_info"]["routed_experts"] = base64.b64encode(data).decode()
    limit = len(sampled) + (3 if stopped else 0)
    known = {f"w{i}": 10 + i for i in range(8)}
    sampling = SamplingParams(limit, stop_token_ids=(45,))
    return value, make_request(prompt, sampling), contract(model, versions=known, keep=True), tokens


@settings(max_examples=200, deadline=None)
@given(answers())
def test_any_answer_equals_its_construction_token_by_token(
    case: tuple[dict[str, Any], Request, wire.Contract, list[dict[str, Any]]],
) -> None:
    value, request, against, tokens = case
    rollout = wire.parse(json.loads(json.dumps(value)), request, against)
    assert rollout.routes is not None
    assert len(rollout.tokens) == len(tokens)
    assert rollout.tokens[0] == tokens[0]["id"]
    for s, (consumed, predicted) in enumerate(itertools.pairwise(tokens)):
        assert rollout.tokens[s + 1] == predicted["id"]
        assert rollout.loss_mask[s] == ("label" in predicted)
        assert rollout.sampler_logprobs[s] == np.float32(predicted.get("logprob", 0))
        version = 10 + int(predicted["label"][1:]) if "label" in predicted else NOT_SAMPLED
        assert rollout.weight_version[s] == version
        experts = [consumed["experts"][layer] for layer in against.model.moe_layer_indices]
        assert rollout.routes[s].tolist() == experts


# --- what is refused

Change = Callable[[dict[str, Any]], object]


def entry(index: int, field: int, found: Any) -> Change:
    def change(value: dict[str, Any]) -> None:
        value["meta_info"]["output_token_logprobs"][index][field] = found

    return change


def meta(name: str, found: Any) -> Change:
    return lambda value: value["meta_info"].update({name: found})


def span(index: int, name: str, found: Any) -> Change:
    return lambda value: value["meta_info"]["weight_versions"][index].update({name: found})


def sampled_ids(*ids: int) -> Change:
    """Other sampled tokens, without contradicting themselves."""

    def change(value: dict[str, Any]) -> None:
        value["output_ids"] = list(ids)
        for at, token in enumerate(ids):
            entry(at, 1, token)(value)

    return change


def lose_a_token(value: dict[str, Any]) -> None:
    value["output_ids"].pop(0)
    value["meta_info"]["output_token_logprobs"].pop(0)


REFUSED: dict[str, tuple[Change, str, str]] = {
    "nan": (entry(1, 0, float("nan")), "not_finite", r"output_token_logprobs\[1\].* nan"),
    "null": (entry(1, 0, None), "not_finite", r"output_token_logprobs\[1\].* None"),
    "minus infinity": (entry(2, 0, float("-inf")), "not_finite", r"\[2\].* -inf"),
    "positive": (entry(0, 0, 0.25), "bad_answer", r"output_token_logprobs\[0\] is 0.25"),
    "barely positive": (entry(0, 0, 2e-6), "bad_answer", "2e-06; expected a number up to 0"),
    "no float32": (entry(0, 0, -1e39), "bad_answer", r"is -1e\+39"),
    "a huge integer": (entry(0, 0, -(10**400)), "bad_answer", "402 characters"),
    "text": (entry(0, 0, "-0.1"), "bad_answer", "'-0.1'"),
    "a boolean": (entry(0, 0, False), "bad_answer", "False"),
    "a float id": (entry(0, 1, 13.0), "bad_answer", r"\[0\] is \[-0.1, 13.0, None\]"),
    "id too large": (sampled_ids(13, 16, 1), "bad_answer", "is 16; expected 0 to 15"),
    "id negative": (sampled_ids(-1, 14, 1), "bad_answer", "is -1; expected 0 to 15"),
    "a pair": (
        lambda value: value["meta_info"]["output_token_logprobs"][0].pop(),
        "bad_answer",
        r"\[0\] is \[-0.1, 13\]",
    ),
    "no log-probabilities": (meta("output_token_logprobs", None), "bad_answer", "is None; .* list"),
    "none sampled": (
        lambda value: value["meta_info"].update(
            output_token_logprobs=[], output_token_logprobs_length=0, completion_tokens=0
        ),
        "bad_answer",
        "is 0; expected 1 to 5",
    ),
    "a token lost": (lose_a_token, "bad_answer", "completion_tokens is 3; expected 2"),
    "its own length": (meta("output_token_logprobs_length", 4), "bad_answer", "is 4; expected 3"),
    "completion": (meta("completion_tokens", 4), "bad_answer", "completion_tokens is 4"),
    "a true count": (meta("completion_tokens", True), "bad_answer", "is True; expected an integer"),
    "prompt": (meta("prompt_tokens", 3), "bad_answer", "prompt_tokens is 3; expected 2"),
    "other ids": (
        lambda value: value.update(output_ids=[13, 15, 1]),
        "bad_answer",
        r"output_ids is \[13, 15, 1\]",
    ),
    "no ids": (lambda value: value.pop("output_ids"), "bad_answer", "output_ids is None"),
    "stop is not last": (sampled_ids(1, 14, 1), "bad_answer", "behind the stop token at 0"),
    "stop is missing": (sampled_ids(13, 14, 2), "bad_answer", "the last token, 2,"),
    "stopped unasked": (
        lambda value: (
            sampled_ids(13, 14, 2)(value),
            meta("finish_reason", {"type": "stop", "matched": 2})(value),
        ),
        "bad_answer",
        r"'matched': 2.* as one of stop_token_ids, \[1\]",
    ),
    "matched another": (
        meta("finish_reason", {"type": "stop", "matched": 2}),
        "bad_answer",
        "'matched': 2.* end-of-sequence",
    ),
    "matched a text": (
        meta("finish_reason", {"type": "stop", "matched": "so"}),
        "bad_answer",
        "'matched': 'so'",
    ),
    "NaN stopped it": (
        meta("finish_reason", {"type": "stop", "matched": "NaN happened"}),
        "not_finite",
        "NaN happened",
    ),
    "length with a stop": (
        meta("finish_reason", {"type": "length", "length": 5}),
        "bad_answer",
        "of 3 tokens, the last 1,",
    ),
    "unknown finish": (meta("finish_reason", {"type": "tired"}), "bad_answer", "tired"),
    "no finish": (meta("finish_reason", None), "bad_answer", "finish_reason is None"),
    "no spans": (meta("weight_versions", None), "bad_answer", "weight_versions is None"),
    "empty spans": (meta("weight_versions", []), "bad_answer", "tokens in weight_versions is 0"),
    "spans end early": (
        lambda value: value["meta_info"]["weight_versions"].pop(),
        "bad_answer",
        "is 2; expected 3",
    ),
    "spans end late": (span(2, "end", 4), "bad_answer", r"weight_versions\[2\].* up to 3"),
    "a gap": (span(1, "start", 2), "bad_answer", r"weight_versions\[1\].* expected start 1"),
    "an overlap": (span(1, "start", 0), "bad_answer", r"weight_versions\[1\].* expected start 1"),
    "an empty span": (span(0, "end", 0), "bad_answer", r"weight_versions\[0\]"),
    "a numbered version": (span(0, "version", 9), "bad_answer", r"weight_versions\[0\]"),
    "a stranger": (span(2, "version", "default"), "wrong_version", r"\['default'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_answer_is_refused_by_field_and_value(case: str) -> None:
    change, cause, message = REFUSED[case]
    value, request = traced_answer()
    against = contract(versions=VERSIONS, keep=True)
    wire.parse(value, request, against)
    change(value)
    with pytest.raises(wire.BadAnswer, match=message) as caught:
        wire.parse(value, request, against)
    assert caught.value.cause == cause


def test_a_response_that_is_too_short_for_its_length_is_refused() -> None:
    value, request = recorded("basic")
    longer = make_request(request.prompt.tokens.tolist(), SamplingParams(7))
    with pytest.raises(wire.BadAnswer, match="finish_reason of 6 tokens"):
        wire.parse(value, longer, contract(SERVED))
    shorter = make_request(request.prompt.tokens.tolist(), SamplingParams(5))
    with pytest.raises(wire.BadAnswer, match="is 6; expected 1 to 5"):
        wire.parse(value, shorter, contract(SERVED))


def test_a_stop_token_at_the_limit_is_a_stop() -> None:
    value, request = traced_answer()
    limited = make_request(request.prompt.tokens.tolist(), SamplingParams(3, stop_token_ids=(1,)))
    assert wire.parse(value, limited, contract(versions=VERSIONS)).finish == "stop"
    meta("finish_reason", {"type": "length", "length": 3})(value)
    with pytest.raises(wire.BadAnswer, match="finish_reason of 3 tokens, the last 1,"):
        wire.parse(value, limited, contract(versions=VERSIONS))


@pytest.mark.parametrize("found", [5e-7, 0, 0.0])
def test_a_softmax_that_rounds_up_to_one_counts_as_one(found: float) -> None:
    value, request = traced_answer()
    entry(1, 0, found)(value)
    rollout = wire.parse(value, request, contract(versions=VERSIONS))
    assert rollout.sampler_logprobs.tolist() == [0.0, np.float32(-0.1), 0.0, np.float32(-0.3)]


@pytest.mark.parametrize("name", ["output_token_sampling_logprobs"])
@pytest.mark.parametrize("found", [None, [-0.5], [-0.5] * 5 + [float("nan")]])
def test_a_truncated_distribution_is_never_guessed(name: str, found: Any) -> None:
    value, request = recorded("top_p")
    value["meta_info"][name] = found
    with pytest.raises(wire.BadAnswer, match=name):
        wire.parse(value, request, contract(SERVED, routes=False))


def served_rows() -> np.ndarray:
    data = base64.b64decode(RECORDED["basic"]["response"]["meta_info"]["routed_experts"])
    return np.frombuffer(data, "<i4").reshape(13, 2, 2).copy()


def out_of_range() -> np.ndarray:
    rows = served_rows()
    rows[4, 1, 0] = 8
    return rows


BAD_ROUTES: dict[str, tuple[Any, str, str]] = {
    "none": (None, "missing", "gateway"),
    "a list": ([1, 2], "missing", "gateway"),
    "no base64": ("AQ!=", "dtype", "no base64"),
    "letters beyond ASCII": ("é", "dtype", "no base64"),
    "cut": (encode_routes(served_rows())[:-8], "shape", r"expected int32\[13, 2, 2\], 208 bytes"),
    "too few rows": (encode_routes(served_rows()[:-1]), "row_count", "12 rows of this model"),
    "too many rows": (
        encode_routes(np.tile(served_rows(), (2, 1, 1))[:14]),
        "row_count",
        "14 rows",
    ),
    "another model's layers": (
        encode_routes(np.concatenate([served_rows()] * 2, axis=1)),
        "layer_count",
        "4 layers for these 13 rows",
    ),
    "int16": (
        base64.b64encode(served_rows().astype("<i2").tobytes()).decode(),
        "layer_count",
        "104 bytes",
    ),
    "big-endian": (
        base64.b64encode(served_rows().astype(">i4").tobytes()).decode(),
        "range",
        "outside 0 to 7",
    ),
    "expert out of range": (encode_routes(out_of_range()), "range", "layer 1, position 4"),
    "blank": (encode_routes(np.zeros((13, 2, 2))), "zero_layer", "never written"),
}


@pytest.mark.parametrize("case", BAD_ROUTES)
def test_routes_are_taken_by_declared_shape_and_type_or_not_at_all(case: str) -> None:
    found, cause, message = BAD_ROUTES[case]
    value, request = recorded("basic")
    value["meta_info"]["routed_experts"] = found
    with pytest.raises(RouteError, match=message) as caught:
        wire.parse(value, request, contract(SERVED))
    assert caught.value.cause == cause
    assert wire.parse(value, request, contract(SERVED, routes=False)).routes is None


def test_a_refusal_does_not_repeat_megabytes() -> None:
    value, request = recorded("basic")
    value["output_ids"] = list(range(100_000))
    with pytest.raises(wire.BadAnswer) as caught:
        wire.parse(value, request, contract(SERVED))
    assert len(str(caught.value)) < 400


# --- what is sent


def test_a_body_names_legal_fields_alone_and_is_plain_json() -> None:
    request = make_request([5, 6], SamplingParams(4, (1, 2), 0.7, 0.9, 20))
    body = wire.payload(request, rid="r1", routes=True)
    assert json.loads(json.dumps(body)) == body
    params = body["sampling_params"]
    assert set(params) <= set(RECORDED["legal_sampling_fields"])
    neutral = {
        "min_new_tokens": 0,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "n": 1,
    }
    unset = ("stop", "stop_regex", "json_schema", "regex", "ebnf", "structural_tag")
    neutral |= dict.fromkeys((*unset, "custom_params", "beam_width", "watermark"))
    assert params == neutral | {
        "max_new_tokens": 4,
        "stop_token_ids": [1, 2],
        "ignore_eos": False,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "sampling_seed": 2**62 + 1,
    }
    del body["sampling_params"]
    assert body == {
        "rid": "r1",
        "input_ids": [5, 6],
        "stream": False,
        "return_logprob": True,
        "logprob_start_len": -1,
        "return_text_in_logprobs": False,
        "return_sampling_mask": True,
        "return_routed_experts": True,
        "routed_experts_start_len": 0,
    }


def test_every_field_that_the_server_knows_is_sent_or_cannot_matter() -> None:
    """A new field of a newer server shows here, before its default slips in."""
    params = wire.payload(make_request([5], SamplingParams(4)), rid="r", routes=False)
    harmless = {
        "skip_special_tokens",  # of the text, which is not used
        "spaces_between_special_tokens",
        "no_stop_trim",
        "stream_interval",
        "choice",  # of another endpoint
        "logit_bias",  # no neutral value but absence
    }
    assert set(RECORDED["legal_sampling_fields"]) - set(params["sampling_params"]) == harmless


def test_without_stop_tokens_nothing_but_the_length_ends_a_response() -> None:
    body = wire.payload(make_request([5], SamplingParams(4)), rid="r", routes=False)
    assert body["sampling_params"]["ignore_eos"] is True
    assert body["return_routed_experts"] is False
    assert body["return_sampling_mask"] is False
    assert (body["sampling_params"]["top_p"], body["sampling_params"]["top_k"]) == (1.0, -1)


def test_greedy_sampling_is_not_truncated() -> None:
    sampling = SamplingParams(4, temperature=0.0, top_p=0.5, top_k=1)
    assert wire.unscorable(sampling) == ""
    body = wire.payload(make_request([5], sampling), rid="r", routes=False)
    params = body["sampling_params"]
    assert (params["temperature"], params["top_p"], params["top_k"]) == (0.0, 1.0, -1)
    assert body["return_sampling_mask"] is False


def test_the_prompt_is_scored_and_the_cache_split_only_on_request() -> None:
    request = make_request([5], SamplingParams(4))
    body = wire.payload(request, rid="r", routes=False, prompt_logprobs=True, cache_key="v3-ab")
    assert (body["logprob_start_len"], body["extra_key"]) == (0, "v3-ab")
    assert "extra_key" not in wire.payload(request, rid="r", routes=False)


@pytest.mark.parametrize(
    ("sampling", "scorable"),
    [
        (SamplingParams(4), True),
        (SamplingParams(4, temperature=0.3), True),
        (SamplingParams(4, temperature=1e-7), False),
        (SamplingParams(4, top_p=0.9), False),
        (SamplingParams(4, top_p=0.9, top_k=4096), True),
        (SamplingParams(4, top_p=0.9, top_k=4097), False),
        (SamplingParams(4, top_k=2), True),
        (SamplingParams(4, top_k=1), False),
    ],
)
def test_what_the_loss_could_not_score_is_not_sent(
    sampling: SamplingParams, scorable: bool
) -> None:
    reason = wire.unscorable(sampling)
    request = make_request([5], sampling)
    if scorable:
        assert reason == ""
        wire.payload(request, rid="r", routes=False)
    else:
        assert "; " in reason, "it says what to change"
        with pytest.raises(ValueError, match=r"temperature|top_k"):
            wire.payload(request, rid="r", routes=False)
