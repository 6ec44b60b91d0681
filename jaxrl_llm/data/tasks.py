"""The quickstart task: adding two numbers of two or three digits, worked out column by column.

What it is: problems, their worked responses, and worked responses with mistakes in them, numpy and
text only. What it is not: the dataset (prompts.py) or the reward (rewards.py).

Everything has a fixed width, so that each character is a function of few earlier ones at fixed
places, which a model of two layers learns in a few hundred steps:

    prompt          347+085=              operands of three digits, zeros in front
    demonstration   751248133004#0432     the columns 7512 4813 3004, a marker, the answer

The columns go from the units up. Each is its two operand digits, the carry out of it and its digit
of the sum, so a carry or a sum digit depends on two neighbours and the carry three places back.
"""

from __future__ import annotations

import dataclasses

import numpy as np

ALPHABET = "0123456789+=#,"
"""The characters of prompts and responses, and a spare one: with padding and stop a vocabulary of
16, which divides evenly over devices."""

MARKER = "#"
"""Stands before the answer in a response."""

WIDTH = 3
"""Digits of an operand; smaller numbers get zeros in front. An answer has one digit more."""

SMALLEST, LARGEST = 10, 10**WIDTH - 1


@dataclasses.dataclass(frozen=True)
class Problem:
    """One addition."""

    prompt: str  # "347+085="
    answer: str  # "0432"
    demonstration: str  # the scratch, MARKER, the answer


def generate(seed: int, count: int) -> list[Problem]:
    """`count` problems with distinct prompts, a function of the arguments alone.

    Raises ValueError when there are not as many distinct problems.
    """
    span = LARGEST - SMALLEST + 1
    if not 0 < count <= span**2:
        raise ValueError(f"size is {count}; the addition task has 1 to {span**2} distinct prompts")
    chosen = np.random.default_rng(seed).choice(span**2, size=count, replace=False)
    problems = []
    for number in chosen.tolist():
        prompt = f"{number // span + SMALLEST:03d}+{number % span + SMALLEST:03d}="
        demonstration = demonstrate(prompt)
        problems.append(Problem(prompt, demonstration.split(MARKER)[1], demonstration))
    return problems


def demonstrate(prompt: str) -> str:
    """The right worked response to a prompt."""
    return corrupt(prompt, np.random.default_rng(0), share=0.0)


def corrupt(prompt: str, rng: np.random.Generator, share: float) -> str:
    """A worked response in which each scratch digit is wrong with probability `share`.

    What follows a wrong digit follows from it: a wrong copy of an operand digit is added as
    written, a wrong carry is carried, a wrong digit of the sum is copied into the answer. So a
    model that learns from such text still learns the right rule as the likeliest next token.

    Raises ValueError for a prompt that is not one of this task's, or a share outside [0, 1).
    """
    left, right = _operands(prompt)
    if not 0 <= share < 1:
        raise ValueError(f"share of corrupted digits is {share}; it must be in [0, 1)")

    def written(digit: int, base: int) -> int:
        """The digit, or with probability share another one below base."""
        if rng.random() >= share:
            return digit
        return int((digit + rng.integers(1, base)) % base)

    scratch, digits, carry = [], [], 0
    for column in range(WIDTH):
        a, b = (written(int(operand[WIDTH - 1 - column]), 10) for operand in (left, right))
        total = a + b + carry
        carry = written(total // 10, 2)
        digit = written(total % 10, 10)
        scratch += [a, b, carry, digit]
        digits.append(digit)
    answer = [carry, *reversed(digits)]
    return "".join(map(str, scratch)) + MARKER + "".join(map(str, answer))


def _operands(prompt: str) -> tuple[str, str]:
    left, plus, right = prompt.removesuffix("=").partition("+")
    right_shape = len(left) == len(right) == WIDTH and (left + right).isdecimal()
    if not prompt.endswith("=") or not plus or not right_shape:
        raise ValueError(f'{prompt!r} is no addition prompt; these look like "347+085="')
    return left, right
