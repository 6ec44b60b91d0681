"""route and dispatch against float64 numpy, in values and gradients, on one device and on eight."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_llm.arrays import NO_ROUTE, ReplayedRoutes
from jaxrl_llm.model import grouped, moe
from jaxrl_llm.model.assignments import sort_by_expert
from jaxrl_llm.model.config import Dispatch
from jaxrl_llm.sharding import (
    BATCH_AXES,
    ONE_DEVICE,
    Layout,
    MeshConfig,
    make_layout,
    parameter_shardings,
)
from tests.model.tiny import array_shapes, assert_close
from tests.reference import model as reference

TOKENS, WIDTH, EXPERTS, PER_TOKEN, INNER = 48, 12, 8, 3, 16
IMPLEMENTATIONS: tuple[Dispatch, ...] = ("dense", "blocked", "ragged", "megablox")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---------------------------------------------------------------------------------------- route


@pytest.mark.parametrize("normalize", [True, False])
def test_route_takes_the_best_experts_best_first(normalize: bool) -> None:
    logits = 2 * normal(5, 7, EXPERTS)
    output = moe.route(logits, PER_TOKEN, None, normalize=normalize)
    np.testing.assert_array_equal(output.logits, logits)
    for index in np.ndindex(5, 7):
        wide = logits[index].astype(np.float64)
        experts, weights = reference.route(wide, PER_TOKEN, None, normalize)
        np.testing.assert_array_equal(output.experts[index], experts)
        np.testing.assert_allclose(output.weights[index], weights, rtol=1e-5)


def test_equal_logits_rank_by_expert_id() -> None:
    output = moe.route(jnp.zeros((2, EXPERTS)), PER_TOKEN, None, normalize=True)
    np.testing.assert_array_equal(output.experts, [[0, 1, 2]] * 2)


@pytest.mark.parametrize("normalize", [True, False])
def test_replayed_ids_are_used_and_take_live_gate_values(normalize: bool) -> None:
    logits = normal(4, EXPERTS)
    replayed = np.array([[7, 0, 3], [NO_ROUTE] * 3, [1, 2, 4], [NO_ROUTE] * 3], np.int16)
    output = moe.route(logits, PER_TOKEN, ReplayedRoutes(replayed), normalize=normalize)
    assert output.experts.dtype == jnp.int32
    for n in range(4):
        wide = logits[n].astype(np.float64)
        experts, weights = reference.route(wide, PER_TOKEN, replayed[n], normalize)
        np.testing.assert_array_equal(output.experts[n], experts)
        np.testing.assert_allclose(output.weights[n], weights, rtol=1e-5)


def test_replaying_the_own_choice_changes_nothing() -> None:
    logits = normal(6, EXPERTS)
    own = moe.route(logits, PER_TOKEN, None, normalize=True)
    for gates in (None, own.weights):
        replayed = ReplayedRoutes(own.experts.astype(jnp.int16), gates)
        again = moe.route(logits, PER_TOKEN, replayed, normalize=True)
        jax.tree.map(np.testing.assert_array_equal, own, again)


@pytest.mark.parametrize("normalize", [True, False])
def test_replayed_gates_are_used_as_they_are_and_end_the_gradient(normalize: bool) -> None:
    """At tokens with routes; a token without them keeps its live gate values and their gradient."""
    logits, gates, probe = normal(4, EXPERTS), normal(4, PER_TOKEN, seed=1), normal(4, PER_TOKEN)
    ids = np.array([[7, 0, 3], [NO_ROUTE] * 3, [1, 2, 4], [NO_ROUTE] * 3], np.int16)

    def total(logits: jax.Array, gates: jax.Array) -> tuple[jax.Array, Any]:
        output = moe.route(logits, PER_TOKEN, ReplayedRoutes(ids, gates), normalize=normalize)
        return jnp.sum(output.weights * probe), output

    (to_logits, to_gates), output = jax.grad(total, argnums=(0, 1), has_aux=True)(logits, gates)
    live = moe.route(logits, PER_TOKEN, None, normalize=normalize)
    np.testing.assert_array_equal(output.experts[::2], ids[::2])
    np.testing.assert_array_equal(output.weights[::2], gates[::2])
    np.testing.assert_array_equal(output.experts[1::2], live.experts[1::2])
    np.testing.assert_array_equal(output.weights[1::2], live.weights[1::2])
    assert not np.any(to_gates), "they are frozen"
    assert not np.any(to_logits[::2])
    assert np.all(np.any(np.asarray(to_logits[1::2]) != 0, axis=-1))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_gate_gradient_reaches_the_router_at_the_replayed_ids(normalize: bool) -> None:
    """Normalised, a gate value is a softmax over the chosen logits alone; else over all of them."""
    logits, probe = normal(1, EXPERTS), normal(PER_TOKEN, seed=1)
    replayed = np.array([[6, 1, 4]], np.int16)

    def total(logits: jax.Array) -> jax.Array:
        output = moe.route(logits, PER_TOKEN, ReplayedRoutes(replayed), normalize=normalize)
        return jnp.sum(output.weights * probe)

    shares = reference.softmax(logits[0].astype(np.float64))
    upstream = np.zeros(EXPERTS)
    upstream[replayed[0]] = probe
    if normalize:
        shares = np.where(np.isin(np.arange(EXPERTS), replayed[0]), shares, 0)
        shares /= shares.sum()
    wanted = shares * (upstream - shares @ upstream)
    np.testing.assert_allclose(jax.grad(total)(logits)[0], wanted, atol=1e-6)
    assert np.count_nonzero(wanted) == (PER_TOKEN if normalize else EXPERTS)


def test_router_logits_are_float32_whatever_the_input() -> None:
    x, router = jnp.asarray(normal(6, WIDTH), jnp.bfloat16), normal(WIDTH, EXPERTS, seed=1)
    logits = moe.router_logits(x, router)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.asarray(x, np.float64) @ router, atol=1e-5)


# ------------------------------------------------------------------------------------- dispatch


NAMES = {
    "gate": ("expert", None, "mlp"),
    "up": ("expert", None, "mlp"),
    "down": ("expert", "mlp", None),
}


def expert_params() -> dict[str, np.ndarray]:
    return {
        "gate": normal(EXPERTS, WIDTH, INNER, seed=1) / 3,
        "up": normal(EXPERTS, WIDTH, INNER, seed=2) / 3,
        "down": normal(EXPERTS, INNER, WIDTH, seed=3) / 4,
    }


def balanced() -> np.ndarray:
    """Distinct experts for every token, all of them used."""
    order = np.argsort(np.random.default_rng(4).random((TOKENS, EXPERTS)), axis=-1)
    return order[:, :PER_TOKEN].astype(np.int32)


def lopsided() -> np.ndarray:
    """Everyone wants expert 5; expert 0 has one token and experts 2, 6 and 7 none."""
    experts = np.tile(np.array([5, 1, 3], np.int32), (TOKENS, 1))
    experts[::2, 1] = 4
    experts[17] = [5, 0, 3]
    return experts


def repeated() -> np.ndarray:
    """One expert in every slot, the last: the most that one expert can be given."""
    return np.full((TOKENS, PER_TOKEN), EXPERTS - 1, np.int32)


def program(experts: np.ndarray, implementation: Dispatch, layout: Layout) -> Callable[..., Any]:
    """(x, weights, params, upstream) -> output and the gradients of sum(upstream * output)."""
    tokens = PartitionSpec(layout.split(BATCH_AXES) or None)
    share = layout.shard(
        partial(moe.dispatch, implementation=implementation, layout=layout),
        (tokens, tokens, tokens, {name: layout.spec(names) for name, names in NAMES.items()}),
        tokens,
    )

    def total(x: Any, weights: Any, params: Any, upstream: Any) -> tuple[jax.Array, jax.Array]:
        output = share(x, experts_there, weights, params)
        return jnp.sum(output * upstream), output

    def both(*arguments: Any) -> tuple[jax.Array, Any]:
        (_, output), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(
            *arguments
        )
        return output, gradients

    if layout.mesh is None:
        experts_there = experts
        return jax.jit(both)
    rows = NamedSharding(layout.mesh, tokens)
    experts_there = jax.device_put(experts, rows)
    shapes = jax.eval_shape(expert_params)
    there = (rows, rows, parameter_shardings(shapes, NAMES, layout), rows)
    return lambda *arguments: jax.jit(both)(*jax.device_put(arguments, there))


def check_against_reference(
    experts: np.ndarray, implementation: Dispatch, layout: Layout = ONE_DEVICE
) -> None:
    x, weights = normal(TOKENS, WIDTH), np.abs(normal(TOKENS, PER_TOKEN, seed=5))
    params, upstream = expert_params(), normal(TOKENS, WIDTH, seed=6)
    output, gradients = program(experts, implementation, layout)(x, weights, params, upstream)
    wide = reference.to_float64(params)
    wanted = reference.dispatch(x.astype(np.float64), experts, weights, wide)
    np.testing.assert_allclose(output, wanted, atol=2e-5)
    wanted = reference.dispatch_gradient(
        x.astype(np.float64), experts, weights.astype(np.float64), wide, upstream
    )
    assert_close(gradients, wanted, 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("experts", [balanced, lopsided, repeated])
def test_every_implementation_equals_the_reference(
    experts: Callable[[], np.ndarray], implementation: Dispatch
) -> None:
    check_against_reference(experts(), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("axes", "experts"),
    [((2, 1, 4, 1, 1), balanced), ((1, 2, 2, 1, 2), lopsided), ((1, 1, 8, 1, 1), repeated)],
)
def test_expert_parallel_values_and_gradients_equal_the_reference(
    axes: tuple[int, ...], experts: Callable[[], np.ndarray], implementation: Dispatch
) -> None:
    """An index that is wrongly taken to be the same on all devices leaves the values exact and
    breaks the gradients, so both are compared. Where all want one expert, they come in rounds."""
    check_against_reference(experts(), implementation, make_layout(MeshConfig(*axes)))


def test_tokens_travel_to_their_experts_and_parameters_stay() -> None:
    layout = make_layout(MeshConfig(expert=4))
    tokens = PartitionSpec("expert")
    share = layout.shard(
        partial(moe.dispatch, implementation="blocked", layout=layout),
        (tokens, tokens, tokens, {name: layout.spec(names) for name, names in NAMES.items()}),
        tokens,
    )
    rows = NamedSharding(layout.mesh, tokens)
    x, experts, weights = normal(TOKENS, WIDTH), balanced(), normal(TOKENS, PER_TOKEN)
    arguments = jax.device_put((x, experts, weights), rows)
    params = jax.device_put(expert_params(), parameter_shardings(expert_params(), NAMES, layout))
    program = jax.jit(share).lower(*arguments, params).compile().as_text()
    assert "all-to-all" in program
    assert "all-gather" not in program
    assert "reduce-scatter" not in program


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_tokens_add_up_in_float32(implementation: Dispatch) -> None:
    """Parameter gradients sum over tokens; in bfloat16 the sum would stall."""
    tokens = 2048
    x = jnp.ones((tokens, WIDTH), jnp.bfloat16)
    experts = np.zeros((tokens, 1), np.int32)
    params = {name: np.abs(matrix) for name, matrix in expert_params().items()}

    def gradient(x: jax.Array) -> Any:
        def total(params: Any) -> jax.Array:
            output = moe.dispatch(
                x, experts, jnp.ones((tokens, 1)), params, implementation=implementation
            )
            return jnp.sum(output.astype(jnp.float32))

        return jax.jit(jax.grad(total))(params)

    low, high = gradient(x), gradient(x.astype(jnp.float32))
    for name in params:
        assert low[name].dtype == jnp.float32
        np.testing.assert_allclose(low[name], high[name], rtol=0.03)


def test_the_blocked_gradient_makes_no_array_of_parameters_per_block() -> None:
    experts = np.random.default_rng(0).integers(0, EXPERTS, (512, 2), np.int32)
    arguments = (normal(512, WIDTH), normal(512, 2), expert_params(), normal(512, WIDTH))
    run = program(experts, "blocked", ONE_DEVICE)
    shapes = list(array_shapes(jax.make_jaxpr(run)(*arguments)))
    assert (WIDTH, INNER) in shapes
    assert max(np.prod(s) for s in shapes if s[-2:] == (WIDTH, INNER)) == EXPERTS * WIDTH * INNER


@pytest.mark.parametrize(
    ("platform", "tokens", "widths", "chosen"),
    [
        ("cpu", 1, (256, 128), "blocked"),
        ("tpu", 64, (256, 128), "dense"),
        ("tpu", 65, (256, 128), "megablox"),
        ("tpu", 65, (256, 100), "ragged"),
        ("gpu", 64, (256, 128), "dense"),
        ("gpu", 65, (256, 128), "blocked"),
    ],
)
def test_auto_picks_by_platform_and_batch(
    platform: str, tokens: int, widths: tuple[int, int], chosen: str
) -> None:
    assert moe._resolve("auto", tokens, platform, widths=widths) == chosen
    assert moe._resolve("dense", tokens, platform, widths=widths) == "dense"


@pytest.mark.parametrize(
    ("assignments", "rows"),
    [
        (1, (16, 8, 8)),
        (8 * 40, (32, 16, 16)),
        (8 * 128, (128, 64, 32)),
        (8 * 500, (512, 256, 64)),
        (10**7, (512, 256, 64)),
    ],
)
def test_blocks_follow_the_mean_load_of_an_expert(assignments: int, rows: tuple) -> None:
    assert grouped._block_rows(assignments, EXPERTS) == rows


def test_more_assignments_than_a_sort_key_can_hold_are_refused() -> None:
    shape = jax.ShapeDtypeStruct((2**24, 16), jnp.int32)
    with pytest.raises(ValueError, match="smaller micro-batches"):
        jax.eval_shape(partial(sort_by_expert, num_experts=8), shape)
