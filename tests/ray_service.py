"""Whether a RayService is valid, as far as that can be told without a cluster: `make check` asks.

`python -m tests.ray_service < MANIFESTS` reads what kustomize has built. Kubernetes' own kinds are compared
with its schemas, and so are the pod templates inside a RayService; what Ray Serve is to run with Ray's own
schema; the application is built. For the rest, KubeRay's definition is in no package, so the schema here has
the fields that the manifests use or may need next, as the API reference of KubeRay 1.6.2 lists them, and no
others.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import jsonschema  # type: ignore[import-untyped]  # has no annotations
import kubernetes_validate  # type: ignore[import-untyped]  # has no annotations
import yaml

Manifest = dict[str, Any]
ELSEWHERE = ("monitoring.coreos.com/",)
"""Groups of other operators: test_kubernetes.py and test_ray_service.py name the fields that are used."""
# The oldest release that is meant to work, and the newest one with a schema.
RELEASES = ("1.30", kubernetes_validate.latest_version())


def _record(required: str = "", **fields: Any) -> dict[str, Any]:
    """Schema of an object that has no other fields than these."""
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


BOOLEAN, INTEGER, STRING = {"type": "boolean"}, {"type": "integer", "minimum": 0}, {"type": "string"}
OBJECT = {"type": "object"}
STRINGS = {"type": "object", "additionalProperties": STRING}
GROUP = {"rayStartParams": STRINGS, "resources": STRINGS, "labels": STRINGS, "template": OBJECT}
AUTOSCALER = _record(
    resources=OBJECT,
    image=STRING,
    imagePullPolicy=STRING,
    securityContext=OBJECT,
    idleTimeoutSeconds=INTEGER,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    version={"enum": ["v1", "v2"]},
    env={"type": "array"},
    envFrom={"type": "array"},
    volumeMounts={"type": "array"},
)
CREDENTIAL = _record(value=STRING, valueFrom=OBJECT)
CLUSTER = _record(
    "headGroupSpec rayVersion workerGroupSpecs",
    rayVersion=STRING,
    suspend=BOOLEAN,
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=STRINGS,
    authOptions=_record(mode={"enum": ["disabled", "token"]}, secretName=STRING),
    gcsFaultToleranceOptions=_record(
        "redisAddress",
        redisAddress=STRING,
        redisUsername=CREDENTIAL,
        redisPassword=CREDENTIAL,
        externalStorageNamespace=STRING,
    ),
    headGroupSpec=_record("template", **GROUP, serviceType=STRING, headService=OBJECT, enableIngress=BOOLEAN),
    workerGroupSpecs={
        "type": "array",
        "minItems": 1,
        "items": _record(
            "groupName template",
            **GROUP,
            groupName=STRING,
            replicas=INTEGER,
            minReplicas=INTEGER,
            maxReplicas=INTEGER,
            numOfHosts=INTEGER,
            idleTimeoutSeconds=INTEGER,
        ),
    },
)
UPGRADE = _record(
    "type",
    type={"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]},
    clusterUpgradeOptions=_record(
        "stepSizePercent intervalSeconds gatewayClassName",
        maxSurgePercent=INTEGER,
        stepSizePercent=INTEGER,
        intervalSeconds=INTEGER,
        gatewayClassName=STRING,
    ),
)
SCHEMA = _record(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=OBJECT,
    spec=_record(
        "serveConfigV2 rayClusterConfig",
        serveConfigV2=STRING,
        rayClusterConfig=CLUSTER,
        upgradeStrategy=UPGRADE,
        rayClusterDeletionDelaySeconds=INTEGER,
        excludeHeadPodFromServeSvc=BOOLEAN,
        serveService=OBJECT,
    ),
)


def templates(service: Manifest) -> dict[str, Manifest]:
    """The pod template of each group, by the group's name."""
    cluster = service["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"] for name, group in {"head": cluster["headGroupSpec"], **groups}.items()}


def pods(service: Manifest) -> Iterator[Manifest]:
    """Each template as the Pod that is made of it."""
    for name, template in templates(service).items():
        metadata = {**template.get("metadata", {}), "name": f"{service['metadata']['name']}-{name}"}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def environment(manifests: list[Manifest], template: Manifest) -> dict[str, str]:
    """The variables that a template's container has of ConfigMaps, which must be there."""
    maps = {each["metadata"]["name"]: each["data"] for each in manifests if each["kind"] == "ConfigMap"}
    (container,) = template["spec"]["containers"]
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        name = source["configMapRef"]["name"]
        if name not in maps:
            raise ValueError(f"there is no ConfigMap {name}")
        found.update(maps[name])
    return found


def _unknown(given: Any, known: Any, path: str = "") -> Iterator[str]:
    """Paths of the keys that are given but not known: Ray's schemas ignore these."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            place = f"{path}.{key}" if path else str(key)
            if key not in known:
                yield place
            else:
                yield from _unknown(value, known[key], place)
    elif isinstance(given, list) and isinstance(known, list):
        for number, (one, other) in enumerate(zip(given, known, strict=True)):
            yield from _unknown(one, other, f"{path}[{number}]")


def serve_config(text: str) -> Any:
    """`serveConfigV2` as Ray Serve reads it. Raises ValueError for what Ray refuses, and for unknown keys."""
    from ray.serve.schema import ServeDeploySchema

    given = yaml.safe_load(text)
    config = ServeDeploySchema.model_validate(given)
    if unknown := list(_unknown(given, config.model_dump(exclude_unset=True))):
        raise ValueError(f"serveConfigV2: unknown: {', '.join(unknown)}")
    return config


def built(application: Any, variables: Mapping[str, str]) -> dict[str, Any]:
    """The deployments that an application of `serveConfigV2` consists of, by their names.

    Builds it with the settings among `variables`. Raises ValueError for arguments that it does not take, and
    for options of a deployment that is not there.
    """
    from ray.serve._private.build_app import build_app

    module, _, name = application.import_path.partition(":")
    settings = {key: value for key, value in variables.items() if key.startswith("DDPM_")}
    others = {key: value for key, value in os.environ.items() if not key.startswith("DDPM_")}
    with mock.patch.dict(os.environ, {**others, **settings}, clear=True):
        found = getattr(importlib.import_module(module), name)(application.args)
    deployments = {each.name: each for each in build_app(found, name=application.name).deployments}
    if unknown := {each.name for each in application.deployments} - deployments.keys():
        raise ValueError(f"serveConfigV2: no such deployment: {', '.join(sorted(unknown))}")
    return deployments


def check_ray_service(service: Manifest, manifests: list[Manifest]) -> None:
    """Raises ValueError, or a validator's own error, for a RayService that would not come up."""
    jsonschema.validate(service, SCHEMA)
    for pod in pods(service):
        for release in RELEASES:
            kubernetes_validate.validate(pod, release, strict=True)
    config = serve_config(service["spec"]["serveConfigV2"])
    for template in templates(service).values():
        variables = environment(manifests, template)
    for application in config.applications:
        built(application, variables)


def check(manifests: list[Manifest]) -> list[str]:
    """Check all of them. Returns what has been checked. Raises what their validators raise."""
    checked = []
    for manifest in manifests:
        if manifest["apiVersion"].startswith(ELSEWHERE):
            continue
        if manifest["apiVersion"].startswith("ray.io/"):
            check_ray_service(manifest, manifests)
        else:
            for release in RELEASES:
                kubernetes_validate.validate(manifest, release, strict=True)
        checked.append(f"{manifest['kind']}/{manifest['metadata']['name']}")
    return checked


if __name__ == "__main__":
    try:
        found = check(list(yaml.safe_load_all(sys.stdin)))
    except (ValueError, jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        sys.exit(f"not valid: {error}")
    if not any(each.startswith("RayService/") for each in found):
        sys.exit("there is no RayService")
