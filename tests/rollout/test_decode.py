"""The engine's forward pass against the learner's, and its quantised layers against references."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.model.config import ComputeConfig, ModelConfig
from jaxrl_llm.model.transformer import Params, make_forward, unembed
from jaxrl_llm.rollout import decode
from jaxrl_llm.rollout.decode import by_layer, empty_cache, enter, extend, prefill
from jaxrl_llm.rollout.precision import Numerics, Precision, Weights, pack_weights
from tests.reference import precision as reference
from tests.rollout.engines import MODEL, params
from tests.rollout.test_precision import PRECISIONS

TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (24, 16)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(16), TOKENS.shape)


def numerics(precision: Precision, model: ModelConfig = MODEL) -> Numerics:
    return Numerics(model, precision, router_precision="same")


def engine_weights(setup: Numerics) -> Weights:
    return by_layer(pack_weights(params(model=setup.model), numerics=setup))


@functools.cache
def learner(model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities f32[B, S, V] and experts [B, S, L, K] of the learner in float32."""
    weights = params(model=model)
    forward = jax.jit(make_forward(model, ComputeConfig(dispatch="dense")))
    output = forward(weights, TOKENS, POSITIONS, np.ones_like(TOKENS), None)
    logprobs = jax.nn.log_softmax(output.hidden @ unembed(weights, model))
    return np.asarray(logprobs), np.moveaxis(np.asarray(output.router.experts), 0, 2)


@functools.cache
def through_cache(setup: Numerics) -> tuple[np.ndarray, np.ndarray]:
    """The same of the engine, through its cache in one call."""

    @jax.jit
    def run(weights: Weights) -> tuple[jax.Array, jax.Array]:
        cache = empty_cache(setup.model, rows=len(TOKENS), length=TOKENS.shape[1])
        _, hidden, routes = extend(weights, cache, TOKENS, POSITIONS, numerics=setup)
        return jax.nn.log_softmax(hidden @ unembed(weights, setup.model)), routes

    logprobs, routes = run(engine_weights(setup))
    return np.asarray(logprobs), np.asarray(routes)


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        dataclasses.replace(
            MODEL,
            tie_embeddings=True,
            num_kv_heads=4,
            moe=dataclasses.replace(MODEL.moe, normalize_weights=False, dense_layers=(1,)),
        ),
    ],
    ids=["grouped heads, dense first", "tied, weights not normalised, dense in the middle"],
)
def test_float32_equals_the_learner(model: ModelConfig) -> None:
    expected, experts = learner(model)
    logprobs, routes = through_cache(numerics("float32", model))
    np.testing.assert_allclose(logprobs, expected, atol=1e-4)
    np.testing.assert_array_equal(routes, experts)


def test_layers_are_in_order_however_many_there_are() -> None:
    """Also where their names, as texts, would sort otherwise: 10 before 2."""
    model = dataclasses.replace(
        MODEL, num_layers=12, moe=dataclasses.replace(MODEL.moe, dense_layers=())
    )
    expected, experts = learner(model)
    logprobs, routes = through_cache(numerics("float32", model))
    np.testing.assert_allclose(logprobs, expected, atol=1e-3)
    np.testing.assert_array_equal(routes, experts)


def test_a_prompt_in_pieces_leaves_the_same_cache_and_enters_any_slot() -> None:
    setup = numerics("float32")
    weights, empty = engine_weights(setup), functools.partial(empty_cache, MODEL, length=20)
    whole, whole_routes = prefill(weights, empty(rows=3), TOKENS[:3], np.int32(0), numerics=setup)
    cache, routes = empty(rows=3), []
    for start in range(0, 16, 4):
        piece = TOKENS[:3, start : start + 4]
        cache, chosen = prefill(weights, cache, piece, np.int32(start), numerics=setup)
        routes.append(chosen)
    np.testing.assert_array_equal(np.concatenate(routes, axis=1), whole_routes)
    # The last slot does not exist: its row must leave no trace.
    slots = enter(empty(rows=7), cache, np.array([5, 2, 7], np.int32))
    for there, expected in zip(jax.tree.leaves(slots), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(np.asarray(there)[[5, 2]], expected[:2], atol=1e-5)
        assert not np.any(np.asarray(there)[[0, 1, 3, 4, 6]])


@pytest.mark.parametrize(
    ("positions", "blocks"), [(1, 1), (64, 1), (65, 2), (129, 4), (300, 5), (None, 5)]
)
def test_a_cache_of_prompts_has_the_first_blocks_alone(positions: int | None, blocks: int) -> None:
    whole = empty_cache(MODEL, rows=1, length=300)
    cache = empty_cache(MODEL, rows=1, length=300, positions=positions)
    shapes = jax.tree.map(np.shape, [stored[:blocks] for stored in whole])
    assert jax.tree.map(np.shape, cache) == shapes


def test_prompts_enter_the_first_blocks_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "BLOCK", 3)
    slots = jax.tree.map(lambda leaf: leaf + 1, empty_cache(MODEL, rows=3, length=64))
    prompts = empty_cache(MODEL, rows=2, length=64, positions=11)
    for blocks in enter(slots, prompts, np.array([2, 0], np.int32)):
        for index, stored in enumerate(blocks):
            expected = [0, 1, 0] if index < 2 else [1, 1, 1]
            for leaf in stored:
                np.testing.assert_array_equal(np.mean(leaf, axis=(1, 2, 3)), expected)


def test_divergence_from_float32_grows_with_coarser_precision() -> None:
    expected, experts = learner(MODEL)
    divergence, agreement = {}, {}
    for precision in PRECISIONS:
        logprobs, routes = through_cache(numerics(precision))
        divergence[precision] = np.mean(np.sum(np.exp(logprobs) * (logprobs - expected), axis=-1))
        agreement[precision] = np.mean(np.all(np.sort(routes) == np.sort(experts), axis=-1))
    assert list(divergence) == sorted(divergence, key=lambda p: divergence[p])
    assert abs(divergence["float32"]) < 1e-7
    assert 1e-6 < divergence["bfloat16"] < 0.5 * divergence["int8"]
    assert divergence["int8"] < 0.5 * divergence["fp8_e4m3"]
    assert agreement["bfloat16"] > agreement["fp8_e4m3"] > agreement["int4"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_weights_are_the_reference_quantisation_in_place(precision: Precision) -> None:
    weights = params()
    packed = pack_weights(weights, numerics=numerics(precision))
    assert jax.tree.structure(packed) == jax.tree.structure(weights)
    linear = {"q", "k", "v", "o", "gate", "up", "down", "router"}
    wide = "float32" if precision == "float32" else "bfloat16"
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        grid = precision if path[-1].key in linear else wide
        expected = reference.quantize(np.asarray(leaf), grid, axis=-2)
        found = functools.reduce(lambda tree, key: tree[key.key], path, packed)
        np.testing.assert_array_equal(found, expected, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_weights_are_the_arrays_themselves_or_all_arrays_of_their_own(
    precision: Precision,
) -> None:
    weights = params()
    packed = pack_weights(weights, numerics=Numerics(MODEL, precision, "float32"))
    own = [
        leaf is not mine
        for leaf, mine in zip(*map(jax.tree.leaves, (packed, weights)), strict=True)
    ]
    assert own == [precision != "float32"] * len(own)
    addresses = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(weights)}
    shared = [leaf.unsafe_buffer_pointer() in addresses for leaf in jax.tree.leaves(packed)]
    assert shared == [precision == "float32"] * len(shared)


@pytest.mark.parametrize("router", ["same", "float32"])
def test_both_factors_of_every_product_are_on_the_grid(router: Literal["same", "float32"]) -> None:
    """One MoE layer with fp8 numerics, again in numpy, expert by expert and token by token."""
    model = dataclasses.replace(
        MODEL, num_layers=1, moe=dataclasses.replace(MODEL.moe, dense_layers=())
    )
    weights = params(model=model)
    tokens = TOKENS[:1, :6]
    setup = Numerics(model, "fp8_e4m3", router)
    cache = empty_cache(model, rows=1, length=6)
    run = jax.jit(functools.partial(extend, numerics=setup))
    _, hidden, routes = run(engine_weights(setup), cache, tokens, POSITIONS[:1, :6])
    expected, experts = _reference_layer(weights, tokens[0], setup)
    np.testing.assert_array_equal(routes[0, :, 0], experts)
    # Equal bit for bit where sums are taken in one order; another order may move a value to the
    # next point of its grid. Leaving out one quantisation moves them all, ten times as far.
    assert np.mean(np.abs(hidden[0] - expected)) < 2e-3
    coarse = reference.quantize(np.asarray(hidden[0]), "bfloat16", -1)
    np.testing.assert_array_equal(hidden[0], coarse)


def _reference_layer(
    weights: Params, tokens: np.ndarray, setup: Numerics
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [T, D] after the final norm, and the experts [T, K] of the one layer."""
    model, precision, wide = setup.model, setup.precision, reference.bfloat16
    block = jax.tree.map(lambda leaf: np.asarray(leaf[0]), weights["segments"]["00"])
    attention, mlp, size = block["attention"], block["mlp"], model.head_dim

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return wide(x / np.sqrt(mean_square + model.norm_eps) * wide(scale))

    def product(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        return reference.quantize(x, precision, -1) @ reference.quantize(matrix, precision, -2)

    def heads(name: str) -> np.ndarray:
        return wide(product(normed, attention[name])).reshape(len(tokens), -1, size)

    def turn(x: np.ndarray) -> np.ndarray:
        angles = np.arange(len(x))[:, None] * model.rope_theta ** (-np.arange(0, size, 2) / size)
        turned = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * np.exp(1j * angles)[:, None]
        return wide(np.concatenate([turned.real, turned.imag], axis=-1).astype(np.float32))

    hidden = wide(np.asarray(weights["embed"]))[tokens]
    normed = norm(hidden, block["attention_norm"])
    query = turn(norm(heads("q"), attention["q_norm"]))
    key, value = turn(norm(heads("k"), attention["k_norm"])), heads("v")
    attended = np.zeros_like(query)
    for s in range(len(tokens)):
        for h in range(model.num_heads):
            shared = h // (model.num_heads // model.num_kv_heads)
            scores = np.exp(key[: s + 1, shared] @ query[s, h] * size**-0.5)
            attended[s, h] = scores / scores.sum() @ value[: s + 1, shared]
    change = wide(product(wide(attended).reshape(len(tokens), -1), attention["o"]))
    hidden = wide(hidden + change)
    normed = norm(hidden, block["mlp_norm"])
    exact = setup.router_precision == "float32"
    logits = normed @ mlp["router"] if exact else product(normed, mlp["router"])
    experts = np.argsort(-logits, axis=-1, kind="stable")[:, : model.moe.experts_per_token]
    outputs = np.zeros_like(hidden)
    for s, chosen in enumerate(experts):
        shares = np.exp(logits[s, chosen])
        for expert, share in zip(chosen, shares / shares.sum(), strict=True):
            gate = wide(product(normed[s : s + 1], mlp["gate"][expert]))
            up = wide(product(normed[s : s + 1], mlp["up"][expert]))
            inner = wide(gate / (1 + np.exp(-gate)) * up)
            outputs[s] += share * product(inner, mlp["down"][expert])[0]
    final = norm(wide(hidden + wide(outputs)), np.asarray(weights["final_norm"]))
    return final, experts


def test_what_an_earlier_occupant_of_a_row_left_does_not_matter() -> None:
    setup = numerics("float32")
    weights = engine_weights(setup)
    damaged = jax.tree.map(lambda leaf: leaf * jnp.nan, weights)
    run = jax.jit(functools.partial(extend, numerics=setup))
    clean = empty_cache(MODEL, rows=2, length=20)
    spoiled, _, _ = run(damaged, clean, TOKENS[:2], POSITIONS[:2])
    assert all(np.any(np.isnan(keys)) for ((keys, _),) in spoiled)
    _, expected, _ = run(weights, clean, TOKENS[:2, :4], POSITIONS[:2, :4])
    cache, hidden, _ = run(weights, spoiled, TOKENS[:2, :4], POSITIONS[:2, :4])
    np.testing.assert_array_equal(hidden, expected)
    # Nor does it get lost: who attends to it has no sound result.
    _, hidden, _ = run(weights, cache, TOKENS[:2, 6:7], POSITIONS[:2, 6:7])
    assert np.all(np.isnan(hidden))


def test_a_value_that_overflows_is_not_lost() -> None:
    setup = numerics("float32")
    weights = engine_weights(setup)
    attention = weights["layers"][1]["attention"]
    attention["v"] = attention["v"].at[..., 0].set(jnp.inf)  # one number of a value, and no key
    cache = empty_cache(MODEL, rows=2, length=20)
    run = jax.jit(functools.partial(extend, numerics=setup))
    _, hidden, _ = run(weights, cache, TOKENS[:2, :4], POSITIONS[:2, :4])
    assert np.all(np.isnan(hidden))


BLOCK_ROWS = pytest.mark.parametrize(
    "block_rows", [(0, 64), (8, 8), (232, 232)], ids=["blocks", "few first", "hardly any left"]
)


@BLOCK_ROWS
@pytest.mark.parametrize("precision", ["float32", "fp8_e4m3"])
def test_experts_on_their_tokens_equal_all_experts_on_all_tokens(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, block_rows: tuple[int, int]
) -> None:
    """Also where an expert has several blocks and the last of a block's rows are the next one's."""
    setup = numerics(precision)
    weights = engine_weights(setup)

    def outputs() -> tuple[np.ndarray, np.ndarray]:
        cache = empty_cache(MODEL, rows=len(TOKENS), length=16)
        run = jax.jit(functools.partial(extend, numerics=setup))
        _, hidden, routes = run(weights, cache, TOKENS, POSITIONS)
        return np.asarray(hidden), np.asarray(routes)

    hidden, routes = outputs()
    loads = [np.bincount(layer.ravel(), minlength=4) for layer in np.moveaxis(routes, 2, 0)]
    assert np.max(loads) > 232 > np.min(loads)
    monkeypatch.setattr(decode, "FEW", 0)
    monkeypatch.setattr(decode, "_block_rows", lambda *_: block_rows)
    blocked, blocked_routes = outputs()
    # Sums in another order; on a grid, that may move a value to the next point.
    error = np.abs(blocked - hidden)
    assert np.max(error) < 1e-4 if precision == "float32" else np.mean(error) < 2e-3
    np.testing.assert_array_equal(blocked_routes, routes)


@BLOCK_ROWS
def test_a_token_with_its_experts_is_the_same_bit_for_bit_in_any_company(
    monkeypatch: pytest.MonkeyPatch, block_rows: tuple[int, int]
) -> None:
    monkeypatch.setattr(decode, "FEW", 0)
    monkeypatch.setattr(decode, "_block_rows", lambda *_: block_rows)
    setup = numerics("fp8_e4m3")
    weights = engine_weights(setup)
    run = jax.jit(functools.partial(extend, numerics=setup))
    cache = empty_cache(MODEL, rows=len(TOKENS), length=16)
    _, together, _ = run(weights, cache, TOKENS, POSITIONS)
    alone = np.where(np.arange(len(TOKENS))[:, None] == 5, POSITIONS, -1)
    written, hidden, _ = run(weights, cache, TOKENS, alone)
    np.testing.assert_array_equal(hidden[5], together[5])
    for stored in jax.tree.leaves(written):  # tokens that are not there leave no trace
        assert not np.any(np.delete(np.asarray(stored), 5, axis=0))


def test_rows_of_experts_follow_their_mean_load() -> None:
    assert decode._block_rows(256, 32) == (16, 16)
    assert decode._block_rows(512, 32) == (32, 32)
    assert decode._block_rows(4096, 32) == (0, 64)
    assert decode._block_rows(8, 128) == (0, 16)


def test_attention_over_several_blocks_of_the_cache_equals_the_learner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "BLOCK", 3)
    expected, experts = learner(MODEL)
    logprobs, routes = through_cache.__wrapped__(numerics("float32"))
    np.testing.assert_allclose(logprobs, expected, atol=1e-4)
    np.testing.assert_array_equal(routes, experts)
