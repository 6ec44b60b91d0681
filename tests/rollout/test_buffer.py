"""Groups from single outcomes, the staleness bound, what is counted, and the stored state."""

import json

import numpy as np
import pytest

from jaxrl_llm.rollout.buffer import (
    BufferConfig,
    Finished,
    GroupAssembler,
    RolloutBuffer,
    group_version,
)
from jaxrl_llm.rollout.engine import EngineFailure
from jaxrl_llm.types import NOT_SAMPLED, Group, Prompt, Rollout, bind_routes
from tests.rollout.engines import assert_same


def prompt(name: str) -> Prompt:
    return Prompt(name, np.array([1, 2], np.int32), text="12", answer="3")


def rollout(name: str, index: int, versions: tuple[int, ...] = (0, 0)) -> Rollout:
    sampled = len(versions)
    made = Rollout(
        prompt_id=name,
        sample_index=index,
        tokens=np.arange(2 + sampled, dtype=np.int32),
        loss_mask=np.array([False] + [True] * sampled),
        sampler_logprobs=np.linspace(-1e-7, -9.3, 1 + sampled).astype(np.float32),
        routes=None,
        weight_version=np.array([NOT_SAMPLED, *versions], np.int32),
        text="x",
        finish="stop",
        reward=0.1 + index,
        verdict="correct",
    )
    return bind_routes(made, np.full((1 + sampled, 2, 2), index, np.int16))


def failure(name: str, index: int) -> EngineFailure:
    return EngineFailure(name, index, "too_long", f"words of {index}")


def group(name: str, version: int) -> Group:
    return Group(prompt(name), tuple(rollout(name, i, (version, version)) for i in range(2)))


def names(groups: tuple[Group, ...]) -> list[str]:
    return [group.prompt.prompt_id for group in groups]


def test_a_group_is_complete_with_its_last_outcome_and_ordered() -> None:
    assembler = GroupAssembler()
    for draw, name in enumerate("ab", start=7):
        assembler.expect(draw, prompt(name), 3)
    assert assembler.draws == {7, 8}
    arrivals = [("a", 2), ("b", 0), ("a", 0), ("b", 2), ("b", 1)]
    results = [assembler.add(rollout(*arrival)) for arrival in arrivals]
    assert results[:4] == [None] * 4
    assert results[4] is not None
    draw, group = results[4]
    assert draw == 8
    assert group is not None
    assert [r.sample_index for r in group.rollouts] == [0, 1, 2]
    assert group.prompt.prompt_id == "b"
    assert assembler.draws == {7}
    assert assembler.add(rollout("a", 1)) is not None
    assert not assembler.draws


def test_a_failure_costs_one_rollout_and_is_counted() -> None:
    assembler = GroupAssembler()
    assembler.expect(0, prompt("a"), 3)
    assert assembler.add(rollout("a", 0)) is None
    assert assembler.add(rollout("a", 2)) is None
    finished = assembler.add(failure("a", 1))
    assert finished is not None
    short = finished.group
    assert short is not None
    assert [r.sample_index for r in short.rollouts] == [0, 2]
    assert assembler.take_losses() == ({"too_long": 1}, {"too_long": "words of 1"}, 0)
    assert assembler.take_losses() == ({}, {}, 0)


def test_a_group_of_fewer_than_two_is_dropped_and_counted() -> None:
    assembler = GroupAssembler()
    assembler.expect(0, prompt("a"), 3)
    outcomes = [failure("a", 0), rollout("a", 1), failure("a", 2)]
    assert [assembler.add(outcome) for outcome in outcomes] == [None, None, Finished(0, None)]
    assert assembler.take_losses() == ({"too_long": 2}, {"too_long": "words of 0"}, 1)
    assert not assembler.draws


def test_a_prompt_may_be_pending_twice() -> None:
    assembler = GroupAssembler()
    assembler.expect(3, prompt("a"), 2)
    assembler.expect(9, prompt("a"), 2)
    results = [assembler.add(rollout("a", index)) for index in (0, 0, 1, 1)]
    assert [result and result.draw for result in results] == [None, None, 3, 9]
    assert not assembler.draws


def test_what_is_abandoned_is_not_awaited() -> None:
    assembler = GroupAssembler()
    assembler.expect(0, prompt("a"), 2)
    assembler.add(failure("a", 0))
    assembler.abandon()
    assert not assembler.draws
    assert assembler.take_losses().failures == {"too_long": 1}
    assembler.expect(0, prompt("a"), 2)
    assert [assembler.add(rollout("a", i)) is None for i in range(2)] == [True, False]


@pytest.mark.parametrize("outcome", [rollout("a", 2), rollout("b", 0), failure("a", 0)])
def test_an_outcome_that_nobody_awaits_is_an_error(outcome: Rollout | EngineFailure) -> None:
    assembler = GroupAssembler()
    assembler.expect(0, prompt("a"), 2)
    assembler.add(rollout("a", 0))
    with pytest.raises(ValueError, match="does not await sample"):
        assembler.add(outcome)


def test_a_group_of_one_cannot_be_expected() -> None:
    with pytest.raises(ValueError, match="samples is 1"):
        GroupAssembler().expect(0, prompt("a"), 1)


def test_a_group_is_as_old_as_its_oldest_token() -> None:
    mixed = Group(prompt("a"), (rollout("a", 0, (4, 5)), rollout("a", 1, (7, 3, 9))))
    assert group_version(mixed) == 3


def filled(max_staleness: int, *arrivals: tuple[int, int]) -> RolloutBuffer:
    """A buffer into which the groups of these (draw, version) came in this order, at once."""
    buffer = RolloutBuffer(BufferConfig(max_staleness), drawn=0)
    buffer.draw(max(draw for draw, _ in arrivals) + 1)
    for draw, version in arrivals:
        buffer.settle(draw, group("abcd"[draw], version), version)
    return buffer


def test_groups_leave_in_the_order_of_their_draws() -> None:
    buffer = filled(0, (1, 4), (2, 4), (0, 4))
    assert names(buffer.take(2, current_version=4)) == ["a", "b"]
    assert len(buffer) == 1
    assert names(buffer.take(1, current_version=4)) == ["c"]
    assert buffer.dropped_stale == 0


def test_only_as_many_fresh_groups_as_were_asked_for_are_taken() -> None:
    buffer = filled(1, (0, 4), (1, 5))
    with pytest.raises(ValueError, match=r"3 groups are to be taken at version 5; 2 are held"):
        buffer.take(3, current_version=5)
    with pytest.raises(ValueError, match=r"the draws \[0\] are too stale; call drop_stale\(\)"):
        buffer.take(2, current_version=6)
    assert names(buffer.take(2, current_version=5)) == ["a", "b"]


def test_a_draw_is_pending_until_it_is_settled_once() -> None:
    buffer = RolloutBuffer(BufferConfig(), drawn=5)
    assert buffer.draw(2) == (5, 6)
    assert buffer.draw(1) == (7,)
    buffer.settle(6, None, 0)
    assert buffer.pending == {5, 7}
    buffer.settle(5, group("a", 0), 0)
    assert (buffer.pending, len(buffer), buffer.drawn) == ({7}, 1, 8)
    for draw in (5, 6, 8):
        with pytest.raises(ValueError, match=f"draw {draw} is not pending"):
            buffer.settle(draw, None, 0)


def test_a_group_that_waited_too_long_is_settled_as_dropped() -> None:
    """Else it would count as ready, and be gone when it is taken."""
    buffer = RolloutBuffer(BufferConfig(max_staleness=1), drawn=0)
    buffer.draw(3)
    for draw, version in enumerate((3, 5, 4)):
        buffer.settle(draw, group("abc"[draw], version), 5)
    assert (buffer.pending, buffer.dropped_stale) == (set(), 1)
    assert [buffer.ready(count) for count in (2, 3)] == [True, False]
    assert names(buffer.take(2, current_version=5)) == ["b", "c"]


def test_groups_are_ready_when_no_earlier_draw_is_pending() -> None:
    buffer = RolloutBuffer(BufferConfig(), drawn=0)
    buffer.draw(4)
    ready = []
    for draw in (1, 2, 0):
        buffer.settle(draw, group("abcd"[draw], 0), 0)
        ready.append([buffer.ready(count) for count in (1, 2, 3, 4)])
    assert ready == [[False] * 4, [False] * 4, [True, True, True, False]]
    buffer.settle(3, None, 0)
    assert buffer.ready(3)
    assert not buffer.ready(4)


@pytest.mark.parametrize(
    ("max_staleness", "kept"), [(0, ["c"]), (1, ["b", "c"]), (3, ["a", "b", "c", "d"])]
)
def test_stale_groups_are_dropped_and_counted(max_staleness: int, kept: list[str]) -> None:
    """Wherever they are in the queue."""
    buffer = filled(max_staleness, (0, 3), (1, 5), (2, 6), (3, 4))
    buffer.drop_stale(6)
    assert buffer.dropped_stale == 4 - len(buffer) == 4 - len(kept)
    assert names(buffer.take(len(kept), current_version=6)) == kept


def test_a_cleared_buffer_keeps_what_is_pending() -> None:
    buffer = filled(0, (0, 3), (2, 3))
    buffer.clear()
    assert (len(buffer), buffer.pending, buffer.drawn) == (0, {1}, 3)


def test_the_state_survives_json_exactly() -> None:
    buffer = filled(1, (0, 3), (3, 6), (1, 5))
    buffer.drop_stale(6)
    buffer.take(1, current_version=6)
    stored = json.loads(json.dumps(buffer.to_json()))
    restored = RolloutBuffer.from_json(BufferConfig(max_staleness=1), stored)
    assert restored.dropped_stale == buffer.dropped_stale == 1
    assert (restored.drawn, restored.pending) == (buffer.drawn, buffer.pending) == (4, {2})
    assert restored.to_json() == buffer.to_json()
    (ours,), (theirs,) = (b.take(1, current_version=6) for b in (restored, buffer))
    for left, right in zip(ours.rollouts, theirs.rollouts, strict=True):
        assert_same(left, right)
        assert (left.reward, left.verdict) == (right.reward, right.verdict)


def test_a_copy_changes_on_its_own() -> None:
    buffer = filled(1, (0, 5), (3, 6), (1, 5))
    stored = buffer.to_json()
    other = buffer.copy()
    assert other.to_json() == stored
    other.settle(2, group("c", 3), 6)
    other.draw(2)
    other.take(1, current_version=6)
    other.drop_stale(7)
    assert buffer.to_json() == stored
    assert (other.drawn, other.pending, other.dropped_stale) == (6, {4, 5}, 2)
    assert names(other.take(1, current_version=7)) == ["d"]


COUNTS = {"drawn": 1, "pending": [], "dropped_stale": 0}


@pytest.mark.parametrize(
    "value", [{}, {"groups": []}, {**COUNTS, "groups": [{}]}, {**COUNTS, "groups": [[0, {}]]}]
)
def test_a_foreign_state_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a stored"):
        RolloutBuffer.from_json(BufferConfig(), value)


def test_a_negative_staleness_is_refused() -> None:
    with pytest.raises(ValueError, match="max_staleness is -1"):
        BufferConfig(-1)
