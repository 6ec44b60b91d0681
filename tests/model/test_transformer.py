"""The whole model against float64 numpy: packed, replayed, recomputed, on one device and eight."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.arrays import NO_ROUTE, ForwardOutput, ReplayedRoutes
from jaxrl_llm.model.config import ComputeConfig, ModelConfig, MoEConfig
from jaxrl_llm.model.logprobs import token_logprobs
from jaxrl_llm.model.transformer import (
    Params,
    init_params,
    make_forward,
    parameter_axes,
    parameter_count,
    unembed,
)
from jaxrl_llm.sharding import (
    ONE_DEVICE,
    Layout,
    MeshConfig,
    batch_sharding,
    make_layout,
    parameter_shardings,
)
from tests.model.tiny import (
    TINY,
    array_shapes,
    assert_close,
    one_segment,
    params,
    some_gates,
    some_routes,
    tokens,
)
from tests.reference import model as reference

TIED = dataclasses.replace(
    TINY, tie_embeddings=True, moe=dataclasses.replace(TINY.moe, normalize_weights=False)
)
FLOAT32 = ComputeConfig(remat="none")


@functools.cache
def scoring(config: ModelConfig) -> Any:
    """(params, inputs, replayed) -> forward pass and log-probabilities of `inputs` themselves."""

    def program(
        params: Params, inputs: jax.Array, replayed: ReplayedRoutes | None
    ) -> tuple[ForwardOutput, jax.Array]:
        output = make_forward(config, FLOAT32)(params, *one_segment(inputs), replayed)
        logprobs, _ = token_logprobs(
            output.hidden, unembed(params, config), inputs, temperature=1.0, chunk=4
        )
        return output, logprobs

    return jax.jit(program)


# -------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize(
    ("config", "replayed"),
    [(TINY, "none"), (TINY, "all"), (TINY, "some"), (TIED, "some"), (TINY, "gates")],
    ids=["none", "all", "some", "some-tied", "some-gates"],
)
def test_values_equal_the_reference(config: ModelConfig, replayed: str) -> None:
    """MoE and dense layers mixed: routes belong to MoE layers in global order."""
    inputs = tokens(2, 6)
    routes = None if replayed == "none" else some_routes(2, 6)
    gates = some_gates(2, 6) if replayed == "gates" else None
    if routes is not None and replayed != "all":
        routes[0, 2] = NO_ROUTE  # one token in all layers
        routes[1, :, 1] = NO_ROUTE  # one layer for all tokens
    given = None if routes is None else ReplayedRoutes(routes, gates)
    output, logprobs = scoring(config)(params(config), inputs, given)
    wide = reference.to_float64(params(config))
    for row in range(2):
        hidden, logits, experts, weights = reference.forward(
            wide,
            config,
            inputs[row],
            None if routes is None else routes[row],
            None if gates is None else gates[row],
        )
        wanted, _ = reference.token_logprobs(wide, config, hidden, inputs[row], 1.0)
        np.testing.assert_allclose(output.hidden[row], hidden, atol=2e-5)
        np.testing.assert_allclose(output.router.logits[:, row], logits, atol=2e-5)
        np.testing.assert_array_equal(output.router.experts[:, row], experts)
        np.testing.assert_allclose(output.router.weights[:, row], weights, atol=2e-5)
        np.testing.assert_allclose(logprobs[row], wanted, atol=2e-5)
        if replayed == "all":
            np.testing.assert_array_equal(np.moveaxis(experts, 0, 1), routes[row])


@pytest.mark.parametrize(
    ("config", "gates"),
    [(TINY, None), (TIED, None), (TINY, some_gates(1, 5))],
    ids=["untied", "tied", "replayed gates"],
)
def test_gradients_equal_differences_of_the_reference(
    config: ModelConfig, gates: np.ndarray | None
) -> None:
    """Along one random direction for each parameter, of a sum over everything that is returned."""
    inputs, routes = tokens(1, 5), some_routes(1, 5)
    routes[0, 3] = NO_ROUTE
    random = np.random.default_rng(7)
    on_logprobs = random.standard_normal(5)
    on_logits = random.standard_normal((config.num_moe_layers, 5, config.moe.num_experts))
    on_weights = random.standard_normal((config.num_moe_layers, 5, config.moe.experts_per_token))

    def total(params: Params) -> jax.Array:
        output, logprobs = scoring(config)(params, inputs, ReplayedRoutes(routes, gates))
        router = output.router
        return (
            jnp.sum(on_logprobs * logprobs[0])
            + jnp.sum(on_logits * router.logits[:, 0])
            + jnp.sum(on_weights * router.weights[:, 0])
        )

    def exact(params: Any) -> float:
        hidden, logits, _, weights = reference.forward(
            params, config, inputs[0], routes[0], None if gates is None else gates[0]
        )
        logprobs, _ = reference.token_logprobs(params, config, hidden, inputs[0], 1.0)
        return np.sum(on_logprobs * logprobs) + sum(
            np.sum(a * b) for a, b in ((on_logits, logits), (on_weights, weights))
        )

    gradients = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(total))(params(config)))
    leaves, structure = jax.tree.flatten(reference.to_float64(params(config)))
    for index, (path, gradient) in enumerate(gradients):
        direction = random.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = list(leaves)
            moved[index] = leaves[index] + sign * 1e-5 * direction
            ends.append(exact(jax.tree.unflatten(structure, moved)))
        slope, found = (ends[0] - ends[1]) / 2e-5, np.sum(direction * gradient)
        scale = np.linalg.norm(gradient)
        assert scale > 0, path
        np.testing.assert_allclose(found, slope, atol=1e-4 * scale, err_msg=str(path))


RELEASED = ModelConfig(
    vocab_size=29,
    width=24,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    moe=MoEConfig(
        num_experts=6, experts_per_token=2, expert_width=10, dense_layers=(1,), dense_width=14
    ),
)


def released_params() -> Any:
    """Parameters that depend on nothing but shapes and names, so that others can make them too."""
    shapes = jax.eval_shape(lambda: init_params(RELEASED, jax.random.key(0)))

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        wave = np.sin(sum(map(ord, name)) + 1.7 * np.arange(leaf.size)).reshape(leaf.shape)
        return 1 + 0.3 * wave if "norm" in name else 0.5 * wave

    return jax.tree_util.tree_map_with_path(fill, shapes)


def test_values_equal_the_released_implementation() -> None:
    """Next-token log-probabilities of Qwen3MoeForCausalLM, transformers 5.23.0, in float64."""
    wanted = [
        *(-3.31402, -4.42472, -3.64843, -3.76556, -3.69223, -3.09087),
        *(-4.39777, -2.68989, -3.93814, -3.29680, -4.22656),
    ]
    inputs = (np.arange(11, dtype=np.int32) * 7 % 29)[None]
    wide = released_params()
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), wide)
    output = jax.jit(make_forward(RELEASED, FLOAT32))(narrow, *one_segment(inputs), None)
    found, _ = token_logprobs(
        output.hidden, narrow["head"], np.roll(inputs, -1), temperature=1.0, chunk=64
    )
    np.testing.assert_allclose(found[0], wanted, atol=5e-5)


# -------------------------------------------------------------------------------------- packing


def packed() -> dict[str, tuple[np.ndarray, ...]]:
    """Sequences of 5, 4 and 2 tokens in two rows and a row of padding, and in rows of their own."""
    a, b, c = tokens(1, 5, seed=1)[0], tokens(1, 4, seed=2)[0], tokens(1, 2, seed=3)[0]
    together = tuple(np.zeros((3, 9), np.int32) for _ in range(3))
    apart = tuple(np.zeros((3, 9), np.int32) for _ in range(3))
    places = [(a, (0, 0), 1), (b, (0, 5), 2), (c, (1, 0), 1)]
    for alone, (sequence, (row, start), segment) in enumerate(places):
        for (inputs, positions, ids), at, first, number in (
            (together, row, start, segment),
            (apart, alone, 0, 1),
        ):
            span = slice(first, first + len(sequence))
            inputs[at, span], ids[at, span] = sequence, number
            positions[at, span] = np.arange(len(sequence))
    return {"together": together, "apart": apart}


def test_packed_rows_equal_unpacked_ones() -> None:
    """Values and gradients: sums over real tokens agree, whatever padding there is besides."""
    layouts = packed()

    def total(params: Params, layout: Any) -> tuple[jax.Array, Any]:
        inputs, positions, ids = layout
        output = make_forward(TINY, FLOAT32)(params, inputs, positions, ids, None)
        real = (ids > 0)[..., None]
        loss = jnp.sum(jnp.where(real, jnp.sin(output.hidden), 0.0))
        loss += jnp.sum(jnp.where(real, jnp.square(output.router.logits), 0.0))
        return loss, output

    gradient = jax.jit(jax.value_and_grad(total, has_aux=True))
    results = {name: gradient(params(), layout) for name, layout in layouts.items()}
    one, other = (results[name][0][1].hidden for name in ("together", "apart"))
    np.testing.assert_allclose(one[0, :5], other[0, :5], atol=1e-5)
    np.testing.assert_allclose(one[0, 5:9], other[1, :4], atol=1e-5)
    np.testing.assert_allclose(one[1, :2], other[2, :2], atol=1e-5)
    assert_close(results["together"][1], results["apart"][1], 1e-5)


def test_a_token_depends_on_the_earlier_ones_of_its_segment_only() -> None:
    inputs, positions, ids = packed()["together"]
    forward = jax.jit(make_forward(TINY, FLOAT32))
    before = forward(params(), inputs, positions, ids, None).hidden

    def changed(row: int, column: int) -> np.ndarray:
        other = inputs.copy()
        other[row, column] = (inputs[row, column] + 1) % TINY.vocab_size
        after = forward(params(), other, positions, ids, None).hidden
        return np.abs(after - before).max(-1) > 1e-5

    first, second, padding = changed(0, 2), changed(0, 7), changed(1, 4)
    np.testing.assert_array_equal(first[0], [0, 0, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(second[0], [0, 0, 0, 0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(padding[1, :4], [0, 0, 0, 0])
    assert not first[1].any()
    assert not second[1].any()
    assert not padding[0].any()


# ------------------------------------------------------------------------------------- computing


@functools.cache
def gradient_of(compute: ComputeConfig) -> Any:
    inputs, routes, gates = tokens(2, 6), some_routes(2, 6), some_gates(2, 6)
    routes[0] = NO_ROUTE

    def total(params: Params) -> jax.Array:
        replayed = ReplayedRoutes(routes, gates)
        output = make_forward(TINY, compute)(params, *one_segment(inputs), replayed)
        return jnp.sum(jnp.sin(output.hidden)) + jnp.sum(jnp.sin(output.router.logits))

    return jax.jit(jax.value_and_grad(total))(params())


@pytest.mark.parametrize(
    "compute",
    [
        ComputeConfig(remat="block", attention_chunk=4, dispatch="ragged"),
        ComputeConfig(remat="dots", dispatch="dense"),
    ],
    ids=["block-chunked-ragged", "dots-dense"],
)
def test_how_it_is_computed_changes_no_gradient(compute: ComputeConfig) -> None:
    assert_close(gradient_of(compute), gradient_of(FLOAT32), 1e-4)


def test_remat_keeps_only_the_input_of_a_layer() -> None:
    inputs = tokens(3, 6)

    def stacked(compute: ComputeConfig) -> set[tuple[int, ...]]:
        def total(params: Params) -> jax.Array:
            output = make_forward(TINY, compute)(params, *one_segment(inputs), None)
            return jnp.sum(output.hidden)

        program = jax.make_jaxpr(jax.grad(total))(params())
        # Two layers in the last segment: what its scan keeps of 3 x 6 tokens begins like this.
        shapes = set(array_shapes(program))
        return {s for s in shapes if s[:3] == (2, 3, 6) or s[:2] == (2, 18)}

    moe = TINY.moe
    hidden, router = (2, 3, 6, TINY.width), (2, 3, 6, moe.num_experts)
    # Dense: what other ways of computing experts have for two experts per token begins so too.
    block = ComputeConfig(remat="block", dispatch="dense")
    assert stacked(block) == {hidden, router, (2, 3, 6, 2)}
    products = (2, 18, TINY.width)
    assert products in stacked(ComputeConfig(remat="dots"))
    kept = stacked(FLOAT32)
    assert (2, 3, 6, TINY.num_heads, TINY.head_dim) in kept  # queries before their norm
    assert (2, 3, 6, TINY.num_heads, 1) not in kept  # which is computed again all the same


def test_bfloat16_stays_near_and_keeps_the_router_in_float32() -> None:
    inputs, routes = tokens(2, 6), ReplayedRoutes(some_routes(2, 6))
    forward = make_forward(TINY, ComputeConfig(dtype="bfloat16"))
    low = jax.jit(forward)(params(), *one_segment(inputs), routes)
    high, _ = scoring(TINY)(params(), inputs, routes)
    assert low.hidden.dtype == jnp.bfloat16
    assert low.router.logits.dtype == low.router.weights.dtype == jnp.float32
    np.testing.assert_allclose(low.hidden.astype(jnp.float32), high.hidden, atol=0.15)
    assert np.any(np.asarray(low.router.logits) != np.asarray(low.router.logits, jnp.bfloat16))


@pytest.mark.parametrize("axes", [(2, 1, 4, 1, 1), (1, 2, 1, 2, 2)], ids=str)
def test_eight_devices_give_the_numbers_of_one(axes: tuple[int, ...]) -> None:
    config = dataclasses.replace(
        TINY, num_layers=2, moe=dataclasses.replace(TINY.moe, dense_layers=(0,))
    )
    inputs, routes = tokens(8, 6), some_routes(8, 6, config)
    routes[:4] = NO_ROUTE

    def total(params: Params, batch: Any, layout: Layout) -> Any:
        output = make_forward(config, ComputeConfig(), layout)(params, *batch)
        logprobs, entropy = token_logprobs(
            output.hidden,
            unembed(params, config),
            batch[0],
            temperature=1.0,
            chunk=4,
            layout=layout,
        )
        loss = jnp.sum(logprobs) + jnp.sum(entropy) + jnp.sum(jnp.square(output.router.logits))
        return loss, output

    gradient = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=2)
    batch = (*one_segment(inputs), ReplayedRoutes(routes, some_gates(8, 6, config)))
    single = params(config)
    wanted = gradient(single, batch, ONE_DEVICE)
    layout = make_layout(MeshConfig(*axes))
    placed = jax.device_put(single, parameter_shardings(single, parameter_axes(config), layout))
    found = gradient(placed, jax.device_put(batch, batch_sharding(layout)), layout)
    assert_close(found, wanted, 2e-5)


# ------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_parameters_are_a_plain_float32_tree_with_an_axis_name_per_dimension(
    config: ModelConfig,
) -> None:
    tree = params(config)
    axes = parameter_axes(config)
    names = jax.tree.map(lambda leaf, named: (leaf.ndim, len(named)), tree, axes)
    pairs = jax.tree.leaves(names, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert all(ndim == named for ndim, named in pairs)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
    assert ("head" in tree) is not config.tie_embeddings
    assert parameter_count(config) == sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert axes["segments"]["02"]["mlp"]["down"] == ("layers", "expert", "mlp", "expert_embed")


def test_random_matrices_have_the_variance_of_their_fan_in() -> None:
    config = ModelConfig(width=128, moe=MoEConfig(expert_width=64))
    tree = jax.jit(lambda: init_params(config, jax.random.key(1)))()
    blocks = tree["segments"]["00"]
    fan_in = {"q": 128, "o": 64, "router": 128, "gate": 128, "down": 64}
    for name, inputs in fan_in.items():
        part = blocks["attention"] if name in blocks["attention"] else blocks["mlp"]
        np.testing.assert_allclose(np.std(part[name]) * inputs**0.5, 1, rtol=0.05)
    layer, other = blocks["mlp"]["gate"]
    assert not np.allclose(layer, other)
    assert np.all(blocks["attention_norm"] == 1)


def test_routes_of_another_shape_are_refused() -> None:
    routes, gates = some_routes(2, 6), some_gates(2, 6)
    for replayed in (
        ReplayedRoutes(routes[:, :, :2]),
        ReplayedRoutes(routes, gates[:, :, :2]),
    ):
        with pytest.raises(ValueError, match=r"have shape \(2, 6, 2, 2\).*\(2, 6, 3, 2\)"):
            make_forward(TINY, FLOAT32)(params(), *one_segment(tokens(2, 6)), replayed)
