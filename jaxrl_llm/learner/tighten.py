"""A loss with its off-policy bounds drawn in, for a run whose early warning has spoken.

What it is: one pure function of LossConfig. What it is not: the decision to do so (recovery.py).
"""

from __future__ import annotations

import dataclasses

from jaxrl_llm.losses.policy import LossConfig


def tightened(loss: LossConfig, times: int) -> LossConfig:
    """The loss with each bound's distance from "no off-policy update" halved `times` times.

        importance.high -> 1 + (high - 1) / 2^times
        importance.low  -> 1 - (1 - low) / 2^times, unless it is 0, which is no bound
        clip.low, clip.high -> low / 2^times, high / 2^times

    An infinite bound stays infinite, and bounds that the loss does not read (importance.ratio off,
    clip.kind none) stay as they are. With times 0 it is the loss itself.
    """
    if times < 0:
        raise ValueError(f"times is {times}; it must be 0 or more")
    share = 0.5**times
    importance, clip = loss.importance, loss.clip
    if importance.ratio != "off":
        high = 1 + (importance.high - 1) * share
        low = 1 - (1 - importance.low) * share if importance.low else 0.0
        importance = dataclasses.replace(importance, low=low, high=high)
    if clip.kind != "none":
        clip = dataclasses.replace(clip, low=clip.low * share, high=clip.high * share)
    return dataclasses.replace(loss, importance=importance, clip=clip)


def check_tightening(loss: LossConfig) -> None:
    """ValueError if tightening would leave the loss as it is."""
    if tightened(loss, 1) == loss:
        raise ValueError(
            f"learner.watch.action is tighten, but the loss has no bound to tighten: "
            f"loss.importance.ratio is {loss.importance.ratio} with high {loss.importance.high}, "
            f"loss.clip.kind is {loss.clip.kind}; bound one of them, or choose another action"
        )
