"""Group advantages: how much better a response did than the others to the same prompt.

Works on host arrays (numpy in, numpy out) and on device arrays alike: a reward is known per
response, long before any token reaches a device.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeVar

import numpy as np

from jaxrl_llm.arrays import Array

Rewards = TypeVar("Rewards", np.ndarray, Array)
Baseline = Literal["mean", "leave_one_out", "none"]
Scale = Literal["none", "std"]
Overlong = Literal["keep", "mask"]


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """How rewards of a group become advantages; the defaults are those of arXiv 2512.01374."""

    # Subtract the group's mean, the mean of the OTHER members (RLOO), or nothing (REINFORCE).
    baseline: Baseline = "mean"
    scale: Scale = "none"  # std: divide by the group's standard deviation, as GRPO does
    # A response that was cut off at max_new_tokens: train on it, or give it the advantage 0 (DAPO).
    overlong: Overlong = "keep"

    def __post_init__(self) -> None:
        if self.baseline == "none" and self.scale == "std":
            raise ValueError(
                "advantage.scale std divides by the spread around a baseline, and "
                "advantage.baseline is none; set scale to none, or baseline to mean"
            )


def response_advantages(
    rewards: Rewards, valid: Rewards, truncated: Rewards, cfg: AdvantageConfig
) -> Rewards:
    """group_advantages as configured, with 0 for truncated responses if they are to be masked.

    DAPO's overlong filtering (arXiv 2503.14476, 3.4): the truncated response still counts in its
    group's baseline and in the denominators of the loss, it only pulls at nothing.

    Args:
      rewards: f32[G, N].
      valid: bool[G, N].
      truncated: bool[G, N], True iff the response was cut off at max_new_tokens.
      cfg: the settings.

    Returns:
      f32[G, N].
    """
    advantages = group_advantages(rewards, valid, baseline=cfg.baseline, scale=cfg.scale)
    if cfg.overlong == "keep":
        return advantages
    xp: Any = rewards.__array_namespace__()
    return xp.where(truncated, xp.zeros_like(advantages), advantages)


def group_advantages(
    rewards: Rewards, valid: Rewards, *, baseline: Baseline = "mean", scale: Scale = "none"
) -> Rewards:
    """A(x, y) = R(x, y) - baseline of the group, optionally over the group's standard deviation.

    Invalid members (failed, aborted, never sampled) are no part of the group: they enter neither
    baseline nor deviation, whatever their reward holds, and get advantage 0. Where all valid
    rewards of a group are equal (a group of one included) there is nothing to compare, and under a
    baseline the advantages are exactly 0: no rounding residue is left for the deviation to blow up.
    A NaN reward of a valid member makes its group NaN.

    Args:
      rewards: f32[G, N], a row for each prompt.
      valid: bool[G, N].
      baseline: "mean" of all valid members; "leave_one_out": of the other valid members, which is
        the mean-centred advantage times n / (n - 1) (RLOO, arXiv 2402.14740); or "none": the
        advantage is the reward (REINFORCE).
      scale: "none", or "std": divide by the sample standard deviation (n - 1) of the valid members.

    Returns:
      f32[G, N], of the library and dtype of `rewards`.

    Raises:
      ValueError: if the arguments are not a floating and a bool array of one shape of rank 2.
    """
    if rewards.ndim != 2 or rewards.shape != valid.shape or valid.dtype != bool:
        raise ValueError(
            f"rewards {rewards.dtype}{list(rewards.shape)} and valid "
            f"{valid.dtype}{list(valid.shape)} must be floating and bool of one shape [G, N]"
        )
    if not np.issubdtype(rewards.dtype, np.floating):
        raise ValueError(f"rewards are {rewards.dtype}; convert them to floating point first")
    xp: Any = rewards.__array_namespace__()
    count = xp.sum(valid, axis=1, keepdims=True)
    known = xp.where(valid, rewards, 0)
    if baseline == "none":
        return known.astype(rewards.dtype)
    mean = xp.sum(known, axis=1, keepdims=True) / xp.maximum(count, 1)
    highest = xp.max(xp.where(valid, rewards, -xp.inf), axis=1, keepdims=True)
    lowest = xp.min(xp.where(valid, rewards, xp.inf), axis=1, keepdims=True)
    nothing = ~valid | (highest <= lowest)  # false for NaN: it must show

    others = xp.maximum(count - 1, 1)
    advantages = xp.where(nothing, 0, known - mean)
    if scale == "std":
        deviation = xp.sqrt(xp.sum(advantages**2, axis=1, keepdims=True) / others)
        advantages = xp.where(nothing, 0, advantages / xp.where(deviation == 0, 1, deviation))
    if baseline == "leave_one_out":
        advantages = advantages * (count / others)
    return advantages.astype(rewards.dtype)
