"""The enumeration: every response once, under the alignment rule."""

import itertools

import numpy as np
import pytest

from jaxrl_llm.first_order.enumeration import (
    MAX_RESPONSES,
    NO_TOKEN,
    count_responses,
    enumerate_responses,
)


def by_hand(vocab_size: int, length: int, stop: int) -> set[tuple[int, ...]]:
    """All strings of `length` tokens, each cut behind its first stop token."""
    cut = set()
    for string in itertools.product(range(vocab_size), repeat=length):
        end = string.index(stop) + 1 if stop in string else length
        cut.add(string[:end])
    return cut


@pytest.mark.parametrize(("vocab_size", "length", "stop"), [(2, 1, 0), (3, 4, 1), (5, 3, 4)])
def test_every_response_is_there_once(vocab_size: int, length: int, stop: int) -> None:
    found = enumerate_responses([(0,)], vocab_size=vocab_size, length=length, stop_token=stop)
    listed = [tuple(row[row != NO_TOKEN].tolist()) for row in found.responses]
    assert set(listed) == by_hand(vocab_size, length, stop)
    assert len(listed) == len(set(listed)) == count_responses(vocab_size, length)
    np.testing.assert_array_equal(found.stopped, [row[-1] == stop for row in listed])


def test_rows_keep_the_alignment_rule() -> None:
    found = enumerate_responses([(1,), (2, 0, 2)], vocab_size=3, length=3, stop_token=0)
    prompts = {0: [1], 1: [2, 0, 2]}
    batch = found.batch
    assert batch.inputs.shape == (2 * count_responses(3, 3), 5)
    assert found.prompts == 2
    for row, prompt in enumerate(found.prompt.tolist()):
        response = found.responses[row]
        tokens = prompts[prompt] + response[response != NO_TOKEN].tolist()
        size = len(tokens) - 1
        np.testing.assert_array_equal(batch.inputs[row, :size], tokens[:-1])
        np.testing.assert_array_equal(batch.targets[row, :size], tokens[1:])
        np.testing.assert_array_equal(batch.positions[row, :size], np.arange(size))
        np.testing.assert_array_equal(batch.segment_ids[row], np.arange(5) < size)
        sampled = (np.arange(5) >= len(prompts[prompt]) - 1) & (np.arange(5) < size)
        np.testing.assert_array_equal(batch.loss_mask[row], sampled)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 10, "length": 6}, "are 597871 rows, more than 100000; lower the length"),
        ({"vocab_size": 1}, "vocab_size 1"),
        ({"length": 0}, "length 0"),
        ({"stop_token": 5}, "stop_token 5"),
        ({"prompts": []}, "give at least one"),
        ({"prompts": [(1,), ()]}, r"prompts \[\(\)\]"),
        ({"prompts": [(7,)]}, "between 0 and 4"),
    ],
)
def test_what_cannot_be_enumerated_is_refused(settings: dict, message: str) -> None:
    given = {"prompts": [(1,)], "vocab_size": 5, "length": 2, "stop_token": 0, **settings}
    with pytest.raises(ValueError, match=message):
        enumerate_responses(given.pop("prompts"), **given)


def test_the_limit_counts_all_prompts() -> None:
    assert count_responses(10, 5) < MAX_RESPONSES < 2 * count_responses(10, 5)
    with pytest.raises(ValueError, match="2 prompts x 66430 responses"):
        enumerate_responses([(1,), (2,)], vocab_size=10, length=5, stop_token=0)
