"""What routing replay, the diagnostics of every step and the scoring pass cost."""

from __future__ import annotations

import dataclasses

import jax

from jaxrl_llm.arrays import Metrics, TrainBatch
from jaxrl_llm.bench.config import BenchConfig
from jaxrl_llm.bench.figures import Findings, Wanted, figure
from jaxrl_llm.bench.measure import take_turns
from jaxrl_llm.bench.roof import make_roof
from jaxrl_llm.bench.workload import Setup, Trainee, describe, make_setup, make_tokens
from jaxrl_llm.compile.model_flops import FORWARD, TRAINING, model_flops
from jaxrl_llm.learner.state import TrainState
from jaxrl_llm.learner.step import TrainStep, jit_update, make_gradient, make_score_step
from jaxrl_llm.learner.update import apply_gradients
from jaxrl_llm.losses.policy import LossConfig

TRAIN, REPLAY = "train step", "train step, r3 replay"
BARE, SCORE = "train step, no metrics", "score step"


def measure(config: BenchConfig) -> Findings:
    """See the module."""
    sizes, roof = config.learner, make_roof(config.roof)
    setup = make_setup(sizes.model)
    replaying = dataclasses.replace(setup, learner=dataclasses.replace(setup.learner, replay="r3"))
    batch = setup.batch(make_tokens(sizes.model, sizes.rows, sizes.length + 1))
    trainee = Trainee(setup)
    score = make_score_step(setup.model, setup.learner, setup.layout, temperature=1.0)
    # Those of the live routers, so that both sides have the same load of experts.
    routes = score(trainee.state.params, batch).routes
    routed = dataclasses.replace(batch, routes=routes)
    contestants = {
        **roof.contestants,
        TRAIN: trainee.contestant(setup.train_step(), batch),
        REPLAY: trainee.contestant(replaying.train_step(), routed),
        BARE: trainee.contestant(bare_step(setup), batch),
        SCORE: lambda: jax.block_until_ready(score(trainee.state.params, batch)),
    }
    turns = take_turns(contestants, config.repeats)
    passes = {TRAIN: TRAINING, REPLAY: TRAINING, BARE: TRAINING, SCORE: FORWARD}
    figures = []
    for name, count in passes.items():
        flops = model_flops(sizes.model, rows=sizes.rows, length=sizes.length, passes=count)
        share = roof.of_product(turns, name, flops)
        figures.append(figure(name, turns.seconds(name), "s", roof=share))
    for name, other, bound in (
        (REPLAY, TRAIN, 1.02),
        (TRAIN, BARE, 1.03),
        (SCORE, TRAIN, 0.40),
    ):
        wanted = Wanted("<=", bound)
        figures.append(figure(f"{name} / {other}", turns.ratio(name, other), "x", wanted=wanted))
    title = f"{describe(sizes.model)}, {sizes.rows} rows of {sizes.length:,} tokens"
    notes = (
        "The train step is MiniRL's update. Replayed are the experts that its own routers chose "
        "at first, with the metrics of replay.",
        "Without metrics: the same gradient and AdamW in a program that returns the loss alone.",
    )
    return Findings(title, (*roof.figures(turns), *figures), notes)


def bare_step(setup: Setup) -> TrainStep:
    """The train step that reports its loss alone; the compiler then leaves out the rest."""
    gradient = make_gradient(
        setup.model, setup.learner, LossConfig(), setup.layout, temperature=1.0
    )

    def train(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        grads, output = gradient(state.params, batch)
        state, metrics = apply_gradients(state, grads, output.loss, setup.optimizer)
        return state, {"learner/loss": metrics["learner/loss"]}

    return jit_update(train, setup.model, setup.optimizer, setup.layout)
