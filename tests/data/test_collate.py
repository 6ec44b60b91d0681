"""Batches from rollouts: nothing overlaps, nothing is lost, and what cannot fit is named."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.arrays import TrainBatch
from jaxrl_llm.data.collate import collate, collate_demonstrations, place, rows_needed, unpack
from jaxrl_llm.data.demonstrations import Demonstration
from jaxrl_llm.types import (
    NO_ROUTE,
    NOT_REPLAYED,
    NOT_SAMPLED,
    ROUTES_MISSING,
    ROUTES_UNREPORTED,
    SAMPLER_ROUTES,
    Rollout,
    RouteError,
    RouteFallback,
    bind_routes,
)

LENGTH = 12
LAYERS, EXPERTS_PER_TOKEN = 2, 2

lengths_of_sequences = st.lists(st.integers(1, LENGTH), min_size=1, max_size=20)


def make_rollout(seed: int, positions: int, *, with_routes: bool = True) -> Rollout:
    """A rollout of positions + 1 tokens with distinct random content."""
    rng = np.random.default_rng(seed)
    sampled = np.arange(positions) >= rng.integers(0, positions)
    routes = rng.integers(0, 8, (positions, LAYERS, EXPERTS_PER_TOKEN)).astype(np.int16)
    rollout = Rollout(
        prompt_id=f"p{seed}",
        sample_index=0,
        tokens=rng.integers(2, 1000, positions + 1).astype(np.int32),
        loss_mask=sampled,
        sampler_logprobs=np.where(sampled, -rng.random(positions), 0).astype(np.float32),
        routes=None,
        weight_version=np.where(sampled, rng.integers(3, 6, positions), NOT_SAMPLED).astype(
            np.int32
        ),
        text="",
        finish="stop",
    )
    return bind_routes(rollout, routes) if with_routes else rollout


def make_batch(
    rollouts: Sequence[Rollout],
    *,
    rows: int = 0,
    pack: bool = True,
    step: int = 5,
    route_fallback: RouteFallback = "live",
) -> TrainBatch:
    lengths = [rollout.tokens.size - 1 for rollout in rollouts]
    return collate(
        rollouts,
        np.arange(1, len(rollouts) + 1, dtype=np.float32),
        step=step,
        rows=rows or rows_needed(lengths, length=LENGTH, pack=pack),
        length=LENGTH,
        pack=pack,
        route_fallback=route_fallback,
    )


@settings(deadline=None)
@given(lengths_of_sequences, st.booleans())
def test_placements_never_overlap_and_number_the_segments_of_each_row(
    lengths: list[int], pack: bool
) -> None:
    placement = place(lengths, length=LENGTH, pack=pack)
    taken = np.zeros((placement.rows, LENGTH), np.int32)
    for index, size in enumerate(lengths):
        start = placement.start[index]
        assert start + size <= LENGTH
        taken[placement.row[index], start : start + size] += 1
    assert taken.max() == 1
    assert taken.sum() == sum(lengths)
    assert np.all(taken.any(axis=1)), "no row is empty"
    for row in range(placement.rows):
        here = np.flatnonzero(placement.row == row)
        by_start = here[np.argsort(placement.start[here])]
        assert placement.segment[by_start].tolist() == list(range(1, len(here) + 1))


def test_packing_is_first_fit_decreasing() -> None:
    placement = place([3, 9, 4, 8, 3], length=LENGTH, pack=True)
    assert placement.row.tolist() == [0, 0, 1, 1, 2]
    assert placement.start.tolist() == [9, 0, 8, 0, 0]
    assert placement.segment.tolist() == [2, 1, 2, 1, 1]
    assert placement.rows == 3


def test_without_packing_each_sequence_has_its_row_in_order() -> None:
    placement = place([3, 9, 4], length=LENGTH, pack=False)
    assert placement.row.tolist() == [0, 1, 2]
    assert placement.start.tolist() == [0, 0, 0]
    assert placement.rows == 3


@settings(max_examples=30, deadline=None)
@given(lengths_of_sequences, st.booleans(), st.integers(0, 3))
def test_every_field_returns_whole_from_a_batch(
    lengths: list[int], pack: bool, spare_rows: int
) -> None:
    rollouts = [make_rollout(seed, size) for seed, size in enumerate(lengths)]
    needed = rows_needed(lengths, length=LENGTH, pack=pack)
    batch = make_batch(rollouts, rows=needed + spare_rows, pack=pack)
    fields = {
        field.name: unpack(value, rollouts, pack=pack)
        for field in dataclasses.fields(batch)
        if (value := getattr(batch, field.name)) is not None
    }
    assert set(fields) == {f.name for f in dataclasses.fields(batch)} - {
        "old_logprobs",
        "ref_logprobs",
        "gates",
    }
    for index, rollout in enumerate(rollouts):
        sampled = rollout.loss_mask
        expected = {
            "inputs": rollout.tokens[:-1],
            "targets": rollout.tokens[1:],
            "positions": np.arange(lengths[index]),
            "loss_mask": sampled,
            "sampler_logprobs": rollout.sampler_logprobs,
            "staleness": np.where(sampled, 5 - rollout.weight_version, 0),
            "advantages": np.where(sampled, index + 1.0, 0.0),
            "routes": rollout.routes,
            "provenance": np.full(lengths[index], SAMPLER_ROUTES),
        }
        for name, value in expected.items():
            np.testing.assert_array_equal(fields[name][index], value, err_msg=name)
        assert len(set(fields["segment_ids"][index].tolist())) == 1
    padding = np.asarray(batch.segment_ids) == 0
    assert np.count_nonzero(~padding) == sum(lengths)
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if value is not None:
            blank = NO_ROUTE if field.name == "routes" else 0
            assert np.all(value[padding] == blank), field.name


def test_fields_have_the_promised_types() -> None:
    batch = make_batch([make_rollout(0, 4)], rows=2)
    types = {
        field.name: (value.dtype.name, value.shape)
        for field in dataclasses.fields(batch)
        if (value := getattr(batch, field.name)) is not None
    }
    whole, real = ("int32", (2, LENGTH)), ("float32", (2, LENGTH))
    assert types == {
        "inputs": whole,
        "targets": whole,
        "positions": whole,
        "segment_ids": whole,
        "staleness": whole,
        "loss_mask": ("bool", (2, LENGTH)),
        "sampler_logprobs": real,
        "advantages": real,
        "routes": ("int16", (2, LENGTH, LAYERS, EXPERTS_PER_TOKEN)),
        "provenance": ("int8", (2, LENGTH)),
    }


def test_routes_are_none_only_if_no_rollout_has_any() -> None:
    bare = make_rollout(0, 4, with_routes=False)
    assert make_batch([bare, bare]).routes is None
    mixed = make_batch([bare, make_rollout(1, 5)], pack=False)
    assert np.all(mixed.routes[0] == NO_ROUTE)
    np.testing.assert_array_equal(mixed.routes[1, :5], make_rollout(1, 5).routes)


def test_sampler_values_off_the_mask_do_not_reach_the_batch() -> None:
    rollout = make_rollout(0, 6)
    noise = np.where(rollout.loss_mask, rollout.sampler_logprobs, np.nan).astype(np.float32)
    batch = make_batch([dataclasses.replace(rollout, sampler_logprobs=noise)])
    assert np.all(np.isfinite(batch.sampler_logprobs))


def test_no_rollouts_make_a_batch_of_padding() -> None:
    batch = collate([], np.zeros(0, np.float32), step=0, rows=2, length=LENGTH, pack=True)
    assert not np.any(batch.segment_ids)
    assert batch.routes is None


def test_what_cannot_fit_is_refused_by_name() -> None:
    long, short = make_rollout(7, LENGTH + 1), make_rollout(8, LENGTH)
    with pytest.raises(ValueError, match="rollout 'p7' sample 0: 14 tokens need 13 positions"):
        make_batch([short, long], rows=2)
    with pytest.raises(ValueError, match="2 sequences need 2 rows of 12 positions"):
        make_batch([short, short], rows=1)
    with pytest.raises(ValueError, match="sequence 1 needs 13 positions"):
        place([12, 13], length=LENGTH, pack=True)


def test_a_rollout_newer_than_the_learner_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'p0' sample 0: weight_version reaches 5.*at step 4"):
        make_batch([make_rollout(0, 8)], step=4)


def test_routes_of_different_models_are_refused() -> None:
    other = make_rollout(1, 3)
    other = bind_routes(other, np.zeros((3, LAYERS + 1, 2), np.int16))
    with pytest.raises(ValueError, match=r"'p0' sample 0 has \[2, 2\], rollout 'p1' sample 0 has"):
        make_batch([make_rollout(0, 3), other])


@pytest.mark.parametrize("advantages", [np.zeros(2, np.float32), np.zeros(1), np.zeros((1, 1))])
def test_misshapen_advantages_are_refused(advantages: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected float32\[1\]"):
        collate([make_rollout(0, 3)], advantages, step=9, rows=1, length=LENGTH, pack=False)


@pytest.mark.parametrize("pack", [False, True])
def test_demonstrations_are_learned_on_their_responses(pack: bool) -> None:
    made = [
        Demonstration("a", np.array([5, 6, 7, 8], np.int32), np.array([False, True, True])),
        Demonstration("b", np.array([9, 4, 3], np.int32), np.array([True, True])),
    ]
    batch = collate_demonstrations(made, rows=2, length=8, pack=pack)
    where = [(0, slice(0, 3)), (0, slice(3, 5)) if pack else (1, slice(0, 2))]
    for demonstration, place_of_it in zip(made, where, strict=True):
        assert batch.inputs[place_of_it].tolist() == demonstration.tokens[:-1].tolist()
        assert batch.targets[place_of_it].tolist() == demonstration.tokens[1:].tolist()
        assert batch.loss_mask[place_of_it].tolist() == demonstration.loss_mask.tolist()
    assert batch.loss_mask.sum() == 4
    np.testing.assert_array_equal(batch.advantages, batch.loss_mask.astype(np.float32))
    assert not np.any(batch.sampler_logprobs)
    assert batch.routes is None
    assert batch.old_logprobs is None


def test_a_demonstration_too_long_is_named() -> None:
    made = Demonstration("q", np.arange(6, dtype=np.int32), np.ones(5, np.bool_))
    with pytest.raises(ValueError, match="demonstration 'q': 6 tokens need 5 positions"):
        collate_demonstrations([made], rows=1, length=4, pack=False)


def test_provenance_says_whose_experts_a_position_would_use_and_why() -> None:
    whole, bare = make_rollout(1, 5), make_rollout(2, 4, with_routes=False)
    routes = whole.routes.copy()
    routes[[0, 3]] = NO_ROUTE
    holes = bind_routes(whole, routes)
    batch = make_batch([whole, bare, holes], rows=4, pack=False)
    assert batch.provenance.dtype == np.int8
    assert batch.provenance[0].tolist() == [SAMPLER_ROUTES] * 5 + [NOT_REPLAYED] * 7
    assert batch.provenance[1].tolist() == [ROUTES_UNREPORTED] * 4 + [NOT_REPLAYED] * 8
    expected = [SAMPLER_ROUTES] * 5
    expected[0] = expected[3] = ROUTES_MISSING
    assert batch.provenance[2].tolist() == expected + [NOT_REPLAYED] * 7
    assert batch.provenance[3].tolist() == [NOT_REPLAYED] * LENGTH
    alone = make_batch([bare])
    assert alone.routes is None
    assert alone.provenance[0, :4].tolist() == [ROUTES_UNREPORTED] * 4


def test_a_position_without_routes_is_refused_where_no_fallback_is_allowed() -> None:
    whole, bare = make_rollout(1, 5), make_rollout(2, 4, with_routes=False)
    routes = whole.routes.copy()
    routes[[2, 3]] = NO_ROUTE
    holes = bind_routes(whole, routes)
    for rollouts, message in (
        ([whole, bare], "'p2' sample 0: 4 of its 4 positions have no routes, the first is 0"),
        ([bare], "'p2' sample 0: 4 of its 4 positions have no routes, the first is 0"),
        ([holes, whole], "'p1' sample 0: 2 of its 5 positions have no routes, the first is 2"),
    ):
        with pytest.raises(RouteError, match=message) as error:
            make_batch(rollouts, route_fallback="error")
        assert error.value.cause == "missing"
        assert "learner.route_fallback to live" in str(error.value)
    make_batch([whole], route_fallback="error")


def test_routes_that_left_their_tokens_are_refused() -> None:
    """See tests/rollout/test_routes.py for all the ways."""
    left, right = make_rollout(1, 5), make_rollout(2, 5)
    swapped = dataclasses.replace(left, routes=right.routes)
    with pytest.raises(RouteError, match="rollout 'p1' sample 0: its routes have the digest"):
        make_batch([right, swapped])
