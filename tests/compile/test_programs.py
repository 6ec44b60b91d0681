"""What is compiled is what the loop runs: the arguments of its steps, recorded, are the same."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxrl_llm import assembly, loop
from jaxrl_llm.assembly import initial_params
from jaxrl_llm.compile.programs import make_programs
from jaxrl_llm.config import ColdStartConfig, RunConfig
from jaxrl_llm.model import hf
from jaxrl_llm.model.transformer import Params
from jaxrl_llm.rollout.sglang import SGLangConfig
from jaxrl_llm.sharding import MeshConfig, make_layout
from tests.tiny import tiny_config, vary

ROOT = Path(__file__).parent.parent.parent


def described(arguments: Any) -> Any:
    """Arguments with the shape and type of every array; what is None stays so."""
    return jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", arguments)


class Trained(Exception):
    """The first update is reached; what it would compute is of no interest here."""


def ending(calls: list[Any]) -> Callable[..., Any]:
    """An update that notes its arguments and ends the run."""

    def update(*arguments: Any) -> Any:
        calls.append(described(arguments))
        raise Trained

    return update


def recording(step: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def called(*arguments: Any) -> Any:
        calls.append(described(arguments))
        return step(*arguments)

    return called


def one_step(run_dir: Path) -> RunConfig:
    """One RL step from random weights."""
    config = dataclasses.replace(tiny_config(run_dir), steps=1, cold_start=ColdStartConfig())
    config = vary(config, "evaluation", every=0)
    return vary(config, "learner", mesh=MeshConfig(data=2), micro_batch_rows=3)


def with_penalty(config: RunConfig) -> RunConfig:
    kl = dataclasses.replace(config.loss.kl, coefficient=0.1)
    return vary(vary(config, "loss", kl=kl), "learner", replay_gates=True, row_length=40)


def packed(config: RunConfig) -> RunConfig:
    return vary(config, "learner", pack=True, row_length=64, micro_batch_rows=1)


def without_score(config: RunConfig) -> RunConfig:
    return vary(config, "learner", old_logprobs="none", mini_batches=1, replay="none")


def replaying_its_own(config: RunConfig) -> RunConfig:
    return vary(config, "learner", replay="r2")


@pytest.mark.parametrize(
    ("change", "rows"),
    [(with_penalty, 0), (without_score, 0), (replaying_its_own, 0), (packed, 4)],
)
def test_the_programs_take_what_the_loop_gives_its_steps(
    change: Callable[[RunConfig], RunConfig],
    rows: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the rows of --rows: packed, the loop needs fewer than the eight responses."""
    config = change(one_step(tmp_path / "run"))
    steps = assembly.learner_steps
    trained: list[Any] = []
    scored: list[Any] = []
    monkeypatch.setattr(assembly, "update_step", lambda *parts: ending(trained))
    monkeypatch.setattr(
        assembly,
        "learner_steps",
        lambda *parts: dataclasses.replace(
            steps(*parts), score=recording(steps(*parts).score, scored)
        ),
    )
    with pytest.raises(Trained):
        list(loop.run(config))
    monkeypatch.undo()
    layout = make_layout(config.learner.mesh)
    programs = make_programs(config, layout, ("train", "score"), rows=rows)
    found = {program.name: described(program.arguments) for program in programs}
    assert [found["train"]] == trained
    if config.learner.old_logprobs == "none":
        assert list(found) == ["train"]
        assert not scored
    else:
        assert found["score"] == scored[0]


def test_servers_send_routes_only_if_they_are_replayed(tmp_path: Path) -> None:
    config = one_step(tmp_path)
    mesh = make_layout(config.learner.mesh)
    servers = dataclasses.replace(
        config.rollout, sglang=SGLangConfig(servers=("http://127.0.0.1:1",), max_length=64)
    )
    config = dataclasses.replace(config, rollout=servers)
    for replay, there in (("r3", True), ("none", False)):
        varied = vary(config, "learner", replay=replay)
        (score,) = make_programs(varied, mesh, ("score",))
        assert (score.arguments[1].routes is not None) == there


def test_rows_can_be_given_and_are_rounded_up_to_the_mesh(tmp_path: Path) -> None:
    config = one_step(tmp_path)
    mesh = make_layout(config.learner.mesh)
    (score,) = make_programs(config, mesh, ("score",), rows=7)
    assert score.rows == 12  # 3 at once for each of 2 devices
    assert score.arguments[1].routes.shape == (12, 27, 2, 2)
    with pytest.raises(ValueError, match="--rows is -1"):
        make_programs(config, mesh, ("score",), rows=-1)


def test_a_scoring_pass_that_there_is_none_of_is_refused_by_name(tmp_path: Path) -> None:
    config = without_score(one_step(tmp_path))
    with pytest.raises(ValueError, match=r"learner\.old_logprobs 'none'"):
        make_programs(config, make_layout(config.learner.mesh), ("score",))


def test_a_publish_gathers_the_largest_piece_for_servers(tmp_path: Path) -> None:
    """Of the very pieces that are written, each of which is whole on every device."""
    config = vary(one_step(tmp_path / "run"), "learner", mesh=MeshConfig(fsdp=4, tensor=2))
    sglang = SGLangConfig(servers=("http://localhost:1",))
    layout = make_layout(config.learner.mesh)
    (program,) = make_programs(vary(config, "rollout", sglang=sglang), layout, ("publish",))
    compiled = program.step.lower(*program.arguments).compile()
    params = initial_params(config, layout)
    asked = []

    def fetch(params: Params, piece: hf.Piece) -> jax.Array:
        asked.append(piece)
        return hf.fetch(params, piece)

    files = hf.tensors(params, config.model, "bfloat16", fetch)
    assert max(value.size for _, value in files) <= max(sizes(params, asked))
    assert asked == hf.pieces(config.model, "bfloat16")
    gathered = compiled(params)
    assert gathered.is_fully_replicated
    assert gathered.size == max(sizes(params, asked))
    assert gathered.dtype == "bfloat16"


def sizes(params: Params, pieces: list[hf.Piece]) -> list[int]:
    return [hf.fetch(params, piece).size for piece in pieces]


def test_a_publish_gathers_all_for_the_engine_in_this_process(tmp_path: Path) -> None:
    config = vary(one_step(tmp_path / "run"), "learner", mesh=MeshConfig(fsdp=8))
    layout = make_layout(config.learner.mesh)
    (program,) = make_programs(config, layout, ("publish",))
    params = initial_params(config, layout)
    assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
    gathered = program.step(params)
    assert jax.tree.structure(gathered) == jax.tree.structure(params)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(gathered))


LOWERED = """
import dataclasses, hashlib, pathlib
import tests.conftest  # eight devices
from jaxrl_llm.compile.programs import make_programs
from jaxrl_llm.sharding import MeshConfig, make_layout
from tests.tiny import tiny_config, vary
mesh = MeshConfig(fsdp=2, expert=2, tensor=2)
config = vary(tiny_config(pathlib.Path("unused")), "learner", mesh=mesh)
(train,) = make_programs(config, make_layout(mesh), ("train",))
text = train.step.lower(*train.arguments).as_text()
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_every_process_lowers_the_same_program() -> None:
    """Whatever the order of its sets; another program misses the compilation cache, and several
    processes that each have their own wait for each other for ever."""
    digests = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        ended = subprocess.run(
            [sys.executable, "-c", LOWERED],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        digests.append(ended.stdout)
    assert digests[0] == digests[1]
