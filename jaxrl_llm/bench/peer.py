"""A peer: what a user would run instead of this, as a Python file with two functions.

The file may import what it likes; it is loaded in the process of a row, beside jax. Both of its
functions read a Hugging Face checkpoint that was written for them, so both sides compute with the
same weights. It should be the peer at its best: whatever its library has that is faster.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, cast

import numpy as np


class Peer(Protocol):
    """What the file defines."""

    def name(self) -> str:
        """Library, version and mode, for the table."""
        ...

    def make_step(
        self, folder: Path, tokens: np.ndarray, *, dtype: str, learning_rate: float
    ) -> Callable[[], float]:
        """A training step: forward, backward and AdamW; no clipping, no weight decay, no metrics.

        Args:
          folder: checkpoint, float32.
          tokens: i32[B, S + 1]; the mean cross entropy of tokens[:, 1:] is minimised.
          dtype: to compute in, "float32" or "bfloat16"; parameters and moments are float32.

        Returns:
          a function that makes one update and returns, when it is done, the loss before it, nats.
        """
        ...

    def make_generate(
        self, folder: Path, prompts: np.ndarray, new_tokens: int
    ) -> Mapping[str, Callable[[], np.ndarray]]:
        """Sampling at temperature 1 from all of the vocabulary, without an end of sequence.

        Args:
          folder: checkpoint, float32, which is the type to compute in.
          prompts: i32[R, P].
          new_tokens: of each response.

        Returns:
          name of a mode -> a function that samples new_tokens for all prompts together and
          returns prompts and responses, int[R, P + new_tokens]. The fastest mode counts.
        """
        ...


def load_peer(path: Path) -> Peer:
    """The functions of a peer's file."""
    spec = importlib.util.spec_from_file_location("jaxrl_llm_peer", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--peer is {path}, which is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(
            f'--peer {path} cannot be imported ({error}); pip install -e ".[bench]" installs what '
            "tests/bench/transformers_peer.py needs"
        ) from error
    missing = [name for name in ("name", "make_step", "make_generate") if not hasattr(module, name)]
    if missing:
        raise ValueError(f"--peer is {path}, which lacks {', '.join(missing)}; see bench/peer.py")
    return cast(Peer, module)
