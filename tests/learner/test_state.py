"""The optimizer against float64 numpy, its schedules, and the train state on a mesh."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.learner.state import (
    OptimizerConfig,
    TrainState,
    abstract_state,
    fresh_optimizer_state,
    init_state,
    make_optimizer,
    random_params,
    shardings_of,
)
from jaxrl_llm.learner.update import apply_gradients
from jaxrl_llm.sharding import MeshConfig, make_layout
from tests.learner.tiny import MODEL, make_params, one_device
from tests.reference.optimizer import AdamW


@pytest.mark.parametrize("clip_norm", [0.7, float("inf")])
def test_updates_are_clipped_adamw(clip_norm: float) -> None:
    """Three updates; only matrices decay, the norm scale does not."""
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="linear",
        warmup_steps=2,
        final_share=0.5,
        beta1=0.8,
        beta2=0.9,
        eps=1e-3,
        weight_decay=0.3,
        clip_norm=clip_norm,
    )
    optimizer = make_optimizer(config, total_steps=4)
    rng = np.random.default_rng(0)
    params = {"embed": rng.normal(size=(3, 2)), "final_norm": rng.normal(size=(2,))}
    reference = AdamW(0.8, 0.9, 1e-3, 0.3, clip_norm, decayed=("embed",))
    state = TrainState(
        jnp.int32(0),
        {name: jnp.asarray(value, jnp.float32) for name, value in params.items()},
        None,
    )
    state = TrainState(state.step, state.params, optimizer.transform.init(state.params))
    for index, rate in enumerate([0.05, 0.1, 0.1, 0.075]):
        gradient = {name: rng.normal(size=value.shape) for name, value in params.items()}
        before = dict(params)
        reference.update(params, gradient, rate)
        given = {name: jnp.asarray(g, jnp.float32) for name, g in gradient.items()}
        state, metrics = apply_gradients(state, given, jnp.float32(1.5), optimizer)
        for name, value in params.items():
            np.testing.assert_allclose(state.params[name], value, rtol=2e-5)
        assert int(state.step) == index + 1
        change = [params[name] - before[name] for name in params]
        expected = {
            "learner/loss": 1.5,
            "learner/grad_norm": np.sqrt(sum(np.sum(g**2) for g in gradient.values())),
            "learner/update_norm": np.sqrt(sum(np.sum(c**2) for c in change)),
            "learner/learning_rate": rate,
        }
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name].value(), value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.882843, 0.6, 0.317157, 0.2]),
    ],
)
def test_schedules_rise_and_fall(schedule: str, expected: list[float]) -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=2, final_share=0.2)
    rate = make_optimizer(config, total_steps=6).schedule
    np.testing.assert_allclose([float(rate(i)) for i in range(7)], expected, rtol=1e-6)


def test_a_warm_up_of_one_update_is_none_at_all() -> None:
    rate = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_steps=1), 3).schedule
    assert [float(rate(i)) for i in range(3)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"clip_norm": 0.0}, "clip_norm is 0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"beta2": 1.0}, "beta2 is 1"),
        ({"final_share": 1.5}, "final_share is 1.5"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


def test_a_warm_up_must_leave_room_for_the_schedule() -> None:
    with pytest.raises(ValueError, match="leaves none for the cosine schedule"):
        make_optimizer(OptimizerConfig(schedule="cosine", warmup_steps=5), total_steps=5)


def test_the_state_is_the_same_on_every_mesh_and_lies_where_it_should() -> None:
    optimizer = make_optimizer(OptimizerConfig(), 1)
    mesh = make_layout(MeshConfig(fsdp=2, expert=2, tensor=2))
    params = [random_params(MODEL, m, jax.random.key(3)) for m in (one_device(), mesh)]
    states = [init_state(given, optimizer) for given in params]
    # Not bit for bit: compilers fuse the sampling of a normal differently for a part of an array.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), *states)
    expected = abstract_state(MODEL, optimizer, mesh)
    assert abstract_state(MODEL, None, mesh) == dataclasses.replace(expected, opt_state=None)
    assert jax.tree.structure(states[1]) == jax.tree.structure(expected)
    for leaf, struct in zip(jax.tree.leaves(states[1]), jax.tree.leaves(expected), strict=True):
        assert (leaf.shape, leaf.dtype) == (struct.shape, struct.dtype)
        assert leaf.sharding == struct.sharding
    moments = optax.tree.get(states[1].opt_state, "mu")
    assert shardings_of(moments) == shardings_of(states[1].params)
    gate = moments["segments"]["00"]["mlp"]["gate"]
    assert gate.addressable_shards[0].data.size == gate.size / 8


def test_a_fresh_optimizer_keeps_the_parameters() -> None:
    first = make_optimizer(OptimizerConfig(), 1)
    second = make_optimizer(OptimizerConfig(schedule="cosine"), 9)
    mesh = make_layout(MeshConfig(fsdp=2))
    shardings = shardings_of(abstract_state(MODEL, first, mesh))
    params = jax.tree.map(jnp.asarray, make_params())
    state = TrainState(jnp.int32(0), params, first.transform.init(params))
    state = jax.device_put(state, shardings)
    used = TrainState(state.step + 5, state.params, jax.tree.map(lambda x: x + 1, state.opt_state))
    fresh = fresh_optimizer_state(used, second)
    assert int(fresh.step) == 0
    jax.tree.map(np.testing.assert_array_equal, fresh.params, state.params)
    expected = abstract_state(MODEL, second, mesh)
    assert jax.tree.structure(fresh) == jax.tree.structure(expected)
    assert shardings_of(fresh) == shardings_of(expected)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fresh.opt_state))
