"""From a RunConfig to the parts of a job, and from its run directory to where it had got.

What it is: Job, everything that is made once and never changes; Progress, everything that changes
and is therefore in a checkpoint; resume() and save() between the two. What it is not: the order in
which the parts are used, which is loop.py.

All randomness is a function of (seed, purpose, counters), so a checkpoint needs no generator state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.arrays import TrainBatch
from jaxrl_llm.checks import (
    check_directory,
    check_length,
    check_log,
    check_processes,
    check_size,
    check_weights,
)
from jaxrl_llm.config import RunConfig, to_json
from jaxrl_llm.data.prompts import PromptSource, load_prompts
from jaxrl_llm.data.rewards import Verifier
from jaxrl_llm.data.tokenizer import Tokenizer, make_tokenizer
from jaxrl_llm.engines import Joint, make_engine, make_joint, make_journal
from jaxrl_llm.learner.attribution import Attribution, make_attribution
from jaxrl_llm.learner.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    CheckpointConfig,
    CheckpointError,
    Checkpoints,
    restore,
)
from jaxrl_llm.learner.publish import MANIFEST, PublishError, verify
from jaxrl_llm.learner.sft import make_sft_step
from jaxrl_llm.learner.state import (
    Optimizer,
    TrainState,
    abstract_state,
    fresh_optimizer_state,
    init_state,
    make_optimizer,
    random_params,
)
from jaxrl_llm.learner.step import ScoreStep, TrainStep, make_score_step, make_train_step
from jaxrl_llm.learner.tighten import tightened
from jaxrl_llm.learner.watch import WatchConfig, WatchState
from jaxrl_llm.lock import locked
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.model.hf import load_params
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.processes import everywhere, first, from_first, spread
from jaxrl_llm.rollout.buffer import RolloutBuffer, UnderWay
from jaxrl_llm.rollout.engine import Engine, EngineError
from jaxrl_llm.rollout.journal import Journal
from jaxrl_llm.runlog import RunWriter
from jaxrl_llm.sharding import Layout, batch_sharding, make_layout
from jaxrl_llm.types import Prompt, SamplingParams

REFERENCE = "reference"
"""Folder of a run directory: the policy that a KL penalty refers to."""

ENDED = "wait until it has ended (a stopped run finishes its step first), or use another --run-dir"


@dataclasses.dataclass(frozen=True)
class Progress:
    """All that changes while a job runs."""

    step: int  # finished steps, those of the cold start included
    state: TrainState  # parameters and optimizer, on the devices
    buffer: RolloutBuffer  # prompts drawn, and finished groups that no update has used
    watch: WatchState  # what the early warning remembers
    reference: Params | None  # the policy RL started from; None if the loss has no KL penalty
    # Why the run ends here; in no checkpoint.
    stop: str = ""  # the early warning's reason
    failure: ValueError | None = None  # the engine's, or that of writing weights for it


@dataclasses.dataclass(frozen=True)
class Steps:
    """The compiled steps of the learner."""

    sft: TrainStep
    score: ScoreStep
    score_reference: ScoreStep  # as score, with its own routing whatever is replayed
    attribution: Attribution  # what moved the importance weights


@dataclasses.dataclass(frozen=True)
class Outside:
    """What the first process alone has to do with."""

    engine: Engine
    verifier: Verifier
    journal: Journal | None  # rollouts that servers finished and no checkpoint has
    log: RunWriter


@dataclasses.dataclass(frozen=True)
class Job:
    """All that is made once, in every process."""

    config: RunConfig
    layout: Layout
    tokenizer: Tokenizer
    train: PromptSource
    heldout: tuple[Prompt, ...]
    outside: Outside | None  # None in every process but the first
    joint: Joint  # what a publish computes in all of them
    under_way: UnderWay  # what the engine was asked for; the one part that changes
    cold_optimizer: Optimizer
    optimizer: Optimizer
    steps: Steps
    checkpoints: Checkpoints

    @property
    def engine(self) -> Engine:
        """The first process's."""
        return self._outside.engine

    @property
    def verifier(self) -> Verifier:
        """The first process's."""
        return self._outside.verifier

    @property
    def log(self) -> RunWriter:
        """The first process's."""
        return self._outside.log

    def saved_steps(self) -> tuple[int, ...]:
        """Those of the checkpoints, ascending, in all processes: as the first one sees them.

        A host may see an older state of a shared file system than another.
        """
        return from_first(lambda: self.checkpoints.steps)

    def forget(self, version: int) -> None:
        """Drop rollouts of versions before this one from the first process's journal."""
        if self._outside.journal is not None:
            self._outside.journal.forget(version)

    @property
    def last_step(self) -> int:
        """Steps of the whole run."""
        return self.config.cold_start.steps + self.config.steps

    @property
    def sampling(self) -> SamplingParams:
        """Of rollouts and evaluation."""
        return self.config.rollout.sampling(self.tokenizer.stop_token_ids)

    def version(self, progress: Progress) -> int:
        """The weight version: finished RL steps."""
        return progress.step - self.config.cold_start.steps

    def seed(self, purpose: str, *counters: int) -> int:
        """A seed below 2^63, different for every purpose and counters."""
        return _seed(self.config, purpose, *counters)

    def to_devices(self, batch: TrainBatch) -> TrainBatch:
        """The first process's batch with its rows split over the mesh; see processes.spread."""
        return spread(batch, batch_sharding(self.layout))

    def loss(self, progress: Progress) -> LossConfig:
        """The loss of the next update, tightened as often as the early warning did so."""
        acted = progress.watch.acted if self.config.learner.watch.action == "tighten" else ()
        return tightened(self.config.loss, len(acted))

    def train_step(self, progress: Progress) -> TrainStep:
        """The compiled update with that loss."""
        config = dataclasses.replace(self.config, loss=self.loss(progress))
        return update_step(config, self.layout)

    @property
    def _outside(self) -> Outside:
        assert self.outside is not None, "only the first process samples, verifies and logs"
        return self.outside


def _seed(config: RunConfig, purpose: str, *counters: int) -> int:
    entropy = (config.seed, zlib.crc32(purpose.encode()), *counters)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def assemble(config: RunConfig, stack: contextlib.ExitStack) -> Job:
    """Make the parts; `stack` closes those that hold files or processes.

    Raises ValueError where the config contradicts the data, the tokenizer, the run directory, the
    devices or what another process of the job has.
    """
    # First, since it sees to threads before JAX starts; and a kernel that these devices lack is
    # refused before anything is written or asked for.
    layout = make_layout(config.learner.mesh)
    steps = learner_steps(config, layout)
    tokenizer = everywhere(lambda: _tokenizer(config))
    from_first(lambda: _open_directory(config, stack))
    train = everywhere(lambda: load_prompts(config.task.data, tokenizer, "train"))
    heldout = everywhere(lambda: heldout_prompts(config, tokenizer))
    check_processes(config, train.dataset, heldout)
    check_size(config, len(train))
    check_length(config, heldout)
    cold_optimizer, optimizer = optimizers(config)
    joint = make_joint(config, heldout[0], layout)
    outside: Outside | None = from_first(
        lambda: _reach_outside(config, tokenizer, heldout[0], joint, stack), share=lambda _: None
    )
    return Job(
        config=config,
        layout=layout,
        tokenizer=tokenizer,
        train=train,
        heldout=heldout,
        outside=outside,
        joint=joint,
        under_way=UnderWay(),
        cold_optimizer=cold_optimizer,
        optimizer=optimizer,
        steps=steps,
        checkpoints=stack.enter_context(
            Checkpoints(config.directory / CHECKPOINTS, config.checkpoint)
        ),
    )


def _tokenizer(config: RunConfig) -> Tokenizer:
    tokenizer = make_tokenizer(config.task.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {config.model.vocab_size} but the tokenizer has "
            f"{tokenizer.vocab_size} ids; raise model.vocab_size"
        )
    return tokenizer


def _open_directory(config: RunConfig, stack: contextlib.ExitStack) -> None:
    """Hold the run directory, and see that it and the weights to start from are of this config."""
    stack.enter_context(locked(config.directory, ENDED))
    check_directory(config)
    if config.cold_start.weights and not (config.directory / "config.json").exists():
        # Now, or the directory would be one of these settings; and a run that goes on has its own.
        check_weights(config)


def _reach_outside(
    config: RunConfig,
    tokenizer: Tokenizer,
    prompt: Prompt,
    joint: Joint,
    stack: contextlib.ExitStack,
) -> Outside:
    journal = make_journal(config)
    engine = make_engine(config, tokenizer, prompt, joint, journal, stack)
    log = stack.enter_context(RunWriter(config.directory, config.log))
    log.write_config(to_json(config))
    verifier = stack.enter_context(Verifier(config.task.reward))
    return Outside(engine, verifier, journal, log)


def optimizers(config: RunConfig) -> tuple[Optimizer, Optimizer]:
    """Of the cold start and of RL."""
    return (
        make_optimizer(config.cold_start.optimizer, config.cold_start.steps),
        make_optimizer(config.learner.optimizer, config.steps * config.learner.mini_batches),
    )


def learner_steps(config: RunConfig, layout: Layout) -> Steps:
    """The steps that a run of this config compiles, all but its update."""
    return _steps(_compiled(config), layout)


def update_step(config: RunConfig, layout: Layout) -> TrainStep:
    """The update that a run of this config compiles."""
    return _train_step(_compiled(config), layout)


def _compiled(config: RunConfig) -> RunConfig:
    """Without what compiles into nothing: runs of one process that differ in it compile once."""
    learner = dataclasses.replace(config.learner, watch=WatchConfig())
    return dataclasses.replace(config, run_dir="", seed=0, learner=learner)


@functools.lru_cache(maxsize=4)
def _train_step(config: RunConfig, layout: Layout) -> TrainStep:
    optimizer, temperature = optimizers(config)[1], config.rollout.temperature
    return make_train_step(
        config.model, config.learner, config.loss, optimizer, layout, temperature=temperature
    )


@functools.lru_cache(maxsize=4)
def _steps(config: RunConfig, layout: Layout) -> Steps:
    model, learner, temperature = config.model, config.learner, config.rollout.temperature
    cold_optimizer = optimizers(config)[0]
    natural = dataclasses.replace(learner, mini_batches=1, replay="none", replay_gates=False)
    return Steps(
        sft=make_sft_step(model, learner, config.loss, cold_optimizer, layout),
        score=make_score_step(model, learner, layout, temperature=temperature),
        score_reference=make_score_step(model, natural, layout, temperature=temperature),
        attribution=make_attribution(model, learner, layout, temperature=temperature),
    )


def resume(job: Job) -> Progress:
    """Where the run in job.config.directory had got, or its beginning if there is none."""
    config = job.config
    folder = config.directory / CHECKPOINTS
    abstract = abstract_state(config.model, job.optimizer, job.layout)
    saved = job.saved_steps()
    checkpoint = restore(folder, abstract, saved[-1]) if saved else None
    if checkpoint is None:
        from_first(lambda: _resume_log(job, None))
        return _begin(job)
    if checkpoint.host["dataset"] != job.train.dataset:
        raise CheckpointError(
            f"{folder} was made on other prompts than task.data gives now: "
            "its place in them would mean nothing; restore the files, or use another --run-dir"
        )
    from_first(lambda: _resume_log(job, checkpoint.step))
    reference = None
    if config.loss.kl.coefficient and checkpoint.step >= config.cold_start.steps:
        without_optimizer = abstract_state(config.model, None, job.layout)
        kept = restore(config.directory / REFERENCE, without_optimizer)
        if kept is None:
            raise CheckpointError(
                f"{config.directory / REFERENCE} is gone, and loss.kl.coefficient needs the "
                "policy in it; restore the folder, or use another run directory"
            )
        reference = kept.state.params
    progress = Progress(
        step=checkpoint.step,
        state=checkpoint.state,
        buffer=_buffer(config, checkpoint),
        watch=WatchState.from_json(checkpoint.host["watch"]),
        reference=reference,
    )
    return published(job, progress) if progress.step >= config.cold_start.steps else progress


def _resume_log(job: Job, step: int | None) -> None:
    if step is None:
        check_log(job.config)
    job.log.resume(step)


def _buffer(config: RunConfig, checkpoint: Checkpoint) -> RolloutBuffer:
    """That of the checkpoint; an empty one where nothing is sampled."""
    if not first():
        return RolloutBuffer(config.rollout.buffer, drawn=0)
    return RolloutBuffer.from_json(config.rollout.buffer, checkpoint.host["buffer"])


def _begin(job: Job) -> Progress:
    config = job.config
    state = init_state(initial_params(config, job.layout), job.cold_optimizer)
    buffer = RolloutBuffer(config.rollout.buffer, drawn=config.cold_start.prompts)
    progress = Progress(0, state, buffer, WatchState(), None)
    return progress if config.cold_start.steps else start_rl(job, progress)


def initial_params(config: RunConfig, layout: Layout) -> Params:
    """What training starts from: the weights of cold_start.weights, or random ones.

    Raises ValueError if that folder is not of this model, or is a publication with damaged files.
    """
    folder = config.cold_start.weights
    if not folder:
        key = jax.random.key(_seed(config, "weights") % 2**32)
        return random_params(config.model, layout, key)
    everywhere(lambda: check_weights(config))
    if (Path(folder) / MANIFEST).exists():
        from_first(lambda: verify(folder))  # flipped bits are numbers too
    return load_params(folder, config.model, layout)


def start_rl(job: Job, progress: Progress) -> Progress:
    """From the cold start to RL: its own optimizer, a reference for a KL penalty, a publish."""
    state = fresh_optimizer_state(progress.state, job.optimizer)
    reference = None
    if job.config.loss.kl.coefficient:
        # Copied, because the train step donates its own parameters.
        reference = jax.tree.map(jnp.copy, state.params)
        with Checkpoints(job.config.directory / REFERENCE, CheckpointConfig(keep_last=1)) as kept:
            kept.save(progress.step, state, {})
    return published(job, dataclasses.replace(progress, state=state, reference=reference))


def published(job: Job, progress: Progress) -> Progress:
    """Hand the current weights to the engine. Where it fails, progress.failure says why.

    The failure is a value because the step that made the weights is still to be logged and saved.
    """
    params, version = progress.state.params, job.version(progress)

    def act(request: tuple[str, tuple[Any, ...]]) -> None:
        name, inputs = request
        job.joint[name](params, *inputs)

    try:
        from_first(lambda: job.engine.publish(params, version), act=act)
    except (EngineError, PublishError) as failure:
        return dataclasses.replace(progress, failure=failure)
    return progress


def save(job: Job, progress: Progress) -> None:
    """Start a checkpoint of the progress; the loop goes on meanwhile.

    Not of step 0, which is made faster than restored.
    """
    if progress.step == 0:
        return
    host = {
        "buffer": progress.buffer.to_json(),
        "watch": progress.watch.to_json(),
        "dataset": job.train.dataset,
    }
    durable = job.saved_steps()
    job.checkpoints.save(progress.step, progress.state, host)
    if durable:
        # A run that is killed before this checkpoint is on disk goes on from the one before.
        version = durable[-1] - job.config.cold_start.steps
        from_first(lambda: job.forget(version - job.config.rollout.buffer.max_staleness))


def heldout_prompts(config: RunConfig, tokenizer: Tokenizer) -> tuple[Prompt, ...]:
    """The held-out split, in order."""
    source = load_prompts(config.task.data, tokenizer, "heldout")
    return tuple(source[index] for index in range(len(source)))
