"""HTTP to a server: JSON in, bytes out, one deadline a call, failures as one exception.

What it is: the only place that touches httpx and the API key. What it is not: a judge of what an
answer means, or of the server that gave it (servers.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from typing import Any

import httpx

from jaxrl_llm.rollout.engine import FailureCause

# Answers that speak of the request: bad request, too large, cannot be processed. Any other error
# speaks of the server, an expired key (401) too.
REQUEST_STATUS = (400, 413, 422)

# Below the 5 s after which SGLang's HTTP server drops an idle connection: a request sent into a
# connection that is just being dropped would fail for nothing.
KEEPALIVE_SECONDS = 2.0

QUOTED_CHARACTERS = 300  # of a server's own words in a message


class ServerError(Exception):
    """A server did not do what it was asked. `cause` is for machines, the message for people."""

    def __init__(self, cause: FailureCause, message: str, *, answered: bool = True) -> None:
        """`answered` is False if it may still be at it: it gave no answer."""
        super().__init__(message)
        self.cause: FailureCause = cause
        self.answered = answered


class Client:
    """HTTP to the servers: JSON in, bytes out, and the API key in no message."""

    def __init__(self, api_key: str) -> None:
        """`api_key` is sent as a bearer token; "" sends none."""
        if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            # Not quoted: the key must not reach a log even when it is unusable.
            raise ValueError("the API key has spaces or characters that no HTTP header can carry")
        self._api_key = api_key
        for name in ("httpx", "httpcore"):  # they would log one line for each request
            logging.getLogger(name).setLevel(logging.WARNING)
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=None,  # call() has a deadline for the whole of it
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_SECONDS),
            verify=ssl.create_default_context(),  # the system's, or those of $SSL_CERT_FILE
            trust_env=False,  # rollout servers are not behind the proxy of the machine's browser
        )

    async def call(self, url: str, body: object = None, *, seconds: float) -> bytes:
        """POST `body` as JSON, or GET without one; the answer's bytes, within `seconds`.

        Raises ServerError: "timeout", "refused" (the request itself is wrong) or "unreachable" (no
        connection, or any other error status).
        """
        try:
            async with asyncio.timeout(seconds):
                if body is None:
                    answer = await self._http.get(url)
                else:
                    answer = await self._http.post(url, json=body)
        except TimeoutError:
            words = f"{url} gave no answer in {seconds:g} s"
            raise ServerError("timeout", words, answered=False) from None
        except httpx.HTTPError as error:
            words = f"{type(error).__name__} {self._quote(str(error))}".strip()
            raise ServerError("unreachable", f"{url}: {words}", answered=False) from None
        if answer.status_code == 200:
            return answer.content
        words = f"{url} answered {answer.status_code}: {self._quote(answer.text)}"
        if answer.status_code in (401, 403):
            words += "; is its API key in the environment variable that sglang.api_key_env names?"
        raise ServerError(
            "refused" if answer.status_code in REQUEST_STATUS else "unreachable", words
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    def _quote(self, text: str) -> str:
        """A server's words, short and without the API key that it may have echoed."""
        if self._api_key:
            text = text.replace(self._api_key, "<the API key>")
        return text[:QUOTED_CHARACTERS].strip()


def as_object(content: bytes, url: str) -> dict[str, Any]:
    """An answer that must be a JSON object; raises ServerError("bad_answer") if it is not."""
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ServerError("bad_answer", f"{url} sent no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ServerError("bad_answer", f"{url} sent {type(value).__name__}, no JSON object")
    return value
