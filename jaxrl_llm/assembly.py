"""From a RunConfig to the parts of a job, and from its run directory to where it had got.

What it is: Job, everything that is made once and never changes; Progress, everything that changes
and is therefore in a checkpoint; resume() and save() between the two. What it is not: the order in
which the parts are used, which is loop.py.

All randomness is a function of (seed, purpose, counters), so a checkpoint needs no generator state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrl_llm.arrays import TrainBatch
from jaxrl_llm.config import RunConfig, differences, read_config, to_json
from jaxrl_llm.data.prompts import PromptSource, dataset_digest, load_prompts
from jaxrl_llm.data.rewards import Verifier
from jaxrl_llm.data.tokenizer import Tokenizer, make_tokenizer
from jaxrl_llm.evaluate import EvaluationResult, evaluate
from jaxrl_llm.learner.attribution import Attribution, make_attribution
from jaxrl_llm.learner.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    Checkpoints,
    restore,
)
from jaxrl_llm.learner.sft import make_sft_step
from jaxrl_llm.learner.state import (
    Optimizer,
    TrainState,
    abstract_state,
    fresh_optimizer_state,
    init_state,
    make_optimizer,
)
from jaxrl_llm.learner.step import ScoreStep, TrainStep, make_score_step, make_train_step
from jaxrl_llm.learner.tighten import tightened
from jaxrl_llm.learner.watch import WatchConfig, WatchState
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.rollout.buffer import RolloutBuffer
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.rollout.local import LocalEngine
from jaxrl_llm.runlog import RunReader, RunWriter
from jaxrl_llm.sharding import batch_sharding, make_mesh
from jaxrl_llm.types import Prompt, SamplingParams

CHECKPOINTS, REFERENCE = "checkpoints", "reference"
"""Folders of a run directory: its checkpoints, and the policy that a KL penalty refers to."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """All that changes while a job runs."""

    step: int  # finished steps, those of the cold start included
    cursor: int  # prompts drawn from the training split
    state: TrainState  # parameters and optimizer, on the devices
    buffer: RolloutBuffer  # finished groups that no update has used
    watch: WatchState  # what the early warning remembers
    reference: Params | None  # the policy RL started from; None if the loss has no KL penalty
    stop: str = ""  # why the early warning ends the run here; in no checkpoint


@dataclasses.dataclass(frozen=True)
class Steps:
    """The compiled steps of the learner."""

    sft: TrainStep
    score: ScoreStep
    score_reference: ScoreStep  # as score, with its own routing whatever is replayed
    attribution: Attribution  # what moved the importance weights


@dataclasses.dataclass(frozen=True)
class Job:
    """All that is made once."""

    config: RunConfig
    mesh: Mesh
    tokenizer: Tokenizer
    train: PromptSource
    heldout: tuple[Prompt, ...]
    verifier: Verifier
    engine: Engine
    cold_optimizer: Optimizer
    optimizer: Optimizer
    steps: Steps
    checkpoints: Checkpoints
    log: RunWriter

    @property
    def last_step(self) -> int:
        """Steps of the whole run."""
        return self.config.cold_start.steps + self.config.steps

    @property
    def sampling(self) -> SamplingParams:
        """Of rollouts and evaluation."""
        return self.config.rollout.sampling(self.tokenizer.stop_token_ids)

    @property
    def row_length(self) -> int:
        """Positions of a row, S."""
        return self.config.learner.row_length or self.config.rollout.engine.max_length - 1

    def version(self, progress: Progress) -> int:
        """The weight version: finished RL steps."""
        return progress.step - self.config.cold_start.steps

    def seed(self, purpose: str, *counters: int) -> int:
        """A seed below 2^63, different for every purpose and counters."""
        entropy = (self.config.seed, zlib.crc32(purpose.encode()), *counters)
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)

    def rows(self, needed: int) -> int:
        """`needed` rows and those of padding that let them divide into micro-batches on devices."""
        multiple = self.config.learner.row_multiple
        return -(-needed // multiple) * multiple

    def to_devices(self, batch: TrainBatch) -> TrainBatch:
        """The batch with its rows split over the mesh."""
        return jax.device_put(batch, batch_sharding(self.mesh))

    def publish(self, progress: Progress) -> None:
        """Hand the current weights to the engine."""
        self.engine.publish(progress.state.params, self.version(progress))

    def loss(self, progress: Progress) -> LossConfig:
        """The loss of the next update, tightened as often as the early warning did so."""
        acted = progress.watch.acted if self.config.learner.watch.action == "tighten" else ()
        return tightened(self.config.loss, len(acted))

    def train_step(self, progress: Progress) -> TrainStep:
        """The compiled update with that loss."""
        config = dataclasses.replace(self.config, loss=self.loss(progress))
        return _train_step(_compiled(config), self.mesh)


def assemble(config: RunConfig, stack: contextlib.ExitStack) -> Job:
    """Make the parts; `stack` closes those that hold files or processes.

    Raises ValueError where the config contradicts the data, the tokenizer or the run directory.
    """
    tokenizer = make_tokenizer(config.task.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {config.model.vocab_size} but the tokenizer has "
            f"{tokenizer.vocab_size} ids; raise model.vocab_size"
        )
    stack.enter_context(_locked(config.directory))
    _check_directory(config)
    train = load_prompts(config.task.data, tokenizer, "train")
    heldout = _heldout(config, tokenizer)
    _check_size(config, len(train))
    _check_length(config, heldout)
    mesh = make_mesh(config.learner.mesh)
    cold_optimizer, optimizer = _optimizers(config)
    engine = stack.enter_context(contextlib.closing(_engine(config, tokenizer)))
    log = stack.enter_context(RunWriter(config.directory, config.log))
    log.write_config(to_json(config))
    return Job(
        config=config,
        mesh=mesh,
        tokenizer=tokenizer,
        train=train,
        heldout=heldout,
        verifier=stack.enter_context(Verifier(config.task.reward)),
        engine=engine,
        cold_optimizer=cold_optimizer,
        optimizer=optimizer,
        steps=_steps(_compiled(config), mesh),
        checkpoints=stack.enter_context(
            Checkpoints(config.directory / CHECKPOINTS, config.checkpoint)
        ),
        log=log,
    )


def _optimizers(config: RunConfig) -> tuple[Optimizer, Optimizer]:
    """Of the cold start and of RL."""
    return (
        make_optimizer(config.cold_start.optimizer, config.cold_start.steps),
        make_optimizer(config.learner.optimizer, config.steps * config.learner.mini_batches),
    )


def _compiled(config: RunConfig) -> RunConfig:
    """Without what compiles into nothing: runs of one process that differ in it compile once."""
    learner = dataclasses.replace(config.learner, watch=WatchConfig())
    return dataclasses.replace(config, run_dir="", seed=0, learner=learner)


@functools.lru_cache(maxsize=4)
def _train_step(config: RunConfig, mesh: Mesh) -> TrainStep:
    optimizer, temperature = _optimizers(config)[1], config.rollout.temperature
    return make_train_step(
        config.model, config.learner, config.loss, optimizer, mesh, temperature=temperature
    )


@functools.lru_cache(maxsize=4)
def _steps(config: RunConfig, mesh: Mesh) -> Steps:
    model, learner, temperature = config.model, config.learner, config.rollout.temperature
    cold_optimizer = _optimizers(config)[0]
    natural = dataclasses.replace(learner, mini_batches=1, replay="none", replay_gates=False)
    return Steps(
        sft=make_sft_step(model, learner, config.loss, cold_optimizer, mesh),
        score=make_score_step(model, learner, mesh, temperature=temperature),
        score_reference=make_score_step(model, natural, mesh, temperature=temperature),
        attribution=make_attribution(model, learner, mesh, temperature=temperature),
    )


def resume(job: Job) -> Progress:
    """Where the run in job.config.directory had got, or its beginning if there is none."""
    config = job.config
    abstract = abstract_state(config.model, job.optimizer, job.mesh)
    checkpoint = restore(config.directory / CHECKPOINTS, abstract)
    if checkpoint is None:
        _check_log(config)
        job.log.resume(None)
        return _begin(job)
    if checkpoint.host["dataset"] != dataset_digest(config.task.data):
        raise CheckpointError(
            f"{config.directory / CHECKPOINTS} was made on other prompts than task.data gives now: "
            "its place in them would mean nothing; restore the files, or use another --run-dir"
        )
    job.log.resume(checkpoint.step)
    reference = None
    if config.loss.kl.coefficient and checkpoint.step >= config.cold_start.steps:
        kept = restore(config.directory / REFERENCE, abstract)
        if kept is None:
            raise CheckpointError(
                f"{config.directory / REFERENCE} is gone, and loss.kl.coefficient needs the "
                "policy in it; restore the folder, or use another run directory"
            )
        reference = kept.state.params
    progress = Progress(
        step=checkpoint.step,
        cursor=checkpoint.host["cursor"],
        state=checkpoint.state,
        buffer=RolloutBuffer.from_json(config.rollout.buffer, checkpoint.host["buffer"]),
        watch=WatchState.from_json(checkpoint.host["watch"]),
        reference=reference,
    )
    if progress.step >= config.cold_start.steps:
        job.publish(progress)
    return progress


def _begin(job: Job) -> Progress:
    config = job.config
    state = init_state(
        config.model, job.cold_optimizer, job.mesh, jax.random.key(job.seed("weights") % 2**32)
    )
    progress = Progress(0, 0, state, RolloutBuffer(config.rollout.buffer), WatchState(), None)
    return progress if config.cold_start.steps else start_rl(job, progress)


def start_rl(job: Job, progress: Progress) -> Progress:
    """From the cold start to RL: its own optimizer, a reference for a KL penalty, a publish."""
    state = fresh_optimizer_state(progress.state, job.optimizer)
    reference = None
    if job.config.loss.kl.coefficient:
        # Copied, because the train step donates its own parameters.
        reference = jax.tree.map(jnp.copy, state.params)
        with Checkpoints(job.config.directory / REFERENCE, CheckpointConfig(keep_last=1)) as kept:
            kept.save(progress.step, state, {})
    progress = dataclasses.replace(progress, state=state, reference=reference)
    job.publish(progress)
    return progress


def save(job: Job, progress: Progress) -> None:
    """Start a checkpoint of the progress; the loop goes on meanwhile.

    Not of step 0, which is made faster than restored.
    """
    if progress.step == 0:
        return
    host = {
        "cursor": progress.cursor,
        "buffer": progress.buffer.to_json(),
        "watch": progress.watch.to_json(),
        "dataset": dataset_digest(job.config.task.data),
    }
    job.checkpoints.save(progress.step, progress.state, host)


def evaluate_checkpoint(
    run_dir: Path, *, samples: int | None, prompts: int | None, seed: int
) -> tuple[int, EvaluationResult]:
    """Evaluate the newest checkpoint of a run on its held-out prompts; (its step, the result).

    None for samples or prompts takes what the run's own evaluation took. The run may be going on:
    nothing in its directory is written. Raises ValueError where there is no checkpoint.
    """
    config = read_config(run_dir / "config.json")
    samples = config.evaluation.samples if samples is None else samples
    prompts = config.evaluation.prompts if prompts is None else prompts
    pass_k = config.evaluation.pass_k
    evaluation = dataclasses.replace(
        config.evaluation, samples=samples, prompts=prompts, pass_k=min(pass_k, samples)
    )
    mesh = make_mesh(config.learner.mesh)
    optimizer = _optimizers(config)[1]
    checkpoint = restore(run_dir / CHECKPOINTS, abstract_state(config.model, optimizer, mesh))
    if checkpoint is None:
        raise ValueError(f"{run_dir} has no checkpoint yet; let the run make one first")
    tokenizer = make_tokenizer(config.task.tokenizer)
    with contextlib.closing(_engine(config, tokenizer)) as engine:
        engine.publish(checkpoint.state.params, checkpoint.step)
        with Verifier(config.task.reward) as verifier:
            result = evaluate(
                engine,
                _heldout(config, tokenizer),
                verifier,
                sampling=config.rollout.sampling(tokenizer.stop_token_ids),
                config=evaluation,
                seed=seed,
            )
    return checkpoint.step, result


def _engine(config: RunConfig, tokenizer: Tokenizer) -> Engine:
    return LocalEngine(config.rollout.engine, config.model, tokenizer.decode)


def _heldout(config: RunConfig, tokenizer: Tokenizer) -> tuple[Prompt, ...]:
    source = load_prompts(config.task.data, tokenizer, "heldout")
    return tuple(source[index] for index in range(len(source)))


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes from writing here; ValueError if one does. A kill frees the lock."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing to {directory}; wait until it has ended (a stopped "
                "run finishes its step first), or use another --run-dir"
            ) from error
        yield


def _check_size(config: RunConfig, prompts: int) -> None:
    """ValueError if a step could draw a prompt twice, which a group cannot be told apart by."""
    drawn = {
        "cold_start.batch": config.cold_start.batch if config.cold_start.steps else 0,
        "rollout.groups times (1 + rollout.buffer.max_staleness)": config.rollout.groups
        * (1 + config.rollout.buffer.max_staleness),
    }
    for name, count in drawn.items():
        if count > prompts // 2:
            raise ValueError(
                f"{name} is {count}, more than half of the {prompts} training prompts; give more "
                "prompts (task.data) or lower it"
            )


def _check_length(config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """ValueError naming a held-out prompt that leaves no room for a whole response."""
    longest = max(prompts, key=lambda prompt: prompt.tokens.size)
    needed = longest.tokens.size + config.rollout.max_new_tokens
    if needed > config.rollout.engine.max_length:
        raise ValueError(
            f"prompt {longest.prompt_id!r} of {longest.tokens.size} tokens and "
            f"rollout.max_new_tokens = {config.rollout.max_new_tokens} need {needed} tokens; "
            f"rollout.engine.max_length is {config.rollout.engine.max_length}; raise it, or lower "
            "max_new_tokens"
        )


def _check_log(config: RunConfig) -> None:
    """ValueError if the log is of a run whose checkpoints are gone: starting over would erase it.

    A run killed before its first checkpoint has a log too, but a short one.
    """
    if not (config.directory / "metrics.jsonl").exists() or not config.checkpoint.every:
        return
    reader = RunReader(config.directory)
    columns = [reader.metrics(phase)["step"] for phase in ("sft", "rl")]
    last = max((int(steps[-1]) for steps in columns if steps.size), default=0)
    if last >= 2 * config.checkpoint.every:
        raise ValueError(
            f"{config.directory} has the log of {last} steps but no checkpoint: starting over "
            f"would erase the log; restore {CHECKPOINTS}/, or use another --run-dir"
        )


def _check_directory(config: RunConfig) -> None:
    """ValueError if the run directory holds another experiment, naming the settings that differ."""
    path = config.directory / "config.json"
    if not path.exists():
        return
    other = differences(read_config(path), config)
    if other:
        raise ValueError(
            f"{config.directory} holds a run with other settings ({'; '.join(other)}): to start a "
            "new run choose another --run-dir, to go on with this one use its settings"
        )
