"""What a host of a TPU slice is given: its share, its environment, what restarts its process."""

import inspect
import re
import subprocess
from pathlib import Path

import jax
import pytest

from jaxrl_llm.main import INTERRUPTED, STOPPED_EARLY
from jaxrl_llm.processes import HEARTBEAT_SECONDS
from tests.launch import units
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


@pytest.mark.parametrize(
    ("end", "alone", "told_to_stop"),
    [
        ("0", "inactive", "inactive"),
        (str(INTERRUPTED), "activating", "inactive"),  # alone: SIGTERM was another host's
        ("SIGTERM", "inactive", "inactive"),
        (str(STOPPED_EARLY), "failed", "failed"),
        ("1", "activating", "failed"),
        ("SIGABRT", "activating", "failed"),  # by JAX's heartbeat, or while it waits for the others
    ],
)
def test_the_service_starts_again_unless_it_was_stopped_or_has_ended(
    end: str, alone: str, told_to_stop: str
) -> None:
    assert units.state_after(end, stopped=False) == alone
    assert units.state_after(end, stopped=True) == told_to_stop


def test_waiting_for_a_host_that_restarts_stays_below_the_start_limit() -> None:
    unit = units.read()
    patience = inspect.signature(jax.distributed.initialize).parameters["initialization_timeout"]
    assert f"JAX waits for {patience.default} s" in " ".join(units.SERVICE.read_text().split())
    attempt = patience.default + int(unit["Service"]["RestartSec"])
    starts = int(unit["Unit"]["StartLimitIntervalSec"]) / attempt
    assert starts < int(unit["Unit"]["StartLimitBurst"])


def test_the_service_is_given_what_the_script_installs() -> None:
    unit = units.read()
    service = unit["Service"]
    # A word of its own: systemd splits it into arguments.
    assert service["ExecStart"] == "/opt/jaxrl_llm/.venv/bin/jaxrl-llm $ARGUMENTS"
    script = (LAUNCH / "tpu_pod.sh").read_text()
    assert service["EnvironmentFile"] in script
    assert f"tar -xzf ~/jaxrl_llm.tar.gz -C {service['WorkingDirectory']}" in script
    # It starts with its host, once it is enabled.
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    assert "systemctl enable $service" in script


def test_the_same_exit_statuses_end_or_restart_elsewhere() -> None:
    for path in (LAUNCH / "gke").glob("learner_*.yaml"):
        (document,) = documents(path)
        job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
        codes = job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
        assert codes == [STOPPED_EARLY, INTERRUPTED]
    (task,) = documents(LAUNCH / "sky_learner.yaml")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [INTERRUPTED]


def test_the_heartbeat_is_the_programs_wherever_it_is_named() -> None:
    files = [path for path in LAUNCH.rglob("*") if path.is_file()]
    named = {path.name: re.findall(r"heartbeat \((\d+) s\)", path.read_text()) for path in files}
    assert {name for name, found in named.items() if found} >= {
        "README.md",
        "sky_learner.yaml",
        "tpu_pod.service",
    }
    assert {value for found in named.values() for value in found} == {str(HEARTBEAT_SECONDS)}
