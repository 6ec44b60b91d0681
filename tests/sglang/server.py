"""A real SGLang server on this machine's CPU for tests, started by launch/sglang_cpu.sh.

It takes 25 to 120 s until it answers and 2 GB, so a test file has one for all of its tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "launch" / "sglang_cpu.sh"
START_SECONDS = 400.0
"""A server that is not healthy by then has failed: three times what a loaded machine needs."""
STOP_SECONDS = 60.0
"""From SIGTERM to the end of every process: sglang looks for the signal every 5 s."""


@dataclasses.dataclass(frozen=True)
class RealServer:
    """A server that is up."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]
    api_key: str

    def log_text(self) -> str:
        """All it has written so far."""
        return self.log.read_text(errors="replace")


@contextlib.contextmanager
def real_server(model: Path, log: Path, *flags: str, api_key: str) -> Iterator[RealServer]:
    """Runs a server of the checkpoint in the folder `model` while the block runs.

    Args:
      log: file for all output of the server.
      flags: of `sglang serve`, behind those of the script.
      api_key: what clients must send.

    Raises RuntimeError with the end of the log if the server does not come up, or does not go with
    all of its processes when it is told to.
    """
    port = _free_port()
    # The learner's packages are none of the server's business.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = ["bash", str(SCRIPT), str(model), "--port", str(port), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment | {"SGLANG_API_KEY": api_key},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its process group is the server and its children
        )
    server = RealServer(f"http://127.0.0.1:{port}", log, process, api_key)
    try:
        _wait_until_healthy(server)
        yield server
        _stop(server)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(server: RealServer) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise _failure(server, f"ended with status {server.process.returncode}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise _failure(
        server,
        f"was not healthy within {START_SECONDS:g} s; if it was still installing, run "
        "`bash launch/sglang_cpu.sh --install` first",
    )


def _stop(server: RealServer) -> None:
    """SIGTERM to the one process that was started; its children must go with it."""
    server.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        server.process.poll()  # collects it, so that it no longer counts as a process
        try:
            os.killpg(server.process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    raise _failure(server, f"left processes behind {STOP_SECONDS:g} s after SIGTERM")


def _failure(server: RealServer, what: str) -> RuntimeError:
    tail = "\n".join(line[:300] for line in server.log_text().splitlines()[-40:])
    return RuntimeError(f"the SGLang server {what}. The end of {server.log}:\n{tail}")
