"""What the learner says about one sequence, to hold a server's answer against.

What it is: the log-probabilities of a few tokens under the current parameters, computed as the
score step computes them. What it is not: the comparison (rollout/probe.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from jaxrl_llm.arrays import NO_ROUTE, Array, ReplayedRoutes
from jaxrl_llm.model.config import ComputeConfig, ModelConfig
from jaxrl_llm.model.logprobs import token_logprobs
from jaxrl_llm.model.transformer import Params, make_forward, unembed
from jaxrl_llm.sharding import BATCH_AXES, Layout, batch_sharding, replicated

ProbeScore = Callable[[Params, np.ndarray, np.ndarray | None, float], np.ndarray]
"""(parameters, tokens i32[T], routes int16[S, L, K] or None, temperature) -> f32[S].

Log-probabilities of tokens[1:] in nats.
"""


def make_probe_score(
    model: ModelConfig, compute: ComputeConfig, layout: Layout, *, length: int
) -> ProbeScore:
    """A scorer of single sequences of at most `length` tokens.

    Through the experts of the sampler's routes, if there are any: where two experts are nearly tied
    two engines may choose differently, and that is no sign of other weights. Through the learner's
    own otherwise.

    It compiles once for each temperature. Raises ValueError for a longer sequence.
    """
    forward = make_forward(model, compute, layout)
    rows = layout.size(BATCH_AXES)  # copies of the sequence: rows must split

    width = -(-(length - 1) // layout.size(("context",))) * layout.size(("context",))

    @partial(jax.jit, static_argnames="temperature", out_shardings=replicated(layout))
    def score(
        params: Params,
        inputs: Array,
        targets: Array,
        positions: Array,
        segment_ids: Array,
        replayed: ReplayedRoutes | None,
        *,
        temperature: float,
    ) -> Array:
        output = forward(params, inputs, positions, segment_ids, replayed)
        logprobs, _ = token_logprobs(
            output.hidden,
            unembed(params, model),
            targets,
            temperature=temperature,
            chunk=compute.logprob_chunk,
            layout=layout,
        )
        return logprobs

    def probe(
        params: Params, tokens: np.ndarray, routes: np.ndarray | None, temperature: float
    ) -> np.ndarray:
        if not 2 <= tokens.size <= length:
            raise ValueError(f"the probe has {tokens.size} tokens; it may have 2 to {length}")
        count, row = tokens.size - 1, partial(_in_every_row, (rows, width), layout)
        logprobs = score(
            params,
            row(tokens[:-1], 0),
            row(tokens[1:], 0),
            row(np.arange(count, dtype=np.int32), 0),
            row(np.ones(count, np.int32), 0),
            None if routes is None else ReplayedRoutes(row(routes, NO_ROUTE)),
            temperature=temperature,
        )
        return np.asarray(logprobs)[0, :count]

    return probe


def _in_every_row(shape: tuple[int, int], layout: Layout, values: np.ndarray, fill: int) -> Array:
    """values[S, ...] at the front of every row of an array [*shape, ...] on the devices."""
    whole = np.full((*shape, *values.shape[1:]), fill, values.dtype)
    whole[:, : len(values)] = values
    # Every process has the same values; device_put would compare them first.
    return jax.make_array_from_callback(whole.shape, batch_sharding(layout), whole.__getitem__)
