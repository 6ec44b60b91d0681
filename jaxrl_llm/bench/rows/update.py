"""The learner's step beside the peer's, the RL update, and the step with ragged dispatch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxrl_llm.bench import memory
from jaxrl_llm.bench.config import BenchConfig
from jaxrl_llm.bench.figures import Figure, Findings, Wanted, figure
from jaxrl_llm.bench.isolation import in_fresh_process
from jaxrl_llm.bench.measure import Contestant, Turns, take_turns
from jaxrl_llm.bench.peer import Peer, load_peer
from jaxrl_llm.bench.roof import Roof, computes_in, make_roof
from jaxrl_llm.bench.workload import (
    LEARNING_RATE,
    Trainee,
    describe,
    make_setup,
    make_tokens,
    write_checkpoint,
)
from jaxrl_llm.compile.model_flops import TRAINING, model_flops

STEP, RL, PEER, RAGGED = "learner step", "RL update", "peer's step", "step, ragged dispatch"
SLOW_ROUNDS = 2
NO_PEER = "No --peer: add tests/bench/transformers_peer.py (launch/bench.sh does) to compare."


def measure(config: BenchConfig) -> Findings:
    """See the module."""
    with tempfile.TemporaryDirectory() as folder:
        return _measure(config, Path(folder) / "weights")


def _measure(config: BenchConfig, folder: Path) -> Findings:
    sizes = config.learner
    setup, roof = make_setup(sizes.model), make_roof(config.roof)
    batch, trainee = setup.batch(_tokens(config)), Trainee(setup)
    step = setup.sft_step()
    loss = float(trainee.advance(step, batch)["learner/loss"].value())
    contestants = {**roof.contestants, STEP: trainee.contestant(step, batch)}
    peer = None if config.peer is None else load_peer(config.peer)
    figures: list[Figure] = []
    if peer is not None:
        write_checkpoint(folder, setup, max_length=sizes.length)
        contestants[PEER] = peer_step = _peer_step(peer, folder, config)
        apart = abs(peer_step() - loss)
        figures.append(figure("first loss, ours less peer's", [apart], "nats", wanted=_equal()))
    contestants[RL] = trainee.contestant(setup.train_step(), batch)
    ragged = setup.kernels("ragged", "auto").sft_step()
    contestants[RAGGED] = trainee.contestant(ragged, batch)
    turns = take_turns(contestants, config.repeats, at_most={RAGGED: SLOW_ROUNDS})
    figures = [*_times(turns, roof, config), *figures, *_peaks(folder, config)]
    title = f"{describe(sizes.model)}, {sizes.rows} rows of {sizes.length:,} tokens"
    return Findings(title, (*roof.figures(turns), *figures), _notes(peer))


def _equal() -> Wanted | None:
    """Two computations in bfloat16 differ by more."""
    return Wanted("<=", 1e-4) if computes_in() == "float32" else None


def _tokens(config: BenchConfig) -> np.ndarray:
    sizes = config.learner
    return make_tokens(sizes.model, sizes.rows, sizes.length + 1)


def _peer_step(peer: Peer, folder: Path, config: BenchConfig) -> Callable[[], float]:
    return peer.make_step(folder, _tokens(config), dtype=computes_in(), learning_rate=LEARNING_RATE)


def _times(turns: Turns, roof: Roof, config: BenchConfig) -> list[Figure]:
    sizes = config.learner
    flops = model_flops(sizes.model, rows=sizes.rows, length=sizes.length, passes=TRAINING)
    figures = []
    for name in (STEP, PEER, RL, RAGGED):
        if name in turns.taken:
            share = roof.of_product(turns, name, flops)
            figures.append(figure(name, turns.seconds(name), "s", roof=share))
    rate = turns.rate(STEP, sizes.rows * sizes.length)
    figures.append(figure(f"{STEP}, speed", rate, "tokens/s"))
    share = roof.of_product(turns, STEP, flops)
    figures.append(figure(f"{STEP}, MFU", share, "share", wanted=Wanted(">", 0.6)))
    if PEER in turns.taken:
        ratio = turns.ratio(STEP, PEER)
        figures.append(figure(f"{STEP} / {PEER}", ratio, "x", wanted=Wanted("<", 1.0)))
    figures.append(figure(f"{RL} / {STEP}", turns.ratio(RL, STEP), "x"))
    ratio = turns.ratio(RAGGED, STEP)
    figures.append(figure(f"{RAGGED} / {STEP}", ratio, "x", wanted=Wanted(">=", 10.0)))
    return figures


def _peaks(folder: Path, config: BenchConfig) -> list[Figure]:
    """Peak memory of steady steps, of each side in a process of its own."""
    sides = {STEP: None} if config.peer is None else {STEP: None, PEER: config.peer}
    peaks = {
        name: in_fresh_process(step_peak, config, folder, peer) for name, peer in sides.items()
    }
    figures = [figure(f"{name}, peak memory", [peak], "B") for name, peak in peaks.items() if peak]
    if len(figures) == 2:
        ratio = [peaks[STEP] / peaks[PEER]]
        figures.append(figure("peak memory, ours / peer's", ratio, "x", wanted=Wanted("<", 1.0)))
    return figures


def step_peak(config: BenchConfig, folder: Path, peer: Path | None) -> int:
    """Bytes that two steady steps need at most, the model and its optimizer included.

    Args:
      folder: checkpoint for the peer.
      peer: whose step it is; None: ours.

    On a CPU, resident memory beyond that of the process with its libraries, before there was a
    model. On an accelerator what jax says of the device, and 0 for the peer, of whom it does not.
    """
    device = jax.devices()[0]  # jax has started
    library = None if peer is None else load_peer(peer)
    if device.platform != "cpu" and library is not None:
        return 0
    before = memory.resident_bytes()
    step = _our_step(config) if library is None else _peer_step(library, folder, config)
    for _ in range(2):
        step()
    memory.reset_peak()
    for _ in range(2):
        step()
    if device.platform != "cpu":
        return int(device.memory_stats()["peak_bytes_in_use"])
    return memory.peak_resident_bytes() - before


def _our_step(config: BenchConfig) -> Contestant:
    setup = make_setup(config.learner.model)
    return Trainee(setup).contestant(setup.sft_step(), setup.batch(_tokens(config)))


def _notes(peer: Peer | None) -> tuple[str, ...]:
    """What is compared."""
    ours = (
        "The learner step is forward, backward, clipping by norm, AdamW and its metrics; the RL "
        "update is MiniRL with all metrics of a step."
    )
    roof = "Of roof: model FLOPs per second (no recomputation counted) over the product's."
    fresh = "" if memory.reset_peak() else " Their set-up is included: this kernel resets no peak."
    peak = (
        "Peak memory, each side in a process of its own: the highest of two steps after two "
        "others, less what the process held with its libraries loaded and no model; what set-up "
        "freed was handed back to the system before." + fresh
    )
    if computes_in() != "float32":
        peak = "Peak memory is the device's since the process began, set-up included; ours alone."
    if peer is None:
        return ours, roof, peak, NO_PEER
    named = (
        f"The peer is {peer.name()}: same weights and tokens; forward, backward and AdamW "
        "without clipping or metrics."
    )
    return ours, named, roof, peak
