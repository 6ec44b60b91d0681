"""The learner on the first layers of Qwen3-30B-A3B, by kernel; on a GPU only."""

from __future__ import annotations

import jax

from jaxrl_llm.bench.config import BenchConfig
from jaxrl_llm.bench.figures import Figure, Findings, Wanted, figure
from jaxrl_llm.bench.isolation import in_fresh_process
from jaxrl_llm.bench.measure import take_turns
from jaxrl_llm.bench.roof import make_roof
from jaxrl_llm.bench.workload import Trainee, describe, make_setup, make_tokens
from jaxrl_llm.compile.model_flops import TRAINING, model_flops
from jaxrl_llm.model.config import Attention, Dispatch

STEP = "step"
KERNELS: tuple[tuple[Dispatch, Attention], ...] = (
    ("blocked", "cudnn"),
    ("ragged", "cudnn"),
    ("blocked", "blocked"),
)
"""The first is what `auto` takes on a GPU."""


def measure(config: BenchConfig) -> Findings:
    """See the module. Each pair of kernels is measured in a process of its own."""
    sizes = config.slice
    title = f"{describe(sizes.model)}, {sizes.rows} rows of {sizes.length:,} tokens"
    if jax.default_backend() != "gpu":
        return Findings(title, (), ("Not measured: it needs a GPU, and there is none here.",))
    figures: list[Figure] = []
    notes = []
    for dispatch, attention in KERNELS:
        try:
            figures += in_fresh_process(measure_kernels, config, dispatch, attention)
        except Exception as error:  # a kernel that does not run is a result; the others go on
            notes.append(f"{dispatch}, {attention} did not run: {type(error).__name__}: {error}")
    if not figures:
        raise RuntimeError("; ".join(notes))
    notes.append("Each pair in a process of its own, with a roof of its own in the same rounds.")
    return Findings(title, tuple(figures), tuple(notes))


def measure_kernels(
    config: BenchConfig, dispatch: Dispatch, attention: Attention
) -> tuple[Figure, ...]:
    """The learner step with these kernels, and the roof beside it."""
    sizes, roof = config.slice, make_roof(config.roof)
    setup = make_setup(sizes.model).kernels(dispatch, attention)
    batch = setup.batch(make_tokens(sizes.model, sizes.rows, sizes.length + 1))
    contestants = {**roof.contestants, STEP: Trainee(setup).contestant(setup.sft_step(), batch)}
    turns = take_turns(contestants, config.repeats)
    flops = model_flops(sizes.model, rows=sizes.rows, length=sizes.length, passes=TRAINING)
    share = roof.of_product(turns, STEP, flops)
    name = f"{dispatch} dispatch, {attention} attention"
    return (
        *roof.figures(turns),
        figure(name, turns.seconds(STEP), "s", roof=share),
        figure(f"{name}, MFU", share, "share", wanted=Wanted(">=", 0.35)),
    )
