"""The rollout/* metrics of hand-made groups."""

import dataclasses

import numpy as np
import pytest

from jaxrl_llm.rollout.statistics import group_metrics
from jaxrl_llm.types import NOT_SAMPLED, Group, Prompt, Rollout

PROMPT = Prompt("p", np.array([2, 3], np.int32), "", "")


def rollout(index: int, *, sampled: int, version: int, reward: float | None) -> Rollout:
    """A rollout of two prompt tokens and `sampled` sampled ones."""
    mask = np.arange(sampled + 1) >= 1
    return Rollout(
        prompt_id="p",
        sample_index=index,
        tokens=np.full(sampled + 2, 2, np.int32),
        loss_mask=mask,
        sampler_logprobs=np.where(mask, -0.5, 0).astype(np.float32),
        routes=None,
        weight_version=np.where(mask, version, NOT_SAMPLED).astype(np.int32),
        text="",
        finish="length" if sampled == 4 else "stop",
        reward=reward,
        verdict="correct" if reward else "wrong",
    )


def test_group_metrics_count_what_they_say() -> None:
    mixed = Group(
        PROMPT,
        (
            rollout(0, sampled=1, version=5, reward=1.0),
            rollout(1, sampled=4, version=3, reward=0.0),
        ),
    )
    equal = Group(
        PROMPT,
        tuple(rollout(index, sampled=2, version=5, reward=0.0) for index in range(2)),
    )
    assert group_metrics([mixed, equal], version=5) == {
        "rollout/reward_mean": 0.25,
        "rollout/accuracy": 0.25,
        "rollout/response_tokens": 2.25,
        "rollout/truncated_fraction": 0.25,
        "rollout/equal_reward_groups": 0.5,
        "rollout/staleness": pytest.approx(4 * 2 / 9),  # over tokens, of which 4 are 2 steps old
        "rollout/verdict_correct": 1.0,
        "rollout/verdict_wrong": 3.0,
    }


def test_an_unverified_rollout_is_refused_by_name() -> None:
    verified = rollout(0, sampled=1, version=0, reward=1.0)
    group = Group(PROMPT, (verified, dataclasses.replace(verified, sample_index=1, reward=None)))
    with pytest.raises(ValueError, match="'p' sample 1 was never verified"):
        group_metrics([group], version=0)
