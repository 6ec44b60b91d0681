"""What can go wrong at the fake server: faults by kind, and edits of otherwise sound answers."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Collection
from typing import Any, Literal

import numpy as np

from jaxrl_llm.model.config import ModelConfig

EVERY = range(1, 2**31)
"""All calls of a path."""

Edit = Callable[[dict[str, Any], ModelConfig], None]
"""Changes an answer in place before it is sent."""

FaultKind = Literal[
    "status",  # answer `status` with an error body
    "hang",  # never answer
    "delay",  # wait `seconds`, then answer as usual
    "drop",  # close the connection without an answer
    "cut",  # close it in the middle of the answer
    "truncate",  # a complete HTTP answer whose JSON ends in the middle
    "edit",  # a well-formed answer changed by `edit`
    "keep_weights",  # /update_weights_from_disk: success and the new label, but the old weights
]


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong at the given calls of a path."""

    path: str
    kind: FaultKind
    calls: Collection[int] = EVERY  # from 1, counted since the fault was added
    status: int = 500
    seconds: float = 0.0
    edit: Edit | None = None


def _set_logprob(answer: dict[str, Any], value: float | None) -> None:
    answer["meta_info"]["output_token_logprobs"][-1][0] = value


def nan_logprob(answer: dict[str, Any], model: ModelConfig) -> None:
    """The last log-probability is NaN, which JSON spells as a bare NaN."""
    _set_logprob(answer, float("nan"))


def null_logprob(answer: dict[str, Any], model: ModelConfig) -> None:
    _set_logprob(answer, None)


def positive_logprob(answer: dict[str, Any], model: ModelConfig) -> None:
    _set_logprob(answer, 0.25)


def wrong_label(answer: dict[str, Any], model: ModelConfig) -> None:
    """The tokens come from weights that nobody published."""
    answer["meta_info"]["weight_version"] = "strange"
    answer["meta_info"]["weight_versions"][-1]["version"] = "strange"


def bad_token(answer: dict[str, Any], model: ModelConfig) -> None:
    answer["meta_info"]["output_token_logprobs"][-1][1] = model.vocab_size
    answer["output_ids"][-1] = model.vocab_size


def no_routes(answer: dict[str, Any], model: ModelConfig) -> None:
    """As behind a router that drops what it does not know."""
    answer["meta_info"].pop("routed_experts", None)


def _edit_routes(change: Callable[[np.ndarray, ModelConfig], np.ndarray]) -> Edit:
    def edit(answer: dict[str, Any], model: ModelConfig) -> None:
        ids = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), "<i4")
        rows = ids.reshape(-1, model.num_layers, model.moe.experts_per_token).copy()
        answer["meta_info"]["routed_experts"] = encode_routes(change(rows, model))

    return edit


def _out_of_range(rows: np.ndarray, model: ModelConfig) -> np.ndarray:
    rows[-1, model.moe_layer_indices[-1], 0] = model.moe.num_experts
    return rows


def _another_model(rows: np.ndarray, model: ModelConfig) -> np.ndarray:
    return np.concatenate([rows, rows[:, -1:]], axis=1)


too_few_rows = _edit_routes(lambda rows, model: rows[:-1])
too_many_rows = _edit_routes(lambda rows, model: np.concatenate([rows, rows[-1:]]))
expert_out_of_range = _edit_routes(_out_of_range)
other_layers = _edit_routes(_another_model)


def encode_routes(rows: np.ndarray) -> str:
    """base64 of little-endian int32, C order."""
    return base64.b64encode(np.ascontiguousarray(rows, "<i4").tobytes()).decode("ascii")
