"""Routes on arrival and at their use: every way to lose them is a named error."""

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.data.collate import collate
from jaxrl_llm.model.config import ModelConfig, MoEConfig
from jaxrl_llm.rollout.routes import check_routes, with_routes
from jaxrl_llm.types import (
    NO_ROUTE,
    Group,
    Prompt,
    Rollout,
    RouteCause,
    RouteError,
    bind_routes,
    check_digest,
    group_from_json,
    group_to_json,
    without_routes,
)

# Layers 0 and 2 are dense, so that MoE layers 1, 3 and 4 have other indices than their rows.
MODEL = ModelConfig(
    num_layers=5,
    moe=MoEConfig(num_experts=8, experts_per_token=2, dense_layers=(0, 2), dense_width=4),
)
MOE_LAYERS = [1, 3, 4]
TOKENS = 9
POSITIONS = TOKENS - 1


def random_ids(seed: int = 0, *, positions: int = POSITIONS, experts: int = 8) -> np.ndarray:
    """What an engine sends for the MoE layers alone: distinct experts, int32[S, 3, 2]."""
    order = np.argsort(np.random.default_rng(seed).random((positions, 3, experts)), axis=-1)
    return order[..., :2].astype(np.int32)


def all_layers(ids: np.ndarray) -> np.ndarray:
    """As SGLang sends them: rows of all hidden layers, zeros in the dense ones."""
    whole = np.zeros((len(ids), MODEL.num_layers, ids.shape[2]), np.int32)
    whole[:, MOE_LAYERS] = ids
    return whole


def make_rollout(sample_index: int = 3, *, seed: int = 0) -> Rollout:
    rng = np.random.default_rng([seed, sample_index])
    sampled = np.arange(POSITIONS) >= 2
    return Rollout(
        prompt_id="add-17",
        sample_index=sample_index,
        tokens=rng.integers(0, 16, TOKENS).astype(np.int32),
        loss_mask=sampled,
        sampler_logprobs=np.where(sampled, -0.5, 0).astype(np.float32),
        routes=None,
        weight_version=np.where(sampled, 0, -1).astype(np.int32),
        text="",
        finish="stop",
    )


def use(*rollouts: Rollout) -> None:
    """What a learner does with rollouts."""
    advantages = np.zeros(len(rollouts), np.float32)
    collate(rollouts, advantages, step=0, rows=len(rollouts), length=POSITIONS, pack=False)


def refused(action: Callable[[], object]) -> RouteError:
    with pytest.raises(RouteError) as error:
        action()
    return error.value


# ------------------------------------------------------------------------------------- on arrival


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint8, np.uint64])
def test_sound_routes_become_int16_of_the_moe_layers(dtype: type) -> None:
    ids = random_ids()
    for sent in (ids, all_layers(ids)):
        rollout = with_routes(make_rollout(), sent.astype(dtype), MODEL)
        assert rollout.routes is not None
        assert rollout.routes.dtype == np.int16
        np.testing.assert_array_equal(rollout.routes, ids)
        assert rollout.routes.base is None, "no view that keeps the whole message alive"
        use(rollout)


def test_blank_rows_of_dense_layers_may_be_no_route() -> None:
    sent = all_layers(random_ids())
    sent[:, [0, 2]] = NO_ROUTE
    routes = check_routes(sent, MODEL, positions=POSITIONS, owner="it")
    np.testing.assert_array_equal(routes, random_ids())


def test_a_token_may_have_no_routes_at_all() -> None:
    ids = random_ids()
    ids[4] = NO_ROUTE
    rollout = with_routes(make_rollout(), ids, MODEL)
    assert np.all(rollout.routes[4] == NO_ROUTE)


def test_one_expert_in_all_is_always_chosen() -> None:
    model = ModelConfig(moe=MoEConfig(num_experts=1, experts_per_token=1))
    routes = check_routes(np.zeros((4, 2, 1), np.int32), model, positions=4, owner="it")
    assert not routes.any()


def put(value: int, *where: object) -> Callable[[np.ndarray], np.ndarray]:
    """A fault that writes `value` at places of all_layers()."""

    def fault(sent: np.ndarray) -> np.ndarray:
        sent = sent.copy()
        for place in where:
            sent[place] = value
        return sent

    return fault


FAULTS: dict[str, tuple[RouteCause, Callable[[np.ndarray], np.ndarray], str]] = {
    "floats": ("dtype", lambda sent: sent.astype(np.float32), "routes are float32[8, 5, 2]"),
    "booleans": ("dtype", lambda sent: sent > 0, "expert ids are integers"),
    "flat": ("shape", lambda sent: sent.reshape(-1), "expected [8, layers, 2]"),
    "other top-k": ("shape", lambda sent: sent[..., :1], "routes are int32[8, 5, 1]"),
    "a row short": ("row_count", lambda sent: sent[1:], "7 rows for 8 forward passes"),
    "a row long": (
        "row_count",
        lambda sent: np.concatenate([sent, sent[:1]]),
        "9 rows for 8 forward passes; every token but the last is an input",
    ),
    "a layer dropped": (
        "layer_count",
        lambda sent: sent[:, 1:],
        "4 layers for a model of 5, of which 3 have experts",
    ),
    "layers shifted": (
        "dense_layer",
        lambda sent: np.roll(sent, 1, axis=1),
        "expert ids in a dense layer: 16 times, first at layer 0, position 0; engine and learner",
    ),
    "too large": (
        "range",
        put(8, (5, 3, 1), (6, 3, 0)),
        "outside 0 to 7: 2 times, first at layer 3, position 5; the engine serves another model",
    ),
    "too small": ("range", put(-2, (7, 4, 1)), "outside 0 to 7: 1 times, first at layer 4, posi"),
    "wraps in int16": ("range", put(2**16, (0, 1, 0)), "first at layer 1, position 0"),
    "half a row": (
        "partial_row",
        put(NO_ROUTE, (2, 3, 1)),
        "NO_ROUTE in some but not all slots of a token: 1 times, first at layer 3, position 2",
    ),
    "one layer of a token": (
        "partial_row",
        put(NO_ROUTE, (2, 4)),
        "NO_ROUTE in some but not all slots of a token: 1 times, first at layer 4, position 2",
    ),
    "a layer unwritten": (
        "zero_layer",
        put(0, (slice(None), 3)),
        "layer 3 has expert 0 at every position and in every slot, from position 0 on (1 of 3",
    ),
    "nothing written": (
        "zero_layer",
        np.zeros_like,
        "layer 1 has expert 0 at every position and in every slot, from position 0 on (3 of 3",
    ),
    "a token overwritten": (
        "duplicate",
        put(0, (6, slice(None))),
        "an expert twice among those of one token: 3 times, first at layer 1, position 6",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_with_their_place_and_their_remedy(name: str) -> None:
    cause, fault, message = FAULTS[name]
    sent = fault(all_layers(random_ids()))
    error = refused(lambda: with_routes(make_rollout(), sent, MODEL))
    assert error.cause == cause
    assert str(error).startswith("rollout 'add-17' sample 3: ")
    assert message in str(error)


def test_every_cause_has_a_test() -> None:
    at_use = {"missing", "digest"}
    assert {cause for cause, *_ in FAULTS.values()} | at_use == set(RouteCause.__args__)


def test_a_layer_of_zeros_is_refused_for_one_expert_per_token_too() -> None:
    """Nothing repeats then; that all tokens choose expert 0 is how an unwritten buffer looks."""
    model = ModelConfig(moe=MoEConfig(num_experts=4, experts_per_token=1))
    ids = np.random.default_rng(0).integers(0, 4, (6, 2, 1))
    check_routes(ids, model, positions=6, owner="it")
    ids[:, 1] = 0
    error = refused(lambda: check_routes(ids, model, positions=6, owner="it"))
    assert error.cause == "zero_layer"
    assert "it: layer 1 has expert 0" in str(error)
    assert "never written" in str(error)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_duplicates_are_found_wherever_they_are(seed: int, slots: int) -> None:
    """Against a count of the distinct ids of each row."""
    model = ModelConfig(moe=MoEConfig(num_experts=6, experts_per_token=slots))
    ids = np.random.default_rng(seed).integers(0, 6, (3, 2, slots))
    ids[0] = np.arange(slots)  # no layer is all zeros
    distinct = [[len(set(row.tolist())) for row in token] for token in ids]
    repeated = np.argwhere(np.array(distinct) < slots)
    if not repeated.size:
        check_routes(ids, model, positions=3, owner="it")
        return
    error = refused(lambda: check_routes(ids, model, positions=3, owner="it"))
    assert error.cause == "duplicate"
    position, layer = repeated[0]
    place = f"{len(repeated)} times, first at layer {layer}, position {position};"
    assert place in str(error)


# ---------------------------------------------------------------------------------- at their use


def arrived(sample_index: int, *, seed: int = 0) -> Rollout:
    ids = random_ids(10 * seed + sample_index)
    return with_routes(make_rollout(sample_index, seed=seed), ids, MODEL)


def shifted(rollout: Rollout) -> Rollout:
    return dataclasses.replace(rollout, routes=np.roll(rollout.routes, 1, axis=0))


def without_a_layer(rollout: Rollout) -> Rollout:
    return dataclasses.replace(rollout, routes=rollout.routes[:, 1:])


def zero_filled(rollout: Rollout) -> Rollout:
    return dataclasses.replace(rollout, routes=np.zeros_like(rollout.routes))


def of_another_sample(rollout: Rollout) -> Rollout:
    return dataclasses.replace(rollout, routes=arrived(2).routes)


def with_the_digest_of_another(rollout: Rollout) -> Rollout:
    """Both swapped: routes and digest belong together but not to these tokens."""
    other = arrived(2)
    return dataclasses.replace(rollout, routes=other.routes, route_digest=other.route_digest)


def reshaped(rollout: Rollout) -> Rollout:
    """The same bytes in another shape."""
    return dataclasses.replace(rollout, routes=rollout.routes.reshape(8, 2, 3))


def renamed(rollout: Rollout) -> Rollout:
    return dataclasses.replace(rollout, prompt_id="add-18")


def renumbered(rollout: Rollout) -> Rollout:
    return dataclasses.replace(rollout, sample_index=7)


def retokenized(rollout: Rollout) -> Rollout:
    tokens = rollout.tokens.copy()
    tokens[4] += 1
    return dataclasses.replace(rollout, tokens=tokens)


@pytest.mark.parametrize(
    "damage",
    [
        shifted,
        without_a_layer,
        zero_filled,
        of_another_sample,
        with_the_digest_of_another,
        reshaped,
        renamed,
        renumbered,
        retokenized,
    ],
)
def test_routes_changed_after_their_arrival_are_refused_where_they_are_used(
    damage: Callable[[Rollout], Rollout],
) -> None:
    good, damaged = arrived(1), damage(arrived(3))
    use(good)
    error = refused(lambda: use(good, damaged))
    assert error.cause == "digest"
    assert f"{damaged.name}: its routes have the digest" in str(error)
    assert arrived(3).route_digest in str(error) or damage is with_the_digest_of_another


def test_rewards_and_verdicts_do_not_break_the_bond() -> None:
    use(dataclasses.replace(arrived(3), reward=1.0, verdict="correct"))


def test_the_bond_survives_json_and_notices_damage_on_the_way() -> None:
    prompt = Prompt("add-17", make_rollout().tokens[:3], "", "")
    text = json.dumps(group_to_json(Group(prompt, (arrived(0), arrived(1)))))
    back = group_from_json(json.loads(text))
    assert [r.route_digest for r in back.rollouts] == [arrived(n).route_digest for n in (0, 1)]
    use(*back.rollouts)
    value = json.loads(text)
    first, second = value["rollouts"]
    first["routes"], second["routes"] = second["routes"], first["routes"]
    swapped = group_from_json(value)
    assert refused(lambda: use(swapped.rollouts[0])).cause == "digest"


def test_routes_and_digest_come_and_go_together() -> None:
    bare = make_rollout()
    bound = bind_routes(bare, random_ids().astype(np.int16))
    assert without_routes(bound) == bare
    check_digest(bare)
    check_digest(bound)
    for half in (
        lambda: dataclasses.replace(bare, routes=bound.routes),
        lambda: dataclasses.replace(bare, route_digest=bound.route_digest),
        lambda: dataclasses.replace(bound, routes=None),
        lambda: dataclasses.replace(bound, route_digest=""),
    ):
        error = refused(half)
        assert error.cause == "digest"
        assert "'add-17' sample 3: routes is" in str(error)
        assert "with_routes" in str(error)
