"""The engine of a job: SGLang servers where the config names some, else the in-process engine.

What it is: the learner's side of the servers put together, which is how weights leave it, what it
expects of a server that has them, and where finished rollouts are kept until a checkpoint has them.
What it is not: an engine (rollout/).
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxrl_llm.config import RunConfig
from jaxrl_llm.data.tokenizer import Tokenizer
from jaxrl_llm.learner.probe import make_probe_score
from jaxrl_llm.learner.publish import Publisher
from jaxrl_llm.model import hf
from jaxrl_llm.processes import announce
from jaxrl_llm.rollout.engine import Engine, Request
from jaxrl_llm.rollout.journal import Journal
from jaxrl_llm.rollout.local import LocalEngine
from jaxrl_llm.rollout.sglang import LearnerSide, SGLangEngine
from jaxrl_llm.sharding import Layout, whole_here
from jaxrl_llm.types import Prompt

IN_FLIGHT = "in_flight"
"""Folder of a run directory: rollouts that are in no checkpoint yet."""

CONTEXT_MARGIN = 8
"""Tokens of a served model's context beyond the longest sequence: SGLang ends responses 2 early."""

PROBE_TOKENS = 16
"""Tokens that a server samples after each publish for the learner to compare, at most."""


Joint = Mapping[str, Callable[..., Any]]
"""What a publish computes on the devices of all processes: name -> (params, *inputs) -> value."""


def make_joint(config: RunConfig, prompt: Prompt, layout: Layout) -> Joint:
    """The joint work of any engine.

    prompt: any real one; servers are probed with it.
    """
    length = prompt.tokens.size + _probe_tokens(config)
    score = make_probe_score(config.model, config.learner.compute, layout, length=length)
    return {"whole": whole_here, "fetch": hf.fetch, "score": score}


def make_journal(config: RunConfig) -> Journal | None:
    """Where the run's finished rollouts are kept until a checkpoint has them, if they are."""
    if not (config.rollout.sglang.servers and config.rollout.sglang.journal):
        return None
    return Journal(config.directory / IN_FLIGHT)


def make_engine(
    config: RunConfig,
    tokenizer: Tokenizer,
    prompt: Prompt,
    joint: Joint,
    journal: Journal | None,
    stack: contextlib.ExitStack,
) -> Engine:
    """The engine, still without weights.

    Args:
      prompt: any real one; servers are probed with it.
      joint: of make_joint for this prompt. The engine announces what it uses of it.
      journal: of make_journal, or None to keep nothing.
      stack: closes the engine, and then lets others publish where it does.

    Raises EngineError naming a server that cannot be reached or cannot serve this run, and
    ValueError naming the folder if another process publishes there.
    """
    rollout, model = config.rollout, config.model
    if not rollout.sglang.servers:
        whole = _announced(joint, "whole")
        local = LocalEngine(rollout.engine, model, tokenizer.decode, whole)
        return stack.enter_context(contextlib.closing(local))
    publisher = Publisher(
        rollout.publish,
        model,
        config.directory,
        stop_token_ids=tokenizer.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
        max_length=rollout.max_length + CONTEXT_MARGIN,
        fetch=_announced(joint, "fetch"),
    )
    stack.enter_context(publisher.alone())
    # No stop tokens: the probe has the same number of tokens whatever the weights.
    sampling = dataclasses.replace(rollout.sampling(()), max_new_tokens=_probe_tokens(config))
    learner = LearnerSide(
        write=publisher.publish,
        score=_announced(joint, "score"),
        probe=Request(prompt, 0, zlib.crc32(b"probe"), sampling),
    )
    engine = SGLangEngine(
        rollout.sglang,
        model,
        tokenizer.decode,
        learner=learner,
        routes=config.learner.replay == "r3",
        journal=journal,
    )
    return stack.enter_context(contextlib.closing(engine))


def _probe_tokens(config: RunConfig) -> int:
    return min(PROBE_TOKENS, config.rollout.max_new_tokens)


def _announced(joint: Joint, name: str) -> Callable[..., Any]:
    """This part of the joint work, which the first process has the others do too."""

    def call(params: Any, *inputs: Any) -> Any:
        announce((name, inputs))
        return joint[name](params, *inputs)

    return call
