"""Tightening halves every bound that the loss reads, and refuses a loss without one."""

import dataclasses
import math

import pytest

from jaxrl_llm.learner.tighten import check_tightening, tightened
from jaxrl_llm.losses.clipping import ClipConfig
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.losses.weights import ImportanceConfig


def test_bounds_halve_their_distance_from_an_on_policy_update() -> None:
    loss = LossConfig(
        importance=ImportanceConfig(ratio="mismatch", rule="band", low=0.5, high=5.0),
        clip=ClipConfig(low=0.2, high=0.28),
    )
    assert tightened(loss, 0) == loss
    once = tightened(loss, 1)
    assert (once.importance.low, once.importance.high) == (0.75, 3.0)
    assert (once.clip.low, once.clip.high) == (0.1, 0.14)
    thrice = tightened(loss, 3)
    assert (thrice.importance.low, thrice.importance.high) == (1 - 0.5 / 8, 1.5)
    assert (thrice.clip.low, thrice.clip.high) == (0.2 / 8, 0.28 / 8)
    same = dataclasses.replace(thrice, importance=loss.importance, clip=loss.clip)
    assert same == loss  # nothing else changes


def test_what_is_no_bound_stays() -> None:
    loss = LossConfig(importance=ImportanceConfig(low=0.0, high=math.inf), clip=ClipConfig())
    once = tightened(loss, 1)
    assert once.importance == loss.importance
    assert once.clip != loss.clip
    unread = LossConfig(
        importance=ImportanceConfig(ratio="off", high=5.0), clip=ClipConfig(kind="none")
    )
    assert tightened(unread, 2) == unread


def test_a_loss_without_bounds_and_a_negative_count_are_refused() -> None:
    check_tightening(LossConfig())
    unbounded = LossConfig(importance=ImportanceConfig(high=math.inf), clip=ClipConfig(kind="none"))
    with pytest.raises(ValueError, match=r"no bound to tighten.*importance.ratio is sampler"):
        check_tightening(unbounded)
    with pytest.raises(ValueError, match="times is -1"):
        tightened(LossConfig(), -1)
