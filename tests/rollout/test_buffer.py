"""Groups from single outcomes, the staleness bound, what is counted, and the stored state."""

import json

import numpy as np
import pytest

from jaxrl_llm.rollout.buffer import BufferConfig, GroupAssembler, RolloutBuffer, group_version
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
    return EngineFailure(name, index, "too_long", "")


def group(name: str, version: int) -> Group:
    return Group(prompt(name), tuple(rollout(name, i, (version, version)) for i in range(2)))


def names(groups: tuple[Group, ...]) -> list[str]:
    return [group.prompt.prompt_id for group in groups]


def test_a_group_is_complete_with_its_last_outcome_and_ordered() -> None:
    assembler = GroupAssembler()
    for name in "ab":
        assembler.expect(prompt(name), 3)
    arrivals = [("a", 2), ("b", 0), ("a", 0), ("b", 2), ("b", 1)]
    groups = [assembler.add(rollout(*arrival)) for arrival in arrivals]
    assert groups[:4] == [None] * 4
    assert groups[4] is not None
    assert [r.sample_index for r in groups[4].rollouts] == [0, 1, 2]
    assert groups[4].prompt.prompt_id == "b"
    assert len(assembler) == 1
    assert assembler.add(rollout("a", 1)) is not None
    assert len(assembler) == 0


def test_a_failure_costs_one_rollout_and_is_counted() -> None:
    assembler = GroupAssembler()
    assembler.expect(prompt("a"), 3)
    assert assembler.add(rollout("a", 0)) is None
    assert assembler.add(rollout("a", 2)) is None
    short = assembler.add(failure("a", 1))
    assert short is not None
    assert [r.sample_index for r in short.rollouts] == [0, 2]
    assert dict(assembler.failures) == {"too_long": 1}
    assert assembler.dropped_groups == 0


def test_a_group_of_fewer_than_two_is_dropped_and_counted() -> None:
    assembler = GroupAssembler()
    assembler.expect(prompt("a"), 3)
    outcomes = [failure("a", 0), rollout("a", 1), failure("a", 2)]
    assert [assembler.add(outcome) for outcome in outcomes] == [None] * 3
    assert dict(assembler.failures) == {"too_long": 2}
    assert assembler.dropped_groups == 1
    assert len(assembler) == 0


def test_a_prompt_may_be_pending_twice() -> None:
    assembler = GroupAssembler()
    assembler.expect(prompt("a"), 2)
    assembler.expect(prompt("a"), 2)
    groups = [assembler.add(rollout("a", index)) for index in (0, 0, 1, 1)]
    assert [g is not None for g in groups] == [False, False, True, True]
    assert len(assembler) == 0


@pytest.mark.parametrize("outcome", [rollout("a", 2), rollout("b", 0), failure("a", 0)])
def test_an_outcome_that_nobody_awaits_is_an_error(outcome: Rollout | EngineFailure) -> None:
    assembler = GroupAssembler()
    assembler.expect(prompt("a"), 2)
    assembler.add(rollout("a", 0))
    with pytest.raises(ValueError, match="does not await sample"):
        assembler.add(outcome)


def test_a_group_of_one_cannot_be_expected() -> None:
    with pytest.raises(ValueError, match="samples is 1"):
        GroupAssembler().expect(prompt("a"), 1)


def test_a_group_is_as_old_as_its_oldest_token() -> None:
    mixed = Group(prompt("a"), (rollout("a", 0, (4, 5)), rollout("a", 1, (7, 3, 9))))
    assert group_version(mixed) == 3


def test_take_is_first_in_first_out_and_leaves_the_rest() -> None:
    buffer = RolloutBuffer(BufferConfig())
    for name in "abc":
        buffer.put(group(name, 4))
    assert names(buffer.take(2, current_version=4)) == ["a", "b"]
    assert len(buffer) == 1
    assert names(buffer.take(2, current_version=4)) == ["c"]
    assert buffer.take(2, current_version=4) == ()
    assert buffer.dropped_stale == 0


@pytest.mark.parametrize(
    ("max_staleness", "taken", "dropped"), [(0, ["c"], 3), (1, ["b", "c"], 2), (3, ["a", "b"], 0)]
)
def test_stale_groups_are_dropped_and_counted(
    max_staleness: int, taken: list[str], dropped: int
) -> None:
    buffer = RolloutBuffer(BufferConfig(max_staleness))
    for name, version in [("a", 3), ("b", 5), ("c", 6), ("d", 4)]:
        buffer.put(group(name, version))
    assert names(buffer.take(2, current_version=6)) == taken
    assert buffer.dropped_stale == dropped
    assert len(buffer) == 4 - dropped - len(taken)


def test_the_state_survives_json_exactly() -> None:
    buffer = RolloutBuffer(BufferConfig(max_staleness=1))
    for name, version in [("a", 3), ("b", 5), ("c", 6)]:
        buffer.put(group(name, version))
    buffer.take(1, current_version=6)
    stored = json.loads(json.dumps(buffer.to_json()))
    restored = RolloutBuffer.from_json(BufferConfig(max_staleness=1), stored)
    assert restored.dropped_stale == buffer.dropped_stale == 1
    assert restored.to_json() == buffer.to_json()
    (ours,), (theirs,) = (b.take(5, current_version=6) for b in (restored, buffer))
    for left, right in zip(ours.rollouts, theirs.rollouts, strict=True):
        assert_same(left, right)
        assert (left.reward, left.verdict) == (right.reward, right.verdict)


@pytest.mark.parametrize("value", [{}, {"groups": []}, {"groups": [{}], "dropped_stale": 0}])
def test_a_foreign_state_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a stored"):
        RolloutBuffer.from_json(BufferConfig(), value)


def test_a_negative_staleness_is_refused() -> None:
    with pytest.raises(ValueError, match="max_staleness is -1"):
        BufferConfig(-1)
