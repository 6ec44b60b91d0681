"""From single rollouts to training groups: the assembler of groups and the rollout buffer.

What it is: bookkeeping between an engine that finishes responses in any order and a learner that
takes whole groups, with a bound on staleness. Whatever does not reach the learner is counted by
reason. What it is not: routing replay, which shares nothing with it. It never imports jax.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.rollout.engine import EngineFailure, Responses
from jaxrl_llm.types import Group, Prompt, Rollout, group_from_json, group_to_json


@dataclasses.dataclass(frozen=True)
class BufferConfig:
    """Which finished groups the learner may still take."""

    # Weight versions a group's oldest token may lag behind; 0: none, strictly on-policy. As many
    # rollout batches are asked for ahead; servers sample them while the learner updates. pi_old
    # stays the policy that an update starts from.
    max_staleness: int = 0

    def __post_init__(self) -> None:
        if self.max_staleness < 0:
            raise ValueError(
                f"max_staleness is {self.max_staleness}; use 0 (only the current weights) or more"
            )


class Finished(NamedTuple):
    """A prompt all of whose requests have an outcome."""

    draw: int  # as it was expected
    group: Group | None  # ordered by sample_index; None: too few rollouts were left


class Losses(NamedTuple):
    """What did not become part of a group."""

    failures: dict[str, int]  # requests, by cause
    messages: dict[str, str]  # the first failure's own words, by cause
    dropped_groups: int  # too few rollouts were left


class GroupAssembler:
    """Collects the outcomes of every prompt's N requests until all have arrived.

    A failure costs its group one rollout. A group is kept while it has two, the least from which an
    advantage can be centred, and else dropped; both are counted.
    """

    def __init__(self) -> None:
        self._failures: collections.Counter[str] = collections.Counter()
        self._messages: dict[str, str] = {}
        self._dropped_groups = 0
        self._pending: dict[str, list[_PendingGroup]] = {}

    @property
    def draws(self) -> frozenset[int]:
        """The prompts that are not finished."""
        return frozenset(group.draw for groups in self._pending.values() for group in groups)

    def expect(self, draw: int, prompt: Prompt, samples: int) -> None:
        """Await outcomes of sample_index 0 .. samples-1 of this prompt, the draw-th of the run.

        A prompt may be expected again while it is pending, as when a batch spans two epochs.
        """
        if samples < 2:
            raise ValueError(
                f"prompt {prompt.prompt_id!r}: samples is {samples}; a group needs at least 2"
            )
        group = _PendingGroup(draw, prompt, awaited=set(range(samples)))
        self._pending.setdefault(prompt.prompt_id, []).append(group)

    def add(self, outcome: Rollout | EngineFailure) -> Finished | None:
        """Take one outcome; returns its prompt's result if that was the last.

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
            self._failures[outcome.cause] += 1
            self._messages.setdefault(outcome.cause, outcome.message)
        else:
            group.rollouts.append(outcome)
        if group.awaited:
            return None
        groups.remove(group)
        if not groups:
            del self._pending[outcome.prompt_id]
        if len(group.rollouts) < 2:
            self._dropped_groups += 1
            return Finished(group.draw, None)
        ordered = tuple(sorted(group.rollouts, key=lambda r: r.sample_index))
        return Finished(group.draw, Group(group.prompt, ordered))

    def abandon(self) -> None:
        """Await nothing any more; what was counted stays."""
        self._pending.clear()

    def take_losses(self) -> Losses:
        """What was lost since the last call."""
        losses = Losses(dict(self._failures), self._messages, self._dropped_groups)
        self._failures.clear()
        self._messages, self._dropped_groups = {}, 0
        return losses


@dataclasses.dataclass(eq=False)
class _PendingGroup:
    draw: int
    prompt: Prompt
    awaited: set[int]  # sample indices without an outcome
    rollouts: list[Rollout] = dataclasses.field(default_factory=list)


class UnderWay:
    """Requests that the engine has not answered yet, and the groups that they are for."""

    def __init__(self) -> None:
        self.assembler = GroupAssembler()
        self.responses: collections.deque[Responses] = collections.deque()  # oldest first

    def cancel(self) -> None:
        """Give up what is under way. Its prompts stay pending in the buffer, to be asked again."""
        while self.responses:
            self.responses.popleft().close()
        self.assembler.abandon()


class RolloutBuffer:
    """What was drawn from the training prompts, and the finished groups that no update has used.

    A drawn prompt is pending until it is settled: put here as a group, or dropped for good. Groups
    leave in the order in which their prompts were drawn, not in that of completion: the short
    responses would fill the first mini-batch and the long ones the last, where the policy has moved
    most, and length would correlate with staleness.
    """

    def __init__(self, config: BufferConfig, drawn: int) -> None:
        """`drawn` prompts were used before, by a cold start."""
        self.drawn = drawn  # prompts so far; the next one is this draw of the run
        self.pending: set[int] = set()  # draws that are not settled
        self.dropped_stale = 0  # groups, since the run began
        self._config = config
        self._groups: dict[int, Group] = {}  # by draw

    def __len__(self) -> int:
        """Number of groups held."""
        return len(self._groups)

    def copy(self) -> RolloutBuffer:
        """A buffer with the same contents, that changes on its own."""
        other = copy.copy(self)
        other.pending, other._groups = set(self.pending), dict(self._groups)
        return other

    def draw(self, count: int) -> tuple[int, ...]:
        """The next `count` draws, pending from now on."""
        draws = tuple(range(self.drawn, self.drawn + count))
        self.drawn += count
        self.pending |= set(draws)
        return draws

    def settle(self, draw: int, group: Group | None, current_version: int) -> None:
        """The group of a pending draw, or None if it has none to learn from.

        One that is too stale already, as it had to wait for the learner, is dropped and counted.
        """
        if draw not in self.pending:
            raise ValueError(f"draw {draw} is not pending; settle each draw once")
        self.pending.remove(draw)
        if group is None:
            return
        if self._stale(group, current_version):
            self.dropped_stale += 1
        else:
            self._groups[draw] = group

    def ready(self, count: int) -> bool:
        """Whether `count` groups are held and no draw before the last of them is pending."""
        draws = sorted(self._groups)[:count]
        return len(draws) == count and min(self.pending, default=self.drawn) > draws[-1]

    def take(self, count: int, current_version: int) -> tuple[Group, ...]:
        """Remove and return the `count` groups drawn first.

        Raises ValueError if fewer are held, or if one is staler than max_staleness at
        `current_version`: drop_stale() comes before a version's groups are counted.
        """
        draws = sorted(self._groups)[:count]
        stale = [draw for draw in draws if self._stale(self._groups[draw], current_version)]
        if len(draws) < count or stale:
            raise ValueError(
                f"{count} groups are to be taken at version {current_version}; {len(draws)} are "
                f"held, of which the draws {stale} are too stale; call drop_stale() at each new "
                "version, and take() when the groups are ready()"
            )
        return tuple(self._groups.pop(draw) for draw in draws)

    def drop_stale(self, current_version: int) -> None:
        """Drop and count what is staler than max_staleness at `current_version`."""
        fresh = {d: g for d, g in self._groups.items() if not self._stale(g, current_version)}
        self.dropped_stale += len(self._groups) - len(fresh)
        self._groups = fresh

    def clear(self) -> None:
        """Drop every group, whatever its age; the caller counts them. Pending draws stay so."""
        self._groups.clear()

    def to_json(self) -> dict[str, Any]:
        """The whole state as plain JSON values, exact, for a checkpoint."""
        return {
            "drawn": self.drawn,
            "pending": sorted(self.pending),
            "dropped_stale": self.dropped_stale,
            "groups": [[draw, group_to_json(g)] for draw, g in sorted(self._groups.items())],
        }

    @classmethod
    def from_json(cls, config: BufferConfig, value: dict[str, Any]) -> RolloutBuffer:
        """Inverse of to_json; raises ValueError for a value that is not one of its results."""
        if set(value) != {"drawn", "pending", "dropped_stale", "groups"}:
            raise ValueError(f"not a stored rollout buffer: it has the keys {sorted(value)}")
        buffer = cls(config, int(value["drawn"]))
        buffer.pending = {int(draw) for draw in value["pending"]}
        buffer.dropped_stale = int(value["dropped_stale"])
        for entry in value["groups"]:
            if not (isinstance(entry, list) and len(entry) == 2):
                raise ValueError(f"not a stored group with its draw: {type(entry).__name__}")
            buffer._groups[int(entry[0])] = group_from_json(entry[1])
        return buffer

    def _stale(self, group: Group, current_version: int) -> bool:
        return group_version(group) < current_version - self._config.max_staleness


def group_version(group: Group) -> int:
    """Weight version of the group's oldest sampled token: its staleness is that token's."""
    return min(int(np.min(r.weight_version[r.loss_mask])) for r in group.rollouts)
