"""transformers as the peer, in the server's environment: it computes what we compute."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.bench.workload import Trainee, make_setup, make_tokens, write_checkpoint
from tests.bench.sizes import MODEL

HERE = Path(__file__).parent
PROMPTS = (3, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peer")
    write_checkpoint(folder / "weights", make_setup(MODEL), max_length=32)
    np.save(folder / "tokens.npy", make_tokens(MODEL, 4, 17))
    np.save(folder / "prompts.npy", make_tokens(MODEL, *PROMPTS))
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, Any]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    venv = Path(os.environ.get("SGLANG_VENV") or cache / "jaxrl_llm" / "sglang_cpu")
    python = venv / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{venv} is not there; bash launch/sglang_cpu.sh --install makes it")
    command = [python, HERE / "run_peer.py", HERE / "transformers_peer.py", folder]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "peer.json").read_text())


def test_its_first_loss_is_ours(theirs: dict[str, Any]) -> None:
    setup = make_setup(MODEL)
    batch = setup.batch(make_tokens(MODEL, 4, 17))
    loss = float(Trainee(setup).advance(setup.sft_step(), batch)["learner/loss"].value())
    assert theirs["losses"][0] == pytest.approx(loss, abs=1e-4)
    assert loss != pytest.approx(np.log(MODEL.vocab_size), abs=1e-3)  # it is not just any loss


def test_its_steps_train(theirs: dict[str, Any]) -> None:
    assert sorted(theirs["losses"], reverse=True) == theirs["losses"]
    assert len(set(theirs["losses"])) == 3


def test_every_mode_makes_as_many_tokens_as_asked_for(theirs: dict[str, Any]) -> None:
    assert len(theirs["shapes"]) > 1
    assert set(map(tuple, theirs["shapes"].values())) == {(PROMPTS[0], PROMPTS[1] + 6)}
    assert theirs["prompts_kept"]


def test_it_says_what_it_is(theirs: dict[str, Any]) -> None:
    assert "transformers" in theirs["name"]
    assert "grouped_mm" in theirs["name"]
