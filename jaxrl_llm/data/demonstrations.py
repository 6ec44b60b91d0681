"""Worked responses for the supervised cold start, right or with a share of mistakes in them.

What it is: from prompts to token sequences whose response part is to be learned. What it is not:
batches (collate.py) or the mistakes themselves (tasks.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxrl_llm.data.tasks import corrupt
from jaxrl_llm.data.tokenizer import Tokenizer
from jaxrl_llm.types import Prompt


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A prompt and a response to imitate, stop token included; see types.py for the alignment."""

    prompt_id: str
    tokens: np.ndarray  # i32[T]
    loss_mask: np.ndarray  # bool[S], True iff targets[s] belongs to the response


def make_demonstrations(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, *, corrupted_share: float, seed: int
) -> list[Demonstration]:
    """The prompts' demonstrations as tokens, a function of the arguments alone.

    corrupted_share: probability with which each scratch digit is replaced by a wrong one, drawn
      anew for every `seed` (pass another one every step); only the addition task can be corrupted.
    Raises ValueError, naming the prompt, where it has no demonstration or cannot be corrupted.
    """
    rng = np.random.default_rng(seed)
    made = []
    for prompt in prompts:
        if not prompt.demonstration:
            raise ValueError(
                f"prompt {prompt.prompt_id!r} has no demonstration; add one to its row, "
                "or switch the supervised cold start off"
            )
        text = prompt.demonstration
        if corrupted_share > 0:
            text = corrupt(prompt.text, rng, corrupted_share)
        response = [*tokenizer.encode(text), tokenizer.stop_token_ids[0]]
        tokens = np.concatenate([prompt.tokens, np.array(response, np.int32)])
        loss_mask = np.arange(tokens.size - 1) >= prompt.tokens.size - 1
        made.append(Demonstration(prompt.prompt_id, tokens, loss_mask))
    return made
