"""A server's answer to a request, bytes as they came, becomes an outcome.

What it is: the sorting of what wire.py found into what may be asked again and what may not. What it
is not: the checks themselves (wire.py, routes.py).
"""

from __future__ import annotations

from jaxrl_llm.rollout import wire
from jaxrl_llm.rollout.client import as_object
from jaxrl_llm.rollout.engine import EngineFailure, FailureCause, Request
from jaxrl_llm.types import Rollout, RouteError


def read(
    content: bytes, url: str, request: Request, contract: wire.Contract
) -> Rollout | EngineFailure | None:
    """What an answer to a request says; None if the generation was aborted.

    Raises ServerError("bad_answer") for what is no JSON: it was broken on the way.
    """
    value = as_object(content, url)
    try:
        return None if wire.is_abort(value) else wire.parse(value, request, contract)
    except wire.BadAnswer as error:
        return failure(request, error.cause, f"{url}: {error}")
    except RouteError as error:
        return failure(request, "bad_routes", f"{url}: {error}")


def failure(request: Request, cause: FailureCause, message: str) -> EngineFailure:
    """The failure of this request."""
    return EngineFailure(request.prompt.prompt_id, request.sample_index, cause, message)
