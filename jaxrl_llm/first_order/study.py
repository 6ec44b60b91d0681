"""The study behind `jaxrl-llm first-order`: agreement against precision and against staleness.

What it is: tiny random policies, each moved a number of learner updates away from the weights that
were published, and the agreement of every correction's gradient there with the sequence-level
gradient. All expectations are exact, so the differences are bias alone: what a correction costs in
variance is not seen here. What it is not: a training run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm.first_order.enumeration import Enumeration, enumerate_responses
from jaxrl_llm.first_order.gradients import (
    Agreement,
    Behaviour,
    agreement,
    behaviour_at,
    expected_batch,
    sequence_gradient,
    surrogate_gradient,
)
from jaxrl_llm.first_order.passes import Passes, flat, make_passes, make_sampler_score
from jaxrl_llm.learner.step import Replay
from jaxrl_llm.losses.clipping import ClipConfig
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.losses.weights import ImportanceConfig
from jaxrl_llm.model.config import ComputeConfig, ModelConfig, MoEConfig
from jaxrl_llm.model.transformer import Params, init_params
from jaxrl_llm.rollout.precision import Numerics, Precision

STOP_TOKEN = 0
WARMUP_LEARNING_RATE = 1e-3
"""Of the updates before the publication, ten times as large as of those after it by default."""
Sweep = Literal["precision", "staleness"]
Task = tuple[Enumeration, np.ndarray]
"""All responses, and their rewards f32[B]."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""From the finest to the coarsest."""

METHODS: dict[str, tuple[ImportanceConfig, Replay]] = {
    "no correction": (ImportanceConfig(ratio="off"), "none"),
    "staleness only": (ImportanceConfig(ratio="staleness"), "none"),
    "token IS": (ImportanceConfig(), "none"),
    "sequence IS": (ImportanceConfig(level="sequence"), "none"),
    "token IS + R2": (ImportanceConfig(), "r2"),
    "token IS + R3": (ImportanceConfig(), "r3"),
}
"""The importance weight w, capped as by default, and the routes that are replayed."""


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The policies, and the two sweeps."""

    output: str = "runs/first-order"  # folder for the figure and study.json
    seeds: int = 6  # independent policies; the spread over them is drawn
    vocab_size: int = 5  # V, the stop token included
    length: int = 5  # most tokens of a response
    prompts: int = 1  # prompts of one token each, each with a rule of its own
    warmup_updates: int = 20  # exact updates before the weights are published
    learning_rate: float = 0.0001  # of Adam, for the updates since the publication
    router_precision: Literal["same", "float32"] = "float32"  # of the engine's routers' product
    precisions: tuple[Precision, ...] = PRECISIONS  # engine numerics of the first sweep
    precision_updates: int = 2  # updates since the publication, in the first sweep
    updates: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # updates since the publication, second sweep
    staleness_precision: Precision = "fp8_e4m3"  # engine numerics of the second sweep

    def __post_init__(self) -> None:
        for name in ("seeds", "prompts"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} is {vars(self)[name]}; it must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be positive")
        steps = (self.warmup_updates, self.precision_updates, *self.updates)
        if min(steps) < 0 or not self.updates or not self.precisions:
            raise ValueError(
                f"warmup_updates {self.warmup_updates}, precision_updates "
                f"{self.precision_updates}, updates {self.updates}, precisions {self.precisions}: "
                "numbers of updates are 0 or more, and a sweep needs at least one point"
            )
        if self.prompts >= self.vocab_size:
            raise ValueError(
                f"prompts is {self.prompts}; a vocabulary of {self.vocab_size} has "
                f"{self.vocab_size - 1} symbols besides the stop token to tell prompts apart"
            )


@dataclasses.dataclass(frozen=True)
class Cell:
    """One gradient of one policy."""

    sweep: Sweep
    seed: int
    precision: Precision
    updates: int  # since the publication
    method: str  # of METHODS
    clipped: bool  # the clip mask at its defaults, or none
    agreement: Agreement


@dataclasses.dataclass(frozen=True)
class Attribution:
    """Relative error of token IS, unclipped, as the sources of the discrepancy join one another.

    The behaviour policy is changed, nothing else: first pi_old with its own routes (only staleness
    is left), then pi_old on the sampler's routes (routing joins), then mu (numerics join).
    """

    sweep: Sweep
    seed: int
    precision: Precision
    updates: int
    staleness: float
    with_routing: float
    with_numerics: float


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that was measured."""

    config: StudyConfig
    cells: tuple[Cell, ...]
    attributions: tuple[Attribution, ...]


def study_model(config: StudyConfig) -> ModelConfig:
    """An MoE of eight thousand parameters: two layers, four experts, two of them per token."""
    return ModelConfig(
        vocab_size=config.vocab_size,
        width=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        moe=MoEConfig(num_experts=4, experts_per_token=2, expert_width=16),
    )


def study_passes(config: StudyConfig) -> Passes:
    """The learner's passes for policies this small."""
    return make_passes(study_model(config), ComputeConfig(remat="none", dispatch="dense"))


def study_task(config: StudyConfig) -> Task:
    """All responses, and rewards f32[B]: 1 iff the tokens add up to the prompt, modulo V."""
    enumeration = enumerate_responses(
        [(1 + prompt,) for prompt in range(config.prompts)],
        vocab_size=config.vocab_size,
        length=config.length,
        stop_token=STOP_TOKEN,
    )
    totals = np.sum(np.maximum(enumeration.responses, 0), axis=1) % config.vocab_size
    return enumeration, (totals == 1 + enumeration.prompt).astype(np.float32)


def random_params(model: ModelConfig, seed: int) -> Params:
    """Numpy parameters as init_params draws them, norm scales of 1; nothing compiles."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key.endswith("norm"):
            return np.ones(leaf.shape, np.float32)
        fan_in = leaf.shape[-1] if path[-1].key == "embed" else leaf.shape[-2]
        return rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def updates_from(
    passes: Passes, params: Params, task: Task, learning_rate: float
) -> Iterator[tuple[Params, Params]]:
    """Endless: the weights after 0, 1, 2, ... updates of Adam, and the exact gradient at them.

    All methods are compared on this one path, that of the exact sequence-level gradient.
    """
    state = optax.adam(learning_rate).init(params)
    while True:
        _, gradient = sequence_gradient(passes, params, *task)
        yield params, gradient
        params, state = jax.device_get(_ascend(params, gradient, state, learning_rate))


@partial(jax.jit, static_argnames="learning_rate")
def _ascend(
    params: Params, gradient: Params, state: Any, learning_rate: float
) -> tuple[Params, Any]:
    downhill = jax.tree.map(jnp.negative, gradient)
    change, state = optax.adam(learning_rate).update(downhill, state)
    return optax.apply_updates(params, change), state


def run_study(config: StudyConfig, tell: Callable[[str], None]) -> Study:
    """Measure everything; `tell` receives a line of progress for each policy and engine."""
    model, task = study_model(config), study_task(config)
    passes = study_passes(config)
    precisions = dict.fromkeys((*config.precisions, config.staleness_precision))
    engines = {
        name: make_sampler_score(Numerics(model, name, config.router_precision))
        for name in precisions
    }
    cells: list[Cell] = []
    attributions: list[Attribution] = []
    for seed in range(config.seeds):
        old = warmed_up(passes, random_params(model, seed), task, config.warmup_updates)
        wanted = {config.precision_updates, *config.updates}
        moved = moved_by(wanted, passes, old, task, config.learning_rate)
        for name, engine in engines.items():
            behaviour = behaviour_at(passes.score, engine, old, task[0])
            for sweep, updates in _points(config, name):
                new, exact = moved[updates]
                point = _Point(passes, task, behaviour, new, flat(exact))
                for method, clipped, found in _compare(point):
                    cells.append(Cell(sweep, seed, name, updates, method, clipped, found))
                attributions.append(Attribution(sweep, seed, name, updates, *_attribute(point)))
            tell(f"policy {seed + 1} of {config.seeds}, {name} engine")
    return Study(config, tuple(cells), tuple(attributions))


def warmed_up(passes: Passes, params: Params, task: Task, updates: int) -> Params:
    """The weights that are published: the policy has learnt a part of its task."""
    return moved_by({updates}, passes, params, task, WARMUP_LEARNING_RATE)[updates][0]


def moved_by(
    counts: set[int], passes: Passes, params: Params, task: Task, learning_rate: float
) -> dict[int, tuple[Params, Params]]:
    """Weights and exact gradient after each of these numbers of updates."""
    path = updates_from(passes, params, task, learning_rate)
    return {
        index: point
        for index, point in zip(range(max(counts) + 1), path, strict=False)
        if index in counts
    }


def _points(config: StudyConfig, precision: Precision) -> Iterator[tuple[Sweep, int]]:
    """Where this engine is measured: (sweep, updates since the publication)."""
    if precision in config.precisions:
        yield "precision", config.precision_updates
    if precision == config.staleness_precision:
        yield from (("staleness", updates) for updates in config.updates)


@dataclasses.dataclass(frozen=True)
class _Point:
    """One policy, one engine, one distance from the published weights."""

    passes: Passes
    task: Task
    behaviour: Behaviour
    params: Params  # now
    exact: np.ndarray  # f64[P], the sequence-level gradient at params


def _compare(point: _Point) -> Iterator[tuple[str, bool, Agreement]]:
    """(method, clipped, agreement) of every method."""
    for replay in get_args(Replay):
        scores = None
        for method, (importance, replayed) in METHODS.items():
            if replayed != replay:
                continue
            for clip in (ClipConfig(kind="none"), ClipConfig()):
                cfg = LossConfig(importance=importance, clip=clip)
                batch, weights = expected_batch(*point.task, point.behaviour, replay, cfg)
                scores = scores or point.passes.score(point.params, batch)
                gradient = surrogate_gradient(
                    point.passes, point.params, batch, weights, cfg, scores=scores
                )
                yield method, clip.kind != "none", agreement(gradient, point.exact)


def _attribute(point: _Point) -> tuple[float, float, float]:
    """See Attribution."""
    cfg = LossConfig(clip=ClipConfig(kind="none"))
    behaviour = point.behaviour
    errors = []
    for sampler in (behaviour.old, behaviour.old_replayed, behaviour.sampler):
        sampled = dataclasses.replace(behaviour, sampler=sampler)
        batch, weights = expected_batch(*point.task, sampled, "none", cfg)
        gradient = surrogate_gradient(point.passes, point.params, batch, weights, cfg)
        errors.append(agreement(gradient, point.exact).relative_error)
    stale, routed, numeric = errors
    return stale, routed, numeric
