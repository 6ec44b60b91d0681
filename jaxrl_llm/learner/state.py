"""What the learner carries from update to update, and the optimizer that changes it.

What it is: TrainState, its shapes and shardings on a mesh, AdamW with a schedule and global-norm
clipping. What it is not: a loss, or the update itself (step.py).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_llm.arrays import Array
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.transformer import Params, init_params, parameter_axes
from jaxrl_llm.sharding import Layout, parameter_shardings, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything an update reads and writes. The train steps donate it."""

    step: Array  # i32[], updates made by this optimizer; the schedule's clock
    params: Params  # f32, see model/transformer.py
    opt_state: Any  # optax; moments have the shapes and shardings of the parameters


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, a schedule and global-norm clipping."""

    learning_rate: float = 3e-4  # peak, reached after the warm-up
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # shape after the warm-up
    warmup_steps: int = 0  # updates over which the rate rises linearly from 0 to its peak
    final_share: float = 0.0  # rate at the end of a linear or cosine schedule, share of the peak
    beta1: float = 0.9  # decay of the mean of gradients
    beta2: float = 0.999  # decay of the mean of squared gradients
    eps: float = 1e-8  # added to the root of the mean square
    weight_decay: float = 0.0  # decoupled, on matrices only; norm scales are not decayed
    clip_norm: float = 1.0  # largest global gradient norm, gradients scale down to it; inf: never

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip_norm"):
            if not vars(self)[name] > 0:
                raise ValueError(f"optimizer {name} is {vars(self)[name]}; it must be positive")
        for name in ("warmup_steps", "weight_decay"):
            if not vars(self)[name] >= 0:
                raise ValueError(f"optimizer {name} is {vars(self)[name]}; it must be 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= vars(self)[name] < 1:
                raise ValueError(f"optimizer {name} is {vars(self)[name]}; it must be in [0, 1)")
        if not 0 <= self.final_share <= 1:
            raise ValueError(f"optimizer final_share is {self.final_share}; it must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation, and its learning rate once more so that it can be reported."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule  # TrainState.step before the update -> learning rate


def make_optimizer(config: OptimizerConfig, total_steps: int) -> Optimizer:
    """Clip by global norm, then AdamW. `total_steps` updates are where a schedule ends.

    Raises ValueError if the warm-up leaves no update to a linear or cosine schedule.
    """
    after = total_steps - config.warmup_steps
    if config.schedule != "constant" and after < 1:
        raise ValueError(
            f"optimizer warmup_steps is {config.warmup_steps} of {total_steps} updates, which "
            f'leaves none for the {config.schedule} schedule; lower it or use "constant"'
        )
    peak, share = config.learning_rate, config.final_share
    schedules = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, share * peak, after),
        "cosine": lambda: optax.cosine_decay_schedule(peak, after, alpha=share),
    }
    schedule = schedules[config.schedule]()
    if config.warmup_steps:
        # Update 0 already moves: its rate is peak / warmup_steps.
        rise = optax.linear_schedule(
            peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1)
        )
        schedule = optax.join_schedules([rise, schedule], [config.warmup_steps])
    transform = optax.chain(
        optax.stateless(partial(_clipped, config.clip_norm)),
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_matrices),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(transform, schedule)


def abstract_params(config: ModelConfig, layout: Layout) -> Params:
    """The parameters of a model, with jax.ShapeDtypeStruct and its sharding for every leaf."""
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    shardings = parameter_shardings(shapes, parameter_axes(config), layout)
    return jax.tree.map(_struct, shapes, shardings)


def abstract_state(config: ModelConfig, optimizer: Optimizer | None, layout: Layout) -> TrainState:
    """The TrainState of a model, with jax.ShapeDtypeStruct and its sharding for every leaf.

    Without an optimizer, opt_state is None.
    """
    params = abstract_params(config, layout)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(layout))
    opt_state = None if optimizer is None else _abstract_opt_state(params, optimizer)
    return TrainState(step, params, opt_state)  # type: ignore[arg-type]


def shardings_of(tree: Any) -> Any:
    """The sharding of every leaf of a tree of arrays or jax.ShapeDtypeStruct."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def random_params(config: ModelConfig, layout: Layout, key: Array) -> Params:
    """Initial parameters, each leaf made where it lives.

    The same key gives the same ones on every mesh, to rounding.
    """
    shardings = shardings_of(abstract_params(config, layout))
    return jax.jit(partial(init_params, config), out_shardings=shardings)(key)


def init_state(params: Params, optimizer: Optimizer) -> TrainState:
    """These parameters, with a fresh optimizer at step 0; every array on the parameters' mesh."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    step = jax.device_put(jnp.int32(0), NamedSharding(mesh, PartitionSpec()))
    return fresh_optimizer_state(TrainState(step, params, None), optimizer)


def fresh_optimizer_state(state: TrainState, optimizer: Optimizer) -> TrainState:
    """The same parameters at step 0 of another optimizer, as when RL follows a cold start."""
    shardings = shardings_of(_abstract_opt_state(state.params, optimizer))
    opt_state = jax.jit(optimizer.transform.init, out_shardings=shardings)(state.params)
    return TrainState(jnp.zeros_like(state.step), state.params, opt_state)


def _abstract_opt_state(params: Params, optimizer: Optimizer) -> Any:
    """Shapes and shardings of the optimizer's state for parameters that have shardings."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    return optax.tree.map_params(
        optimizer.transform,
        lambda moment, param: _struct(moment, param.sharding),
        jax.eval_shape(optimizer.transform.init, params),
        params,
        transform_non_params=lambda leaf: _struct(leaf, everywhere),
    )


def _struct(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _clipped(clip_norm: float, gradient: Params, _: Params | None) -> Params:
    """optax.clip_by_global_norm by a product, which compilers take into the moments' updates; its
    division they compute apart, in a pass over all gradients.
    """
    scale = jnp.minimum(1.0, clip_norm / optax.tree.norm(gradient))
    return optax.tree.scale(scale, gradient)


def _matrices(params: Params) -> Any:
    """True for every parameter that weight decay acts on: all but the norm scales."""

    def one(path: tuple[Any, ...], _: Array) -> bool:
        return not path[-1].key.endswith("norm")

    return jax.tree_util.tree_map_with_path(one, params)
