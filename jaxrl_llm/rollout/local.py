"""The in-process engine: samples with the learner's weights in an inference engine's numerics.

What it is: continuous batching on the host around the jitted functions of decode.py. The KV cache
has a fixed number of slots. Prompts are computed in groups, in a small cache of their own; each
takes a free slot when there is one, and leaves it the moment its response is finished. Once nobody
waits, the slots are halved as soon as the requests left fit.
What it is not: an engine for large models, which SGLang serves over HTTP behind the same protocol.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.rollout.decode import (
    Cache,
    Decoded,
    Slots,
    by_layer,
    decode,
    empty_cache,
    enter,
    prefill,
    take_rows,
)
from jaxrl_llm.rollout.engine import EngineFailure, EngineReport, Params, Request, refusal
from jaxrl_llm.rollout.precision import Numerics, Precision, Weights, pack_weights
from jaxrl_llm.rollout.routes import with_routes
from jaxrl_llm.rollout.sampling import Leaf, Samplers, seed_words
from jaxrl_llm.sharding import whole_here
from jaxrl_llm.types import NO_ROUTE, NOT_SAMPLED, Rollout

LEAST_SLOTS = 32
"""Slots are not halved to fewer: a step of these takes hardly longer, and each number compiles."""


@dataclasses.dataclass(frozen=True)
class LocalEngineConfig:
    """The in-process engine: its numerics and the fixed shapes it compiles for."""

    precision: Precision = "float32"  # of weights and activations in every linear layer
    router_precision: Literal["same", "float32"] = "float32"  # of the routers' product
    slots: int = 64  # responses that are decoded together
    max_length: int = 512  # longest prompt plus response, in tokens
    prefill_rows: int = 16  # prompts computed together
    prefill_chunk: int = 64  # tokens of a prompt computed at once, at most; more take more calls
    free_slots: int = 2  # as soon as so many are free, decoding pauses to let prompts in
    decode_steps: int = 32  # most tokens per slot between two visits of the host

    def __post_init__(self) -> None:
        for field, value in dataclasses.asdict(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{field} is {value}; it must be at least 1")


class _Row:
    """A request, and what has come of it so far; indices follow the alignment rule."""

    def __init__(self, request: Request, model: ModelConfig) -> None:
        prompt = request.prompt.tokens
        total = prompt.size + request.sampling.max_new_tokens
        route_shape = (total - 1, model.num_moe_layers, model.moe.experts_per_token)
        self.request = request
        self._model = model
        self.length = prompt.size  # tokens so far
        self.finite = True
        self._tokens = np.concatenate([prompt, np.zeros(total - prompt.size, np.int32)])
        self._logprobs = np.zeros(total - 1, np.float32)
        self._versions = np.full(total - 1, NOT_SAMPLED, np.int32)
        self._routes = np.full(route_shape, NO_ROUTE, np.int16)

    @property
    def consumed(self) -> np.ndarray:
        """Tokens that prefill consumes: the prompt but its last, which decode starts from."""
        return self.request.prompt.tokens[:-1]

    def take_prompt(self, start: int, routes: np.ndarray) -> None:
        """Store routes [C, L, K] of the consumed tokens from `start` on; the rest is padding."""
        count = max(0, min(len(routes), self.consumed.size - start))
        self._routes[start : start + count] = routes[:count]

    def take_sampled(self, tokens: Leaf, logprobs: Leaf, routes: Leaf, version: int) -> None:
        """Append sampled tokens [n] with their log-probabilities [n] and routes [n, L, K]."""
        positions = slice(self.length - 1, self.length - 1 + tokens.size)
        self._tokens[self.length : self.length + tokens.size] = tokens
        self._logprobs[positions] = logprobs
        self._versions[positions] = version
        self._routes[positions] = routes
        self.length += tokens.size
        self.finite = bool(np.isfinite(logprobs[-1]))

    def result(self, decode_text: Callable[[Sequence[int]], str]) -> Rollout | EngineFailure:
        """The finished rollout, or the failure of a forward pass that was not finite."""
        prompt, index = self.request.prompt, self.request.sample_index
        if not self.finite:
            message = (
                f"the log-probability of token {self.length - 1} is not finite; the published "
                "weights are damaged or overflow this precision"
            )
            return EngineFailure(prompt.prompt_id, index, "not_finite", message)
        tokens, positions = self._tokens[: self.length], self.length - 1
        response = tokens[prompt.tokens.size :].tolist()
        stopped = response[-1] in self.request.sampling.stop_token_ids
        rollout = Rollout(
            prompt_id=prompt.prompt_id,
            sample_index=index,
            tokens=tokens,
            loss_mask=np.arange(positions) >= prompt.tokens.size - 1,
            sampler_logprobs=self._logprobs[:positions],
            routes=None,
            weight_version=self._versions[:positions],
            text=decode_text(response[:-1] if stopped else response),
            finish="stop" if stopped else "length",
        )
        return with_routes(rollout, self._routes[:positions], self._model)


class _SlotTable:
    """Which request sits in which slot, and the Slots that decode reads."""

    def __init__(self, size: int, stop_count: int) -> None:
        self._rows: dict[int, _Row] = {}
        self._free = list(range(size))
        self.slots = Slots(
            active=np.zeros(size, np.bool_),
            token=np.zeros(size, np.int32),
            position=np.zeros(size, np.int32),
            end=np.zeros(size, np.int32),
            stops=np.full((size, stop_count), -1, np.int32),
            samplers=Samplers(
                seed=np.zeros((size, 2), np.uint32),
                temperature=np.ones(size, np.float32),
                top_p=np.ones(size, np.float32),
                top_k=np.zeros(size, np.int32),
            ),
        )

    @property
    def occupied(self) -> bool:
        """Whether any slot holds a request."""
        return bool(self._rows)

    @property
    def free(self) -> int:
        """Slots without a request."""
        return len(self._free)

    def admit(self, rows: Sequence[_Row]) -> list[int]:
        """Put rows, no more than slots are free, into slots; returns these."""
        taken, self._free = self._free[: len(rows)], self._free[len(rows) :]
        for slot, row in zip(taken, rows, strict=True):
            self._rows[slot] = row
            request = row.request
            slots, sampling, prompt = self.slots, request.sampling, request.prompt.tokens
            slots.active[slot] = True
            slots.token[slot] = prompt[-1]
            slots.position[slot] = prompt.size - 1
            slots.end[slot] = prompt.size - 1 + sampling.max_new_tokens
            slots.stops[slot] = -1
            slots.stops[slot, : len(sampling.stop_token_ids)] = sampling.stop_token_ids
            slots.samplers.seed[slot] = seed_words(request.seed)
            slots.samplers.temperature[slot] = sampling.temperature
            slots.samplers.top_p[slot] = sampling.top_p
            slots.samplers.top_k[slot] = sampling.top_k
        return taken

    def halve(self) -> np.ndarray | None:
        """Leave half of the slots, if all requests fit; returns those that are kept, in order."""
        count = self.slots.active.size // 2
        if len(self._rows) > count or count < LEAST_SLOTS:
            return None
        kept = np.array([*sorted(self._rows), *self._free], np.int32)[:count]
        self._rows = {slot: self._rows[old] for slot, old in enumerate(kept) if old in self._rows}
        self._free = list(range(len(self._rows), count))
        self.slots = jax.tree.map(lambda leaf: leaf[kept], self.slots)
        return kept

    def absorb(self, decoded: Decoded, version: int) -> list[_Row]:
        """Add what a decode call sampled; returns the rows that finished and frees their slots."""
        finished = []
        for slot, row in sorted(self._rows.items()):
            count = decoded.counts[slot]
            row.take_sampled(
                decoded.tokens[:count, slot],
                decoded.logprobs[:count, slot],
                decoded.routes[:count, slot],
                version,
            )
            self.slots.token[slot] = decoded.tokens[count - 1, slot]
            self.slots.position[slot] += count
            if not decoded.active[slot]:
                self.slots.active[slot] = False
                finished.append(self._rows.pop(slot))
                self._free.append(slot)
        return finished


class _Prompts:
    """The requests that wait for a slot; the prompts of the first ones are computed already."""

    def __init__(
        self, queue: collections.deque[Request], config: LocalEngineConfig, numerics: Numerics
    ) -> None:
        self._queue = queue
        self._size = config.prefill_rows
        self._numerics = numerics
        consumed = [request.prompt.tokens.size - 1 for request in queue]
        self._width = _prefill_width(consumed, config)
        self._cache = empty_cache(
            numerics.model,
            rows=self._size,
            length=config.max_length,
            positions=max([1, *consumed]),
        )
        self._computed: list[_Row] = []  # in the last rows of the cache
        self._routes: list[tuple[int, list[_Row], jax.Array]] = []

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._queue) + len(self._computed)

    def forget(self) -> None:
        """Compute again, with other weights, what has no slot yet."""
        self._queue.extendleft(row.request for row in reversed(self._computed))
        self._computed = []

    def compute(self, weights: Weights) -> bool:
        """Compute prompts of the queue's front if none is ready; whether one is."""
        if self._computed or not self._queue:
            return bool(self._computed)
        count, model = min(self._size, len(self._queue)), self._numerics.model
        batch = [_Row(self._queue.popleft(), model) for _ in range(count)]
        for start in range(0, max(row.consumed.size for row in batch), self._width):
            tokens = np.full((self._size, self._width), -1, np.int32)
            for line, row in zip(tokens[self._size - count :], batch, strict=True):
                part = row.consumed[start : start + self._width]
                line[: part.size] = part
            self._cache, routes = prefill(
                weights, self._cache, tokens, np.int32(start), numerics=self._numerics
            )
            self._routes.append((start, batch, routes))
        self._computed = batch
        return True

    def enter(self, cache: Cache, table: _SlotTable) -> Cache:
        """The cache of the slots with computed prompts in those that were free."""
        rows, self._computed = self._computed[: table.free], self._computed[table.free :]
        first = self._size - len(self._computed) - len(rows)
        # A slot that does not exist stands for a row that does not enter.
        slots = np.full(self._size, table.slots.active.size, np.int32)
        slots[first : first + len(rows)] = table.admit(rows)
        return enter(cache, self._cache, slots)

    def take_routes(self) -> None:
        """Store the routes of computed prompts; the host need not wait for them to decode."""
        for start, batch, routes in self._routes:
            for row, chosen in zip(batch, np.asarray(routes)[-len(batch) :], strict=True):
                row.take_prompt(start, chosen)
        self._routes = []


@dataclasses.dataclass(frozen=True)
class _Published:
    weights: Weights
    version: int


class LocalEngine:
    """An Engine (see engine.py) in this process and on one device.

    A publish while an iterator is open takes effect at its next decode call: later tokens come from
    the new weights, those of requests in slots over the older KV cache, and their weight_version
    says so.
    """

    def __init__(
        self,
        config: LocalEngineConfig,
        model: ModelConfig,
        decode_text: Callable[[Sequence[int]], str],
        whole: Callable[[Params], Params] = whole_here,
    ) -> None:
        """Args:
        decode_text: response tokens -> Rollout.text; the tokenizer's decode.
        whole: makes published parameters ones that this process sees all of.
        """
        self._config = config
        self._numerics = Numerics(model, config.precision, config.router_precision)
        self._decode_text = decode_text
        self._whole = whole
        # Not the device itself: an array put there would keep the type of the learner's mesh.
        self._device = SingleDeviceSharding(jax.local_devices()[0])
        self._published: _Published | None = None

    def publish(self, params: Params, version: int) -> None:
        """Make `params` the engine's weights, quantised; see Engine.publish.

        In float32 nothing is copied: the engine keeps these very arrays where the learner has them
        whole on the first device, until the next publish, and a call of generate() cuts them by
        layer for as long as it lasts. Once an update has taken them (donation), generate() raises.
        """
        if version < 0:
            raise ValueError(f"version is {version}; weight versions count from 0")
        own = jax.device_put(dict(self._whole(params)), self._device, may_alias=True)
        self._published = _Published(pack_weights(own, numerics=self._numerics), version)

    def generate(self, requests: Sequence[Request]) -> Generator[Rollout | EngineFailure]:
        """See Engine.generate. All state of the call is its own: several may be open at once.

        Raises RuntimeError if no weights were published, or an update has taken them.
        """
        model, config = self._numerics.model, self._config
        queue: collections.deque[Request] = collections.deque()
        for request in requests:
            failure = refusal(request, vocab_size=model.vocab_size, max_length=config.max_length)
            if failure is None:
                queue.append(request)
            else:
                yield failure
        # At least four, so that calls with few stop ids and with none share one compilation.
        stop_count = max([4, *(len(request.sampling.stop_token_ids) for request in queue)])
        table = _SlotTable(config.slots, stop_count)
        prompts = _Prompts(queue, config, self._numerics)
        cache = empty_cache(model, rows=config.slots, length=config.max_length)
        published = None
        while prompts.waiting or table.occupied:
            if published is not (newest := self._weights()):
                published, weights = newest, by_layer(newest.weights)
                prompts.forget()
            while table.free and prompts.compute(weights):
                cache = prompts.enter(cache, table)
            enough = min(config.free_slots, prompts.waiting) or config.slots
            if not prompts.waiting and (kept := table.halve()) is not None:
                cache = take_rows(cache, kept)
            cache, decoded = decode(
                weights,
                cache,
                table.slots,
                np.int32(enough),
                numerics=self._numerics,
                steps=config.decode_steps,
            )
            prompts.take_routes()
            for row in table.absorb(jax.device_get(decoded), published.version):
                yield row.result(self._decode_text)

    @property
    def overlaps(self) -> bool:
        """False: it works while the next item is waited for, on a device of the learner's host."""
        return False

    def report(self) -> EngineReport:
        """Nothing: what can happen to it is an EngineFailure."""
        return EngineReport({}, ())

    def close(self) -> None:
        """Release the weights."""
        self._published = None

    def _weights(self) -> _Published:
        if self._published is None:
            raise RuntimeError("the engine has no weights; call publish() before generate()")
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._published.weights)):
            raise RuntimeError(
                f"an update has taken the weights of version {self._published.version}, which were "
                "published without a copy; publish() those that came of it before generate()"
            )
        return self._published


def _prefill_width(consumed: Sequence[int], config: LocalEngineConfig) -> int:
    """Tokens of a prompt computed at once: a power of two that holds the longest, or the most.

    One for all the prompts of a call, since each width is compiled.
    """
    longest = max([1, *consumed])
    return min(config.prefill_chunk, 2 ** math.ceil(math.log2(longest)))
