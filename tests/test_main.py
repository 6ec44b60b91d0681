"""The command line as a user meets it: in a process of its own, with signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxrl_llm.main import INTERRUPTED, main
from tests.test_loop import logged

CONFIG = """
from pathlib import Path
from tests.tiny import tiny_config, vary

def get_config():
    return vary(tiny_config(Path({run_dir!r})), "checkpoint", every={every})
"""
ROOT = Path(__file__).parent.parent


def write_config(folder: Path, name: str, *, every: int = 2) -> tuple[Path, Path]:
    """A config file and the run directory it names."""
    path, run_dir = folder / f"{name}.py", folder / name
    path.write_text(CONFIG.format(run_dir=str(run_dir), every=every))
    return path, run_dir


def start(path: Path) -> subprocess.Popen[str]:
    """`jaxrl-llm train path` in the background."""
    command = [
        sys.executable,
        "-c",
        "import sys; from jaxrl_llm.main import main; sys.exit(main())",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "train", str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_lines(process: subprocess.Popen[str], run_dir: Path, count: int) -> None:
    """Until the run has logged so many records; the test fails if the process ends before."""
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("main")


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, str]:
    """The run directory of a whole run, and what it printed."""
    path, run_dir = write_config(folder, "finished")
    process = start(path)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return run_dir, output


def test_a_run_prints_its_outcome_and_writes_a_report(finished: tuple[Path, str]) -> None:
    run_dir, output = finished
    assert "held-out accuracy, sampled" in output
    report = run_dir / "report" / "index.html"
    assert "report/index.html" in output.replace("\n", "")
    assert report.stat().st_size > 10_000


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_costs_nothing(
    folder: Path, finished: tuple[Path, str], number: signal.Signals
) -> None:
    path, run_dir = write_config(folder, number.name)
    process = start(path)
    wait_for_lines(process, run_dir, 5)
    process.send_signal(number)
    output, _ = process.communicate()
    if number != signal.SIGKILL:
        assert process.returncode == INTERRUPTED
        assert "The same command goes on from here" in output
        saved = {int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit()}
        assert logged(run_dir)[-1]["step"] in saved
    again = start(path)
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert logged(run_dir) == logged(finished[0])


def test_eval_and_report_read_a_run(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = finished
    assert main(["eval", str(run_dir), "--samples", "3", "--prompts", "4"]) == 0
    printed = capsys.readouterr().out
    assert "eval/avg_at_k" in printed
    assert "step 7" in printed
    assert main(["report", str(run_dir)]) == 0


def test_errors_are_one_line_that_names_the_remedy(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(folder / "nowhere.py")]) == 1
    assert "is no file" in capsys.readouterr().err
    assert main(["eval", str(folder)]) == 1
    assert "config.json" in capsys.readouterr().err
    path, _ = write_config(folder, "contradiction")
    with pytest.raises(SystemExit):
        main(["train", str(path), "--learner.replay", "r2", "--learner.mini-batches", "1"])
    assert "replay r2 changes nothing" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        main(["train", str(path), "--loss.clip.hihg", "1"])
    assert "--loss.clip.high" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from jaxrl_llm.main import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
        "heavy = {'jax', 'flax', 'numpy', 'orbax', 'tensorflow_datasets', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
    assert "usage: jaxrl-llm" in result.stdout
