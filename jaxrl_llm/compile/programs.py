"""The programs of a config that `jaxrl-llm compile` compiles, with abstract arguments.

What it is: the very steps that the loop runs, from the same functions, and the shapes that the loop
gives them. What it is not: a compilation (report.py); nothing here allocates an array of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.arrays import TrainBatch
from jaxrl_llm.assembly import learner_steps, optimizers, update_step
from jaxrl_llm.compile.model_flops import FORWARD, TRAINING, model_flops
from jaxrl_llm.config import RunConfig
from jaxrl_llm.data.collate import collate
from jaxrl_llm.learner.state import abstract_params, abstract_state
from jaxrl_llm.learner.step import prepare
from jaxrl_llm.model import hf
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.sharding import Layout, batch_sharding, replicated

ProgramName = Literal["train", "score", "publish"]
PROGRAMS: tuple[ProgramName, ...] = get_args(ProgramName)


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A jitted step and what it is called with."""

    name: ProgramName
    step: Any  # jitted
    arguments: tuple[Any, ...]  # jax.ShapeDtypeStruct for every array
    rows: int = 0  # of its batch, B; 0: it has none
    length: int = 0  # positions of a row, S
    model_flops: int = 0  # of all devices together


def make_programs(
    config: RunConfig, layout: Layout, names: tuple[ProgramName, ...], *, rows: int = 0
) -> list[StepProgram]:
    """The programs of these names, of mini-batches of `rows` rows, or 0: one for each response.

    Packed rows are fewer than the responses, by how much depends on their lengths. Rows are rounded
    up as the loop does it. A config without a scoring pass has no score program: ValueError if it
    is the only one asked for.
    """
    if rows < 0:
        raise ValueError(f"--rows is {rows}; give the rows of a mini-batch, or 0 for the config's")
    makers: dict[ProgramName, Callable[..., StepProgram]] = {
        "train": _train,
        "score": _score,
        "publish": _publish,
    }
    if config.learner.old_logprobs == "none":
        del makers["score"]
    wanted = [name for name in names if name in makers]
    if not wanted:
        raise ValueError(
            f"--programs is {' '.join(names)}, but learner.old_logprobs 'none' leaves the scoring "
            "pass out; ask for train"
        )
    shape = (config.rows(rows or config.responses), config.row_length)
    return [makers[name](config, layout, shape) for name in wanted]


def _score(config: RunConfig, layout: Layout, shape: tuple[int, int]) -> StepProgram:
    step = learner_steps(config, layout).score
    arguments = (abstract_params(config.model, layout), _unscored(config, layout, shape))
    return _program("score", config, step, arguments, FORWARD)


def _train(config: RunConfig, layout: Layout, shape: tuple[int, int]) -> StepProgram:
    step, optimizer = update_step(config, layout), optimizers(config)[1]
    batch = _unscored(config, layout, shape)
    if config.learner.old_logprobs == "score":
        params = abstract_params(config.model, layout)
        score = jax.eval_shape(learner_steps(config, layout).score, params, batch)
        batch = jax.eval_shape(partial(prepare, replay=config.learner.replay), batch, score)
    arguments = (abstract_state(config.model, optimizer, layout), batch)
    return _program("train", config, step, arguments, TRAINING)


def _publish(config: RunConfig, layout: Layout, shape: tuple[int, int]) -> StepProgram:
    """A publish as several processes do it, where each sees a part of every parameter.

    For servers, the one piece of all that is largest: pieces are gathered one after another, each
    while the one before, which is not counted, is copied from a device. For the in-process engine,
    all parameters at once.
    """
    params = abstract_params(config.model, layout)
    everywhere = replicated(layout)
    if not config.rollout.sglang.servers:
        step = jax.jit(
            partial(jax.tree.map, partial(jax.sharding.reshard, out_shardings=everywhere))
        )
        return StepProgram("publish", step, (params,))

    def gathered(params: Params, piece: hf.Piece) -> jax.Array:
        return jax.sharding.reshard(hf.cut(params, piece), everywhere)

    pieces = hf.pieces(config.model, config.rollout.publish.dtype)
    sizes = {piece: jax.eval_shape(partial(hf.cut, piece=piece), params).size for piece in pieces}
    largest = max(pieces, key=lambda piece: sizes[piece])
    # The others stay where they are: keep_unused counts them.
    step = jax.jit(partial(gathered, piece=largest), keep_unused=True)
    return StepProgram("publish", step, (params,))


def _program(
    name: ProgramName, config: RunConfig, step: Any, arguments: tuple[Any, ...], passes: int
) -> StepProgram:
    rows, length = arguments[-1].inputs.shape
    flops = model_flops(config.model, rows=rows, length=length, passes=passes)
    return StepProgram(name, step, arguments, rows, length, flops)


def _collated(config: RunConfig, layout: Layout, shape: tuple[int, int]) -> TrainBatch:
    """What collate gives: fields of the same types, of this shape [B, S]."""
    smallest = collate([], np.zeros(0, np.float32), step=0, rows=1, length=1, pack=False)
    field = partial(jax.ShapeDtypeStruct, sharding=batch_sharding(layout))
    batch = jax.tree.map(lambda leaf: field(shape, leaf.dtype), smallest)
    # The in-process engine always reports its routes, servers if they are asked to.
    if config.learner.replay == "r3" or not config.rollout.sglang.servers:
        model = config.model
        routes = (*shape, model.num_moe_layers, model.moe.experts_per_token)
        batch = dataclasses.replace(batch, routes=field(routes, jnp.int16))
    return batch


def _unscored(config: RunConfig, layout: Layout, shape: tuple[int, int]) -> TrainBatch:
    """What loop.py gives the scoring pass: with the log-probabilities of a reference, if any."""
    batch = _collated(config, layout, shape)
    if not config.loss.kl.coefficient:
        return batch
    steps, params = learner_steps(config, layout), abstract_params(config.model, layout)
    reference = jax.eval_shape(steps.score_reference, params, batch)
    return dataclasses.replace(batch, ref_logprobs=reference.logprobs)
