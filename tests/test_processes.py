"""Two processes with four CPU devices each, on this machine: values, runs, checkpoints, a loss."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.config import to_json
from jaxrl_llm.sharding import MeshConfig
from tests.rollout.fake_faults import Fault
from tests.rollout.fake_samplers import ModelSampler
from tests.rollout.fake_sglang import FakeServer
from tests.rollout.sglang_engines import sampling_bodies
from tests.sglang_runs import checkpoints, served
from tests.tiny import tiny_config, vary

ROOT = Path(__file__).parent.parent
TRAIN = "import sys; from jaxrl_llm.main import main; sys.exit(main())"
SHORT = (
    *("--cold-start.steps", "21", "--steps", "3", "--checkpoint.every", "1"),
    *("--evaluation.prompts", "16", "--evaluation.every", "0"),
    *("--rollout.groups", "16"),
    # In fp8 the last digit of an update, which several processes add up in another order, may
    # round a weight of the engine to its neighbour, 6 % away.
    *("--rollout.engine.precision", "float32"),
)
MESH = ("--learner.mesh.expert", "8")  # tokens travel between the processes, and parameters
UPDATE = "/update_weights_from_disk"
LEAVING = 150  # seconds in which a process must end after another one was lost


def start(command: Sequence[str], folder: Path, *, together: bool) -> list[subprocess.Popen[bytes]]:
    """The command in two processes of one job, the first one first; or in a single process."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4" if together else "8"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("PJRT_NPROC", None)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for index in range(2 if together else 1):
        names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        own = environment | (names | {"JAX_PROCESS_ID": str(index)} if together else {})
        with (folder / f"output_{index}.txt").open("ab") as output:
            arguments = [sys.executable, *command]
            started.append(
                subprocess.Popen(arguments, cwd=ROOT, env=own, stdout=output, stderr=output)
            )
    return started


def train(folder: Path, mesh: Sequence[str], *, together: bool) -> list[subprocess.Popen[bytes]]:
    """The quickstart's first steps."""
    more = ("--multihost",) if together else ()
    command = ("-c", TRAIN, "train", "configs/quickstart.py", *more, *SHORT, *mesh)
    return start((*command, "--run-dir", str(folder / "run")), folder, together=together)


def statuses(started: list[subprocess.Popen[bytes]], seconds: float = 300) -> list[int]:
    """The exit statuses; none may still run after so long."""
    end = time.monotonic() + seconds
    try:
        return [process.wait(max(end - time.monotonic(), 1)) for process in started]
    finally:
        for process in started:
            process.kill()


def output(folder: Path) -> str:
    """What the processes printed."""
    return "".join(path.read_text(errors="replace") for path in sorted(folder.glob("output_*")))


def records(folder: Path) -> list[dict[str, object]]:
    """The run's metrics.jsonl so far."""
    path = folder / "run/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_for(folder: Path, count: int, started: list[subprocess.Popen[bytes]]) -> None:
    """Until the run has so many records."""
    end = time.monotonic() + 300
    while len(records(folder)) < count:
        assert all(process.poll() is None for process in started), output(folder)
        assert time.monotonic() < end, output(folder)
        time.sleep(0.05)


def assert_same_run(found: Path, wanted: Path) -> None:
    """The same records with the same metrics, to rounding."""
    left, right = records(found), records(wanted)
    assert [(r["phase"], r["step"]) for r in left] == [(r["phase"], r["step"]) for r in right]
    for one, other in zip(left, right, strict=True):
        assert one["metrics"].keys() == other["metrics"].keys()  # type: ignore[attr-defined]
        for name, value in other["metrics"].items():  # type: ignore[attr-defined]
            got = one["metrics"][name]  # type: ignore[index]
            where = f"{name} of {other['phase']} step {other['step']}"
            np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5, err_msg=where)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with all eight devices."""
    folder = tmp_path_factory.mktemp("alone")
    assert statuses(train(folder, MESH, together=False)) == [0], output(folder)
    return folder


def test_processes_exchange_values_errors_and_arrays(tmp_path: Path) -> None:
    started = start(("-m", "tests.two_processes"), tmp_path, together=True)
    assert statuses(started, 120) == [0, 0], output(tmp_path)
    assert output(tmp_path).count("all checked") == 2


def test_two_processes_run_as_one_does(alone: Path, tmp_path: Path) -> None:
    assert statuses(train(tmp_path, MESH, together=True)) == [0, 0], output(tmp_path)
    assert_same_run(tmp_path, alone)
    # The first one alone shows anything, and writes the log and the report.
    for shown in ("Run directory:", "Report:"):
        assert shown in (tmp_path / "output_0.txt").read_text()
        assert shown not in (tmp_path / "output_1.txt").read_text()
    assert (tmp_path / "run/report/index.html").exists()


def test_a_stop_a_loss_and_another_mesh_change_nothing(alone: Path, tmp_path: Path) -> None:
    started = train(tmp_path, MESH, together=True)
    wait_for(tmp_path, 5, started)
    started[1].send_signal(signal.SIGTERM)  # a host that is to go; the others must hear of it
    assert statuses(started) == [130, 130], output(tmp_path)
    stopped = [int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()]
    assert max(stopped) == len(records(tmp_path)) < 21

    for lost, count in ((0, 9), (1, 23)):  # in the cold start, and after a step of RL
        started = train(tmp_path, MESH, together=True)
        wait_for(tmp_path, count, started)
        started[lost].kill()
        codes = statuses(started, LEAVING)
        assert codes[lost] == -signal.SIGKILL
        assert codes[1 - lost] not in (0, 130), output(tmp_path)

    other = ("--learner.mesh.data", "2", "--learner.mesh.expert", "2")
    assert statuses(train(tmp_path, other, together=False)) == [0], output(tmp_path)
    assert_same_run(tmp_path, alone)


def told(body: dict[str, Any]) -> str:
    """A request without the names that every sending of it has anew."""
    return json.dumps({k: v for k, v in body.items() if k not in ("rid", "extra_key")})


def test_the_first_process_alone_serves_weights_of_all(tmp_path: Path) -> None:
    """On a server: weights gathered piece by piece, and the probe scored, by both processes.

    The two are ended by a server that does not take the weights of a step, and go on.
    """
    folders = [tmp_path / name for name in ("one", "two")]
    asked = []
    for folder in folders:
        folder.mkdir()
        with FakeServer(
            ModelSampler(tiny_config(folder).model, max_length=48), context=48
        ) as server:
            config = vary(served(folder / "run", [server]), "learner", mesh=MeshConfig(fsdp=8))
            (folder / "config.json").write_text(json.dumps(to_json(config)))
            command = ("-m", "tests.sglang_runs", str(folder / "config.json"))
            if folder.name == "two":
                server.add(Fault(UPDATE, "keep_weights", calls=(2, 3)))
                assert statuses(start(command, folder, together=True)) == [1, 1], output(folder)
                for index in (0, 1):
                    said = (folder / f"output_{index}.txt").read_text()
                    assert "EngineError: version 1 (v1-" in said
                assert checkpoints(folder / "run")[-1] == records(folder)[-1]["step"]
            started = start(command, folder, together=folder.name == "two")
            assert set(statuses(started)) == {0}, output(folder)
            asked.append(Counter(map(told, sampling_bodies(server))))
    assert asked[0] == asked[1]
    assert_same_run(folders[1], folders[0])


def test_what_is_wrong_is_said_by_all(tmp_path: Path) -> None:
    """The folder is another run's: only the first looks, and every process ends with its words."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{")
    assert statuses(train(tmp_path, MESH, together=True)) == [1, 1], output(tmp_path)
    for index in (0, 1):
        said = (tmp_path / f"output_{index}.txt").read_text()
        assert re.search(r"^error: ValueError: .*config\.json", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("sys.argv += ['--seed', os.environ['JAX_PROCESS_ID']]", "settings.seed: 1 != 0"),
        ("os.chdir(os.environ['JAX_PROCESS_ID'])", "run_dir: run, where the first has made"),
    ],
    ids=["settings", "folder"],
)
def test_processes_that_are_not_alike_are_refused(own: str, message: str, tmp_path: Path) -> None:
    for index in (0, 1):
        (tmp_path / f"{index}").mkdir()
    enter = f"import os; os.chdir({str(tmp_path)!r}); {own}; "
    config = str(ROOT / "configs/quickstart.py")
    command = ("-c", f"import sys; {enter}{TRAIN}", "train", config, "--multihost", *MESH)
    assert statuses(start((*command, "--run-dir", "run"), tmp_path, together=True)) == [1, 1]
    said = [(tmp_path / f"output_{index}.txt").read_text() for index in (0, 1)]
    assert "error: ValueError: the processes of this job differ (not this one" in said[0]
    assert f"error: ValueError: the processes of this job differ ({message}" in said[1]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, "without JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "localhost:1",
                "JAX_NUM_PROCESSES": "two",
                "JAX_PROCESS_ID": "0",
            },
            "JAX_NUM_PROCESSES is 'two'",
        ),
    ],
)
def test_variables_that_name_no_process(variables: dict[str, str], message: str) -> None:
    command = [sys.executable, "-c", TRAIN, "train", "configs/quickstart.py", "--multihost"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert message in ended.stderr
