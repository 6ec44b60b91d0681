"""Whether a server can serve a run: asked once, before anything is sampled.

What it is: the settings of a server that the learner could not score, or that would fail hours
later. What it is not: health, which is asked all the time (servers.py). Names and meanings are
those of sglang 0.5.23; only the fields named here are read, since the server's full account of
itself holds its API key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

from jaxrl_llm.rollout.client import ServerError
from jaxrl_llm.rollout.engine import EngineError
from jaxrl_llm.rollout.servers import Pool, Server

KNOWN_VERSION = "0.5.23"

RESERVED_TOKENS = 4
"""Tokens by which /server_info's max_req_input_len is below the longest prompt plus response.

sglang takes 5 off for a prompt (tp_worker.py) and 1 off for a response (scheduler.py).
"""

# Settings that must be off, and why. A server that has no such setting has it off.
OFF: dict[str, str] = {
    "speculative_algorithm": "reported log-probabilities and routes may be those of a draft",
    "enable_watermark": "it changes the sampled distribution, not the reported one",
    "enable_hierarchical_cache": "a prefix that comes back from host memory may bring stale routes",
    "disaggregation_mode": "a weight update reaches one half of it",
    "allow_auto_truncate": "it would cut prompts and say nothing",
}


async def inspect(pool: Pool, *, routes: bool, max_length: int) -> None:
    """Ask every server; note what is only worth knowing.

    Takes at most 4 health_seconds. Raises EngineError naming every unfit server and why.
    """
    asked = (_inspect(pool, server, routes, max_length) for server in pool.servers)
    problems = [problem for found in await asyncio.gather(*asked) for problem in found]
    if problems:
        raise EngineError("not fit to sample this run: " + "; ".join(problems))


async def _inspect(pool: Pool, server: Server, routes: bool, max_length: int) -> list[str]:
    """The problems of one server, each with its URL."""
    try:
        await pool.wake(server)
        model = await pool.facts(server, "/model_info")
        settings = await pool.facts(server, "/server_info")
    except ServerError as error:
        return [str(error)]
    missing = {"enable_return_routed_experts", "max_req_input_len"} - set(settings)
    if missing:
        return [
            f"{server.url} does not say {sorted(missing)} in /server_info; it is no SGLang server, "
            f"or not like {KNOWN_VERSION}"
        ]
    if settings.get("version") != KNOWN_VERSION:
        found = settings.get("version")
        pool.notes.event(f"{server.url} is sglang {found}; this client knows {KNOWN_VERSION}")
    if not settings.get("enable_deterministic_inference"):
        pool.notes.event(
            f"{server.url} was started without --enable-deterministic-inference: it ignores seeds, "
            "so a repeated request is another sample"
        )
    found = _problems(model, settings, routes=routes, max_length=max_length)
    return [f"{server.url} {problem}" for problem in found]


def _problems(
    model: Mapping[str, Any], settings: Mapping[str, Any], *, routes: bool, max_length: int
) -> Iterator[str]:
    if model.get("is_generation") is not True:
        yield "serves no model that generates"
    if model.get("preferred_sampling_params"):
        yield (
            f"has preferred_sampling_params, {model['preferred_sampling_params']}, which change "
            "what is sampled; start it without"
        )
    if routes and settings["enable_return_routed_experts"] is not True:
        yield (
            "was not started with --enable-return-routed-experts, and this run replays the "
            "sampler's routes"
        )
    longest = settings["max_req_input_len"] + RESERVED_TOKENS
    if longest < max_length:
        yield (
            f"takes at most {longest} tokens of prompt and response, sglang.max_length is "
            f"{max_length}; start it with a longer context or more memory for tokens, or lower "
            "sglang.max_length"
        )
    for name, why in OFF.items():
        if settings.get(name) not in (None, False, "null"):
            yield f"was started with {name} {settings[name]!r}: {why}; start it without"
