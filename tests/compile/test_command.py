"""`jaxrl-llm compile` as a user meets it, with the real TPU compiler; in processes of its own."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxrl_llm.compile.chips import CHIPS
from jaxrl_llm.compile.programs import PROGRAMS, make_programs
from jaxrl_llm.main import DOES_NOT_FIT, Compile, main
from jaxrl_llm.sharding import make_layout
from tests.compile.small import LENGTH, ROWS, forward_flops, get_config, training_flops

ROOT = Path(__file__).parent.parent.parent
SMALL = Path(__file__).parent / "small.py"


def compile_small(*arguments: str) -> tuple[int, str]:
    """Exit status and output of the command on tests/compile/small.py; warnings are errors."""
    command = "import sys; from jaxrl_llm.main import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", command, "compile", str(SMALL), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, " ".join((result.stdout + result.stderr).split())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What the command prints and writes for four chips of v5e."""
    path = tmp_path_factory.mktemp("compile") / "small.json"
    status, output = compile_small("--topology", "v5e:2x2", "--json", str(path))
    assert status == 0, output
    return output, json.loads(path.read_text())


def test_arguments_are_the_shards_of_state_and_batch(
    compiled: tuple[str, dict[str, Any]],
) -> None:
    config = get_config()
    mesh = make_layout(config.learner.mesh)
    programs = make_programs(config, mesh, PROGRAMS)
    for program, found in zip(programs, compiled[1]["programs"], strict=True):
        expected = 0
        for leaf in jax.tree.leaves(program.arguments):
            # Rows of a batch are split over all four devices; parameters say it themselves.
            shape = leaf.shape
            if leaf.sharding is not None:
                shape = leaf.sharding.shard_shape(shape)
            parts = 4 if leaf.sharding is None else 1
            expected += math.prod(shape) * leaf.dtype.itemsize // parts
        memory = found["memory"]
        assert found["name"] == program.name
        # Small arrays are padded to whole tiles.
        assert expected <= memory["arguments"] <= 1.03 * expected
        parts = ("arguments", "outputs", "temporaries", "code")
        assert memory["total"] == sum(memory[part] for part in parts)
        assert memory["free_share"] == pytest.approx(1 - memory["total"] / CHIPS["v5e"].hbm)
    train, score, publish = (found["memory"] for found in compiled[1]["programs"])
    # The state is donated: its successor takes its place. A scoring pass leaves all as it was.
    assert train["donated"] > 0.99 * train["arguments"]
    assert train["outputs"] < 0.05 * train["donated"]
    assert score["donated"] == publish["donated"] == 0


def test_flops_are_those_of_a_hand_count(compiled: tuple[str, dict[str, Any]]) -> None:
    tokens = ROWS * LENGTH // 4
    train, score, publish = (found["cost"] for found in compiled[1]["programs"])
    assert score["flops"] == sum(forward_flops(tokens).values())
    assert train["flops"] == pytest.approx(training_flops(tokens, remat=True), rel=1e-4)
    assert publish["flops"] == 0
    for cost in (train, score, publish):
        assert cost["once"] == []
        assert cost["unknown"] == []


def test_collectives_gather_the_parameters_and_sum_the_gradient(
    compiled: tuple[str, dict[str, Any]],
) -> None:
    config = get_config()
    (train, _) = make_programs(config, make_layout(config.learner.mesh), ("train", "score"))
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(train.arguments[0].params))
    costs = [found["cost"]["collectives"] for found in compiled[1]["programs"]]
    for collectives in costs[:2]:
        moved = sum(collectives[kind]["size"] for kind in ("all-gather", "all-reduce"))
        # In float32; what both micro-batches need may be fetched once for both.
        assert moved > 4 * 0.9 * parameters
    # The in-process engine wants all of them on one device; nothing else travels.
    assert set(costs[2]) == {"all-gather"}
    assert costs[2]["all-gather"]["size"] > 4 * 0.9 * parameters
    # The gradients of the matrices are summed, each device keeping its slice.
    assert "reduce-scatter" not in costs[1]
    summed = sum(costs[0][kind]["size"] for kind in ("reduce-scatter", "all-reduce"))
    assert summed > 4 * 0.9 * parameters


def test_times_and_utilisation_follow_from_the_costs(
    compiled: tuple[str, dict[str, Any]],
) -> None:
    chip = CHIPS["v5e"]
    for found in compiled[1]["programs"][:2]:
        times, cost = found["times"], found["cost"]
        compute = cost["cycles"] / chip.clock + cost["rest"]
        assert times["compute"] == pytest.approx(compute)
        assert times["step"] == max(times["compute"], times["hidden"]) + times["waited"]
        assert times["step"] >= times["roofline"] >= cost["flops"] / chip.flops
        rate = found["model_flops"] / times["step"] / 4
        assert found["utilisation"] == pytest.approx(rate / chip.flops)
        # All eight experts for each token, where the model needs two.
        assert found["repeated"] == pytest.approx(4 * cost["flops"] / found["model_flops"])
        assert 2 < found["repeated"] < 4


def test_the_table_names_what_is_in_it(compiled: tuple[str, dict[str, Any]]) -> None:
    output, values = compiled
    assert (values["topology"], values["devices"]) == ("v5e:2x2", 4)
    for text in ("train", "score", "16 rows x 128", "free of 15.75 GiB", "all-gather", "MFU"):
        assert text in output


def test_a_program_that_does_not_fit_says_so_and_fails() -> None:
    rows = ("--programs", "score", "--rows", "8000000")
    status, output = compile_small("--topology", "v5e:2x2", *rows)
    assert status == DOES_NOT_FIT
    assert "score does not fit: RESOURCE_EXHAUSTED" in output


def test_too_little_free_memory_fails_and_settings_are_flags() -> None:
    flags = ("--programs", "score", "--free", "0.9999", "--learner.mesh.fsdp", "1")
    status, output = compile_small("--topology", "v6e:1x1", *flags)
    assert status == DOES_NOT_FIT
    assert "Less than 100% of memory is free in: score" in output
    assert "free of 31.25 GiB" in output


@pytest.mark.parametrize(
    ("topology", "flags", "message"),
    [
        ("v5p:3x5x7", (), "v5p:3x5x7', which the TPU compiler refuses"),
        ("v6e:2x4", (), "= 4 devices, and --topology v6e:2x4 has 8"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(
    topology: str, flags: tuple[str, ...], message: str
) -> None:
    status, output = compile_small("--topology", topology, *flags)
    assert status == 1
    assert message in output


def test_the_command_offers_the_programs_that_there_are() -> None:
    (offered,) = (field for field in dataclasses.fields(Compile) if field.name == "programs")
    assert offered.default == PROGRAMS


def test_errors_before_the_compiler_is_loaded_name_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["compile", "nowhere.py", "--topology", "v5e:2x2"]) == 1
    assert "nowhere.py is no file" in capsys.readouterr().err
    for topology in ("v9:2x2", "v5e", "v5e:0x2x", "v5e:2x2x2x2"):
        assert main(["compile", str(SMALL), "--topology", topology]) == 1
        assert "must be one of v4, v5e, v5p, v6e" in capsys.readouterr().err
    wrong = {
        ("--free", "1.5"): "--free is 1.5",
        ("--json", "nowhere/needs.json"): "nowhere is no folder",
    }
    for flags, message in wrong.items():
        assert main(["compile", str(SMALL), "--topology", "v5e:2x2", *flags]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert main(["compile", str(SMALL), "--topology", "v5e:2x2"]) == 1
    assert 'pip install "jaxrl-llm[tpu]"' in capsys.readouterr().err
