"""A server that speaks SGLang's HTTP protocol: deterministic, in this process, faults on request.

It answers the endpoints that the client uses, in the form recorded from sglang 0.5.23 (see
tests/recorded/sglang_0.5.23.json), from a thread on a loopback port:

    sampler = HashSampler(MODEL)      # or ModelSampler(MODEL, max_length=64): computes the model
    with FakeServer(sampler) as server:
        httpx.post(server.url + "/generate", json={...})
        server.bodies("/generate")                # every body it was sent, in order
        server.weight_version                     # the label it would report

What it answers is a function of (weights, input_ids, sampling_params), whatever else runs. Weights
are folders: sampler.load(path) -> weights, and sampler.score(weights, tokens, temperature) is the
truth a probe can be compared with. `write_weights(folder, text)` makes one for a HashSampler.

Updates during generation: hold() makes every response stop after some tokens, until release():

    server.hold(tokens=3)
    ... start requests in other threads ...
    server.wait_held(2)                           # two responses are under way, 3 tokens each
    ... /pause_generation, /update_weights_from_disk, /continue_generation ...
    server.release()

Faults are added at any time; each counts the calls of its path from then on, the first being 1:

    server.add(Fault("/generate", "status", calls=(1, 2), status=500))
    server.add(Fault("/generate", "edit", calls=(3,), edit=fake_faults.nan_logprob))
    server.clear_faults()
    server.stop()                                 # killed: open connections are reset
    server.restart()                              # same port, start-up weights, label "default"

What it is not: SGLang. Its text is the response's ids between spaces, responses never share a batch
(nothing is queued for want of memory), and only what the client asks for is answered.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import http.server
import json
import select
import socket
import struct
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.rollout.fake_faults import Fault, encode_routes
from tests.rollout.fake_samplers import (
    DEFAULT_WEIGHTS,
    HashSampler,
    ModelSampler,
    Sampler,
    Sampling,
    write_weights,
)

__all__ = ["FakeServer", "Fault", "HashSampler", "ModelSampler", "write_weights"]

RECORDED = json.loads(
    (Path(__file__).parent.parent / "recorded" / "sglang_0.5.23.json").read_text()
)
PATIENCE = 30.0  # seconds a test waits for something to happen here before it fails


# --- one response ------------------------------------------------------------------------------


class _Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(str(body))
        self.status, self.body = status, body


class _Gone(Exception):
    """The client, or this server, went away."""


@dataclasses.dataclass(eq=False)
class _Generation:
    """A response under way; `rows` says from which row on which weights wrote the routes."""

    rid: str
    prompt: list[int]
    sampling: Sampling
    sampled: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)
    spans: list[tuple[str, int]] = dataclasses.field(default_factory=list)  # label, first token
    rows: list[tuple[Any, int]] = dataclasses.field(default_factory=list)  # weights, first row
    finish: dict[str, Any] | None = None
    held: bool = False
    retracted: bool = False
    retractions: int = 0
    cached: int = 0

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *(token for token, _, _ in self.sampled)]

    def take(self, sampled: list[tuple[int, float, float]], weights: Any, label: str) -> None:
        """Append tokens that `weights` sampled."""
        if self.retracted:  # the prefix was computed anew: all of its routes are the new weights'
            self.rows, self.retracted = [], False
        if not self.rows or self.rows[-1][0] is not weights:
            first = len(self.tokens) - 1 if self.rows else 0
            self.rows.append((weights, first))
        if not self.spans or self.spans[-1][0] != label:
            self.spans.append((label, len(self.sampled)))
        self.sampled += sampled
        last, limit = self.sampled[-1][0], self.sampling.max_new_tokens
        if not self.sampling.ignore_eos and last in self.sampling.stop_token_ids:
            self.finish = {"type": "stop", "matched": last}
        elif len(self.sampled) >= limit:
            self.finish = {"type": "length", "length": limit}


ABORTED = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
NOT_FLUSHED = (
    "Weights were updated, but the cache was not flushed because requests are still running or "
    "queued. Retract or finish them, then call /flush_cache."
)
FLUSHED = RECORDED["flush_cache_idle"]["response"]
NOT_FLUSHED_NOW = RECORDED["flush_cache_running"]["response"]


# --- the server --------------------------------------------------------------------------------


class FakeServer:
    """See the module's docstring. All state is guarded by one condition."""

    def __init__(
        self,
        sampler: Sampler,
        *,
        faults: Collection[Fault] = (),
        api_key: str = "",
        deterministic: bool = True,
        routes: bool = True,
        context: int = 2048,
        chunk: int = 1,
        token_seconds: float = 0.0,
        info: dict[str, Any] | None = None,
    ) -> None:
        """Starts at once.

        Args:
          api_key: what clients must send as a bearer token; "" asks for none.
          deterministic: as with --enable-deterministic-inference; without it seeds are ignored.
          routes: as with --enable-return-routed-experts.
          context: the longest prompt and response together, in tokens.
          chunk: tokens sampled between two looks at pauses, aborts and hold().
          token_seconds: how long a token takes.
          info: overrides fields of /server_info and /model_info.
        """
        self.requests: list[tuple[str, Any]] = []  # path, body: everything that ever came
        self._sampler = sampler
        self._api_key = api_key
        self._deterministic = deterministic
        self._routes = routes
        self._context = context
        self._chunk = chunk
        self._token_seconds = token_seconds
        self._info = info or {}
        self._changed = threading.Condition()
        self._faults: list[tuple[Fault, collections.Counter[str]]] = []
        self._unseeded = 0
        for fault in faults:
            self.add(fault)
        self._port = 0
        self.restart()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def weight_version(self) -> str:
        """The label that /model_info reports."""
        return self._reported

    @property
    def running(self) -> int:
        """Responses under way, those that wait for a pause to end left out."""
        with self._changed:
            return len(self._running)

    def bodies(self, path: str) -> list[Any]:
        """The bodies sent to a path, in order of arrival."""
        with self._changed:
            return [body for where, body in self.requests if where == path]

    def add(self, fault: Fault) -> None:
        with self._changed:
            self._faults.append((fault, collections.Counter()))

    def clear_faults(self) -> None:
        with self._changed:
            self._faults.clear()

    def hold(self, tokens: int, *, call: int = 0) -> None:
        """No response gets further than this many sampled tokens, from that /generate on, or now.

        Counted like requests, and before that one is sampled; those that got further stop too.
        """
        with self._changed:
            if call:
                self._hold_at = (call, tokens)
            else:
                self._limit = tokens

    def release(self) -> None:
        with self._changed:
            self._limit = self._hold_at = None
            self._changed.notify_all()

    def wait_held(self, count: int) -> None:
        """Until `count` responses have got as far as hold() lets them."""
        self._await(lambda: sum(g.held for g in self._running) >= count, f"{count} held responses")

    def wait_requests(self, path: str, count: int) -> None:
        """Until a path was called `count` times, answered or not."""
        self._await(
            lambda: sum(where == path for where, _ in self.requests) >= count,
            f"{count} calls of {path}",
        )

    def stop(self) -> None:
        """Kill it: nothing is answered any more, open connections are reset. Idempotent."""
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            self._changed.notify_all()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        for connection in list(self._http.connections):
            _reset(connection)

    def restart(self, weights: str = DEFAULT_WEIGHTS, label: str = "default") -> None:
        """Start it (again) on the same port, with nothing but these weights."""
        self._weights = self._sampler.load(weights)
        self._path = weights
        self._label = self._reported = label  # of new tokens; in /model_info
        self._paused: str | None = None  # the mode
        self._limit: int | None = None
        self._hold_at: tuple[int, int] | None = None  # (call, tokens)
        self._running: list[_Generation] = []
        self._rids: set[str] = set()
        self._stepping = 0
        self._updates: list[object] = []  # those that have begun
        self._prefixes: set[tuple[Any, ...]] = set()  # prompts in the cache
        self._stopped = False
        handler = functools.partial(_Handler, server_state=self)
        self._http = _HttpServer(("127.0.0.1", self._port), handler)
        self._port = self._http.server_port
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    # Called by the handler, in the thread of a connection.

    def receive(self, path: str, body: Any) -> list[Fault]:
        """Log a request; returns the faults that befall it."""
        with self._changed:
            self.requests.append((path, body))
            calls = sum(where == "/generate" for where, _ in self.requests)
            if self._hold_at and calls == self._hold_at[0]:
                self._limit = self._hold_at[1]
            self._changed.notify_all()
            befall = []
            for fault, count in self._faults:
                if fault.path == path:
                    count[path] += 1
                    if count[path] in fault.calls:
                        befall.append(fault)
            return befall

    def answer(
        self, path: str, query: dict[str, str], body: Any, faults: list[Fault], peer: _Peer
    ) -> Any:
        """What the endpoint returns: a dict (JSON) or a string; raises _Refusal or _Gone."""
        if path == "/generate":
            return self._generate(body, peer)
        if path == "/update_weights_from_disk":
            return self._update(body, peer, keep=any(f.kind == "keep_weights" for f in faults))
        simple: dict[str, Callable[[], Any]] = {
            "/health": lambda: "",
            "/health_generate": lambda: "",
            "/model_info": self._model_info,
            "/server_info": self._server_info,
            "/v1/models": self._models,
            "/abort_request": lambda: self._abort(body),
            "/pause_generation": lambda: self._pause(body, peer),
            "/continue_generation": self._continue,
            "/flush_cache": lambda: self._flush(float(query.get("timeout", 0)), peer),
        }
        if path not in simple:
            raise _Refusal(404, {"detail": "Not Found"})
        return simple[path]()

    @contextlib.contextmanager
    def alone(self, path: str) -> Iterator[None]:
        """Two updates at once end the process, as they end the real server's."""
        if path != "/update_weights_from_disk":
            yield
            return
        updates, update = self._updates, object()
        with self._changed:
            updates.append(update)
        try:
            if len(updates) > 1:
                self.stop()
                raise _Gone
            yield
        finally:
            updates.remove(update)

    def authorised(self, path: str, header: str | None) -> bool:
        return (
            not self._api_key or path.startswith("/health") or header == f"Bearer {self._api_key}"
        )

    def wait(
        self, ready: Callable[[], bool], peer: _Peer | None, seconds: float | None = None
    ) -> bool:
        """Until ready(), holding the condition; False after `seconds`, _Gone if anyone leaves."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not ready():
            if self._stopped or (peer is not None and peer.gone()):
                raise _Gone
            if deadline is not None and time.monotonic() >= deadline:
                return False
            self._changed.wait(0.02)
        return True

    def hang(self, peer: _Peer) -> None:
        """Until somebody leaves; then _Gone."""
        with self._changed:
            self.wait(lambda: False, peer)

    def pause_for(self, seconds: float, peer: _Peer | None) -> None:
        with self._changed:
            self.wait(lambda: False, peer, seconds)

    def edit(self, fault: Fault, answer: dict[str, Any]) -> None:
        assert fault.edit is not None
        fault.edit(answer, self._sampler.model)

    # --- endpoints

    def _generate(self, body: dict[str, Any], peer: _Peer) -> dict[str, Any]:
        generation = self._admit(body)
        with self._changed:
            try:
                # In the tokenizer's process: an abort sent now is lost, as in the real server.
                self.wait(lambda: self._paused is None, peer)
                self._running.append(generation)
                key = (body.get("extra_key"), *generation.prompt)
                if key in self._prefixes:
                    generation.cached = len(generation.prompt) - 1
                    start = body.get("logprob_start_len")
                    if body.get("return_logprob") and start is not None and start >= 0:
                        generation.cached = min(generation.cached, start)
                self._prefixes.add(key)
                while generation.finish is None:
                    self._step(generation, peer)
                return self._result(generation, body)
            finally:
                self._rids.discard(generation.rid)
                if generation in self._running:
                    self._running.remove(generation)
                self._changed.notify_all()

    def _admit(self, body: dict[str, Any]) -> _Generation:
        sampling = self._sampling(body.get("sampling_params") or {})
        prompt = body.get("input_ids")
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise _Refusal(400, {"error": {"message": "input_ids must be a list of integers"}})
        if not prompt:
            raise _Refusal(400, RECORDED["err_empty"]["response"])
        wanted = len(prompt) + sampling.max_new_tokens
        if len(prompt) >= self._context or wanted > self._context:
            message = (
                "Requested token count exceeds the model's maximum context length of "
                f"{self._context} tokens. You requested a total of {wanted} tokens."
            )
            raise _Refusal(400, {"error": {"message": message}})
        if not all(0 <= token < self._sampler.model.vocab_size for token in prompt):
            threading.Thread(target=self.stop).start()  # that kills the real one
            raise _Gone
        if body.get("return_routed_experts") and not self._routes:
            message = "The server is not configured to return routed experts."
            raise _Refusal(400, {"error": {"message": message}})
        if body.get("return_sampling_mask") and not 1 < sampling.top_k <= 4096:
            message = "return_sampling_mask requires a finite top_k in (1, 4096]."
            raise _Refusal(400, {"error": {"message": message}})
        with self._changed:
            rid = body.get("rid") or f"{len(self.requests):032x}"
            if rid in self._rids:
                message = f"Duplicate request ID detected: {rid}"
                raise _Refusal(400, {"error": {"message": message}})
            self._rids.add(rid)
        return _Generation(rid, prompt, sampling)

    def _sampling(self, params: dict[str, Any]) -> Sampling:
        legal = RECORDED["legal_sampling_fields"]
        unknown = next((name for name in params if name not in legal), None)
        if unknown is not None:
            expected = ", ".join(f"`{name}`" for name in legal)
            message = f"unknown field `{unknown}`, expected one of {expected}"
            raise _Refusal(400, {"error": message})
        fields = {field.name for field in dataclasses.fields(Sampling)}
        given = {n: v for n, v in params.items() if n in fields and v is not None}
        sampling = Sampling(**{**given, "stop_token_ids": tuple(given.get("stop_token_ids", ()))})
        if sampling.temperature < 0:
            message = (
                f"temperature must be a non-negative finite number, got {params['temperature']}."
            )
            raise _Refusal(400, {"error": {"message": message}})
        if not self._deterministic:
            with self._changed:
                self._unseeded += 1
                return dataclasses.replace(sampling, sampling_seed=-self._unseeded)
        seed = 42 if sampling.sampling_seed is None else sampling.sampling_seed
        return dataclasses.replace(sampling, sampling_seed=seed)

    def _step(self, generation: _Generation, peer: _Peer) -> None:
        """Sample the next tokens, with the condition held before and after."""
        limit, done = generation.sampling.max_new_tokens, len(generation.sampled)

        def may_go() -> bool:
            generation.held = self._limit is not None and done >= self._limit
            if generation.held:
                self._changed.notify_all()
            return generation.finish is not None or (self._paused is None and not generation.held)

        self.wait(may_go, peer)
        if generation.finish is not None:
            return
        if self._limit is not None:
            limit = min(limit, self._limit)
        weights, label = self._weights, self._label
        self._stepping += 1
        self._changed.release()
        try:
            time.sleep(self._token_seconds)
            sampled = self._sampler.extend(
                weights, generation.tokens, generation.sampling, min(self._chunk, limit - done)
            )
        finally:
            self._changed.acquire()
            self._stepping -= 1
            self._changed.notify_all()
        if generation.finish is None:
            generation.take(sampled, weights, label)

    def _result(self, generation: _Generation, body: dict[str, Any]) -> dict[str, Any]:
        """The answer, with the keys of the recorded one in their order."""
        sampled, tokens, prompt = generation.sampled, generation.tokens, generation.prompt
        ids = [token for token, _, _ in sampled]
        assert generation.finish is not None
        recorded = RECORDED["basic"]["response"]["meta_info"]
        meta: dict[str, Any] = {
            "id": generation.rid,
            "finish_reason": generation.finish,
            "prompt_tokens": len(prompt),
            "weight_version": self._reported,
            "num_retractions": generation.retractions,
        }
        if body.get("return_logprob"):
            meta["input_token_logprobs"] = self._input_logprobs(generation, body)
            meta["output_token_logprobs"] = [
                [logprob, token, None] for token, logprob, _ in sampled
            ]
            meta["output_token_logprobs_length"] = len(sampled)
        if body.get("return_sampling_mask"):
            meta["output_token_sampling_mask"] = [[token] for token in ids]
            meta["output_token_sampling_logprobs"] = [kept for _, _, kept in sampled]
            meta["output_token_sampling_mask_length"] = len(sampled)
        meta["reasoning_tokens"] = 0
        meta["completion_tokens"] = len(sampled)
        meta["cached_tokens"] = generation.cached
        ends = [*(start for _, start in generation.spans[1:]), len(sampled)]
        meta["weight_versions"] = [
            {"version": label, "start": start, "end": end}
            for (label, start), end in zip(generation.spans, ends, strict=True)
        ]
        details = {"device": generation.cached, "host": 0}
        meta["cached_tokens_details"] = details if generation.cached else None
        if body.get("return_routed_experts") and generation.rows:
            first = [start for _, start in generation.rows] + [len(tokens) - 1]
            parts = [
                self._sampler.routes(weights, tokens[:-1])[start:end]
                for (weights, start), end in zip(generation.rows, first[1:], strict=True)
            ]
            rows = np.concatenate(parts)[body.get("routed_experts_start_len") or 0 :]
            meta["routed_experts"] = encode_routes(rows)
        meta["dp_rank"] = None
        # Times are the recorded ones: an answer is a function of its request.
        meta |= {name: value for name, value in recorded.items() if name not in _NOT_TIMES}
        stopped = generation.finish["type"] == "stop"
        text = " ".join(map(str, ids[:-1] if stopped else ids))
        return {"text": text, "output_ids": ids, "meta_info": meta}

    def _input_logprobs(self, generation: _Generation, body: dict[str, Any]) -> list[list[Any]]:
        start, prompt = body.get("logprob_start_len"), generation.prompt
        if start is None or start < 0:
            return []
        weights = generation.rows[0][0] if generation.rows else self._weights
        values = [None, *self._sampler.score(weights, prompt, 1.0).tolist()]
        values[start] = None
        return [
            [value, token, None]
            for value, token in zip(values[start:], prompt[start:], strict=True)
        ]

    def _update(self, body: dict[str, Any], peer: _Peer, *, keep: bool) -> dict[str, Any]:
        with self._changed:
            if body.get("abort_all_requests"):
                self._abort_running()
            if self._paused is None:
                self.wait(lambda: not self._running, peer)
            try:
                weights = self._sampler.load(body["model_path"])
            except (ValueError, OSError, KeyError) as error:
                failed = {"success": False, "message": f"Failed to get weights iterator: {error}."}
                raise _Refusal(400, {**failed, "num_paused_requests": 0}) from error
            self._weights = self._weights if keep else weights
            label = body.get("weight_version")
            self._label = self._label if label is None else label
            if body.get("flush_cache", True) and not self._flush_now():
                # Spans know the new label by now, /model_info does not.
                refused = {"success": False, "message": NOT_FLUSHED, "num_paused_requests": 0}
                raise _Refusal(400, refused)
            self._reported, self._path = self._label, body["model_path"]
            message = "Succeeded to update model weights."
            if label is not None:
                message += f" Weight version updated to {label}."
            return {"success": True, "message": message, "num_paused_requests": 0}

    def _pause(self, body: dict[str, Any], peer: _Peer) -> dict[str, Any]:
        mode = (body or {}).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise _Refusal(400, {"error": {"message": f"mode is {mode!r}"}})
        with self._changed:
            self._paused = mode
            self.wait(lambda: self._stepping == 0, peer)
            if mode == "abort":
                self._abort_running()
                self.wait(lambda: not self._running, peer)
            if mode == "retract":
                for generation in self._running:
                    generation.retracted = True
                    generation.retractions += 1
            return dict(RECORDED["pause_abort"]["response"])

    def _continue(self) -> dict[str, Any]:
        with self._changed:
            self._paused = None
            self._changed.notify_all()
            return dict(RECORDED["continue_abort"]["response"])

    def _abort(self, body: dict[str, Any]) -> str:
        with self._changed:
            if body.get("abort_all"):
                self._abort_running()
            for generation in self._running:
                if generation.rid == body.get("rid"):
                    generation.finish = ABORTED
            self._changed.notify_all()
        return ""

    def _abort_running(self) -> None:
        for generation in self._running:
            generation.finish = generation.finish or ABORTED
        self._changed.notify_all()

    def _flush(self, seconds: float, peer: _Peer) -> str:
        with self._changed:
            if not self.wait(self._flush_now, peer, seconds):
                raise _Refusal(400, NOT_FLUSHED_NOW)
            return str(FLUSHED)

    def _flush_now(self) -> bool:
        idle = all(generation.retracted for generation in self._running)
        if idle:
            self._prefixes.clear()
        return idle

    def _model_info(self) -> dict[str, Any]:
        own = {"model_path": self._path, "served_model_name": self._path}
        own |= {"tokenizer_path": self._path, "weight_version": self._reported}
        return self._override(RECORDED["model_info"]["response"] | own)

    def _server_info(self) -> dict[str, Any]:
        own = {
            "port": self._port,
            "api_key": self._api_key or None,
            "enable_return_routed_experts": self._routes,
            "enable_deterministic_inference": self._deterministic,
            "max_req_input_len": self._context - 6,
        }
        return self._override(RECORDED["server_info"]["response"] | own)

    def _models(self) -> dict[str, Any]:
        card = RECORDED["models"]["response"]["data"][0] | {"max_model_len": self._context}
        return {"object": "list", "data": [card]}

    def _override(self, answer: dict[str, Any]) -> dict[str, Any]:
        return answer | {name: v for name, v in self._info.items() if name in answer}

    def _await(self, ready: Callable[[], bool], what: str) -> None:
        with self._changed:
            if not self._changed.wait_for(ready, PATIENCE):
                raise TimeoutError(f"no {what} within {PATIENCE} seconds")


_NOT_TIMES = {
    "id",
    "finish_reason",
    "prompt_tokens",
    "weight_version",
    "num_retractions",
    "input_token_logprobs",
    "output_token_logprobs",
    "output_token_logprobs_length",
    "reasoning_tokens",
    "completion_tokens",
    "cached_tokens",
    "weight_versions",
    "cached_tokens_details",
    "routed_experts",
    "dp_rank",
}


# --- HTTP --------------------------------------------------------------------------------------


class _HttpServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections break here on purpose, on both sides: only other errors are told."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _reset(connection: socket.socket) -> None:
    """Close at once, as the kernel does for a killed process."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)


@dataclasses.dataclass(frozen=True)
class _Peer:
    connection: socket.socket

    def gone(self) -> bool:
        """Whether the client has closed its end."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, *args: Any, server_state: FakeServer) -> None:
        self._state = server_state
        super().__init__(*args)

    def do_GET(self) -> None:
        self._serve(None)

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._serve(json.loads(text) if text else None)

    def log_message(self, *_: object) -> None:
        """Silence."""

    def _serve(self, body: Any) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        try:
            if not self._state.authorised(url.path, self.headers.get("Authorization")):
                raise _Refusal(401, {"error": "Unauthorized"})
            faults = self._state.receive(url.path, body)
            with self._state.alone(url.path):
                for fault in self._before(faults):
                    raise _Refusal(fault.status, {"error": {"message": "a scripted fault"}})
                answer = self._state.answer(url.path, query, body, faults, _Peer(self.connection))
            for fault in faults:
                if fault.kind == "edit":
                    self._state.edit(fault, answer)
            kinds = {fault.kind for fault in faults}
            self._send(200, answer, cut="cut" in kinds, truncate="truncate" in kinds)
        except _Refusal as refusal:
            self._send(refusal.status, refusal.body)
        except _Gone:
            self.close_connection = True
            _reset(self.connection)

    def _before(self, faults: list[Fault]) -> Iterator[Fault]:
        """Let the faults happen that come before an answer; yields those that replace it."""
        peer = _Peer(self.connection)
        for fault in faults:
            if fault.kind == "hang":
                self._state.hang(peer)
            elif fault.kind == "delay":
                # The real server loads weights to the end, whoever still waits.
                loads = fault.path == "/update_weights_from_disk"
                self._state.pause_for(fault.seconds, None if loads else peer)
            elif fault.kind == "drop":
                raise _Gone
            elif fault.kind == "status":
                yield fault

    def _send(self, status: int, answer: Any, *, cut: bool = False, truncate: bool = False) -> None:
        is_text = isinstance(answer, str)
        data = answer.encode() if is_text else json.dumps(answer).encode()
        data = data[: len(data) // 2] if truncate else data
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if is_text else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            raise _Gone
