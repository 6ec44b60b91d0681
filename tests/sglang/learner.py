"""The learner's side of the tests on the real server: a model, its forward pass, an engine."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.arrays import ReplayedRoutes
from jaxrl_llm.engines import CONTEXT_MARGIN
from jaxrl_llm.learner.probe import ProbeScore, make_probe_score
from jaxrl_llm.learner.publish import Publication, PublishConfig, Publisher
from jaxrl_llm.model import hf
from jaxrl_llm.model.config import ComputeConfig, ModelConfig, MoEConfig
from jaxrl_llm.model.hf_config import config_json
from jaxrl_llm.model.logprobs import token_logprobs
from jaxrl_llm.model.transformer import Params, make_forward, unembed
from jaxrl_llm.rollout.engine import EngineFailure, Request
from jaxrl_llm.rollout.sglang import LearnerSide, SGLangConfig, SGLangEngine
from jaxrl_llm.types import NO_ROUTE, Prompt, Rollout, SamplingParams
from tests.learner.tiny import make_params, one_device
from tests.model.tiny import one_segment
from tests.sglang.server import RealServer

MODEL = ModelConfig(
    vocab_size=16,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    moe=MoEConfig(num_experts=8, experts_per_token=2, expert_width=16),
)
MAX_LENGTH = 512
CONTEXT = MAX_LENGTH + CONTEXT_MARGIN
KEY = "the-key-of-the-tests"
NATS = 1e-3
"""Allowed between the log-probabilities of the server and ours."""
LENGTH = 448  # tokens that our forward pass is compiled for


@functools.cache
def params(seed: int) -> Params:
    return make_params(MODEL, seed)


def export(weights: Params, folder: Path) -> None:
    described = config_json(
        MODEL, dtype="float32", max_length=CONTEXT, stop_token_ids=(), pad_token_id=None
    )
    hf.write(folder, hf.tensors(weights, MODEL, "float32"), described)


def requests(
    count: int, sampling: SamplingParams, *, prompt_length: int | None = None
) -> list[Request]:
    """Of random prompts, each with a seed of its own."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(count):
        tokens = rng.integers(0, MODEL.vocab_size, prompt_length or rng.integers(2, 40), np.int32)
        prompt = Prompt(f"p{index}", tokens, "", "")
        made.append(Request(prompt, 0, seed=1000 + index, sampling=sampling))
    return made


class Ours(NamedTuple):
    """Our forward pass over one sequence of T tokens; S = T - 1."""

    logprobs: np.ndarray  # f32[S]
    logits: np.ndarray  # f32[S, V]
    routes: np.ndarray  # int[S, L, K]


def ours(weights: Params, tokens: np.ndarray, routes: np.ndarray | None = None) -> Ours:
    """Through the experts `routes`, int[S, L, K], if given."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : tokens.size] = tokens  # behind what a causal model looks at
    replayed = np.full((1, LENGTH - 1, MODEL.num_layers, 2), NO_ROUTE, np.int16)
    if routes is not None:
        replayed[0, : tokens.size - 1] = routes
    found = _forward(weights, padded, replayed)
    return Ours(*(np.asarray(part)[: tokens.size - 1] for part in found))


def as_sampled(weights: Params, rollout: Rollout) -> Ours:
    """Through the server's experts: of two that are nearly tied each engine may choose its own.

    agreement() says how often that happens; here it would move a token by tenths of a nat.
    """
    assert rollout.routes is not None
    return ours(weights, rollout.tokens, rollout.routes)


@jax.jit
def _forward(weights: Params, tokens: jax.Array, routes: jax.Array) -> Ours:
    forward = make_forward(MODEL, ComputeConfig(remat="none"))
    output = forward(weights, *one_segment(tokens[:, :-1]), ReplayedRoutes(routes))
    head = unembed(weights, MODEL)
    logprobs, _ = token_logprobs(output.hidden, head, tokens[:, 1:], temperature=1.0, chunk=64)
    logits = jnp.matmul(output.hidden, head, precision="highest")
    return Ours(logprobs[0], logits[0], jnp.moveaxis(output.router.experts[:, 0], 0, 1))


def agreement(pairs: Sequence[tuple[Rollout, Params]]) -> float:
    """Share of (token, layer) pairs with the same experts in the same order."""
    same = [
        np.all(rollout.routes == ours(weights, rollout.tokens).routes, axis=-1).ravel()
        for rollout, weights in pairs
    ]
    return float(np.mean(np.concatenate(same)))


PROBE = Request(
    Prompt("probe", np.arange(MODEL.vocab_size, dtype=np.int32), "", ""),
    0,
    seed=7,
    sampling=SamplingParams(max_new_tokens=16),
)


class Learner:
    """Publishes float32 weights into a folder; `misled` makes servers load an older one again."""

    def __init__(self, folder: Path) -> None:
        self._publisher = Publisher(
            PublishConfig(dtype="float32", keep=3),
            MODEL,
            folder,
            stop_token_ids=(),
            pad_token_id=None,
            max_length=CONTEXT,
        )
        self.misled = False
        self.published: list[Publication] = []

    def write(self, weights: Params, version: int) -> Publication:
        """The label is always that of the new weights."""
        publication = self._publisher.publish(weights, version)
        if self.misled:
            publication = dataclasses.replace(publication, path=self.published[-1].path)
        self.published.append(publication)
        return publication


@functools.cache
def probe_score() -> ProbeScore:
    return make_probe_score(MODEL, ComputeConfig(remat="none"), one_device(), length=LENGTH)


@contextlib.contextmanager
def engine(server: RealServer, learner: Learner, **settings: Any) -> Iterator[SGLangEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_API_KEY", KEY)
        made = SGLangEngine(
            SGLangConfig(servers=(server.url,), max_length=MAX_LENGTH, **settings),
            MODEL,
            lambda ids: " ".join(map(str, ids)),
            learner=LearnerSide(learner.write, probe_score(), PROBE),
            routes=True,
            journal=None,
        )
    try:
        yield made
    finally:
        made.close()


def finished(outcomes: Iterable[Rollout | EngineFailure]) -> list[Rollout]:
    rollouts = []
    for outcome in outcomes:
        assert isinstance(outcome, Rollout), outcome
        rollouts.append(outcome)
    return sorted(rollouts, key=lambda rollout: int(rollout.prompt_id[1:]))
