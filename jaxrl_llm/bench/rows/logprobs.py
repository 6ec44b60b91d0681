"""Log-probabilities and entropy of a large vocabulary with their gradient, in chunks and whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bench.config import BenchConfig
from jaxrl_llm.bench.figures import Findings, Wanted, figure
from jaxrl_llm.bench.measure import Contestant, take_turns
from jaxrl_llm.bench.roof import computes_in, make_roof
from jaxrl_llm.model.config import ComputeConfig
from jaxrl_llm.model.logprobs import token_logprobs

CHUNKED, WHOLE = "in chunks", "unchunked"


def measure(config: BenchConfig) -> Findings:
    """See the module."""
    sizes, width = config.logprobs, config.learner.model.width
    roof = make_roof(config.roof)
    chunk = ComputeConfig().logprob_chunk
    chunked, chunked_bytes = _contestant(config, chunk)
    whole, whole_bytes = _contestant(config, sizes.positions)
    turns = take_turns({**roof.contestants, CHUNKED: chunked, WHOLE: whole}, config.repeats)
    # Logits, and the gradients of hidden states and head; logits computed again do not count.
    flops = 3 * 2 * sizes.positions * width * sizes.vocabulary
    figures = [
        figure(name, turns.seconds(name), "s", roof=roof.of_product(turns, name, flops))
        for name in (CHUNKED, WHOLE)
    ]
    ratio = turns.ratio(CHUNKED, WHOLE)
    figures += [
        figure(f"time, {CHUNKED} / {WHOLE}", ratio, "x", wanted=Wanted("<=", 1.1)),
        figure(f"temporary memory, {CHUNKED}", [chunked_bytes], "B"),
        figure(f"temporary memory, {WHOLE}", [whole_bytes], "B"),
        figure(
            f"temporary memory, {CHUNKED} / {WHOLE}",
            [chunked_bytes / whole_bytes],
            "x",
            wanted=Wanted("<", 1 / 8),
        ),
    ]
    title = f"V {sizes.vocabulary:,}, D {width}, {sizes.positions:,} positions, {computes_in()}"
    notes = (
        f"token_logprobs, of targets, and entropy, with gradients of both; chunks of {chunk} "
        "positions. Memory is what the compiled program allots beside arguments and results.",
    )
    return Findings(title, (*roof.figures(turns), *figures), notes)


def _contestant(config: BenchConfig, chunk: int) -> tuple[Contestant, int]:
    """The gradient of a weighted sum of both, and the bytes of its temporaries."""
    sizes, width = config.logprobs, config.learner.model.width
    rng = np.random.default_rng(0)
    shape = (1, sizes.positions)
    hidden = jnp.asarray(rng.normal(size=(*shape, width)), computes_in())
    head = jnp.asarray(rng.normal(0, width**-0.5, (width, sizes.vocabulary)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, sizes.vocabulary, shape, np.int32))
    weights = jnp.asarray(rng.normal(size=shape), jnp.float32)

    def objective(hidden: jax.Array, head: jax.Array) -> jax.Array:
        logprobs, entropy = token_logprobs(hidden, head, targets, temperature=1.0, chunk=chunk)
        return jnp.sum(weights * logprobs) + 0.01 * jnp.sum(entropy)

    compiled = jax.jit(jax.value_and_grad(objective, argnums=(0, 1))).lower(hidden, head).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("this backend does not say what memory a program needs")
    return lambda: jax.block_until_ready(compiled(hidden, head)), analysis.temp_size_in_bytes
