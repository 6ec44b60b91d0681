"""A run directory from outside: its settings, its newest policy, and an evaluation of that.

What it is: what `jaxrl-llm eval` and `jaxrl-llm export` need of a run, which may be going on. What
it is not: going on with it (assembly.resume), or reading its log (runlog.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import jax

from jaxrl_llm.assembly import ENDED, heldout_prompts
from jaxrl_llm.config import RunConfig, read_config
from jaxrl_llm.data.rewards import Verifier
from jaxrl_llm.data.tokenizer import make_tokenizer
from jaxrl_llm.engines import make_engine, make_joint
from jaxrl_llm.evaluate import EvaluationResult, evaluate
from jaxrl_llm.learner.checkpoint import CHECKPOINTS, Checkpoint, restore
from jaxrl_llm.learner.state import abstract_state
from jaxrl_llm.lock import locked
from jaxrl_llm.sharding import Layout, MeshConfig, make_layout


def stored_config(run_dir: Path) -> RunConfig:
    """The config.json of a run directory; its run_dir is where the directory is now."""
    config = read_config(run_dir / "config.json")
    return dataclasses.replace(config, run_dir=str(run_dir.absolute()))


def layout_here(config: RunConfig) -> Layout:
    """The mesh of the config; where it has more devices than there are here, one of all these."""
    mesh, devices = config.learner.mesh, len(jax.devices())
    return make_layout(mesh if mesh.devices <= devices else MeshConfig(fsdp=devices))


def newest_checkpoint(config: RunConfig) -> Checkpoint:
    """Of the run in config.directory, without optimizer state, on the mesh of layout_here().

    Raises ValueError where there is none.
    """
    abstract = abstract_state(config.model, None, layout_here(config))
    checkpoint = restore(config.directory / CHECKPOINTS, abstract)
    if checkpoint is None:
        raise ValueError(f"{config.directory} has no checkpoint yet; let the run make one first")
    return checkpoint


def evaluate_checkpoint(
    run_dir: Path,
    *,
    samples: int | None,
    prompts: int | None,
    seed: int,
    servers: tuple[str, ...] = (),
) -> tuple[int, EvaluationResult]:
    """Evaluate the newest checkpoint of a run on its held-out prompts; (its step, the result).

    None for samples or prompts takes what the run's own evaluation took. `servers`, if there are
    any, take the place of the run's own. The run may be going on, unless it samples on servers: the
    checkpoint's weights are published where the run publishes. Raises ValueError where there is no
    checkpoint, and if servers are given for a run that has none.
    """
    config = stored_config(run_dir)
    if servers:
        config = _on_servers(config, servers)
    samples = config.evaluation.samples if samples is None else samples
    prompts = config.evaluation.prompts if prompts is None else prompts
    pass_k = config.evaluation.pass_k
    evaluation = dataclasses.replace(
        config.evaluation, samples=samples, prompts=prompts, pass_k=min(pass_k, samples)
    )
    checkpoint = newest_checkpoint(config)
    tokenizer = make_tokenizer(config.task.tokenizer)
    heldout = heldout_prompts(config, tokenizer)
    layout = layout_here(config)
    with contextlib.ExitStack() as stack:
        if config.rollout.sglang.servers:
            # A run that goes on would find other weights on its servers than it put there.
            stack.enter_context(locked(config.directory, ENDED))
        joint = make_joint(config, heldout[0], layout)
        engine = make_engine(config, tokenizer, heldout[0], joint, None, stack)
        # As the run called them, so that a publication which is still there serves again.
        version = max(0, checkpoint.step - config.cold_start.steps)
        engine.publish(checkpoint.state.params, version)
        result = evaluate(
            engine,
            heldout,
            stack.enter_context(Verifier(config.task.reward)),
            sampling=config.rollout.sampling(tokenizer.stop_token_ids),
            config=evaluation,
            seed=seed,
        )
    return checkpoint.step, result


def _on_servers(config: RunConfig, servers: tuple[str, ...]) -> RunConfig:
    if not config.rollout.sglang.servers:
        raise ValueError(
            f"{config.directory} is a run without servers, whose engine is part of its settings; "
            "leave out --servers"
        )
    sglang = dataclasses.replace(config.rollout.sglang, servers=servers)
    rollout = dataclasses.replace(config.rollout, sglang=sglang)
    return dataclasses.replace(config, rollout=rollout)
