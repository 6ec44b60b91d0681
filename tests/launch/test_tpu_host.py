"""What a host of a TPU slice is given: its share, its environment, what restarts its process."""

import configparser
import subprocess
from pathlib import Path

import pytest

from jaxrl_llm.main import INTERRUPTED, STOPPED_EARLY
from tests.launch.shapes import documents

LAUNCH = Path(__file__).parent.parent.parent / "launch"
STUB = """#!/bin/sh
[ "$1" != tee ] || cat >>"$LOG.fstab"
echo "$(basename "$0") $*" >>"$LOG"
case "$(basename "$0")" in mountpoint) [ -e "$LOG.mounted" ] ;; esac
"""


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A copy of the scripts, and stubs for what they would change on this machine."""
    (tmp_path / "bin").mkdir()
    for name in ("sudo", "uv", "curl", "mount.nfs", "mountpoint"):
        stub = tmp_path / "bin" / name
        stub.write_text(STUB)
        stub.chmod(0o755)
    (tmp_path / "code" / "launch").mkdir(parents=True)
    script = (LAUNCH / "tpu_host.sh").read_text()
    (tmp_path / "code" / "launch" / "tpu_host.sh").write_text(script)
    return tmp_path


def run(host: Path, **variables: str) -> list[str]:
    """The calls that the script makes."""
    log = host / "log"
    log.write_text("")
    environment = {"PATH": f"{host / 'bin'}:/usr/bin:/bin", "HOME": str(host), "LOG": str(log)}
    command = ["bash", str(host / "code/launch/tpu_host.sh")]
    subprocess.run(command, env=environment | variables, check=True, timeout=60)
    return log.read_text().splitlines()


ENVIRONMENT = [
    "uv venv --quiet --allow-existing --python 3.12 .venv",
    "uv pip install --quiet --python .venv/bin/python --editable .[tpu]",
]


def test_a_host_without_a_share_gets_its_environment(host: Path) -> None:
    assert run(host) == ENVIRONMENT


def test_a_share_is_mounted_now_and_after_a_restart(host: Path) -> None:
    calls = run(host, NFS="10.0.0.2:/shared", SHARED="/mnt/rl")
    assert calls == [
        "sudo mkdir -p /mnt/rl",
        "sudo tee -a /etc/fstab",
        "mountpoint --quiet /mnt/rl",
        "sudo mount /mnt/rl",
        *ENVIRONMENT,
    ]
    # Without the locks of NFSv3: those of a host that was preempted are never given back.
    line = "10.0.0.2:/shared /mnt/rl nfs defaults,_netdev,nolock,nconnect=7 0 0\n"
    assert (host / "log.fstab").read_text() == line


def test_a_share_that_is_mounted_stays(host: Path) -> None:
    (host / "log.mounted").touch()
    assert "sudo mount /shared" not in run(host, NFS="10.0.0.2:/shared")


def test_the_service_restarts_what_failed_and_not_what_was_stopped() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(LAUNCH / "tpu_pod.service")
    service = unit["Service"]
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == str(STOPPED_EARLY)
    assert service["SuccessExitStatus"] == str(INTERRUPTED)
    # A word of its own: systemd splits it into arguments.
    assert service["ExecStart"] == "/opt/jaxrl_llm/.venv/bin/jaxrl-llm $ARGUMENTS"
    script = (LAUNCH / "tpu_pod.sh").read_text()
    assert service["EnvironmentFile"] in script
    assert f"tar -xzf ~/jaxrl_llm.tar.gz -C {service['WorkingDirectory']}" in script


def test_the_same_exit_status_stops_a_jobset() -> None:
    for path in (LAUNCH / "gke").glob("learner_*.yaml"):
        (document,) = documents(path)
        job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [STOPPED_EARLY]
