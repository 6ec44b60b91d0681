"""The train step: gradient accumulation, donation, eight devices like one, and that it learns."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.arrays import Mean, ReplayedRoutes, TrainBatch
from jaxrl_llm.learner.state import (
    Optimizer,
    OptimizerConfig,
    TrainState,
    abstract_state,
    make_optimizer,
    shardings_of,
)
from jaxrl_llm.learner.step import (
    LearnerConfig,
    make_gradient,
    make_policy,
    make_score_step,
    make_train_step,
)
from jaxrl_llm.losses.kl import KLConfig
from jaxrl_llm.losses.policy import LossConfig, policy_loss
from jaxrl_llm.losses.router import router_loss
from jaxrl_llm.losses.weights import ImportanceConfig, token_weights
from jaxrl_llm.model.config import ComputeConfig, ModelConfig, MoEConfig
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.sharding import AXES, Layout, MeshConfig, ShardingRules, batch_sharding, make_layout
from tests.learner.tiny import (
    MODEL,
    make_batch,
    make_params,
    make_routes,
    one_device,
    replace,
    with_noise,
    with_some_routes,
)

# A dense layer and an MoE layer, all parts of the loss, routes for some tokens; and every dimension
# that a mesh axis may split can be split eight ways.
MIXED = ModelConfig(
    vocab_size=16,
    width=8,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=2,
    moe=MoEConfig(
        num_experts=8, experts_per_token=2, expert_width=8, dense_layers=(0,), dense_width=8
    ),
)
EIGHT = [
    MeshConfig(*sizes)
    for sizes in itertools.product((1, 2, 4, 8), repeat=5)
    if math.prod(sizes) == 8
]
"""Every way to share eight devices among the axes."""
LOSS = LossConfig(
    averaging="sequence",
    kl=KLConfig(coefficient=0.1),
    entropy_coefficient=0.02,
    router_z_coefficient=0.01,
    router_balance_coefficient=0.05,
)
LEARNER = LearnerConfig(
    mini_batches=2, micro_batch_rows=8, replay="r3", compute=ComputeConfig(logprob_chunk=3)
)
"""Two micro-batches of the 16 rows, on one device."""
# beta1 = 0 leaves the gradient itself in the first moment, to be compared leaf by leaf; a large eps
# keeps the update proportional to it, where AdamW would turn rounding errors into signs.
TRANSPARENT = make_optimizer(
    OptimizerConfig(learning_rate=0.5, beta1=0.0, eps=1.0, clip_norm=float("inf")), 1
)


def in_two(config: MeshConfig) -> LearnerConfig:
    """LEARNER on this mesh, in as many micro-batches."""
    rows = LEARNER.micro_batch_rows // config.rows
    return dataclasses.replace(LEARNER, mesh=config, micro_batch_rows=rows)


def make_state(model: ModelConfig, optimizer: Optimizer, layout: Layout) -> TrainState:
    params = jax.tree.map(jnp.asarray, make_params(model))
    state = TrainState(jnp.int32(0), params, optimizer.transform.init(params))
    return jax.device_put(state, shardings_of(abstract_state(model, optimizer, layout)))


@pytest.fixture(scope="module")
def batch() -> TrainBatch:
    """Off-policy enough for the cap, the clip mask and every other branch to act."""
    batch = make_batch(model=MIXED)
    policy = jax.jit(make_policy(MIXED, ComputeConfig(), one_device(), temperature=1.0))
    logprobs = policy(make_params(MIXED), batch, None).logprobs
    return replace(
        with_some_routes(make_routes(np.random.default_rng(1), MIXED), batch),
        old_logprobs=with_noise(logprobs, 0.3, seed=1),
        ref_logprobs=with_noise(logprobs, 0.5, seed=2),
    )


def values(metrics: dict[str, Mean]) -> dict[str, float]:
    return {name: float(mean.value()) for name, mean in metrics.items()}


def assert_close(left: Params, right: Params, tolerance: float = 1e-5) -> None:
    """Every leaf to `tolerance` of each element, or half of that of its largest if that is more."""
    assert jax.tree.structure(left) == jax.tree.structure(right)

    def one(path: tuple, a: jax.Array, b: jax.Array) -> None:
        atol = tolerance / 2 * float(np.max(np.abs(b)))
        assert atol > 0, jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=atol, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(one, left, right)


@pytest.fixture(scope="module")
def plain(batch: TrainBatch):
    """Gradient, loss and metrics of the whole batch at once, written without the learner."""
    policy = make_policy(MIXED, ComputeConfig(), one_device(), temperature=1.0)
    weights = token_weights(batch.loss_mask, batch.segment_ids, per="sequence")
    real = np.asarray(batch.segment_ids) > 0
    router_weights = jnp.asarray(real / real.sum(), jnp.float32)

    def loss(params: Params) -> tuple[jax.Array, dict[str, Mean]]:
        logprobs, entropy, router = policy(params, batch, ReplayedRoutes(batch.routes))
        main = policy_loss(logprobs, entropy, batch, weights, LOSS)
        side = router_loss(router, router_weights, z_coefficient=0.01, balance_coefficient=0.05)
        return main.loss + side.loss, main.metrics | side.metrics

    (total, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(make_params(MIXED))
    metrics = values(metrics)
    for name in ("is_weight/capped_fraction", "clip/high_fraction", "clip/low_fraction"):
        assert metrics[name] > 0.005, f"the batch leaves {name} untested"
    return grads, float(total), metrics


def test_one_micro_batch_is_the_batch(batch: TrainBatch, plain) -> None:
    """On four devices, with the gradient split as the parameters are."""
    config = MeshConfig(fsdp=2, tensor=2)
    learner = dataclasses.replace(LEARNER, micro_batch_rows=0, mesh=config)
    layout = make_layout(config)
    step = jax.jit(make_gradient(MIXED, learner, LOSS, layout, temperature=1.0))
    params = make_state(MIXED, TRANSPARENT, layout).params
    grads, output = step(params, jax.device_put(batch, batch_sharding(layout)))
    assert_close(grads, plain[0])
    assert float(output.loss) == pytest.approx(plain[1], rel=1e-5)
    metrics = values(output.metrics)
    routing = {name: metrics.pop(name) for name in list(metrics) if name.startswith("routing/")}
    assert 0.3 < routing["routing/replay_coverage"] < 0.9
    assert metrics == pytest.approx(plain[2], rel=1e-5)
    same = jax.tree.map(lambda g, p: g.sharding.is_equivalent_to(p.sharding, g.ndim), grads, params)
    assert jax.tree.all(same)


@pytest.fixture(scope="module")
def alone(batch: TrainBatch):
    """State and metrics after one update, in two micro-batches, on one device."""
    return update_on(MeshConfig(), batch)


def update_on(
    config: MeshConfig,
    batch: TrainBatch,
    model: ModelConfig = MIXED,
    compute: ComputeConfig = LEARNER.compute,
) -> tuple[TrainState, dict[str, float]]:
    layout = make_layout(config)
    learner = dataclasses.replace(in_two(config), compute=compute)
    train = make_train_step(model, learner, LOSS, TRANSPARENT, layout, temperature=1.0)
    state, metrics = train(
        make_state(model, TRANSPARENT, layout), jax.device_put(batch, batch_sharding(layout))
    )
    assert shardings_of(state) == shardings_of(abstract_state(model, TRANSPARENT, layout))
    return state, values(metrics)


def test_micro_batches_add_up_to_the_batch(alone, plain) -> None:
    """Values and gradients, the balance loss included, which is no sum over tokens."""
    state, metrics = alone
    grads, loss, expected = plain
    assert_close(optax.tree.get(state.opt_state, "mu"), grads)
    assert metrics["learner/loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["learner/grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_micro_batches_have_so_many_rows_for_each_share_of_the_mesh() -> None:
    mesh = MeshConfig(data=2, fsdp=3, expert=2, context=2, tensor=2)
    learner = LearnerConfig(micro_batch_rows=4, mesh=mesh)
    assert learner.row_multiple == 4 * 12
    assert [learner.micro_batches(rows) for rows in (48, 96, 480)] == [1, 2, 10]
    whole = LearnerConfig(mesh=mesh)
    assert whole.row_multiple == 12
    assert [whole.micro_batches(rows) for rows in (12, 480)] == [1, 1]
    for one, rows in ((learner, 60), (whole, 18)):
        with pytest.raises(ValueError, match=rf"{rows} rows, no multiple of {one.row_multiple}, "):
            one.micro_batches(rows)


@pytest.fixture(scope="module")
def half_at_once(batch: TrainBatch):
    """Half of the batch's rows, those of padding among them, and its gradient and loss."""
    half = jax.tree.map(lambda leaf: leaf[8:], batch)
    learner = dataclasses.replace(LEARNER, micro_batch_rows=0)
    step = jax.jit(make_gradient(MIXED, learner, LOSS, one_device(), temperature=1.0))
    return half, *step(make_params(MIXED), half)


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(data=2)], ids=["one", "data2"])
def test_a_shorter_mini_batch_takes_fewer_micro_batches(
    config: MeshConfig, batch: TrainBatch, half_at_once
) -> None:
    """Its loss and gradient are those of all its rows at once, the balance loss included."""
    learner = dataclasses.replace(LEARNER, mesh=config, micro_batch_rows=2)
    layout = make_layout(config)
    params = make_state(MIXED, TRANSPARENT, layout).params
    gradient = make_gradient(MIXED, learner, LOSS, layout, temperature=1.0)
    score = make_score_step(MIXED, learner, layout, temperature=1.0)
    half, expected, output = half_at_once
    whole, half = (jax.device_put(each, batch_sharding(layout)) for each in (batch, half))
    # The loads of the experts are summed first, then the gradients.
    assert loops(gradient, params, whole) == [8 // config.rows] * 2
    assert loops(gradient, params, half) == [4 // config.rows] * 2
    assert loops(score, params, half) == [4 // config.rows]
    grads, found = jax.jit(gradient)(params, half)
    assert_close(grads, expected)
    assert float(found.loss) == pytest.approx(float(output.loss), rel=1e-5)
    np.testing.assert_allclose(found.logprobs, output.logprobs, rtol=1e-5, atol=1e-5)


def loops(step: Callable[..., object], params: Params, batch: TrainBatch) -> list[int]:
    """How often each outermost loop of a step runs: once for a micro-batch."""
    equations = jax.make_jaxpr(step)(params, batch).eqns
    while [equation.primitive.name for equation in equations] == ["jit"]:
        equations = equations[0].params["jaxpr"].eqns
    scans = [equation for equation in equations if equation.primitive.name == "scan"]
    return [equation.params["length"] for equation in scans]


@pytest.mark.parametrize(
    "config",
    EIGHT,
    ids=lambda config: "x".join(f"{a}{vars(config)[a]}" for a in AXES if vars(config)[a] > 1),
)
def test_eight_devices_do_what_one_does(config: MeshConfig, batch: TrainBatch, alone) -> None:
    """Loss, metrics, every gradient leaf, every parameter."""
    state, metrics = update_on(config, batch)
    assert_close(optax.tree.get(state.opt_state, "mu"), optax.tree.get(alone[0].opt_state, "mu"))
    assert_close(state.params, alone[0].params)
    assert int(state.step) == 1
    assert metrics == pytest.approx(alone[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "rules",
    [
        ShardingRules(embed=(), expert_embed=(), mlp=(), expert=()),
        ShardingRules(embed=("context",), heads=(), vocab=()),
    ],
    ids=["whole experts", "whole heads"],
)
def test_other_rules_change_nothing(rules: ShardingRules, batch: TrainBatch, alone) -> None:
    """What a rule does not split, every device of the axis has and computes whole."""
    state, metrics = update_on(MeshConfig(expert=2, context=2, tensor=2, rules=rules), batch)
    assert_close(optax.tree.get(state.opt_state, "mu"), optax.tree.get(alone[0].opt_state, "mu"))
    assert metrics == pytest.approx(alone[1], rel=1e-5, abs=1e-6)


# Heads as wide as kernels want them.
WIDE = dataclasses.replace(MIXED, num_heads=4, num_kv_heads=2, head_dim=128)


@pytest.fixture(scope="module")
def by_plain(batch: TrainBatch):
    compute = ComputeConfig(attention="plain", dispatch="dense", logprob_chunk=3)
    return update_on(MeshConfig(), batch, WIDE, compute)


@pytest.mark.parametrize(
    ("config", "remat"),
    [
        (MeshConfig(), "none"),
        (MeshConfig(expert=2, context=2, tensor=2), "block"),
        (MeshConfig(fsdp=2, expert=4), "dots"),
    ],
    ids=["one-none", "eight-block", "eight-dots"],
)
def test_an_update_by_kernels_is_the_plain_update(
    config: MeshConfig, remat: str, batch: TrainBatch, by_plain
) -> None:
    """Packed rows, replayed routes, micro-batches: loss, metrics, every gradient leaf.

    To 5e-5: the kernels add up in another order, the shares of a softmax among others.
    """
    compute = ComputeConfig(
        attention="splash",
        dispatch="megablox",
        remat=remat,  # type: ignore[arg-type]
        logprob_chunk=3,
        keep_logits=remat == "dots",
    )
    state, metrics = update_on(config, batch, WIDE, compute)
    wanted = optax.tree.get(by_plain[0].opt_state, "mu")
    assert_close(optax.tree.get(state.opt_state, "mu"), wanted, 5e-5)
    assert metrics == pytest.approx(by_plain[1], rel=5e-5, abs=1e-6)


def test_eight_devices_score_as_one_does(batch: TrainBatch) -> None:
    outputs = []
    for config in (MeshConfig(), MeshConfig(expert=2, context=2, tensor=2)):
        layout = make_layout(config)
        params = make_state(MIXED, TRANSPARENT, layout).params
        score = make_score_step(MIXED, in_two(config), layout, temperature=0.7)
        outputs.append(score(params, jax.device_put(batch, batch_sharding(layout))))
    one, eight = outputs
    np.testing.assert_allclose(eight.logprobs, one.logprobs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(eight.entropy, one.entropy, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(eight.routes, one.routes)
    assert values(eight.metrics) == pytest.approx(values(one.metrics), rel=1e-5)
    assert eight.logprobs.addressable_shards[0].data.shape == (8, 4), "rows and positions split"


def test_the_state_is_donated_and_the_policy_learns() -> None:
    """On-policy without scoring: good tokens become likelier than bad ones, update by update."""
    batch = replace(make_batch(), routes=make_routes(np.random.default_rng(1)))
    learner = LearnerConfig(old_logprobs="none")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01), 1)
    loss = LossConfig(importance=ImportanceConfig(ratio="off"), averaging="token")
    train = make_train_step(MODEL, learner, loss, optimizer, one_device(), temperature=1.0)
    state = make_state(MODEL, optimizer, one_device())
    losses = []
    for _ in range(6):
        previous = state
        state, metrics = train(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(previous))
        losses.append(values(metrics)["learner/loss"])
    assert all(later < earlier - 1e-3 for earlier, later in itertools.pairwise(losses))
    found = values(metrics)
    assert found["staleness/ratio_mean"] == 1, "pi_old is the current policy"
    assert found["routing/replay_coverage"] == 0
    assert 0.3 < found["routing/agreement"] < 0.7, "reported here, for no scoring pass does"
