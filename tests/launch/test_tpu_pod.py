"""tpu_pod.sh against a gcloud that plays the states of a slice: what it asks for, in what order."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from jaxrl_llm.main import INTERRUPTED, STOPPED_EARLY

REPOSITORY = Path(__file__).parent.parent.parent
CONFIG = "configs/qwen3_moe.py"
RUN_DIR = ("--run-dir", "/shared/runs/a")
KEY = "open-sesame-4711"
OURS = ("ZONE", "NAME", "PROJECT", "ACCELERATOR", "RUNTIME", "SPOT", "NETWORK", "SUBNETWORK")
OURS += ("SERVICE_ACCOUNT", "INTERNAL_IPS", "CREATE_FLAGS", "SSH_FLAGS", "NFS", "SHARED", "PASS")
OURS += ("MODEL", "PROMPTS", "SGLANG_URL", "SGLANG_API_KEY", "JAX_COMPILATION_CACHE_DIR", "DELETE")


@dataclasses.dataclass(frozen=True)
class Cloud:
    """A folder with a fake gcloud, a small repository, and what has happened."""

    home: Path

    def play(
        self,
        states: Sequence[str] = ("ACTIVE",),
        services: Sequence[str] = ("none", "exit 0"),
        installs: Sequence[str] = ("done",),
    ) -> None:
        script = {"states": states, "services": services, "installs": installs}
        (self.home / "script.json").write_text(json.dumps(script))

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if k not in OURS}
        environment |= {"PATH": f"{self.home / 'bin'}:{os.environ['PATH']}", "ZONE": "us-east5-a"}
        environment |= {"FAKE_GCLOUD": str(self.home), "POLL_SECONDS": "0.05"} | variables
        return subprocess.Popen(
            ["bash", str(self.home / "repository/launch/tpu_pod.sh"), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self) -> list[list[str]]:
        path = self.home / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self) -> list[str]:
        """What was done to the slice and its hosts, without the looks at them."""
        names = []
        for call in self.calls():
            command = "".join(a for a in call if a.startswith("--command="))
            if call[3] in ("create", "delete", "scp"):
                names.append(call[3])
            elif "tpu_host.sh" in command:
                names.append("install")
            elif "systemctl stop" in command:
                names.append("stop")
        return names

    def left(self, name: str) -> list[str]:
        """Entries of the script that nobody has asked for but the last."""
        entries: list[str] = json.loads((self.home / "script.json").read_text())[name]
        return entries[:-1]

    def find(self, verb: str) -> list[str]:
        return next(call for call in self.calls() if call[3] == verb)


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    """A fake gcloud on PATH, and a repository with one commit, since its copy is what hosts get."""
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.parent.mkdir()
    python = f"env PYTHONPATH={REPOSITORY} {sys.executable}"
    gcloud.write_text(f'#!/bin/sh\nexec {python} -m tests.launch.fake_gcloud "$@"\n')
    gcloud.chmod(0o755)
    repository = tmp_path / "repository"
    shutil.copytree(REPOSITORY / "launch", repository / "launch")
    (repository / "configs").mkdir()
    shutil.copy(REPOSITORY / CONFIG, repository / CONFIG)
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "All"], check=True)
    cloud = Cloud(tmp_path)
    cloud.play()
    return cloud


def test_a_slice_is_asked_for_and_trained_on(cloud: Cloud) -> None:
    states = ("", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    # The first look at the service is before the installation, where host 0 has none.
    cloud.play(states, services=("none", "exit 1", "active", "exit 0"))
    done = cloud.run("train", CONFIG, *RUN_DIR, "--steps", "9")
    assert done.returncode == 0, done.stderr
    assert cloud.steps() == ["create", "scp", "install"]
    assert "rl step 12  loss 0.5" in done.stdout
    assert "The run has ended" in done.stderr
    name, *flags = cloud.find("create")[4:]
    assert name == "jaxrl-learner"
    assert set(flags) == {
        "--zone=us-east5-a",
        "--node-id=jaxrl-learner",
        "--accelerator-type=v5p-64",
        "--runtime-version=v2-alpha-tpuv5",
    }


def test_the_settings_reach_gcloud(cloud: Cloud) -> None:
    cloud.play(("", "ACTIVE"))
    settings = {"NAME": "a", "PROJECT": "p", "ACCELERATOR": "v6e-64", "SPOT": "1", "NETWORK": "n"}
    settings |= {"SUBNETWORK": "s", "SERVICE_ACCOUNT": "x@y", "INTERNAL_IPS": "1"}
    settings |= {"CREATE_FLAGS": "--reserved --valid-until-duration=6h"}
    settings |= {"SSH_FLAGS": "--tunnel-through-iap"}
    assert cloud.run("train", CONFIG, *RUN_DIR, **settings).returncode == 0
    assert set(cloud.find("create")[4:]) == {
        "a",
        "--zone=us-east5-a",
        "--project=p",
        "--node-id=a",
        "--accelerator-type=v6e-64",
        "--runtime-version=v2-alpha-tpuv6e",
        "--spot",
        "--network=n",
        "--subnetwork=s",
        "--service-account=x@y",
        "--internal-ips",
        "--reserved",
        "--valid-until-duration=6h",
    }
    over_ssh = [call for call in cloud.calls() if call[2] == "tpu-vm"]
    assert all("--tunnel-through-iap" in call for call in over_ssh)
    assert all("--project=p" in call for call in cloud.calls())


@pytest.mark.parametrize("lost", ["SUSPENDED", "FAILED", "SUSPENDING"])
def test_after_a_preemption_the_same_command_starts_on_another_slice(
    cloud: Cloud, lost: str
) -> None:
    # ACTIVE twice: when the slice is had, and at the first look at the run. Then it is lost.
    states = ["ACTIVE", "ACTIVE", lost, "SUSPENDED", "", "CREATING", "ACTIVE"]
    cloud.play(states, services=("none", "active", "none", "exit 0"))
    done = cloud.run("train", CONFIG, *RUN_DIR)
    assert done.returncode == 0, done.stderr
    assert cloud.steps() == ["scp", "install", "delete", "create", "scp", "install"]
    assert f"{lost}; the slice is lost" in done.stderr
    assert {"--force", "--quiet"} <= set(cloud.find("delete"))


def test_a_command_given_again_joins_a_run_that_is_under_way(cloud: Cloud) -> None:
    cloud.play(services=("active", "active", "exit 0"))
    done = cloud.run("train", CONFIG, *RUN_DIR)
    assert done.returncode == 0, done.stderr
    assert cloud.steps() == []
    assert "rl step 12  loss 0.5" in done.stdout


def test_a_run_that_fails_is_reported_and_costs_nothing_with_delete(cloud: Cloud) -> None:
    cloud.play(services=("none", "active", "limit 1"))
    done = cloud.run("train", CONFIG, *RUN_DIR, DELETE="1")
    assert done.returncode == 1
    assert "The run failed" in done.stderr
    assert cloud.steps() == ["scp", "install", "delete"]


def test_a_run_goes_on_after_sigterm_at_another_host(cloud: Cloud) -> None:
    # All processes end with 130; process 0 is started again, and waits for the other host's.
    services = ("none", "active", f"exit {INTERRUPTED}", "exit SIGABRT", "active", "exit 0")
    cloud.play(services=services)
    done = cloud.run("train", CONFIG, *RUN_DIR, DELETE="1")
    assert done.returncode == 0, done.stderr
    assert cloud.left("services") == []
    assert cloud.steps() == ["scp", "install", "delete"]
    assert "stopped" not in done.stderr


@pytest.mark.parametrize("end", [str(INTERRUPTED), "SIGTERM"])
def test_a_run_goes_on_after_a_restart_of_its_first_host(cloud: Cloud, end: str) -> None:
    down = (f"down {end}", f"down {end}", "error", "booted")
    cloud.play(services=("none", "active", *down, "active", "exit 0"))
    done = cloud.run("train", CONFIG, *RUN_DIR, DELETE="1")
    assert done.returncode == 0, done.stderr
    assert cloud.left("services") == []
    assert cloud.steps() == ["scp", "install", "delete"]
    assert done.stderr.count("Host 0 restarts, or the service was stopped there alone") == 1


@pytest.mark.parametrize("end", [str(INTERRUPTED), "SIGTERM"])
def test_a_run_that_was_stopped_on_request_has_ended(cloud: Cloud, end: str) -> None:
    cloud.play(services=("none", "active", f"stop {end}"))
    done = cloud.run("train", CONFIG, *RUN_DIR, DELETE="1")
    assert done.returncode == INTERRUPTED, done.stderr
    assert "The run was stopped; the same command goes on with it" in done.stderr
    assert cloud.steps() == ["scp", "install", "delete"]


def test_a_run_that_its_early_warning_ended_says_so(cloud: Cloud) -> None:
    cloud.play(services=("none", "active", f"exit {STOPPED_EARLY}"))
    done = cloud.run("train", CONFIG, *RUN_DIR)
    assert done.returncode == STOPPED_EARLY, done.stderr
    assert "Its early warning ended the run" in done.stderr
    assert cloud.steps() == ["scp", "install"]


@pytest.mark.parametrize(
    "before", [f"stop {INTERRUPTED}", f"down {INTERRUPTED}", "exit 3", "exit 0"]
)
def test_what_does_not_run_is_installed_and_started(cloud: Cloud, before: str) -> None:
    cloud.play(services=(before, "active", "exit 0"))
    assert cloud.run("train", CONFIG, *RUN_DIR).returncode == 0
    assert cloud.steps() == ["scp", "install"]


@pytest.mark.parametrize(
    ("play", "message"),
    [
        ({"states": ("FAILED",)}, "could not be had in 3 attempts"),
        ({"states": ("error",)}, "gcloud failed 3 times in a row"),
        ({"installs": ("error",)}, "could not be set up in 3 attempts"),
    ],
)
def test_what_keeps_failing_ends_the_command(
    cloud: Cloud, play: dict[str, Sequence[str]], message: str
) -> None:
    cloud.play(**play)
    done = cloud.run("train", CONFIG, *RUN_DIR, ATTEMPTS="3")
    assert done.returncode == 1
    assert message in done.stderr


def test_calls_that_fail_now_and_then_do_not(cloud: Cloud) -> None:
    states = ("error", "ACTIVE", "error", "ACTIVE")
    cloud.play(states, services=("none", "none", "active", "exit 0"), installs=("error", "done"))
    assert cloud.run("train", CONFIG, *RUN_DIR).returncode == 0


def test_hosts_get_the_last_commit_and_the_environment_but_not_on_a_command_line(
    cloud: Cloud,
) -> None:
    settings = {"SGLANG_API_KEY": KEY, "SGLANG_URL": "http://a:1,http://b:1", "MODEL": "/shared/m"}
    settings |= {"PASS": "QUOTED", "QUOTED": 'a "b" \\c', "NFS": "10.0.0.2:/shared"}
    (cloud.home / "repository" / "not committed").touch()
    assert cloud.run("train", CONFIG, *RUN_DIR, "--steps", "9", **settings).returncode == 0
    copied = cloud.home / "copied"
    assert (copied / "jaxrl_llm.env").read_text().splitlines() == [
        'MODEL="/shared/m"',
        'SGLANG_URL="http://a:1,http://b:1"',
        f'SGLANG_API_KEY="{KEY}"',
        'QUOTED="a \\"b\\" \\\\c"',
        f'ARGUMENTS="train {CONFIG} --multihost --run-dir /shared/runs/a --steps 9"',
    ]
    assert (copied / "jaxrl_llm.env").stat().st_mode & 0o777 == 0o600
    with tarfile.open(copied / "jaxrl_llm.tar.gz") as archive:
        names = archive.getnames()
    assert CONFIG in names
    assert "not committed" not in names
    calls = json.dumps(cloud.calls())
    assert KEY not in calls
    assert "NFS='10.0.0.2:/shared'" in calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train",), "Usage: ZONE=... bash launch/tpu_pod.sh train CONFIG"),
        (("train", "--steps", "9"), "Usage"),
        (("begin",), "Usage"),
        (("train", "configs/mine.py", *RUN_DIR), "configs/mine.py is not in the last commit"),
        (("train", CONFIG), "Give --run-dir FOLDER on storage that all hosts see"),
        (("train", CONFIG, *RUN_DIR, "a b"), "'a b' has a space"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_asked_for(
    cloud: Cloud, arguments: tuple[str, ...], message: str
) -> None:
    done = cloud.run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert cloud.calls() == []


def test_a_run_directory_may_follow_an_equals_sign(cloud: Cloud) -> None:
    assert cloud.run("train", CONFIG, "--run-dir=/shared/runs/a").returncode == 0


def test_an_unknown_accelerator_needs_its_runtime(cloud: Cloud) -> None:
    done = cloud.run("train", CONFIG, *RUN_DIR, ACCELERATOR="v9-8")
    assert done.returncode == 1
    assert "ACCELERATOR=v9-8; set RUNTIME" in done.stderr
    assert cloud.calls() == []


def test_the_other_commands_are_one_call_each(cloud: Cloud) -> None:
    assert cloud.run("state").stdout == "ACTIVE\n"
    assert cloud.run("stop").returncode == 0
    assert cloud.run("delete").returncode == 0
    assert cloud.steps() == ["stop", "delete"]
    assert "--worker=all" in cloud.find("ssh")
    (stop,) = [a for a in cloud.find("ssh") if a.startswith("--command=")]
    # Disabled first: follow() takes a host that was only stopped for one that restarts.
    assert re.search(r"systemctl disable \S+; sudo systemctl stop ", stop)


def test_an_interrupted_command_leaves_the_run_and_takes_its_log_along(cloud: Cloud) -> None:
    cloud.play(services=("none", "active"))
    process = cloud.start("train", CONFIG, *RUN_DIR)
    assert process.stdout is not None
    assert process.stdout.readline() == "rl step 12  loss 0.5\n"
    process.send_signal(signal.SIGTERM)
    # The pipe closes when the last process that writes to it has ended, the log's own included.
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert cloud.steps() == ["scp", "install"]
