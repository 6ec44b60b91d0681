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
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from tests.rollout.fake_faults import Fault
from tests.rollout.fake_http import Gone, Handler, HttpServer, Peer, Refusal, reset
from tests.rollout.fake_responses import RECORDED, Generation, response
from tests.rollout.fake_samplers import (
    DEFAULT_WEIGHTS,
    Sampler,
    Sampling,
)

PATIENCE = 30.0  # seconds a test waits for something to happen here before it fails
ABORTED = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
NOT_FLUSHED = (
    "Weights were updated, but the cache was not flushed because requests are still running or "
    "queued. Retract or finish them, then call /flush_cache."
)
FLUSHED = RECORDED["flush_cache_idle"]["response"]
NOT_FLUSHED_NOW = RECORDED["flush_cache_running"]["response"]


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
        info: dict[str, Any] | None = None,
    ) -> None:
        """Starts at once.

        Args:
          api_key: what clients must send as a bearer token; "" asks for none.
          deterministic: as with --enable-deterministic-inference; without it seeds are ignored.
          routes: as with --enable-return-routed-experts.
          context: the longest prompt and response together, in tokens.
          chunk: tokens sampled between two looks at pauses, aborts and hold().
          info: overrides fields of /server_info and /model_info.
        """
        self.requests: list[tuple[str, Any]] = []  # path, body: everything that ever came
        self._sampler = sampler
        self._api_key = api_key
        self._deterministic = deterministic
        self._routes = routes
        self._context = context
        self._chunk = chunk
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
        """No response gets further than this many sampled tokens; longer ones stop where they are.

        From the arrival of that call of /generate on, counted like `requests`; 0 is now.
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

    def only_held(self, count: int) -> bool:
        """Whether at least `count` responses are under way, and all are held."""
        with self._changed:
            return len(self._running) >= count and all(g.held for g in self._running)

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
            reset(connection)

    def restart(self, weights: str = DEFAULT_WEIGHTS, label: str = "default") -> None:
        """Start it (again) on the same port, with nothing but these weights."""
        self._weights = self._sampler.load(weights)
        self._path = weights
        self._label = self._reported = label  # of new tokens; in /model_info
        self._paused: str | None = None  # the mode
        self._limit: int | None = None
        self._hold_at: tuple[int, int] | None = None  # (call, tokens)
        self._running: list[Generation] = []
        self._rids: set[str] = set()
        self._stepping = 0
        self._updates: list[object] = []  # those that have begun
        self._prefixes: set[tuple[Any, ...]] = set()  # prompts in the cache
        self._stopped = False
        handler = functools.partial(Handler, server_state=self)
        self._http = HttpServer(("127.0.0.1", self._port), handler)
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
        self, path: str, query: dict[str, str], body: Any, faults: list[Fault], peer: Peer
    ) -> Any:
        """What the endpoint returns: a dict (JSON) or a string; raises Refusal or Gone."""
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
            raise Refusal(404, {"detail": "Not Found"})
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
                raise Gone
            yield
        finally:
            updates.remove(update)

    def authorised(self, path: str, header: str | None) -> bool:
        return (
            not self._api_key or path.startswith("/health") or header == f"Bearer {self._api_key}"
        )

    def wait(
        self, ready: Callable[[], bool], peer: Peer | None, seconds: float | None = None
    ) -> bool:
        """Until ready(), holding the condition; False after `seconds`, Gone if anyone leaves."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not ready():
            if self._stopped or (peer is not None and peer.gone()):
                raise Gone
            if deadline is not None and time.monotonic() >= deadline:
                return False
            self._changed.wait(0.02)
        return True

    def hang(self, peer: Peer) -> None:
        """Until somebody leaves; then Gone."""
        with self._changed:
            self.wait(lambda: False, peer)

    def pause_for(self, seconds: float, peer: Peer | None) -> None:
        with self._changed:
            self.wait(lambda: False, peer, seconds)

    def edit(self, fault: Fault, answer: dict[str, Any]) -> None:
        assert fault.edit is not None
        fault.edit(answer, self._sampler.model)

    # --- endpoints

    def _generate(self, body: dict[str, Any], peer: Peer) -> dict[str, Any]:
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
                return response(generation, body, self._sampler, self._reported)
            finally:
                self._rids.discard(generation.rid)
                if generation in self._running:
                    self._running.remove(generation)
                self._changed.notify_all()

    def _admit(self, body: dict[str, Any]) -> Generation:
        sampling = self._sampling(body.get("sampling_params") or {})
        prompt = body.get("input_ids")
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise Refusal(400, {"error": {"message": "input_ids must be a list of integers"}})
        if not prompt:
            raise Refusal(400, RECORDED["err_empty"]["response"])
        wanted = len(prompt) + sampling.max_new_tokens
        if len(prompt) >= self._context or wanted > self._context:
            message = (
                "Requested token count exceeds the model's maximum context length of "
                f"{self._context} tokens. You requested a total of {wanted} tokens."
            )
            raise Refusal(400, {"error": {"message": message}})
        if not all(0 <= token < self._sampler.model.vocab_size for token in prompt):
            threading.Thread(target=self.stop).start()  # that kills the real one
            raise Gone
        if body.get("return_routed_experts") and not self._routes:
            message = "The server is not configured to return routed experts."
            raise Refusal(400, {"error": {"message": message}})
        if body.get("return_sampling_mask") and not 1 < sampling.top_k <= 4096:
            message = "return_sampling_mask requires a finite top_k in (1, 4096]."
            raise Refusal(400, {"error": {"message": message}})
        with self._changed:
            rid = body.get("rid") or f"{len(self.requests):032x}"
            if rid in self._rids:
                message = f"Duplicate request ID detected: {rid}"
                raise Refusal(400, {"error": {"message": message}})
            self._rids.add(rid)
        return Generation(rid, prompt, sampling)

    def _sampling(self, params: dict[str, Any]) -> Sampling:
        legal = RECORDED["legal_sampling_fields"]
        unknown = next((name for name in params if name not in legal), None)
        if unknown is not None:
            expected = ", ".join(f"`{name}`" for name in legal)
            message = f"unknown field `{unknown}`, expected one of {expected}"
            raise Refusal(400, {"error": message})
        fields = {field.name for field in dataclasses.fields(Sampling)}
        given = {n: v for n, v in params.items() if n in fields and v is not None}
        sampling = Sampling(**{**given, "stop_token_ids": tuple(given.get("stop_token_ids", ()))})
        if sampling.temperature < 0:
            message = (
                f"temperature must be a non-negative finite number, got {params['temperature']}."
            )
            raise Refusal(400, {"error": {"message": message}})
        if not self._deterministic:
            with self._changed:
                self._unseeded += 1
                return dataclasses.replace(sampling, sampling_seed=-self._unseeded)
        seed = 42 if sampling.sampling_seed is None else sampling.sampling_seed
        return dataclasses.replace(sampling, sampling_seed=seed)

    def _step(self, generation: Generation, peer: Peer) -> None:
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
            sampled = self._sampler.extend(
                weights, generation.tokens, generation.sampling, min(self._chunk, limit - done)
            )
        finally:
            self._changed.acquire()
            self._stepping -= 1
            self._changed.notify_all()
        if generation.finish is None:
            generation.take(sampled, weights, label)

    def _update(self, body: dict[str, Any], peer: Peer, *, keep: bool) -> dict[str, Any]:
        with self._changed:
            if body.get("abort_all_requests"):
                self._abort_running()
            if self._paused is None:
                self.wait(lambda: not self._running, peer)
            try:
                weights = self._sampler.load(body["model_path"])
            except (ValueError, OSError, KeyError) as error:
                failed = {"success": False, "message": f"Failed to get weights iterator: {error}."}
                raise Refusal(400, {**failed, "num_paused_requests": 0}) from error
            self._weights = self._weights if keep else weights
            label = body.get("weight_version")
            self._label = self._label if label is None else label
            if body.get("flush_cache", True) and not self._flush_now():
                # Spans know the new label by now, /model_info does not.
                refused = {"success": False, "message": NOT_FLUSHED, "num_paused_requests": 0}
                raise Refusal(400, refused)
            self._reported, self._path = self._label, body["model_path"]
            message = "Succeeded to update model weights."
            if label is not None:
                message += f" Weight version updated to {label}."
            return {"success": True, "message": message, "num_paused_requests": 0}

    def _pause(self, body: dict[str, Any], peer: Peer) -> dict[str, Any]:
        mode = (body or {}).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise Refusal(400, {"error": {"message": f"mode is {mode!r}"}})
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

    def _flush(self, seconds: float, peer: Peer) -> str:
        with self._changed:
            if not self.wait(self._flush_now, peer, seconds):
                raise Refusal(400, NOT_FLUSHED_NOW)
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
