"""What a step costs when there is more of something: tokens, experts, segments in a row."""

from __future__ import annotations

import dataclasses

from jaxrl_llm.arrays import TrainBatch
from jaxrl_llm.bench.config import BenchConfig
from jaxrl_llm.bench.figures import Findings, Wanted, figure
from jaxrl_llm.bench.measure import take_turns
from jaxrl_llm.bench.roof import make_roof
from jaxrl_llm.bench.workload import Trainee, describe, make_setup, make_tokens
from jaxrl_llm.compile.model_flops import TRAINING, model_flops

BASE, ROWS, LENGTH = "learner step", "rows x2", "length x2"
EXPERTS, PACKED = "more experts", "all rows packed in one"


def measure(config: BenchConfig) -> Findings:
    """See the module."""
    sizes, roof = config.learner, make_roof(config.roof)
    model, rows, length = sizes.model, sizes.rows, sizes.length
    more = dataclasses.replace(
        model, moe=dataclasses.replace(model.moe, num_experts=sizes.more_experts)
    )
    setup, wider = make_setup(model), make_setup(more)
    step, trainee, other = setup.sft_step(), Trainee(setup), Trainee(wider)

    def batch(rows: int, length: int, segments: int = 1) -> TrainBatch:
        return setup.batch(make_tokens(model, rows, length + 1), segments=segments)

    contestants = {
        **roof.contestants,
        BASE: trainee.contestant(step, batch(rows, length)),
        ROWS: trainee.contestant(step, batch(2 * rows, length)),
        LENGTH: trainee.contestant(step, batch(rows, 2 * length)),
        EXPERTS: other.contestant(wider.sft_step(), batch(rows, length)),
        PACKED: trainee.contestant(step, batch(1, rows * length, rows)),
    }
    turns = take_turns(contestants, config.repeats)
    flops = {
        BASE: model_flops(model, rows=rows, length=length, passes=TRAINING),
        ROWS: model_flops(model, rows=2 * rows, length=length, passes=TRAINING),
        LENGTH: model_flops(model, rows=rows, length=2 * length, passes=TRAINING),
        EXPERTS: model_flops(more, rows=rows, length=length, passes=TRAINING),
        PACKED: model_flops(model, rows=rows, length=length, passes=TRAINING),
    }
    names = {
        BASE: f"{rows} rows of {length:,}",
        ROWS: f"{2 * rows} rows of {length:,}",
        LENGTH: f"{rows} rows of {2 * length:,}",
        EXPERTS: f"{sizes.more_experts} experts",
        PACKED: f"{rows} sequences in one row of {rows * length:,}",
    }
    figures = [
        figure(text, turns.seconds(name), "s", roof=roof.of_product(turns, name, flops[name]))
        for name, text in names.items()
    ]
    wanted = {ROWS: Wanted("<=", 2.1), LENGTH: None, EXPERTS: Wanted("<=", 1.15)}
    wanted[PACKED] = Wanted("<=", 1.1)
    figures += [
        figure(f"{names[name]} / {names[BASE]}", turns.ratio(name, BASE), "x", wanted=bound)
        for name, bound in wanted.items()
    ]
    notes = (
        "All are learner steps as in the row update: forward, backward, AdamW.",
        f"With rows of {2 * length:,} attention does {2}x as much for each token; its model FLOPs "
        "count that.",
    )
    return Findings(describe(model), (*roof.figures(turns), *figures), notes)
