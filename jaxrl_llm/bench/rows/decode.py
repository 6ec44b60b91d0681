"""The in-process engine: against its limit, with unequal lengths, by precision, beside the peer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

from jaxrl_llm.bench.config import BenchConfig
from jaxrl_llm.bench.figures import Figure, Findings, Wanted, figure
from jaxrl_llm.bench.measure import Contestant, Turns, take_turns
from jaxrl_llm.bench.peer import load_peer
from jaxrl_llm.bench.roof import COPY, PRODUCT, Roof, make_roof
from jaxrl_llm.bench.rows.update import NO_PEER
from jaxrl_llm.bench.workload import Setup, describe, make_setup, make_tokens, write_checkpoint
from jaxrl_llm.compile.model_flops import FORWARD, active_parameters, model_flops
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.rollout.engine import Request
from jaxrl_llm.rollout.local import LocalEngine, LocalEngineConfig
from jaxrl_llm.rollout.precision import Precision
from jaxrl_llm.types import Prompt, Rollout, SamplingParams

PEER = "peer's generate"
EQUAL, UNEQUAL = "equal lengths", "unequal lengths"
SLOW_ROUNDS = 3
AS_FAST = 0.97
"""The ratio of speeds from which on one is no slower: medians of a few rounds differ by so much."""
STORED = 4
"""Bytes of a weight or of a number in the KV cache: the engine keeps float32 in every precision."""


def measure(config: BenchConfig) -> Findings:
    """See the module."""
    sizes, model = config.decode, config.learner.model
    setup, roof = make_setup(model), make_roof(config.roof)
    alike = _requests(model, sizes.prompt, [sizes.new_tokens] * sizes.slots)
    length = sizes.prompt + sizes.new_tokens
    precisions: tuple[Precision, ...] = get_args(Precision)
    contestants: dict[str, Contestant] = {
        precision: _sampling(_engine(config, setup, length, precision), alike)
        for precision in precisions
    }
    mode = ""
    if config.peer is not None:
        mode, contestants[PEER] = _peer(config, setup)
    slow = dict.fromkeys([*precisions[1:], PEER], SLOW_ROUNDS)
    turns = take_turns({**roof.contestants, **contestants}, config.repeats, at_most=slow)
    figures = [*roof.figures(turns), *_speeds(config, turns, roof), *_lengths(config, setup)]
    title = f"{describe(model)}, {sizes.slots} slots"
    return Findings(title, tuple(figures), _notes(config, mode))


def _requests(model: ModelConfig, prompt: int, lengths: Sequence[int]) -> list[Request]:
    """Prompts of so many random tokens, and responses of exactly these lengths."""
    return [
        Request(
            Prompt(f"{index}", tokens, text="", answer=""),
            sample_index=0,
            seed=index,
            sampling=SamplingParams(max_new_tokens=int(length)),
        )
        for index, (tokens, length) in enumerate(
            zip(make_tokens(model, len(lengths), prompt), lengths, strict=True)
        )
    ]


def _engine(
    config: BenchConfig, setup: Setup, max_length: int, precision: Precision
) -> LocalEngine:
    settings = LocalEngineConfig(
        precision=precision, slots=config.decode.slots, max_length=max_length
    )
    engine = LocalEngine(settings, setup.model, decode_text=lambda tokens: "")
    engine.publish(setup.params(), 0)
    return engine


def _sampling(engine: LocalEngine, requests: Sequence[Request]) -> Contestant:
    """Serves all requests; raises ValueError if one comes back otherwise than asked for."""

    def serve() -> None:
        wanted = sum(request.sampling.max_new_tokens for request in requests)
        answers = list(engine.generate(requests))
        made = sum(answer.response_length for answer in answers if isinstance(answer, Rollout))
        if made != wanted:
            raise ValueError(f"the engine made {made} tokens of {wanted}")

    return serve


def _peer(config: BenchConfig, setup: Setup) -> tuple[str, Contestant]:
    """The fastest of the peer's modes, each timed once after it was warmed up, and its name."""
    assert config.peer is not None, "measure() asked"
    sizes = config.decode
    prompts = make_tokens(setup.model, sizes.slots, sizes.prompt)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        write_checkpoint(weights, setup, max_length=sizes.prompt + sizes.new_tokens)
        modes = load_peer(config.peer).make_generate(weights, prompts, sizes.new_tokens)

    def checked(generate: Callable[[], np.ndarray]) -> None:
        found, wanted = generate().shape, (sizes.slots, sizes.prompt + sizes.new_tokens)
        if found != wanted:
            raise ValueError(f"the peer's generate returned {found} in place of {wanted}")

    contestants = {name: partial(checked, generate) for name, generate in modes.items()}
    trial = take_turns(contestants, 1)
    best = min(contestants, key=lambda name: trial.taken[name])
    return best, contestants[best]


def _speeds(config: BenchConfig, turns: Turns, roof: Roof) -> list[Figure]:
    """Of every precision, and of the peer."""
    sizes, model = config.decode, config.learner.model
    tokens = sizes.slots * sizes.new_tokens
    finest, *others = get_args(Precision)
    limits = _limits(model, config, roof, turns)
    figures = [figure("limit", [tokens / seconds for seconds in limits], "tokens/s")]
    for name in (finest, *others, PEER):
        if name in turns.taken:
            share = [a / b for a, b in zip(limits, turns.taken[name], strict=False)]
            speed = turns.rate(name, tokens)
            shown = name if name in (finest, PEER) else f"{name} (simulated)"
            figures.append(figure(shown, speed, "tokens/s", roof=share))
            if name in ("float32", "bfloat16"):
                wanted = Wanted(">=", 0.5)
                figures.append(figure(f"{shown}, of the limit", share, "share", wanted=wanted))
    for name in others:
        ratio, wanted = turns.ratio(finest, name), Wanted(">=", AS_FAST)
        figures.append(figure(f"speed, {name} / {finest}", ratio, "x", wanted=wanted))
    if PEER in turns.taken:
        ratio, wanted = turns.ratio(PEER, finest), Wanted(">=", 2.0)
        figures.append(figure(f"speed, {finest} / {PEER}", ratio, "x", wanted=wanted))
    return figures


def _limits(model: ModelConfig, config: BenchConfig, roof: Roof, turns: Turns) -> list[float]:
    """Seconds that equal lengths must take in each round, by the roof of that round.

    The prompts cost their model FLOPs but for the head, which no engine needs there. A step costs
    its model FLOPs, or the time to read all weights and the keys and values there are then,
    whichever is more.
    """
    sizes = config.decode
    consumed = sizes.prompt - 1
    prefill = model_flops(model, rows=sizes.slots, length=consumed, passes=FORWARD)
    prefill -= 2 * sizes.slots * consumed * model.width * model.vocab_size
    contexts = np.arange(sizes.prompt, sizes.prompt + sizes.new_tokens)
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * contexts
    flops = sizes.slots * (2 * active_parameters(model) + attention)
    cache = 2 * model.num_layers * model.num_kv_heads * model.head_dim * contexts
    size = STORED * (_matrix_entries(model) + sizes.slots * cache)
    limits = []
    for product, copy in zip(turns.taken[PRODUCT], turns.taken[COPY], strict=True):
        compute, read = flops * (product / roof.flops), size * (copy / roof.bytes)
        whole = np.sum(np.maximum(compute, read)) + prefill * product / roof.flops
        limits.append(float(whole))
    return limits


def _matrix_entries(model: ModelConfig) -> int:
    """Of all matrices that a step of many tokens reads: those of every expert."""
    moe = model.moe
    unchosen = moe.num_experts - moe.experts_per_token
    experts = 3 * model.width * moe.expert_width * unchosen
    return active_parameters(model) + model.num_moe_layers * experts


def _lengths(config: BenchConfig, setup: Setup) -> list[Figure]:
    """Unequal responses against equal ones of the same mean, with requests waiting for slots."""
    sizes = config.decode
    shortest, longest = sizes.lengths
    count = sizes.waves * sizes.slots
    unequal = np.random.default_rng(1).integers(shortest, longest + 1, count).tolist()
    lengths = {EQUAL: [sizes.new_tokens] * count, UNEQUAL: unequal}
    engine = _engine(config, setup, sizes.prompt + longest, "float32")
    turns = take_turns(
        {
            name: _sampling(engine, _requests(setup.model, sizes.prompt, some))
            for name, some in lengths.items()
        },
        min(config.repeats, SLOW_ROUNDS),
    )
    speeds = {name: turns.rate(name, sum(some)) for name, some in lengths.items()}
    ratio = [a / b for a, b in zip(speeds[UNEQUAL], speeds[EQUAL], strict=True)]
    return [
        figure(f"{EQUAL}, {count} requests of {sizes.new_tokens}", speeds[EQUAL], "tokens/s"),
        figure(f"{UNEQUAL}, {shortest} to {longest}", speeds[UNEQUAL], "tokens/s"),
        figure(f"speed, {UNEQUAL} / {EQUAL}", ratio, "x", wanted=Wanted(">=", 0.8)),
    ]


def _notes(config: BenchConfig, mode: str) -> tuple[str, ...]:
    sizes = config.decode
    shortest, longest = sizes.lengths
    work = (
        f"Every slot answers a prompt of {sizes.prompt} tokens with {sizes.new_tokens}, at "
        "temperature 1 from all of the vocabulary; the prompts' time is in it."
    )
    limit = (
        "Of roof: the limit's time over that taken. Limit of a step: its model FLOPs at the "
        "product's rate, or all weights and the keys and values so far (4 bytes a number) at the "
        "copy's, whichever takes longer; of prompts, their model FLOPs."
    )
    lengths = (
        f"Equal against unequal lengths: {sizes.waves * sizes.slots} requests for {sizes.slots} "
        f"slots of {sizes.prompt + longest} positions; unequal ones are uniform from {shortest} to "
        f"{longest}."
    )
    simulated = (
        "Simulated: values are rounded to the precision's grid; arrays and products are float32, "
        "and so is the limit."
    )
    against = (
        NO_PEER
        if config.peer is None
        else f"The peer's fastest mode: {mode}; not among them are compiled ones and batched_mm."
    )
    return work, limit, lengths, simulated, against
