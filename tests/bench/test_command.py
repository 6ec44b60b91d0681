"""The command: rows in processes of their own, failures among them, what it prints and writes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from jaxrl_llm.bench.command import FAILED, measure_row, run_bench
from jaxrl_llm.bench.config import BenchConfig
from jaxrl_llm.bench.isolation import additions, in_fresh_process
from jaxrl_llm.bench.peer import load_peer
from jaxrl_llm.main import main
from tests.bench.sizes import PEER, tiny

SIZES = [
    *("--repeats", "1", "--roof.product", "64", "--roof.copy-mib", "1"),
    *("--learner.model.width", "16", "--learner.model.num-layers", "1"),
    *("--learner.model.head-dim", "8", "--learner.model.vocab-size", "24"),
    *("--learner.model.moe.expert-width", "8", "--logprobs.vocabulary", "96"),
    *("--logprobs.positions", "512"),
]


def test_two_rows_and_one_that_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    written = tmp_path / "figures.json"
    rows = ["logprobs", "start", "publish"]
    nowhere = ["--train", str(tmp_path / "nowhere.py"), "--json", str(written)]
    assert main(["bench", *rows, *SIZES, *nowhere]) == FAILED
    printed = capfd.readouterr().out
    values = json.loads(written.read_text())
    assert [row["row"] for row in values["rows"]] == rows
    assert [bool(row["error"]) for row in values["rows"]] == [False, True, False]
    assert "nowhere.py, which is no file" in values["rows"][1]["error"]
    assert "ERROR ValueError" in printed
    assert "failed   start" in printed
    assert "to the engine, float32" in printed
    assert values["machine"]["cores"] >= 1
    assert values["machine"]["backend"] == "cpu"
    assert values["settings"]["logprobs"] == {"vocabulary": 96, "positions": 512}
    assert values["machine"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"  # the user's wish


def test_the_process_that_waits_imports_no_jax(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from jaxrl_llm.main import main\n"
        f"main(['bench', 'start', '--train', {str(tmp_path / 'nowhere.py')!r}])\n"
        "print('jax' in sys.modules)\n"
    )
    environment = {name: text for name, text in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert "GLIBC_TUNABLES glibc.malloc.hugetlb=1" in " ".join(done.stdout.split())


def die() -> None:
    os._exit(9)


def variable(name: str) -> str | None:
    return os.environ.get(name)


def sleep_for_ever(pid_file: Path) -> None:
    pid_file.write_text(str(os.getpid()))
    time.sleep(1000)


def test_a_row_does_not_outlive_the_command(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "from pathlib import Path\n"
        "from jaxrl_llm.bench.isolation import in_fresh_process\n"
        "from tests.bench.test_command import sleep_for_ever\n"
        f"in_fresh_process(sleep_for_ever, Path({str(pid_file)!r}))\n"
    )
    command = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not (pid_file.exists() and pid_file.read_text()):
        assert command.poll() is None
        time.sleep(0.01)
    command.kill()
    command.wait()
    while Path(f"/proc/{pid_file.read_text()}/cmdline").exists():  # the test's timeout ends this
        time.sleep(0.01)


def test_a_row_whose_process_dies_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> object:
        return in_fresh_process(die)

    monkeypatch.setattr("jaxrl_llm.bench.command.in_fresh_process", dies)
    result = measure_row("update", tiny())
    assert "killed" in result.error
    assert result.findings is None


def test_a_run_without_failures_succeeds_whatever_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jaxrl_llm.bench.command.additions", lambda *_: {})
    assert run_bench(tiny(rows=("slice",)), Console()) == 0
    assert "0 of 0 figures are what is wanted" in capsys.readouterr().out


def test_what_is_added_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    added = additions({})
    assert added["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in added
    monkeypatch.setattr("jaxrl_llm.bench.isolation._GPU", Path(__file__))
    assert additions({})["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    mine = {"GLIBC_TUNABLES": "", "JAX_PLATFORMS": "cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
    assert additions(mine) == {}
    monkeypatch.setenv("JAXRL_LLM_TEST", "here")
    assert in_fresh_process(variable, "JAXRL_LLM_TEST") == "here"


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for settings in (
        {"repeats": 0},
        {"peer": tmp_path / "none.py"},
        {"json": tmp_path / "none" / "f.json"},
        {"folder": tmp_path / "none"},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            BenchConfig(**settings)


def test_a_peer_is_a_file_with_the_functions_of_the_protocol(tmp_path: Path) -> None:
    assert load_peer(PEER).name() == "a fake"
    path = tmp_path / "half.py"
    path.write_text("def name(): return ''")
    with pytest.raises(ValueError, match="lacks make_step, make_generate"):
        load_peer(path)


def test_a_peer_whose_library_is_missing_names_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "peer.py"
    path.write_text("import no_such_library")
    with pytest.raises(ValueError, match=r"no_such_library.*\[bench\]"):
        load_peer(path)
