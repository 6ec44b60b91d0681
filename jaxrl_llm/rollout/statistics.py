"""What a rollout batch looked like, in numbers for the run log. It never imports jax."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from jaxrl_llm.types import Group, Rollout


def group_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """The rollout/* metrics of the groups that a step trains on (metrics.METRICS explains them).

    Args:
      groups: at least one, every rollout verified.
      version: the learner's step, from which staleness is counted.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    causes = collections.Counter(rollout.verdict for rollout in rollouts)
    return {
        "rollout/reward_mean": _mean([_reward(rollout) for rollout in rollouts]),
        "rollout/accuracy": causes["correct"] / len(rollouts),
        "rollout/response_tokens": _mean([rollout.response_length for rollout in rollouts]),
        "rollout/truncated_fraction": _mean([rollout.finish == "length" for rollout in rollouts]),
        "rollout/equal_reward_groups": _mean(
            [len({_reward(rollout) for rollout in group.rollouts}) == 1 for group in groups]
        ),
        "rollout/staleness": _mean(
            np.concatenate([version - r.weight_version[r.loss_mask] for r in rollouts])
        ),
        **{f"rollout/verdict_{cause}": float(n) for cause, n in sorted(causes.items())},
    }


def _reward(rollout: Rollout) -> float:
    if rollout.reward is None:
        raise ValueError(
            f"rollout {rollout.prompt_id!r} sample {rollout.sample_index} was never verified"
        )
    return rollout.reward


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values))
