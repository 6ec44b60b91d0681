"""Replay of gate values: the router is frozen, the gates stay, and layout changes nothing."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.arrays import LossOutput, TrainBatch
from jaxrl_llm.data.collate import collate
from jaxrl_llm.learner.state import (
    OptimizerConfig,
    TrainState,
    abstract_state,
    make_optimizer,
    shardings_of,
)
from jaxrl_llm.learner.step import (
    LearnerConfig,
    ScoreStep,
    make_gradient,
    make_score_step,
    make_train_step,
    prepare,
)
from jaxrl_llm.losses.policy import LossConfig, policy_loss
from jaxrl_llm.losses.weights import token_weights
from jaxrl_llm.model.config import ComputeConfig, Dispatch
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.rollout.routes import with_routes
from jaxrl_llm.sharding import MeshConfig, batch_sharding, make_layout
from jaxrl_llm.types import Rollout
from tests.learner.tiny import (
    MODEL,
    make_batch,
    make_params,
    make_routes,
    one_device,
    replace,
    with_some_routes,
)
from tests.reference import model as reference

TEMPERATURE = 0.8
OLD, NEW = make_params(), make_params(seed=1)
BATCH = replace(make_batch(), routes=make_routes(np.random.default_rng(5)))
GATED = LearnerConfig(mini_batches=2, replay="r3", replay_gates=True)
TRANSPARENT = make_optimizer(
    OptimizerConfig(learning_rate=0.5, beta1=0.0, eps=1.0, clip_norm=float("inf")), 1
)


def configured(replay: Literal["r2", "r3"], *, gates: bool) -> LearnerConfig:
    return dataclasses.replace(GATED, replay=replay, replay_gates=gates)


def prepared(learner: LearnerConfig, batch: TrainBatch = BATCH) -> TrainBatch:
    """The batch as the updates get it, scored with the old weights."""
    return prepare(batch, score_step(learner)(OLD, batch), learner.replay)


@functools.cache
def score_step(learner: LearnerConfig) -> ScoreStep:
    return make_score_step(MODEL, learner, one_device(), temperature=TEMPERATURE)


@functools.cache
def gradient_step(learner: LearnerConfig) -> Callable[..., tuple[Params, LossOutput]]:
    step = make_gradient(MODEL, learner, LossConfig(), one_device(), temperature=TEMPERATURE)
    return jax.jit(step)


def gradient(
    learner: LearnerConfig, params: Params, batch: TrainBatch
) -> tuple[Params, LossOutput]:
    return gradient_step(learner)(params, batch)


def router_gradient(grads: Params) -> np.ndarray:
    return np.asarray(grads["segments"]["00"]["mlp"]["router"])


def assert_close(left: Params, right: Params) -> None:
    """Every leaf to 5e-6 of its largest element."""

    def one(path: tuple, a: jax.Array, b: jax.Array) -> None:
        atol = 5e-6 * float(np.max(np.abs(b)))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(one, left, right)


@pytest.mark.parametrize("replay", ["r2", "r3"])
def test_the_policy_loss_leaves_the_router_exactly_alone(replay: Literal["r2", "r3"]) -> None:
    """At the old weights and at others; every other parameter gets its gradient."""
    frozen, live = configured(replay, gates=True), configured(replay, gates=False)
    batch = prepared(frozen)
    assert prepared(live).gates is None
    for params in (OLD, NEW):
        grads, _ = gradient(frozen, params, batch)
        assert not np.any(router_gradient(grads))
        paths = jax.tree_util.tree_leaves_with_path(grads)
        still = [jax.tree_util.keystr(path) for path, leaf in paths if not np.any(leaf)]
        assert still == ["['segments']['00']['mlp']['router']"]
        assert np.any(router_gradient(gradient(live, params, batch)[0]))


@pytest.mark.parametrize("replay", ["r2", "r3"])
def test_at_the_old_weights_the_forward_pass_is_pi_olds(replay: Literal["r2", "r3"]) -> None:
    frozen, live = configured(replay, gates=True), configured(replay, gates=False)
    batch = prepared(frozen)
    replayed, natural = gradient(frozen, OLD, batch)[1], gradient(live, OLD, batch)[1]
    for name, mean in natural.metrics.items():
        found = float(replayed.metrics[name].value())
        assert found == pytest.approx(float(mean.value()), rel=1e-5, abs=1e-6), name
    assert float(replayed.metrics["staleness/ratio_mean"].value()) == pytest.approx(1, abs=1e-6)
    assert float(replayed.metrics["routing/replay_coverage"].value()) == 1


@pytest.mark.parametrize("replay", ["r2", "r3"])
def test_at_new_weights_values_are_those_of_the_reference(replay: Literal["r2", "r3"]) -> None:
    """New weights everywhere but in the gates, which are the old ones at the replayed experts."""
    batch = prepared(configured(replay, gates=True))
    old, new = reference.to_float64(OLD), reference.to_float64(NEW)
    ratios, moved = [], []
    for row, segment in itertools.product(range(3), (1, 2)):
        where = (row, np.flatnonzero(batch.segment_ids[row] == segment))
        tokens, targets = batch.inputs[where], batch.targets[where]
        routes = None if replay == "r2" else BATCH.routes[where]
        _, _, experts, gates = reference.forward(old, MODEL, tokens, routes)
        experts, gates = np.moveaxis(experts, 0, 1), np.moveaxis(gates, 0, 1)
        np.testing.assert_array_equal(batch.routes[where], experts)
        np.testing.assert_allclose(batch.gates[where], gates, atol=1e-5)
        sampled = batch.loss_mask[where]
        for values, kept in ((gates, ratios), (None, moved)):
            hidden, *_ = reference.forward(new, MODEL, tokens, experts, values)
            logprobs, _ = reference.token_logprobs(new, MODEL, hidden, targets, TEMPERATURE)
            difference = logprobs - np.asarray(batch.old_logprobs[where], np.float64)
            kept.append(np.exp(difference)[sampled])
    three = jax.tree.map(lambda leaf: leaf[:3], batch)
    _, output = gradient(configured(replay, gates=True), NEW, three)
    found = float(output.metrics["staleness/ratio_mean"].value())
    assert found == pytest.approx(np.mean(np.concatenate(ratios)), rel=1e-4)
    assert abs(np.mean(np.concatenate(moved)) / found - 1) > 1e-3, "live gates are others"


def test_tokens_without_routes_keep_live_gates_and_teach_the_router() -> None:
    """r3 with fallback: only their own gate values reach the router."""
    learner = dataclasses.replace(GATED, route_fallback="live")
    batch = prepared(learner, with_some_routes(BATCH.routes, BATCH))
    grads, output = gradient(learner, OLD, batch)
    assert np.any(router_gradient(grads))
    assert float(output.metrics["staleness/ratio_mean"].value()) == pytest.approx(1, abs=1e-6)
    doubled = replace(batch, gates=np.where(np.asarray(batch.routes) < 0, 9.0, batch.gates))
    jax.tree.map(np.testing.assert_array_equal, gradient(learner, OLD, doubled)[0], grads)
    nothing = replace(batch, routes=None)
    natural = dataclasses.replace(GATED, replay="r3", replay_gates=False, route_fallback="live")
    jax.tree.map(
        np.testing.assert_array_equal,
        gradient(learner, NEW, nothing)[0],
        gradient(natural, NEW, nothing)[0],
    )


@pytest.fixture(scope="module")
def whole():
    """The batch at the old weights, and its gradient at the new ones, all at once."""
    batch = prepared(GATED, with_some_routes(BATCH.routes, BATCH))
    grads, output = gradient(GATED, NEW, batch)
    return batch, grads, {name: float(mean.value()) for name, mean in output.metrics.items()}


@pytest.mark.parametrize("dispatch", ["dense", "ragged"])
def test_every_dispatch_agrees(whole, dispatch: Dispatch) -> None:
    """With the blocks of the CPU's "auto"."""
    batch, grads, metrics = whole
    compute = ComputeConfig(dispatch=dispatch, remat="none", logprob_chunk=3)
    found, output = gradient(dataclasses.replace(GATED, compute=compute), NEW, batch)
    assert_close(found, grads)
    values = {name: float(mean.value()) for name, mean in output.metrics.items()}
    assert values == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(), MeshConfig(data=2, expert=2, tensor=2)],
    ids=["one", "data2xexpert2xtensor2"],
)
def test_micro_batches_and_eight_devices_change_nothing(whole, mesh: MeshConfig) -> None:
    """Scoring and update; the router of tokens with routes rests there too."""
    batch, grads, metrics = whole
    learner = dataclasses.replace(GATED, micro_batch_rows=8 // mesh.rows, mesh=mesh)
    devices = make_layout(mesh)
    shardings = shardings_of(abstract_state(MODEL, TRANSPARENT, devices))
    score = make_score_step(MODEL, learner, devices, temperature=TEMPERATURE)
    unscored = jax.device_put(
        replace(batch, old_logprobs=None, gates=None), batch_sharding(devices)
    )
    scored = score(jax.device_put(OLD, shardings.params), unscored)
    np.testing.assert_allclose(scored.gates, batch.gates, rtol=1e-5, atol=1e-6)
    train = make_train_step(
        MODEL, learner, LossConfig(), TRANSPARENT, devices, temperature=TEMPERATURE
    )
    params = jax.tree.map(jnp.array, NEW)
    state = TrainState(jnp.int32(0), params, TRANSPARENT.transform.init(params))
    ready = prepare(unscored, scored, "r3")
    after, found = train(jax.device_put(state, shardings), ready)
    assert_close(optax.tree.get(after.opt_state, "mu"), grads)
    values = {name: float(mean.value()) for name, mean in found.items()}
    # Not additive: as a metric alone, the balance loss is the mean of the micro-batches'.
    for name in metrics.keys() - {"router/balance_loss"}:
        assert values[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


def make_rollouts() -> list[Rollout]:
    """Four of unequal length, with random routes."""
    rng = np.random.default_rng(3)
    made = []
    for index, positions in enumerate((3, 5, 2, 6)):
        mask = np.arange(positions) >= 1
        rollout = Rollout(
            prompt_id=f"p{index}",
            sample_index=0,
            tokens=rng.integers(0, MODEL.vocab_size, positions + 1).astype(np.int32),
            loss_mask=mask,
            sampler_logprobs=np.where(mask, -1.5, 0).astype(np.float32),
            routes=None,
            weight_version=np.where(mask, 0, -1).astype(np.int32),
            text="",
            finish="stop",
        )
        ids = np.argsort(rng.random((positions, MODEL.num_moe_layers, 4)), axis=-1)[..., :2]
        made.append(with_routes(rollout, ids, MODEL))
    return made


@pytest.mark.parametrize("replay", ["r2", "r3"])
def test_packing_changes_nothing(replay: Literal["r2", "r3"]) -> None:
    """From rollouts to the gradient: gates follow their tokens into any row."""
    learner, gradients = configured(replay, gates=True), []
    for pack in (False, True):
        advantages = np.array([1, -0.5, 0.25, -2], np.float32)
        batch = collate(make_rollouts(), advantages, step=0, rows=4, length=8, pack=pack)
        batch = prepared(learner, batch)
        assert len(np.unique(np.asarray(batch.segment_ids))) == (3 if pack else 2)
        gradients.append(gradient(learner, NEW, batch)[0])
    assert_close(*gradients)
    assert not np.any(router_gradient(gradients[1]))


def test_the_gradient_is_that_of_the_loss_with_constant_gates() -> None:
    """Along one random direction for each parameter, by differences of the float64 reference."""
    batch = jax.tree.map(lambda leaf: np.asarray(leaf)[:1], prepared(GATED))
    loss, segment = LossConfig(), np.flatnonzero(batch.segment_ids[0] == 1)
    grads, _ = gradient(GATED, NEW, batch)
    weights = token_weights(batch.loss_mask, batch.segment_ids, per=loss.averaging)

    def on_logprobs(logprobs: jax.Array) -> jax.Array:
        return policy_loss(logprobs, jnp.zeros_like(logprobs), batch, weights, loss).loss

    def logprobs_of(params: Params) -> np.ndarray:
        """f64[1, S], 0 on padding."""
        whole = np.zeros(batch.inputs.shape)
        for number in np.unique(batch.segment_ids[batch.segment_ids > 0]):
            where = (0, np.flatnonzero(batch.segment_ids[0] == number))
            hidden, *_ = reference.forward(
                params,
                MODEL,
                batch.inputs[where],
                batch.routes[where],
                batch.gates[where].astype(np.float64),
            )
            targets = batch.targets[where]
            whole[where] = reference.token_logprobs(params, MODEL, hidden, targets, TEMPERATURE)[0]
        return whole

    assert segment.size > 1
    wide = reference.to_float64(NEW)
    upstream = np.asarray(jax.grad(on_logprobs)(jnp.asarray(logprobs_of(wide), jnp.float32)))
    leaves, structure = jax.tree.flatten(wide)
    random = np.random.default_rng(0)
    for index, (path, found) in enumerate(jax.tree_util.tree_leaves_with_path(grads)):
        direction = random.standard_normal(found.shape)
        ends = []
        for sign in (1, -1):
            moved = list(leaves)
            moved[index] = leaves[index] + sign * 1e-5 * direction
            ends.append(np.sum(upstream * logprobs_of(jax.tree.unflatten(structure, moved))))
        slope = (ends[0] - ends[1]) / 2e-5
        scale = max(np.linalg.norm(found), 1e-3)
        np.testing.assert_allclose(
            np.sum(direction * found), slope, atol=2e-4 * scale, err_msg=str(path)
        )
