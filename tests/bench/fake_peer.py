"""A peer in numpy that knows one thing: the loss of a model that is sure of nothing."""

import json
from pathlib import Path

import numpy as np


def name() -> str:
    return "a fake"


def make_step(folder: Path, tokens: np.ndarray, *, dtype: str, learning_rate: float):
    assert (dtype, learning_rate > 0, tokens.dtype) == ("float32", True, np.int32)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    return lambda: float(np.log(vocabulary))


def make_generate(folder: Path, prompts: np.ndarray, new_tokens: int):
    assert (folder / "config.json").is_file()

    def generate() -> np.ndarray:
        return np.pad(prompts, ((0, 0), (0, new_tokens)))

    return {"only mode": generate}
