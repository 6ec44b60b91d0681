"""Turns with a clock that the contestants move."""

import itertools

import pytest

from jaxrl_llm.bench.measure import Turns, take_turns


class FakeClock:
    """Time passes only while a contestant works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def contestant(self, name: str, *seconds: float):
        """One that takes these seconds, call by call."""
        left = iter(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += next(left)

        return run


def test_all_are_warmed_up_and_then_take_turns() -> None:
    clock = FakeClock()
    contestants = {"a": clock.contestant("a", 9, 1, 2), "b": clock.contestant("b", 8, 3, 4)}
    turns = take_turns(contestants, 2, clock=lambda: clock.now)
    assert clock.calls[:2] == ["a", "b"]
    assert [set(clock.calls[2:4]), set(clock.calls[4:])] == [{"a", "b"}] * 2
    assert turns == Turns({"a": (1.0, 2.0), "b": (3.0, 4.0)})


@pytest.mark.parametrize(("names", "times"), [("abcdef", 1), ("abcdefg", 2)])
def test_each_follows_each_of_the_others_equally_often(names: str, times: int) -> None:
    clock, size = FakeClock(), len(names)
    contestants = {name: clock.contestant(name, *[1.0] * (1 + times * size)) for name in names}
    take_turns(contestants, times * size, clock=lambda: clock.now)
    starts = range(size, len(clock.calls), size)
    rounds = [clock.calls[start : start + size] for start in starts]
    assert all(sorted(order) == list(names) for order in rounds)
    pairs = [pair for order in rounds for pair in itertools.pairwise(order)]
    assert sorted(pairs) == sorted([*itertools.permutations(names, 2)] * times)


def test_a_slow_contestant_takes_part_in_the_first_rounds_only() -> None:
    clock = FakeClock()
    contestants = {"a": clock.contestant("a", 0, 1, 1, 2), "slow": clock.contestant("slow", 0, 6)}
    turns = take_turns(contestants, 3, at_most={"slow": 1}, clock=lambda: clock.now)
    assert turns.taken == {"a": (1.0, 1.0, 2.0), "slow": (6.0,)}
    assert turns.ratio("slow", "a") == [6.0]
    assert turns.ratio("a", "slow") == [pytest.approx(1 / 6)]


def test_ratios_are_of_neighbours_in_a_round() -> None:
    turns = Turns({"a": (1.0, 10.0), "b": (2.0, 20.0)})  # the machine was slow in round 2
    assert turns.ratio("a", "b") == [0.5, 0.5]
    assert turns.rate("b", 40.0) == [20.0, 2.0]
    assert turns.seconds("a") == [1.0, 10.0]
