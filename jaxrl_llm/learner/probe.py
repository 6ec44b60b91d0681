"""What the learner says about one sequence, to hold a server's answer against.

What it is: the log-probabilities of a few tokens under the current parameters, computed as the
score step computes them. What it is not: the comparison (rollout/probe.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrl_llm.arrays import NO_ROUTE, Array, ReplayedRoutes
from jaxrl_llm.model.config import ComputeConfig, ModelConfig
from jaxrl_llm.model.logprobs import token_logprobs
from jaxrl_llm.model.transformer import Params, make_forward, unembed
from jaxrl_llm.sharding import batch_sharding

ProbeScore = Callable[[Params, np.ndarray, np.ndarray | None, float], np.ndarray]
"""(parameters, tokens i32[T], routes int16[S, L, K] or None, temperature) -> f32[S].

Log-probabilities of tokens[1:] in nats.
"""


def make_probe_score(
    model: ModelConfig, compute: ComputeConfig, mesh: Mesh, *, length: int
) -> ProbeScore:
    """A scorer of single sequences of at most `length` tokens.

    Through the experts of the sampler's routes, if there are any: where two experts are nearly tied
    two engines may choose differently, and that is no sign of other weights. Through the learner's
    own otherwise.

    It compiles once for each temperature. Raises ValueError for a longer sequence.
    """
    forward = make_forward(model, compute, mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]  # copies of the sequence: rows must split

    @partial(jax.jit, static_argnames="temperature")
    def score(
        params: Params,
        tokens: Array,
        segment_ids: Array,
        replayed: ReplayedRoutes | None,
        *,
        temperature: float,
    ) -> Array:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = jnp.broadcast_to(jnp.arange(length - 1), inputs.shape)
        output = forward(params, inputs, positions, segment_ids, replayed)
        logprobs, _ = token_logprobs(
            output.hidden,
            unembed(params, model),
            targets,
            temperature=temperature,
            chunk=compute.logprob_chunk,
        )
        return logprobs[0]

    def probe(
        params: Params, tokens: np.ndarray, routes: np.ndarray | None, temperature: float
    ) -> np.ndarray:
        if not 2 <= tokens.size <= length:
            raise ValueError(f"the probe has {tokens.size} tokens; it may have 2 to {length}")
        positions = tokens.size - 1
        padded = np.zeros((rows, length), np.int32)
        padded[:, : tokens.size] = tokens
        segment_ids = np.zeros((rows, length - 1), np.int32)
        segment_ids[:, :positions] = 1
        replayed = None
        if routes is not None:
            experts = np.full((rows, length - 1, *routes.shape[1:]), NO_ROUTE, np.int16)
            experts[:, :positions] = routes
            replayed = ReplayedRoutes(jax.device_put(experts, batch_sharding(mesh)))
        split = jax.device_put((padded, segment_ids), batch_sharding(mesh))
        return np.asarray(score(params, *split, replayed, temperature=temperature))[:positions]

    return probe
