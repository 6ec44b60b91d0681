"""An SGLangEngine on fake servers, a learner for it, and requests: what its tests share."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.model.config import ModelConfig, MoEConfig
from jaxrl_llm.rollout.engine import EngineFailure, Request
from jaxrl_llm.rollout.journal import Journal
from jaxrl_llm.rollout.sglang import LearnerSide, SGLangConfig, SGLangEngine
from jaxrl_llm.types import Prompt, Rollout, SamplingParams
from tests.rollout.fake_samplers import HashSampler, Sampling, write_weights
from tests.rollout.fake_sglang import FakeServer

MODEL = ModelConfig(vocab_size=32, num_layers=2, moe=MoEConfig(8, 2))
SAMPLER = HashSampler(MODEL)
SAMPLING = SamplingParams(6)

# No test that passes waits for any of these; those about a deadline have a shorter one.
CONFIG = SGLangConfig(
    max_length=64, concurrency=8, request_seconds=30, health_seconds=20, update_seconds=30
)
# Lost servers are looked for often, and a server is asked again at once.
WATCHFUL = dataclasses.replace(CONFIG, health_seconds=0.5)
# Nothing comes back, and a wait without any server is short.
ALONE = dataclasses.replace(CONFIG, update_seconds=0.5)


@dataclasses.dataclass(frozen=True)
class Written:
    """As learner.publish.Publication."""

    version: int
    label: str
    path: str
    leftovers: tuple[str, ...] = ()


class Learner:
    """Weights are texts: the params are the text that is written to a version's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, params: str, version: int) -> Written:
        label = f"v{version}-{params}"
        return Written(version, label, write_weights(self._folder / label, params))

    def score(
        self, params: str, tokens: np.ndarray, routes: np.ndarray | None, temperature: float
    ) -> np.ndarray:
        folder = write_weights(self._folder / f"scored-{params}", params)
        scored = SAMPLER.score(SAMPLER.load(folder), tokens.tolist(), temperature)
        return np.asarray(scored, np.float32)

    def side(self) -> LearnerSide:
        return LearnerSide(self.write, self.score, request(999, prompt_length=12))


def request(
    seed: int, sample: int = 0, *, prompt_length: int = 4, sampling: SamplingParams = SAMPLING
) -> Request:
    """The prompt is a function of `seed`; samples of it differ in index and seed."""
    tokens = np.random.default_rng(seed).integers(0, MODEL.vocab_size, prompt_length)
    prompt = Prompt(f"p{seed}", tokens.astype(np.int32), text="", answer="")
    return Request(prompt, sample, 1000 * seed + sample, sampling)


def requests(prompts: int, samples: int = 1) -> list[Request]:
    return [request(seed, sample) for seed in range(prompts) for sample in range(samples)]


@contextlib.contextmanager
def engine(
    servers: Sequence[FakeServer],
    folder: Path,
    config: SGLangConfig = CONFIG,
    *,
    learner: type[Learner] = Learner,
    routes: bool = True,
    journal: Journal | None = None,
) -> Iterator[SGLangEngine]:
    """An engine without weights, whose learner writes below `folder`; closed at the end."""
    made = SGLangEngine(
        dataclasses.replace(config, servers=tuple(server.url for server in servers)),
        MODEL,
        lambda ids: " ".join(map(str, ids)),
        learner=learner(folder).side(),
        routes=routes,
        journal=journal,
    )
    try:
        yield made
    finally:
        made.close()


def rollouts(outcomes: Iterable[Rollout | EngineFailure]) -> list[Rollout]:
    """All of them, in the order of the requests; fails if one is a failure."""
    found = []
    for outcome in outcomes:
        assert isinstance(outcome, Rollout), outcome
        found.append(outcome)
    return sorted(found, key=lambda rollout: (int(rollout.prompt_id[1:]), rollout.sample_index))


def check_sampled_by(found: Sequence[Rollout], params: str, version: int, folder: Path) -> None:
    """Each was wholly sampled by these weights, and says so."""
    weights = SAMPLER.load(write_weights(folder / f"checked-{params}", params))
    for rollout in found:
        index = int(rollout.prompt_id[1:])
        asked = request(index, rollout.sample_index)
        prompt = asked.prompt.tokens.tolist()
        sampling = Sampling(SAMPLING.max_new_tokens, sampling_seed=asked.seed)
        sampled = SAMPLER.extend(weights, prompt, sampling, SAMPLING.max_new_tokens)
        assert rollout.tokens.tolist() == [*prompt, *(token for token, _, _ in sampled)]
        mask, logprobs = rollout.loss_mask, [logprob for _, logprob, _ in sampled]
        assert mask.tolist() == [False] * (len(prompt) - 1) + [True] * len(sampled)
        np.testing.assert_array_equal(rollout.sampler_logprobs[mask], np.float32(logprobs))
        assert set(rollout.weight_version[mask].tolist()) == {version}
        routes = SAMPLER.routes(weights, rollout.tokens.tolist()[:-1])
        if rollout.routes is not None:
            np.testing.assert_array_equal(rollout.routes, routes)


def sampling_bodies(server: FakeServer) -> list[Any]:
    """Bodies of the requests for rollouts, those of probes left out."""
    return [body for body in server.bodies("/generate") if body["logprob_start_len"] == -1]


def release_at_update(server: FakeServer, number: int) -> None:
    """In another thread: once the server is paused and told to load, let responses go on."""

    def release() -> None:
        server.wait_requests("/update_weights_from_disk", number)
        server.release()

    threading.Thread(target=release, daemon=True).start()


def wait_until(ready: Callable[[], bool]) -> None:
    """Polls; fails after a time that only a broken program takes."""
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)
