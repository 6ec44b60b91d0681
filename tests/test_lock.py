"""The lock on a folder: for one at a time, freed by leaving and by a kill."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxrl_llm.lock import locked

HOLDS = """
import sys, time
from pathlib import Path
from jaxrl_llm.lock import locked
with locked(Path(sys.argv[1]), ""):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with (
        locked(folder, ""),
        pytest.raises(ValueError, match=rf"another process is writing to {folder}; go elsewhere"),
        locked(folder, "go elsewhere"),
    ):
        pass
    with locked(folder, ""), locked(tmp_path / "other", ""):
        pass


def test_a_kill_frees_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another process"), locked(tmp_path, ""):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(tmp_path, ""):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    refuse(monkeypatch, number)
    with locked(tmp_path, ""):
        assert f"{tmp_path} cannot be locked ({os.strerror(number)})" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_any_other_error_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path, ""):
        pass


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
