"""From single rollouts to training groups: the assembler of groups and the rollout buffer.

What it is: bookkeeping between an engine that finishes responses in any order and a learner that
takes whole groups, with a bound on staleness. Whatever does not reach the learner is counted by
reason. What it is not: routing replay, which shares nothing with it. It never imports jax.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from jaxrl_llm.rollout.engine import EngineFailure
from jaxrl_llm.types import Group, Prompt, Rollout, group_from_json, group_to_json


@dataclasses.dataclass(frozen=True)
class BufferConfig:
    """Which finished groups the learner may still take."""

    # Weight versions a group's oldest token may lag behind; 0: none. In-process, as many rollout
    # batches are sampled ahead. pi_old stays the policy that an update starts from.
    max_staleness: int = 0

    def __post_init__(self) -> None:
        if self.max_staleness < 0:
            raise ValueError(
                f"max_staleness is {self.max_staleness}; use 0 (only the current weights) or more"
            )


class GroupAssembler:
    """Collects the outcomes of every prompt's N requests until all have arrived.

    A failure costs its group one rollout. A group is kept while it has two, the least from which an
    advantage can be centred, and else dropped; both are counted.
    """

    def __init__(self) -> None:
        self.failures: collections.Counter[str] = collections.Counter()  # requests, by cause
        self.messages: dict[str, str] = {}  # the first failure's own words, by cause
        self.dropped_groups = 0  # too few rollouts were left
        self._pending: dict[str, list[_PendingGroup]] = {}

    def __len__(self) -> int:
        """Number of groups not yet complete."""
        return sum(len(groups) for groups in self._pending.values())

    def expect(self, prompt: Prompt, samples: int) -> None:
        """Await outcomes of sample_index 0 .. samples-1 of this prompt.

        A prompt may be expected again while it is pending, as when a batch spans two epochs.
        """
        if samples < 2:
            raise ValueError(
                f"prompt {prompt.prompt_id!r}: samples is {samples}; a group needs at least 2"
            )
        group = _PendingGroup(prompt, awaited=set(range(samples)))
        self._pending.setdefault(prompt.prompt_id, []).append(group)

    def add(self, outcome: Rollout | EngineFailure) -> Group | None:
        """Take one outcome; returns its group, ordered by sample_index, if that was the last.

        Raises ValueError for an outcome that no prompt awaits.
        """
        groups = self._pending.get(outcome.prompt_id, [])
        group = next((g for g in groups if outcome.sample_index in g.awaited), None)
        if group is None:
            raise ValueError(
                f"prompt {outcome.prompt_id!r} does not await sample {outcome.sample_index}; "
                "call expect() before, and add each outcome once"
            )
        group.awaited.remove(outcome.sample_index)
        if isinstance(outcome, EngineFailure):
            self.failures[outcome.cause] += 1
            self.messages.setdefault(outcome.cause, outcome.message)
        else:
            group.rollouts.append(outcome)
        if group.awaited:
            return None
        groups.remove(group)
        if not groups:
            del self._pending[outcome.prompt_id]
        if len(group.rollouts) < 2:
            self.dropped_groups += 1
            return None
        return Group(group.prompt, tuple(sorted(group.rollouts, key=lambda r: r.sample_index)))


@dataclasses.dataclass(eq=False)
class _PendingGroup:
    prompt: Prompt
    awaited: set[int]  # sample indices without an outcome
    rollouts: list[Rollout] = dataclasses.field(default_factory=list)


class RolloutBuffer:
    """First in, first out queue of finished groups, none of them staler than allowed."""

    def __init__(self, config: BufferConfig) -> None:
        self.dropped_stale = 0  # groups, since the run began
        self._config = config
        self._groups: collections.deque[Group] = collections.deque()

    def __len__(self) -> int:
        """Number of groups held, stale ones included until the next take()."""
        return len(self._groups)

    def put(self, group: Group) -> None:
        """Append a finished group."""
        self._groups.append(group)

    def take(self, count: int, current_version: int) -> tuple[Group, ...]:
        """Remove and return the `count` oldest groups, or all there are if they are fewer.

        Groups staler than max_staleness at `current_version`, wherever they are in the queue, are
        dropped first and counted in `dropped_stale`.
        """
        self.drop_stale(current_version)
        return tuple(self._groups.popleft() for _ in range(min(count, len(self._groups))))

    def drop_stale(self, current_version: int) -> None:
        """Drop and count what is staler than max_staleness at `current_version`."""
        oldest = current_version - self._config.max_staleness
        fresh = [group for group in self._groups if group_version(group) >= oldest]
        self.dropped_stale += len(self._groups) - len(fresh)
        self._groups = collections.deque(fresh)

    def to_json(self) -> dict[str, Any]:
        """The whole state as plain JSON values, exact, for a checkpoint."""
        groups = [group_to_json(group) for group in self._groups]
        return {"groups": groups, "dropped_stale": self.dropped_stale}

    @classmethod
    def from_json(cls, config: BufferConfig, value: dict[str, Any]) -> RolloutBuffer:
        """Inverse of to_json; raises ValueError for a value that is not one of its results."""
        if set(value) != {"groups", "dropped_stale"}:
            raise ValueError(f"not a stored rollout buffer: it has the keys {sorted(value)}")
        buffer = cls(config)
        buffer.dropped_stale = int(value["dropped_stale"])
        for group in value["groups"]:
            buffer.put(group_from_json(group))
        return buffer


def group_version(group: Group) -> int:
    """Weight version of the group's oldest sampled token: its staleness is that token's."""
    return min(int(np.min(r.weight_version[r.loss_mask])) for r in group.rollouts)
