"""Contestants take turns, so that what disturbs the machine disturbs neighbours alike.

What it is: seconds by contestant and round, and what follows from them. What it is not: jax; a
contestant is any function that comes back when its work is done.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

Contestant = Callable[[], object]
"""Does the work that is timed, and returns when the device has done it."""


@dataclasses.dataclass(frozen=True)
class Turns:
    """What rounds took. All that its methods return has a value for each round."""

    taken: Mapping[str, tuple[float, ...]]  # contestant -> seconds of each of its rounds

    def seconds(self, name: str) -> list[float]:
        """Of one contestant."""
        return list(self.taken[name])

    def rate(self, name: str, amount: float) -> list[float]:
        """Amount of work per second."""
        return [amount / seconds for seconds in self.taken[name]]

    def ratio(self, name: str, other: str) -> list[float]:
        """Seconds of one over those of another, in the rounds that both took part in."""
        return [a / b for a, b in zip(self.taken[name], self.taken[other], strict=False)]


def take_turns(
    contestants: Mapping[str, Contestant],
    repeats: int,
    *,
    at_most: Mapping[str, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Turns:
    """Warms every contestant up once, then lets all of them run once in each of `repeats` rounds.

    Each round has an order of its own: a contestant's place changes its time, and would else do so
    in every round alike.

    Args:
      contestants: the function of each.
      at_most: fewer rounds, the first ones, for contestants that are slow.
      clock: seconds.
    """
    for run in contestants.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(repeats):
        for name in _order(list(contestants), number):
            if number < (at_most or {}).get(name, repeats):
                began = clock()
                contestants[name]()
                taken[name].append(clock() - began)
    return Turns({name: tuple(seconds) for name, seconds in taken.items()})


def _order(names: Sequence[str], number: int) -> list[str]:
    """Of round `number`: each follows each of the others equally often, an even number of
    contestants in as many rounds, an odd one, every second round turned around, in twice as many.

    Williams 1949, "Experimental designs balanced for the estimation of residual effects".
    """
    steps = range(len(names))
    zigzag = [(step + 1) // 2 * (1 if step % 2 else -1) for step in steps]  # 0, 1, -1, 2, -2, ...
    order = [names[(place + number) % len(names)] for place in zigzag]
    return order[::-1] if len(names) % 2 and number % 2 else order
