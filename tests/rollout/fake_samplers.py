"""What the fake server samples from: models behind one small interface.

HashSampler costs nothing and has no weights but a digest; ModelSampler is a true second engine,
which reads the published folder and computes the model in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.model.config import ComputeConfig, ModelConfig
from jaxrl_llm.model.hf import load_params
from jaxrl_llm.model.logprobs import token_logprobs
from jaxrl_llm.model.transformer import Params, init_params, make_forward, unembed
from jaxrl_llm.rollout.engine import Request
from jaxrl_llm.rollout.local import LocalEngine, LocalEngineConfig
from jaxrl_llm.sharding import MeshConfig, make_layout
from jaxrl_llm.types import Prompt, Rollout, SamplingParams

DEFAULT_WEIGHTS = ""
"""Path of the weights that a server has when it starts, unless told otherwise."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """sampling_params as the server reads them: what a request leaves out has SGLang's default."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    sampling_seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class Sampler(Protocol):
    """A model that a FakeServer serves. Weights are opaque and immutable."""

    @property
    def model(self) -> ModelConfig: ...

    def load(self, path: str) -> Any:
        """The weights in a folder; raises ValueError or OSError if they cannot be read."""
        ...

    def extend(
        self, weights: Any, tokens: list[int], sampling: Sampling, count: int
    ) -> list[tuple[int, float, float]]:
        """Up to `count` more tokens, fewer only behind a stop token.

        Each with its log-probability at the temperature, and that renormalised over what top-p and
        top-k keep.
        """
        ...

    def score(self, weights: Any, tokens: list[int], temperature: float) -> np.ndarray:
        """f64[S], log-probabilities of tokens[1:]."""
        ...

    def routes(self, weights: Any, tokens: list[int]) -> np.ndarray:
        """int32[len(tokens), all hidden layers, K]; 0 in dense layers."""
        ...


class HashSampler:
    """Logits and routes are hashes of (weights, tokens so far): a "model" that costs nothing."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model

    @property
    def model(self) -> ModelConfig:
        return self._model

    def load(self, path: str) -> bytes:
        """The digest of the folder: of its manifest if it has one, else of all its files."""
        if path == DEFAULT_WEIGHTS:
            return b"default"
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"{path} is no folder of weights")
        manifest = folder / "manifest.json"
        files = [manifest] if manifest.exists() else sorted(folder.iterdir())
        if not files:
            raise ValueError(f"{path} is empty")
        return hashlib.blake2b(b"".join(file.read_bytes() for file in files)).digest()

    def extend(
        self, weights: bytes, tokens: list[int], sampling: Sampling, count: int
    ) -> list[tuple[int, float, float]]:
        greedy = sampling.temperature < 1e-6
        chosen: list[tuple[int, float, float]] = []
        while len(chosen) < count:
            context = [*tokens, *(token for token, _, _ in chosen)]
            logprobs = self._logprobs(weights, context, 1.0 if greedy else sampling.temperature)
            kept = logprobs if greedy else truncate(logprobs, sampling.top_p, sampling.top_k)
            noise = _rng(b"noise", sampling.sampling_seed, len(context)).gumbel(size=kept.size)
            token = int(np.argmax(kept if greedy else kept + noise))
            chosen.append((token, float(logprobs[token]), float(kept[token])))
            if token in sampling.stop_token_ids and not sampling.ignore_eos:
                break
        return chosen

    def score(self, weights: bytes, tokens: list[int], temperature: float) -> np.ndarray:
        return np.array(
            [
                self._logprobs(weights, tokens[:end], temperature)[tokens[end]]
                for end in range(1, len(tokens))
            ]
        )

    def routes(self, weights: bytes, tokens: list[int]) -> np.ndarray:
        moe, layers = self._model.moe, self._model.num_layers
        rows = np.zeros((len(tokens), layers, moe.experts_per_token), np.int32)
        for row in range(len(tokens)):
            opinions = _rng(b"routes", weights, tokens[: row + 1]).random((layers, moe.num_experts))
            rows[row] = np.argsort(opinions, axis=-1)[:, : moe.experts_per_token]
        rows[:, list(moe.dense_layers)] = 0
        return rows

    def _logprobs(self, weights: bytes, context: list[int], temperature: float) -> np.ndarray:
        logits = 2 * _rng(b"logits", weights, context).standard_normal(self._model.vocab_size)
        return log_softmax(logits / temperature)


def _rng(*parts: object) -> np.random.Generator:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """f64[V]."""
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def truncate(logprobs: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """f64[V] renormalised over the tokens that top-p and top-k keep, -inf elsewhere."""
    order = np.argsort(-logprobs, kind="stable")
    before = np.cumsum(np.exp(logprobs[order])) - np.exp(logprobs[order])
    keep = (before < top_p) | (top_p >= 1)
    if top_k > 0:
        keep[top_k:] = False
    kept = np.full_like(logprobs, -np.inf)
    kept[order[keep]] = logprobs[order[keep]]
    return log_softmax(kept)


def write_weights(folder: Path, text: str) -> str:
    """A folder of "weights" for a HashSampler, as the path to send."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.txt").write_text(text)
    return str(folder)


@dataclasses.dataclass(frozen=True, eq=False)
class ModelWeights:
    """Weights of a ModelSampler, and an engine that has them."""

    params: Params
    engine: LocalEngine


class ModelSampler:
    """The model itself: LocalEngine in float32, and a forward pass for given tokens."""

    def __init__(
        self, model: ModelConfig, *, max_length: int, params: Params | None = None
    ) -> None:
        """
        Args:
          max_length: the longest prompt and response together, in tokens.
          params: the weights a server starts with; random ones if None.
        """
        self._model = model
        self._length = max_length
        self._start = init_params(model, jax.random.key(0)) if params is None else params

    @property
    def model(self) -> ModelConfig:
        return self._model

    def load(self, path: str) -> ModelWeights:
        params = self._start
        if path != DEFAULT_WEIGHTS:
            params = load_params(Path(path), self._model, make_layout(MeshConfig()))
        # One more than is served: routes() lets it sample a token it has no use for.
        config = LocalEngineConfig(slots=1, prefill_rows=1, max_length=self._length + 1)
        engine = LocalEngine(config, self._model, str)
        engine.publish(params, 0)
        return ModelWeights(params, engine)

    def extend(
        self, weights: ModelWeights, tokens: list[int], sampling: Sampling, count: int
    ) -> list[tuple[int, float, float]]:
        greedy = sampling.temperature < 1e-6
        rollout = self._run(
            weights,
            tokens,
            SamplingParams(
                count,
                stop_token_ids=() if sampling.ignore_eos else sampling.stop_token_ids,
                temperature=0.0 if greedy else sampling.temperature,
                top_p=sampling.top_p,
                top_k=max(sampling.top_k, 0),
            ),
            abs(sampling.sampling_seed or 0),
        )
        sampled = rollout.tokens[len(tokens) :].tolist()
        kept = rollout.sampler_logprobs[rollout.loss_mask].tolist()
        plain = kept
        if not greedy and (sampling.top_p < 1 or sampling.top_k > 0):
            whole = self.score(weights, rollout.tokens.tolist(), sampling.temperature)
            plain = whole[len(tokens) - 1 :].tolist()
        return list(zip(sampled, plain, kept, strict=True))

    def score(self, weights: ModelWeights, tokens: list[int], temperature: float) -> np.ndarray:
        size = len(tokens) - 1
        padded = np.zeros(self._length + 2, np.int32)
        padded[: len(tokens)] = tokens
        segments = np.zeros(self._length + 1, np.int32)
        segments[:size] = 1
        logprobs = _score(weights.params, padded, segments, temperature, model=self._model)
        return np.asarray(logprobs, np.float64)[:size]

    def routes(self, weights: ModelWeights, tokens: list[int]) -> np.ndarray:
        rollout = self._run(weights, tokens, SamplingParams(1), seed=0)
        assert rollout.routes is not None
        rows = np.zeros(
            (len(tokens), self._model.num_layers, self._model.moe.experts_per_token), np.int32
        )
        rows[:, list(self._model.moe_layer_indices)] = rollout.routes
        return rows

    def _run(
        self, weights: ModelWeights, tokens: list[int], sampling: SamplingParams, seed: int
    ) -> Rollout:
        prompt = Prompt("fake", np.array(tokens, np.int32), text="", answer="")
        (outcome,) = weights.engine.generate([Request(prompt, 0, seed, sampling)])
        assert isinstance(outcome, Rollout), outcome
        return outcome


@functools.partial(jax.jit, static_argnames=("model",))
def _score(
    params: Params, tokens: Any, segments: Any, temperature: Any, *, model: ModelConfig
) -> jax.Array:
    """f32[S] of one padded row."""
    layout = make_layout(MeshConfig())  # on which the weights of a folder lie
    forward = make_forward(model, ComputeConfig(remat="none"), layout)
    positions = jnp.arange(segments.size)[None]
    hidden = forward(params, tokens[None, :-1], positions, segments[None], None).hidden
    # token_logprobs wants a number that it can look at, and temperature scales the logits alone.
    logprobs, _ = token_logprobs(
        hidden / temperature,
        unembed(params, model),
        tokens[None, 1:],
        temperature=1.0,
        chunk=segments.size,
        layout=layout,
    )
    return logprobs[0]
