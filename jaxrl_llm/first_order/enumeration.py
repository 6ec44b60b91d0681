"""Every response of a small policy, as one batch: expectations become sums over its rows.

What it is: the leaves of the tree of responses, under the alignment rule of types.py. A response
ends with the stop token or after `length` tokens. What it is not: probabilities; those come from a
forward pass over the rows (passes.py).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from jaxrl_llm.arrays import TrainBatch

MAX_RESPONSES = 100_000
"""Rows beyond this take minutes a gradient on a CPU."""

NO_TOKEN = -1
"""What fills a response up after its end."""


@dataclasses.dataclass(frozen=True)
class Enumeration:
    """All responses to some prompts; row b of the batch is responses[b]. Arrays are numpy."""

    batch: TrainBatch  # no routes; sampler_logprobs and advantages are 0
    prompt: np.ndarray  # i32[B], index of the row's prompt
    responses: np.ndarray  # i32[B, length], NO_TOKEN after the end
    stopped: np.ndarray  # bool[B], the response ends with the stop token

    @property
    def prompts(self) -> int:
        """Number of prompts; every expectation is their plain mean."""
        return int(self.prompt[-1]) + 1


def count_responses(vocab_size: int, length: int) -> int:
    """Responses of one prompt: (V - 1)^(l - 1) that stop at token l, and those that never do."""
    others = vocab_size - 1
    return sum(others ** (at - 1) for at in range(1, length + 1)) + others**length


def enumerate_responses(
    prompts: Sequence[Sequence[int]], *, vocab_size: int, length: int, stop_token: int
) -> Enumeration:
    """Every response of up to `length` tokens to every prompt.

    Args:
      prompts: token ids, at least one prompt of at least one token; lengths may differ.
      vocab_size: V, at least 2.
      length: most tokens of a response, at least 1.
      stop_token: ends a response and belongs to it.

    Returns:
      rows in the order of prompts; S is the longest prompt + length - 1.

    Raises:
      ValueError: for settings outside these bounds, or more than MAX_RESPONSES rows.
    """
    if vocab_size < 2 or length < 1 or not 0 <= stop_token < vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size}, length {length}, stop_token {stop_token}: a vocabulary of 2 "
            "or more with the stop token in it and a length of 1 or more are needed"
        )
    outside = [p for p in prompts if not p or min(p) < 0 or max(p) >= vocab_size]
    if outside or not prompts:
        raise ValueError(
            f"prompts {outside or list(prompts)}: give at least one, each of at least one token id "
            f"between 0 and {vocab_size - 1}"
        )
    per_prompt = count_responses(vocab_size, length)
    if per_prompt * len(prompts) > MAX_RESPONSES:
        raise ValueError(
            f"{len(prompts)} prompts x {per_prompt} responses (vocabulary {vocab_size}, length "
            f"{length}) are {len(prompts) * per_prompt} rows, more than {MAX_RESPONSES}; lower the "
            "length, the vocabulary or the prompts, or estimate from samples (monte_carlo.py)"
        )
    responses = _responses(vocab_size, length, stop_token)
    positions = max(map(len, prompts)) + length - 1
    parts = [_rows(np.asarray(prompt, np.int32), responses, positions) for prompt in prompts]
    fields = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    zeros = np.zeros(fields["inputs"].shape, np.float32)
    return Enumeration(
        TrainBatch(**fields, sampler_logprobs=zeros, advantages=zeros),  # type: ignore[arg-type]
        prompt=np.repeat(np.arange(len(prompts), dtype=np.int32), len(responses)),
        responses=np.tile(responses, (len(prompts), 1)),
        stopped=np.tile((responses == stop_token).any(axis=1), len(prompts)),
    )


def _responses(vocab_size: int, length: int, stop_token: int) -> np.ndarray:
    """i32[n, length]: those that stop, shortest first, then those that do not."""
    others = [token for token in range(vocab_size) if token != stop_token]
    ended = [
        (*before, stop_token, *[NO_TOKEN] * (length - at))
        for at in range(1, length + 1)
        for before in itertools.product(others, repeat=at - 1)
    ]
    return np.array([*ended, *itertools.product(others, repeat=length)], np.int32)


def _rows(prompt: np.ndarray, responses: np.ndarray, positions: int) -> dict[str, np.ndarray]:
    """The fields of TrainBatch that tokens alone decide, for one prompt."""
    count, length = responses.shape
    tokens = np.zeros((count, positions + 1), np.int32)
    tokens[:, : prompt.size] = prompt
    tokens[:, prompt.size : prompt.size + length] = np.maximum(responses, 0)
    passes = prompt.size - 1 + np.sum(responses != NO_TOKEN, axis=1, keepdims=True)
    index = np.broadcast_to(np.arange(positions, dtype=np.int32), (count, positions))
    real = index < passes
    return {
        "inputs": np.where(real, tokens[:, :-1], 0),
        "targets": np.where(real, tokens[:, 1:], 0),
        "positions": np.where(real, index, 0),
        "segment_ids": real.astype(np.int32),
        "staleness": np.zeros((count, positions), np.int32),
        "loss_mask": real & (index >= prompt.size - 1),
    }
