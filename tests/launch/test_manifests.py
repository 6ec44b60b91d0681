"""The manifests against their schemas, each other, and the slices and scripts that they name."""

import copy
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.launch.shapes import SkyTask, check, check_manifest, documents

LAUNCH = Path(__file__).parent.parent.parent / "launch"
MANIFESTS = sorted((LAUNCH / "gke").glob("*.yaml"))
LEARNERS = sorted((LAUNCH / "gke").glob("learner_*.yaml"))
SKY = sorted(LAUNCH.glob("sky_*.yaml"))
CHIPS = {"learner_v5p_64": 32, "learner_v6e_64": 64}
CHIPS_PER_HOST = 4


def learner(path: Path) -> Any:
    """The JobSet of a file."""
    (document,) = documents(path)
    return check_manifest(document)


def job_of(jobset: Any) -> Any:
    (replicated,) = jobset.spec.replicatedJobs
    return replicated.template.spec


def values(container: Any) -> dict[str, str | None]:
    return {variable.name: variable.value for variable in container.env}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_every_manifest_fits_its_schema(path: Path) -> None:
    assert [check_manifest(document) for document in documents(path)]


@pytest.mark.parametrize("path", SKY, ids=lambda path: path.name)
def test_every_sky_file_fits_its_schema(path: Path) -> None:
    (document,) = documents(path)
    check(document, SkyTask)


POD = "spec.replicatedJobs.0.template.spec.template.spec"


@pytest.mark.parametrize(
    ("file", "path", "new", "message"),
    [
        ("learner_v5p_64", "spec.failurePolicy.maxRestart", 3, "maxRestart"),
        ("learner_v5p_64", "spec.failurePolicy.maxRestarts", "3", "Expected `int"),
        ("learner_v5p_64", "spec.failurePolicy.rules.0.action", "Restart", "Invalid enum value"),
        ("learner_v5p_64", "spec.replicatedJobs.0.template.spec.paralelism", 8, "paralelism"),
        ("learner_v5p_64", "spec.replicatedJobs.0.template.spec.parallelism", "8", "Expected `int"),
        ("learner_v5p_64", f"{POD}.nodeSelektor", {"a": "b"}, "nodeSelektor"),
        ("learner_v5p_64", f"{POD}.containers.0.resources.limit", {"a": "4"}, "resources.limit"),
        ("learner_v5p_64", f"{POD}.containers.0.command", "jaxrl-llm", "Expected `array"),
        ("learner_v5p_64", f"{POD}.containers.0.name", None, "Expected `str`"),
        ("sglang", "spec.clusterIp", "None", "clusterIp"),
        ("sglang", "spec.ports.0.port", "30000", "Expected `int`"),
        ("storage", "mountOptions", "nolock", "Expected `array"),
        ("sky_learner", "resources.use_spto", True, "use_spto"),
        ("sky_learner", "resources.use_spot", "true", "Expected `bool"),
        ("sky_learner", "resources.job_recovery.max_restarts", 3, "max_restarts"),
    ],
)
def test_misspelt_fields_and_wrong_types_are_found(
    file: str, path: str, new: object, message: str
) -> None:
    folder = LAUNCH if file.startswith("sky") else LAUNCH / "gke"
    document = copy.deepcopy(documents(folder / f"{file}.yaml")[0])
    part: Any = document
    *way, last = [int(word) if word.isdecimal() else word for word in path.split(".")]
    for word in way:
        part = part[word]
    part[last] = new
    with pytest.raises(ValueError, match=re.escape(message)):
        check(document, SkyTask) if file.startswith("sky") else check_manifest(document)


@pytest.mark.parametrize("path", LEARNERS, ids=lambda path: path.stem)
def test_a_slice_has_one_pod_on_every_host(path: Path) -> None:
    job = job_of(learner(path))
    selector = job.template.spec.nodeSelector
    topology = selector["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(int(size) for size in topology.split("x"))
    (container,) = job.template.spec.containers
    assert chips == CHIPS[path.stem]
    assert container.resources.limits == {"google.com/tpu": str(CHIPS_PER_HOST)}
    assert job.parallelism == job.completions == chips // CHIPS_PER_HOST
    assert selector["cloud.google.com/gke-tpu-accelerator"].startswith(f"tpu-{path.stem[8:11]}-")
    assert f"configs/qwen3_30b_a3b_{path.stem[8:]}.py" in container.args


def test_the_learners_differ_in_their_slice_alone() -> None:
    first, second = (path.read_text() for path in LEARNERS)
    slices = (("v5p", "v6e"), ("2x4x4", "8x8"), ("parallelism: 8", "parallelism: 16"))
    for old, new in (*slices, ("completions: 8", "completions: 16")):
        first = first.replace(old, new)
    assert first[first.index("#\n#   sed") :] == second[second.index("#\n#   sed") :]


@pytest.mark.parametrize("path", LEARNERS, ids=lambda path: path.stem)
def test_what_fails_restarts_all_and_what_was_stopped_does_not(path: Path) -> None:
    jobset = learner(path)
    job = job_of(jobset)
    assert job.backoffLimit == 0
    assert job.template.spec.restartPolicy == "Never"  # which a podFailurePolicy asks for
    stopped, preempted = jobset.spec.failurePolicy.rules
    early, disrupted = job.podFailurePolicy.rules
    assert (early.action, early.onExitCodes.values) == ("FailJob", [3, 130])
    assert early.onExitCodes.containerName == job.template.spec.containers[0].name
    assert disrupted.onPodConditions[0].type == "DisruptionTarget"
    # What the job controller writes of the two.
    told = "Container learner for pod default/a failed with exit code 3 matching FailJob rule at 0"
    assert re.search(stopped.onJobFailureMessagePatterns[0], told)
    for other in (31, 130):  # the second rule is that of exit status 130
        message = told.replace("code 3", f"code {other}")
        assert not re.search(stopped.onJobFailureMessagePatterns[0], message)
    assert stopped.action == "FailJobSet"
    assert preempted.action == "RestartJobSetAndIgnoreMaxRestarts"
    for rule in (stopped, preempted):
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule.name)
        assert rule.onJobFailureReasons == ["PodFailurePolicy"]


@pytest.mark.parametrize("path", LEARNERS, ids=lambda path: path.stem)
def test_the_learner_knows_each_server_by_its_name(path: Path) -> None:
    service, policy, servers = (check_manifest(d) for d in documents(LAUNCH / "gke/sglang.yaml"))
    port = service.spec.ports[0].port
    assert service.spec.clusterIP == "None"
    assert servers.spec.serviceName == service.metadata.name
    assert servers.spec.selector.matchLabels == servers.spec.template.metadata.labels
    assert service.spec.selector == policy.spec.podSelector.matchLabels
    assert service.spec.selector == servers.spec.selector.matchLabels
    name = servers.metadata.name
    urls = [f"http://{name}-{i}.{name}:{port}" for i in range(servers.spec.replicas)]
    pod = job_of(learner(path)).template
    for container in (*pod.spec.containers, *pod.spec.initContainers):
        assert values(container)["SGLANG_URL"] == ",".join(urls)
    (rule,) = policy.spec.ingress
    assert rule.from_[0].podSelector.matchLabels == pod.metadata.labels
    assert [entry.port for entry in rule.ports] == [port]
    (server,) = servers.spec.template.spec.containers
    assert f"--port={port}" in server.args
    assert server.readinessProbe.httpGet.path == "/health"


@pytest.mark.parametrize("path", LEARNERS, ids=lambda path: path.stem)
def test_both_sides_have_the_key_from_one_secret_and_the_weights_from_one_volume(
    path: Path,
) -> None:
    servers = check_manifest(documents(LAUNCH / "gke/sglang.yaml")[2]).spec.template.spec
    kinds = {document["kind"]: document for document in documents(LAUNCH / "gke/storage.yaml")}
    claim = kinds["PersistentVolumeClaim"]["metadata"]["name"]
    storage = kinds["PersistentVolumeClaim"]["spec"]["storageClassName"]
    assert storage == kinds["StorageClass"]["metadata"]["name"]
    # NFSv3 keeps the locks of a host that was preempted.
    assert "nolock" in kinds["StorageClass"]["mountOptions"]
    pods = (servers, job_of(learner(path)).template.spec)
    for pod in pods:
        (container,) = pod.containers
        (key,) = [v for v in container.env if v.name == "SGLANG_API_KEY"]
        reference = key.valueFrom.secretKeyRef
        assert (reference.name, reference.key, key.value) == ("sglang", "api-key", None)
        (volume,) = [v for v in pod.volumes if v.persistentVolumeClaim]
        assert volume.persistentVolumeClaim.claimName == claim
        (mount,) = [m for m in container.volumeMounts if m.name == volume.name]
        assert mount.mountPath == "/shared"
    assert pods[1].initContainers[0].env == [pods[1].containers[0].env[0]]  # and not the key
    assert "--rollout.publish.folder=/shared/weights" in pods[1].containers[0].args
    assert values(pods[1].containers[0])["MODEL"] == servers.containers[0].command[-1]


def test_the_init_container_waits_for_every_server(tmp_path: Path) -> None:
    """Its command with a curl that fails at first and notes whom it asks."""
    pod = job_of(learner(LEARNERS[0])).template.spec
    (container,) = pod.initContainers
    curl, sleep, asked = tmp_path / "curl", tmp_path / "sleep", tmp_path / "asked"
    curl.write_text('#!/bin/sh\nfor url; do :; done\necho "$url" >>asked\n[ -e up ]\n')
    sleep.write_text("#!/bin/sh\ntouch up\n")
    for stub in (curl, sleep):
        stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SGLANG_URL": "http://a:1,http://b:2"}
    command = [*container.command, *container.args]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
    lines = asked.read_text().splitlines()
    assert lines == ["http://a:1/health", "http://a:1/health", "http://b:2/health"]


@pytest.mark.parametrize("path", SKY, ids=lambda path: path.name)
@pytest.mark.parametrize("part", ["setup", "run"])
def test_the_sky_commands_are_bash(path: Path, part: str) -> None:
    (document,) = documents(path)
    done = subprocess.run(["bash", "-n"], input=document[part], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert document["secrets"] == {"SGLANG_API_KEY": None}


def test_a_sky_server_listens_at_its_own_private_address(tmp_path: Path) -> None:
    (document,) = documents(LAUNCH / "sky_sglang.yaml")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/sglang_server.sh").write_text('echo "$@"\n')
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/home/a", "MODEL": "/shared/m"}
    environment |= {"SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_NODE_RANK": "1"}
    environment |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    done = subprocess.run(
        ["bash", "-c", document["run"]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    urls, arguments = done.stdout.splitlines()
    assert urls == "SGLANG_URL=http://10.0.0.5:30000,http://10.0.0.6:30000"
    assert arguments.startswith("/shared/m --host 10.0.0.6 --port 30000 --tp-size 8 ")


def test_the_scripts_of_the_servers_are_those_the_manifest_mounts() -> None:
    text = (LAUNCH / "gke/sglang.yaml").read_text()
    for name in re.findall(r"--from-file=launch/(\S+)", text):
        assert (LAUNCH / name).is_file()
    command = documents(LAUNCH / "gke/sglang.yaml")[2]["spec"]["template"]["spec"]["containers"]
    assert command[0]["command"][:2] == ["bash", "/launch/sglang_server.sh"]
