"""Runs a peer's file as bench does, in an environment that need not have ours.

    python run_peer.py PEER FOLDER

FOLDER/weights is a checkpoint, FOLDER/tokens.npy i32[B, S + 1], FOLDER/prompts.npy i32[R, P].
FOLDER/peer.json gets the losses of three steps, and the shape that each mode of generate returned.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np


def main(path: Path, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("peer", path)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    tokens, prompts = np.load(folder / "tokens.npy"), np.load(folder / "prompts.npy")
    step = peer.make_step(folder / "weights", tokens, dtype="float32", learning_rate=1e-3)
    losses = [step() for _ in range(3)]
    modes = peer.make_generate(folder / "weights", prompts, 6)
    answers = {name: generate() for name, generate in modes.items()}
    found = {
        "name": peer.name(),
        "losses": losses,
        "shapes": {name: answer.shape for name, answer in answers.items()},
        "prompts_kept": all(
            np.array_equal(answer[:, : prompts.shape[1]], prompts) for answer in answers.values()
        ),
    }
    (folder / "peer.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
