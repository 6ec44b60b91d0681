"""Rollouts and groups: exact JSON round trips, and errors that name what is wrong."""

import dataclasses
import json

import numpy as np
import pytest

from jaxrl_llm.types import (
    NOT_SAMPLED,
    Group,
    Prompt,
    Rollout,
    SamplingParams,
    bind_routes,
    group_from_json,
    group_to_json,
    without_routes,
)


def make_rollout() -> Rollout:
    rollout = Rollout(
        prompt_id="p0",
        sample_index=3,
        tokens=np.array([1, 2, 3, 4, 5], np.int32),
        loss_mask=np.array([False, True, True, True]),
        sampler_logprobs=np.array([0.0, -0.1, -1e-30, -3.3333333], np.float32),
        routes=None,
        weight_version=np.array([NOT_SAMPLED, 7, 7, 7], np.int32),
        text="x < y & 'z'",
        finish="stop",
        reward=1.0,
        verdict="correct",
    )
    return bind_routes(rollout, np.arange(16, dtype=np.int16).reshape(4, 2, 2))


def make_group() -> Group:
    prompt = Prompt("p0", np.array([1, 2], np.int32), "1+1=", "2", "works out as 2")
    return Group(prompt, (make_rollout(), without_routes(make_rollout())))


def assert_records_equal(left: Prompt | Rollout, right: Prompt | Rollout) -> None:
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


def test_groups_round_trip_through_json_text_exactly() -> None:
    group = make_group()
    back = group_from_json(json.loads(json.dumps(group_to_json(group))))
    assert_records_equal(group.prompt, back.prompt)
    for left, right in zip(group.rollouts, back.rollouts, strict=True):
        assert_records_equal(left, right)


def test_a_damaged_stored_group_is_refused() -> None:
    value = group_to_json(make_group())
    del value["rollouts"][0]["tokens"]
    with pytest.raises(ValueError, match="not a stored group"):
        group_from_json(value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokens", np.arange(5, dtype=np.int64), r"tokens is int64\[5\]; expected int32\[\*\]"),
        ("loss_mask", np.ones(3, np.bool_), r"loss_mask is bool\[3\]; expected bool\[4\]"),
        ("sampler_logprobs", np.zeros(5, np.float32), "sampler_logprobs is float32"),
        ("routes", np.zeros((3, 2, 2), np.int16), r"routes is int16\[3, 2, 2\]"),
        ("sampler_logprobs", np.array([0, np.nan, 0, 0], np.float32), "must be finite"),
        ("sampler_logprobs", np.array([0, 0.5, 0, 0], np.float32), "at most 0"),
    ],
)
def test_malformed_rollouts_are_refused_by_name(
    field: str, value: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(make_rollout(), **{field: value})
    assert "'p0' sample 3" in str(error.value)


def test_a_group_refuses_another_prompts_rollout() -> None:
    prompt = Prompt("p1", np.array([1], np.int32), "1", "1")
    with pytest.raises(ValueError, match=r"rollouts of others: \['p0'\]"):
        Group(prompt, (make_rollout(),))


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}],
)
def test_sampling_params_refuse_values_out_of_range(settings: dict[str, float]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} is"):
        dataclasses.replace(SamplingParams(max_new_tokens=4), **settings)
