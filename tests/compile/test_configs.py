"""The configs for TPU pods, compiled for them with two layers; in full: launch/compile_all.sh.

Layers are scanned: with more of them a program has the same instructions and a loop runs longer. So
this shows that each config can be laid over its pod and compiled, which collectives a layer has,
and that what does not grow with the layers fits. It does not show the memory of all layers, or of
gradients: those programs take minutes to compile.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxrl_llm.config import load_config

ROOT = Path(__file__).parent.parent.parent
COMMAND = "import sys; from jaxrl_llm.main import main; sys.exit(main())"
SCRIPT = (ROOT / "launch/compile_all.sh").read_text()
PODS = dict(re.findall(r"^(\w+) (v\w+:[\dx]+)$", SCRIPT, re.MULTILINE))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the command writes of each scoring pass; all are compiled at the same time."""
    folder = tmp_path_factory.mktemp("configs")
    running = {}
    for name, topology in PODS.items():
        flags = ["--topology", topology, "--programs", "score"]
        flags += ["--json", str(folder / name), "--model.num-layers", "2"]
        running[name] = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", COMMAND, "compile", f"configs/{name}.py", *flags],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    outputs = {name: process.communicate()[0] for name, process in running.items()}
    # Status 0: at least a tenth of the memory is free.
    assert all(process.returncode == 0 for process in running.values()), outputs
    found = {name: json.loads((folder / name).read_text()) for name in PODS}
    return {name: values["programs"][0] for name, values in found.items()}


def test_the_script_compiles_every_config_that_is_named_after_a_pod() -> None:
    named = {path.stem for path in (ROOT / "configs").glob("*_v[0-9]*_*.py")}
    assert set(PODS) == named


@pytest.mark.parametrize("name", PODS)
def test_it_computes_what_the_model_needs_and_waits_for_the_parameters_alone(
    name: str, programs: dict[str, dict[str, Any]]
) -> None:
    config, program = load_config(ROOT / "configs" / f"{name}.py"), programs[name]
    assert (program["rows"], program["length"]) == (config.responses, config.row_length)
    cost = program["cost"]
    assert cost["once"] == cost["unknown"] == []
    # The head, most of two layers, is multiplied twice, and attention computes whole blocks.
    assert 1 < program["repeated"] < 2
    sizes = {kind: traffic["size"] for kind, traffic in cost["collectives"].items()}
    assert set(sizes) <= {"all-gather", "all-reduce", "collective-permute"}
    # Parts of rows travel where devices share them; what is summed are metrics.
    assert ("collective-permute" in sizes) == (config.learner.mesh.context > 1)
    assert sizes["all-reduce"] < 1e-3 * sizes["all-gather"]


def test_parameters_are_gathered_and_gradients_scattered() -> None:
    """One mesh axis at a time: of all at once the TPU compiler makes sums of whole matrices."""
    pairs = [part for name, pod in PODS.items() for part in (f"configs/{name}.py", pod)]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.compile.gathered", *pairs],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for sizes in json.loads(result.stdout):
        assert set(sizes) == {"all-gather", "reduce-scatter"}
