"""What Kubernetes and SkyPilot accept: names and types of the fields, required ones, enumerations.

Kubernetes' own objects are those of lightkube-models, generated from its OpenAPI document. JobSet's
are here, from jobset_types.go of version 0.12 (jobset.x-k8s.io/v1alpha2), all fields but status;
SkyPilot's are those of its 0.14.1 that the files in launch/ use, and stricter than its client,
which lets unknown names in job_recovery pass. What this is not: the rest that a server checks.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml
from lightkube.models import apps_v1, batch_v1, core_v1, meta_v1, networking_v1, storage_v1


class Strict(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """An object with these fields and no others."""


# --- JobSet ---


class FailurePolicyRule(Strict):
    name: str
    action: Literal[
        "FailJobSet",
        "RestartJobSet",
        "RestartJobSetAndIgnoreMaxRestarts",
        "RestartJob",
        "RestartJobAndIgnoreMaxRestarts",
    ]
    onJobFailureReasons: list[str] | None = None
    onJobFailureMessagePatterns: list[str] | None = None
    targetReplicatedJobs: list[str] | None = None


class FailurePolicy(Strict):
    maxRestarts: int | None = None
    restartStrategy: Literal["Recreate", "BlockingRecreate", "InPlaceRestart"] | None = None
    rules: list[FailurePolicyRule] | None = None


class SuccessPolicy(Strict):
    operator: Literal["All", "Any"]
    targetReplicatedJobs: list[str] | None = None


class StartupPolicy(Strict):
    startupPolicyOrder: Literal["AnyOrder", "InOrder"]


class Network(Strict):
    enableDNSHostnames: bool | None = None
    subdomain: str | None = None
    publishNotReadyAddresses: bool | None = None


class Coordinator(Strict):
    replicatedJob: str
    jobIndex: int | None = None
    podIndex: int | None = None


class DependsOn(Strict):
    name: str
    status: Literal["Ready", "Complete"]


class VolumeRetentionPolicy(Strict):
    whenDeleted: Literal["Delete", "Retain"] | None = None


class VolumeClaimPolicy(Strict):
    templates: list[core_v1.PersistentVolumeClaim] | None = None
    retentionPolicy: VolumeRetentionPolicy | None = None


class ReplicatedJob(Strict):
    name: str
    template: batch_v1.JobTemplateSpec
    groupName: str | None = None
    replicas: int | None = None
    dependsOn: list[DependsOn] | None = None


class JobSetSpec(Strict):
    replicatedJobs: list[ReplicatedJob] | None = None
    network: Network | None = None
    successPolicy: SuccessPolicy | None = None
    failurePolicy: FailurePolicy | None = None
    startupPolicy: StartupPolicy | None = None
    suspend: bool | None = None
    coordinator: Coordinator | None = None
    managedBy: str | None = None
    ttlSecondsAfterFinished: int | None = None
    volumeClaimPolicies: list[VolumeClaimPolicy] | None = None


class JobSet(Strict):
    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: meta_v1.ObjectMeta
    spec: JobSetSpec


# --- SkyPilot ---


class JobRecovery(Strict):
    strategy: Literal["FAILOVER", "EAGER_NEXT_REGION"] | None = None
    max_restarts_on_errors: int | None = None
    recover_on_exit_codes: int | list[int] | None = None


class AcceleratorArguments(Strict):
    runtime_version: str | None = None
    gcp_queued_resource: bool | None = None


class Resources(Strict):
    infra: str | None = None
    accelerators: str | None = None
    accelerator_args: AcceleratorArguments | None = None
    use_spot: bool | None = None
    job_recovery: JobRecovery | None = None
    disk_size: int | None = None


class SkyTask(Strict):
    name: str
    resources: Resources
    run: str
    num_nodes: int | None = None
    workdir: str | None = None
    envs: dict[str, str | None] | None = None
    secrets: dict[str, str | None] | None = None
    setup: str | None = None


# --- documents ---

KINDS: dict[tuple[str, str], type[msgspec.Struct]] = {
    ("v1", "Service"): core_v1.Service,
    ("v1", "PersistentVolumeClaim"): core_v1.PersistentVolumeClaim,
    ("v1", "Pod"): core_v1.Pod,
    ("storage.k8s.io/v1", "StorageClass"): storage_v1.StorageClass,
    ("apps/v1", "StatefulSet"): apps_v1.StatefulSet,
    ("networking.k8s.io/v1", "NetworkPolicy"): networking_v1.NetworkPolicy,
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): JobSet,
}


def check(document: dict[str, Any], kind: type[msgspec.Struct]) -> Any:
    """The document as an object of `kind`.

    Raises ValueError: msgspec.ValidationError, naming the path, for a wrong type, a missing field
    or a value that is none of an enumeration; a plain one for fields that `kind` does not have.
    """
    value = msgspec.convert(document, kind)
    unknown = sorted(_leaves(document) - _leaves(msgspec.to_builtins(value)))
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}")
    return value


def check_manifest(document: dict[str, Any]) -> Any:
    """check() of a Kubernetes object, by its apiVersion and kind."""
    return check(document, KINDS[document["apiVersion"], document["kind"]])


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def _leaves(value: Any) -> set[str]:
    return set(_paths(value, "")) - {""}


def _paths(value: Any, path: str) -> Iterator[str]:
    """spec.ports[0].port and so on, of every value that is not null."""
    if value is None:
        return
    yield path
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _paths(part, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _paths(part, f"{path}[{index}]")
