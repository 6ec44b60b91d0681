"""The in-process engine: what it reports, how it schedules, and what it survives."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.arrays import ForwardOutput
from jaxrl_llm.model.config import ComputeConfig
from jaxrl_llm.model.logprobs import token_logprobs
from jaxrl_llm.model.transformer import Params, make_forward, unembed
from jaxrl_llm.rollout import local
from jaxrl_llm.rollout.decode import Decoded
from jaxrl_llm.rollout.engine import EngineFailure, Request
from jaxrl_llm.rollout.local import LocalEngine, LocalEngineConfig
from jaxrl_llm.types import NOT_SAMPLED, Rollout, RouteError, SamplingParams, check_digest
from tests.rollout.engines import (
    CONFIG,
    MODEL,
    assert_same,
    by_prompt,
    engine,
    mixed_requests,
    params,
    request,
)


@functools.cache
def mixed_rollouts() -> dict[str, Rollout]:
    """What the engine makes of mixed_requests() with the first weights, as version 7."""
    return by_prompt(engine(version=7).generate(mixed_requests()))


@functools.cache
def _learner() -> jax.stages.Wrapped:
    return jax.jit(make_forward(MODEL, ComputeConfig(dispatch="dense")))


def padded(values: np.ndarray) -> np.ndarray:
    """One row [1, max_length] of values, so that the learner compiles once."""
    return np.pad(values, (0, CONFIG.max_length - values.size))[None]


def learner_output(rollout: Rollout, *, seed: int) -> ForwardOutput:
    """The learner's forward pass over the rollout in a padded row."""
    size = rollout.tokens.size - 1
    segment = np.ones(size, np.int32)
    inputs, positions = rollout.tokens[:-1], np.arange(size, dtype=np.int32)
    rows = (padded(values) for values in (inputs, positions, segment))
    return _learner()(params(seed), *rows, None)


def assert_learner_agrees(
    rollout: Rollout, temperature: float, *, seed: int = 0, logprobs: bool = True
) -> None:
    """Routes equal, and log-probabilities to 1e-4, those of the learner on the same tokens."""
    size = rollout.tokens.size - 1
    output = learner_output(rollout, seed=seed)
    experts = np.moveaxis(np.asarray(output.router.experts)[:, 0, :size], 0, 1)
    np.testing.assert_array_equal(rollout.routes, experts)
    if logprobs:
        ours, _ = token_logprobs(
            output.hidden,
            unembed(params(seed), MODEL),
            padded(rollout.tokens[1:]),
            temperature=temperature,
            chunk=CONFIG.max_length,
        )
        expected = np.where(rollout.loss_mask, np.asarray(ours)[0, :size], 0.0)
        np.testing.assert_allclose(rollout.sampler_logprobs, expected, atol=1e-4)


def test_every_request_comes_back_once_and_well_formed() -> None:
    rollouts = mixed_rollouts()
    assert sorted(rollouts) == sorted(r.prompt.prompt_id for r in mixed_requests())
    for asked in mixed_requests():
        rollout, sampling = rollouts[asked.prompt.prompt_id], asked.sampling
        prompt_size = asked.prompt.tokens.size
        response = rollout.tokens[prompt_size:].tolist()
        np.testing.assert_array_equal(rollout.tokens[:prompt_size], asked.prompt.tokens)
        assert rollout.sample_index == asked.sample_index
        np.testing.assert_array_equal(
            rollout.loss_mask, np.arange(rollout.tokens.size - 1) >= prompt_size - 1
        )
        np.testing.assert_array_equal(
            rollout.weight_version, np.where(rollout.loss_mask, 7, NOT_SAMPLED)
        )
        assert rollout.routes is not None
        assert np.all((rollout.routes >= 0) & (rollout.routes < MODEL.moe.num_experts))
        check_digest(rollout)
        stops = [token in sampling.stop_token_ids for token in response]
        assert not any(stops[:-1])
        assert rollout.finish == ("stop" if stops[-1] else "length")
        assert stops[-1] or len(response) == sampling.max_new_tokens
        assert rollout.text == " ".join(map(str, response[:-1] if stops[-1] else response))
    assert {r.finish for r in rollouts.values()} == {"stop", "length"}


def test_float32_logprobs_and_routes_are_the_learners() -> None:
    for asked in mixed_requests():
        truncated = asked.sampling.top_p < 1 or asked.sampling.top_k > 0
        assert_learner_agrees(
            mixed_rollouts()[asked.prompt.prompt_id],
            asked.sampling.temperature or 1.0,
            logprobs=not truncated,
        )


def test_greedy_takes_the_likeliest_token() -> None:
    (rollout,) = by_prompt(
        engine().generate([request(3, SamplingParams(6, temperature=0.0))])
    ).values()
    hidden = learner_output(rollout, seed=0).hidden[0, : rollout.tokens.size - 1]
    best = np.argmax(np.asarray(hidden @ unembed(params(), MODEL)), axis=-1)
    sampled = rollout.loss_mask
    np.testing.assert_array_equal(rollout.tokens[1:][sampled], best[sampled])


def test_the_same_call_twice_is_equal_bit_for_bit() -> None:
    made = engine(dataclasses.replace(CONFIG, precision="fp8_e4m3"))
    first, second = list(made.generate(mixed_requests())), list(made.generate(mixed_requests()))
    for left, right in zip(first, second, strict=True):
        assert isinstance(left, Rollout)
        assert isinstance(right, Rollout)
        assert_same(left, right)


def test_a_request_is_the_same_alone_and_in_any_company() -> None:
    made = engine()
    backwards = by_prompt(made.generate(mixed_requests()[::-1]))
    for index, asked in enumerate(mixed_requests()):
        name = asked.prompt.prompt_id
        versions = [backwards[name]]
        if index % 4 == 0:
            versions += by_prompt(made.generate([asked])).values()
        for other in versions:
            np.testing.assert_array_equal(other.tokens, mixed_rollouts()[name].tokens)
            np.testing.assert_array_equal(other.routes, mixed_rollouts()[name].routes)
            np.testing.assert_allclose(
                other.sampler_logprobs, mixed_rollouts()[name].sampler_logprobs, atol=1e-5
            )


def test_shapes_of_the_engine_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    # Prompts of several blocks, and chunks that cross them.
    monkeypatch.setattr("jaxrl_llm.rollout.decode.BLOCK", 4)
    shapes = LocalEngineConfig(
        slots=9, max_length=40, prefill_rows=5, prefill_chunk=3, decode_steps=4
    )
    for name, rollout in by_prompt(engine(shapes).generate(mixed_requests())).items():
        np.testing.assert_array_equal(rollout.tokens, mixed_rollouts()[name].tokens)
        np.testing.assert_array_equal(rollout.routes, mixed_rollouts()[name].routes)


def test_finished_rows_are_refilled_and_none_waits_for_the_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Decoded] = []
    decode = local.decode

    def recorded(*args: object, **settings: object) -> object:
        cache, decoded = decode(*args, **settings)
        calls.append(jax.device_get(decoded))
        return cache, decoded

    monkeypatch.setattr(local, "decode", recorded)
    lengths = [24] + [4] * 18
    requests = [request(seed, SamplingParams(n)) for seed, n in enumerate(lengths)]
    outcomes = list(engine(dataclasses.replace(CONFIG, free_slots=1)).generate(requests))
    steps = sum(int(np.max(call.counts)) for call in calls)
    # Three slots serve 18 short responses, 4 steps each, while the fourth makes its 24. In fixed
    # batches of 4 slots it would take 24 + 4 * 4 steps.
    assert steps == 24
    assert sum(int(np.sum(call.counts)) for call in calls) == sum(lengths)
    assert len(outcomes) == len(requests)
    # The longest was asked first and finishes last.
    assert [o.prompt_id for o in outcomes].index("p0") >= len(outcomes) - 4


def short_requests() -> list[Request]:
    return [request(seed, SamplingParams(2 + seed % 4)) for seed in range(12)]


def record_prompts(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Prompts of each call of prefill; and those that entered slots before each call of decode."""
    computed: list[int] = []
    entered = [0]
    prefill, admit, decode = local.prefill, local._SlotTable.admit, local.decode

    def counted(*args: Any, **settings: Any) -> Any:
        computed.append(int(np.count_nonzero(args[2][:, 0] >= 0)))
        return prefill(*args, **settings)

    def admitted(*args: Any) -> list[int]:
        slots = admit(*args)
        entered[-1] += len(slots)
        return slots

    def decoding(*args: Any, **settings: Any) -> Any:
        entered.append(0)
        return decode(*args, **settings)

    monkeypatch.setattr(local, "prefill", counted)
    monkeypatch.setattr(local._SlotTable, "admit", admitted)
    monkeypatch.setattr(local, "decode", decoding)
    return computed, entered


def test_decoding_pauses_only_when_enough_slots_can_be_refilled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed, entered = record_prompts(monkeypatch)
    config = dataclasses.replace(CONFIG, decode_steps=32)
    list(engine(config).generate(short_requests()))
    assert computed == [2] * 6
    assert sum(entered) == 12
    # Two slots must be free, so a response that has ended waits for a second one.
    first, *later, _ = [count for count in entered if count]
    assert first == CONFIG.slots
    assert later
    assert all(count >= CONFIG.free_slots for count in later)


def test_prompts_are_computed_together_and_enter_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = by_prompt(engine().generate(short_requests()))
    computed, entered = record_prompts(monkeypatch)
    config = dataclasses.replace(CONFIG, prefill_rows=5, prefill_chunk=8, free_slots=1)
    for name, rollout in by_prompt(engine(config).generate(short_requests())).items():
        np.testing.assert_array_equal(rollout.tokens, expected[name].tokens)
        np.testing.assert_array_equal(rollout.routes, expected[name].routes)
    assert computed == [5, 5, 2]
    assert entered[0] == CONFIG.slots
    assert sum(entered) == 12
    assert 1 in entered


def test_slots_are_halved_once_the_requests_left_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    decode = local.decode

    def recorded(*args: Any, **settings: Any) -> Any:
        active = args[2].active
        sizes.append((active.size, int(np.count_nonzero(active))))
        return decode(*args, **settings)

    monkeypatch.setattr(local, "decode", recorded)
    monkeypatch.setattr(local, "LEAST_SLOTS", 2)
    config = dataclasses.replace(CONFIG, slots=8, decode_steps=2)
    for name, rollout in by_prompt(engine(config).generate(mixed_requests())).items():
        np.testing.assert_array_equal(rollout.tokens, mixed_rollouts()[name].tokens)
        np.testing.assert_array_equal(rollout.routes, mixed_rollouts()[name].routes)
    assert [size for size, _ in sizes] == sorted((size for size, _ in sizes), reverse=True)
    assert {size for size, _ in sizes} == {8, 4, 2}
    # Never before they fit, nor long after.
    last = max(index for index, (size, _) in enumerate(sizes) if size == 8)
    assert all(active <= size for size, active in sizes)
    assert all(active > 4 for _, active in sizes[:last])


def test_requests_that_cannot_be_served_fail_and_the_others_do_not() -> None:
    good = request(1, SamplingParams(4))
    long = request(2, SamplingParams(30))
    strange = request(3, SamplingParams(4))
    strange.prompt.tokens[2] = MODEL.vocab_size
    outcomes = list(engine().generate([long, good, strange]))
    causes = {o.prompt_id: o.cause for o in outcomes if isinstance(o, EngineFailure)}
    assert causes == {"p2": "too_long", "p3": "bad_token"}
    assert [o.prompt_id for o in outcomes if isinstance(o, Rollout)] == ["p1"]
    assert list(engine().generate([])) == []


def test_weights_that_are_not_finite_fail_their_requests_and_spoil_no_later_ones() -> None:
    made = engine()
    made.publish(jax.tree.map(lambda leaf: leaf * jnp.nan, params()), 1)
    failures = {o.prompt_id: o for o in made.generate(mixed_requests())}
    for asked in mixed_requests():
        failure = failures[asked.prompt.prompt_id]
        assert isinstance(failure, EngineFailure)
        assert failure.cause == "not_finite"
        # The first sampled token ends the row: a later one might look sound again.
        assert f"token {asked.prompt.tokens.size} is not finite" in failure.message
    made.publish(params(), 7)
    for name, rollout in by_prompt(made.generate(mixed_requests())).items():
        assert_same(rollout, mixed_rollouts()[name])


def test_routes_pass_the_checks_of_every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routes that decode never wrote are refused on arrival."""
    decode = local.decode

    def forgetful(*args: object, **settings: object) -> object:
        cache, decoded = decode(*args, **settings)
        return cache, dataclasses.replace(decoded, routes=jnp.zeros_like(decoded.routes))

    monkeypatch.setattr(local, "decode", forgetful)
    with pytest.raises(RouteError, match=r"rollout 'p1' sample 1: layer 1 has expert 0") as error:
        list(engine().generate([request(1, SamplingParams(6), prompt_length=1)]))
    assert error.value.cause == "zero_layer"


def test_an_abandoned_iterator_leaves_the_engine_usable() -> None:
    made = engine(version=7)
    abandoned = made.generate(mixed_requests())
    next(abandoned)
    abandoned.close()
    for name, rollout in by_prompt(made.generate(mixed_requests())).items():
        assert_same(rollout, mixed_rollouts()[name])


def test_open_iterators_do_not_disturb_each_other() -> None:
    made = engine(version=7)
    pairs = zip(made.generate(mixed_requests()), made.generate(mixed_requests()), strict=True)
    for left, right in pairs:
        assert isinstance(left, Rollout)
        assert isinstance(right, Rollout)
        assert_same(left, right)


def test_a_publish_under_way_shows_in_the_versions_of_later_tokens() -> None:
    made = engine(version=1)
    requests = [request(0, SamplingParams(2))]
    requests += [request(seed, SamplingParams(20)) for seed in range(1, 4)]
    outcomes = made.generate(requests)
    first = next(outcomes)
    made.publish(params(seed=1), 2)
    later = by_prompt(outcomes).values()
    assert isinstance(first, Rollout)
    assert set(first.weight_version[first.loss_mask]) == {1}
    for rollout in later:
        versions = rollout.weight_version[rollout.loss_mask]
        assert np.all(np.diff(versions) >= 0)
        assert set(versions) == {1, 2}


def test_requests_that_enter_after_a_publish_know_the_new_weights_alone() -> None:
    config = dataclasses.replace(CONFIG, prefill_rows=5)  # four enter, one is computed and waits
    requests = [request(seed, SamplingParams(6)) for seed in range(9)]
    expected = by_prompt(engine(config, version=2, seed=1).generate(requests))
    made = engine(config, version=1)
    outcomes = made.generate(requests)
    next(outcomes)
    made.publish(params(seed=1), 2)
    later = by_prompt(outcomes)
    for name in ("p4", "p5", "p6", "p7", "p8"):
        assert_same(later[name], expected[name])


def update(weights: Params) -> Params:
    """Other weights, in the memory of these: a learner's step donates its own."""
    return jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1.0, tree), donate_argnums=0)(
        weights
    )


def addresses(tree: object) -> set[int]:
    return {
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    }


def on_mesh(weights: Params, devices: int) -> Params:
    """Whole on every device of a mesh, as a learner without parameter sharding has them."""
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.device_put(weights, whole)


@pytest.mark.parametrize("devices", [1, 2])
def test_float32_weights_are_published_without_a_copy(devices: int) -> None:
    mine = on_mesh(params(), devices)
    made = engine()
    before = {
        array.unsafe_buffer_pointer()
        for array in jax.live_arrays()
        if array.ndim and len(array.devices()) == 1
    }
    made.publish(mine, 7)
    after = {
        array.unsafe_buffer_pointer()
        for array in jax.live_arrays()
        if array.ndim and len(array.devices()) == 1
    }
    assert after - before <= addresses(mine)
    for name, rollout in by_prompt(made.generate(mixed_requests())).items():
        assert_same(rollout, mixed_rollouts()[name])


def test_weights_that_an_update_has_taken_are_an_error_until_the_next_publish() -> None:
    mine = on_mesh(params(), 1)
    made = engine()
    made.publish(mine, 7)
    outcomes = made.generate(mixed_requests())
    next(outcomes)
    new = update(mine)
    assert addresses(new)
    with pytest.raises(RuntimeError, match=r"an update has taken the weights of version 7"):
        list(outcomes)
    with pytest.raises(RuntimeError, match=r"publish\(\) those that came of it"):
        next(made.generate(mixed_requests()))
    made.publish(params(seed=1), 8)
    asked = request(2, SamplingParams(8))
    (rollout,) = by_prompt(made.generate([asked])).values()
    assert_learner_agrees(rollout, 1.0, seed=1)


@pytest.mark.parametrize("router", ["float32", "same"])
def test_rounded_weights_are_the_engines_own_and_survive_an_update(
    router: Literal["float32", "same"],
) -> None:
    config = dataclasses.replace(CONFIG, precision="fp8_e4m3", router_precision=router)
    mine = on_mesh(params(), 1)
    made = engine(config)
    made.publish(mine, 7)
    expected = by_prompt(made.generate(mixed_requests()))
    update(mine)
    for name, rollout in by_prompt(made.generate(mixed_requests())).items():
        assert_same(rollout, expected[name])


@pytest.mark.parametrize(("chunk", "widths"), [(64, {8}), (4, {4})])
def test_prompts_enter_as_wide_as_the_longest_of_the_call_needs(
    monkeypatch: pytest.MonkeyPatch, chunk: int, widths: set[int]
) -> None:
    seen = set()
    prefill = local.prefill

    def recorded(*args: Any, **settings: Any) -> Any:
        seen.add(args[2].shape[1])
        return prefill(*args, **settings)

    monkeypatch.setattr(local, "prefill", recorded)
    lengths = [1, 3, 7]
    asked = [request(n, SamplingParams(4), prompt_length=n) for n in lengths]
    made = engine(dataclasses.replace(CONFIG, prefill_chunk=chunk))
    for name, rollout in by_prompt(made.generate(asked)).items():
        assert rollout.tokens.size == int(name[1:]) + 4
        assert_learner_agrees(rollout, 1.0)
    assert seen == widths


def test_weights_sharded_over_a_mesh_can_be_published() -> None:
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sharded = jax.tree.map(
        lambda leaf: jax.device_put(leaf, whole if leaf.ndim == 1 else spec), params()
    )
    made = engine()
    made.publish(sharded, 7)
    for name, rollout in by_prompt(made.generate(mixed_requests())).items():
        assert_same(rollout, mixed_rollouts()[name])


def test_an_engine_without_weights_says_so() -> None:
    made = LocalEngine(CONFIG, MODEL, str)
    with pytest.raises(RuntimeError, match="publish"):
        next(made.generate(mixed_requests()))
    with pytest.raises(ValueError, match="version is -1"):
        made.publish(params(), -1)
    made.publish(params(), 0)
    made.close()
    with pytest.raises(RuntimeError, match="publish"):
        next(made.generate(mixed_requests()))


def test_a_config_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="slots is 0"):
        LocalEngineConfig(slots=0)
    with pytest.raises(ValueError, match="free_slots is -1"):
        LocalEngineConfig(free_slots=-1)
