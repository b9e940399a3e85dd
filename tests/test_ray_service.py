"""The RayService is valid, would be refused if misspelt, and agrees with Ray, the service and its image."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # has no annotations
import kubernetes_validate  # type: ignore[import-untyped]  # has no annotations
import pytest
import yaml

from service.settings import Settings
from tests.manifests import FOLDER, ROOT, Manifest, builder, needs_kubectl, one, read, selects
from tests.prometheus_rule import ALERTS
from tests.ray_service import built, check, environment, pods, serve_config, templates

pytestmark = [
    needs_kubectl,
    # Ray's own, while it is imported.
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),
]
OVERLAYS = ("ray-cpu", "ray-gpu")
COMPONENTS = ("hub", "model-volume", "monitoring", "ray-monitoring")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function that builds an overlay with components."""
    return builder(tmp_path_factory)


@pytest.fixture(scope="module", params=OVERLAYS)
def everything(request, build):
    """An overlay with all components that are for it."""
    return build(request.param, *COMPONENTS)


def container(template: Manifest) -> Manifest:
    [found] = template["spec"]["containers"]
    return dict(found)


def workers(manifests: list[Manifest]) -> Manifest:
    [group] = one(manifests, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return dict(group)


def application(manifests: list[Manifest]) -> Any:
    [found] = serve_config(one(manifests, "RayService")["spec"]["serveConfigV2"]).applications
    return found


def deployments(manifests: list[Manifest]) -> dict[str, Any]:
    return built(application(manifests), environment(manifests, workers(manifests)["template"]))


# ----------------------------------------------------------------------------------------------------
# It is valid, and what is misspelt is not.


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("components", [(), *((name,) for name in COMPONENTS), COMPONENTS], ids="+".join)
def test_a_combination_is_valid(build, overlay, components):
    assert "RayService/ddpm-ray" in check(build(overlay, *components))


REFUSED = jsonschema.ValidationError, kubernetes_validate.ValidationError, ValueError


def cluster(service: Manifest) -> Manifest:
    return dict(service["spec"]["rayClusterConfig"])


MISSPELT: dict[str, tuple[Callable[[Manifest], Any], str, Any]] = {
    "spec": (lambda it: it["spec"], "excludeHeadPodFromServeService", True),
    "upgradeStrategy": (lambda it: it["spec"]["upgradeStrategy"], "kind", "NewCluster"),
    "cluster": (lambda it: it["spec"]["rayClusterConfig"], "rayversion", "2.60.0"),
    "head": (lambda it: cluster(it)["headGroupSpec"], "replicas", 1),
    "workers": (lambda it: cluster(it)["workerGroupSpecs"][0], "minReplica", 1),
    "parameter": (lambda it: cluster(it)["headGroupSpec"]["rayStartParams"], "num-gpus", 0),
    "pod": (lambda it: cluster(it)["headGroupSpec"]["template"]["spec"], "enableServicelinks", False),
    "probe": (
        lambda it: cluster(it)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["livenessProbe"],
        "timeoutSecond",
        5,
    ),
}


@pytest.mark.parametrize("place", MISSPELT)
def test_an_unknown_key_is_refused(build, place):
    manifests = deepcopy(build("ray-cpu"))
    find, key, value = MISSPELT[place]
    find(one(manifests, "RayService"))[key] = value
    with pytest.raises(REFUSED, match=key if place != "parameter" else "0 is not of type 'string'"):
        check(manifests)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("proxy_location", "proxy_locations", "proxy_locations"),
        ("EveryNode", "Everywhere", "EveryNode"),
        ("request_timeout_s", "request_timeouts", r"http_options\.request_timeouts"),
        ("import_path", "import_paths", "import_path"),
        ("service.cluster:build", "service.cluster:builds", "builds"),
        ("num_replicas:", "replicas:", "arguments are"),
        ("num_replicas: ", "num_replicas: many # ", "many"),
        ("max_replicas_per_node", "max_replicas_per_nodes", r"deployments\[0\]\.max_replicas_per_nodes"),
        ("name: avatars", "name: avatar", "no such deployment: avatar"),
    ],
)
def test_a_wrong_serve_config_is_refused(build, old, new, message):
    manifests = deepcopy(build("ray-cpu"))
    spec = one(manifests, "RayService")["spec"]
    text = spec["serveConfigV2"].replace("  port: 8000", "  port: 8000\n  request_timeout_s: 600")
    assert old in text
    spec["serveConfigV2"] = text
    check(manifests)  # the control
    spec["serveConfigV2"] = text.replace(old, new)
    with pytest.raises((*REFUSED, AttributeError), match=message):
        check(manifests)


def test_a_config_map_that_is_not_there_is_refused(build):
    others = [each for each in build("ray-cpu") if each["kind"] != "ConfigMap"]
    with pytest.raises(ValueError, match="there is no ConfigMap ddpm-ray-settings-"):
        check(others)


# ----------------------------------------------------------------------------------------------------
# Ray: its version, who has replicas, and whether there is room for them.


@pytest.mark.parametrize(("overlay", "tag"), [("ray-cpu", "ray"), ("ray-gpu", "ray-cuda")])
def test_all_pods_have_the_image_of_this_version(build, overlay, tag):
    found = {container(each)["image"] for each in templates(one(build(overlay), "RayService")).values()}
    assert found == {f"ddpm-service:{VERSION}-{tag}"}


def test_ray_is_the_one_of_the_image(everything):
    lock = (ROOT / "requirements-cluster.txt").read_text().splitlines()
    version = one(everything, "RayService")["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"ray=={version}" in lock


def test_the_head_has_no_replicas_and_no_gpu(everything):
    spec = one(everything, "RayService")["spec"]
    head = spec["rayClusterConfig"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert spec["excludeHeadPodFromServeSvc"] is True
    assert "nvidia.com/gpu" not in container(head["template"])["resources"]["limits"]


def test_the_workers_have_room_for_all_replicas(everything):
    group = workers(everything)
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]  # no autoscaler
    limit = {each.name: each.max_replicas_per_node for each in application(everything).deployments}
    cpus = int(group["rayStartParams"]["num-cpus"])
    gpus = int(container(group["template"])["resources"]["limits"].get("nvidia.com/gpu", "0"))
    found = deployments(everything)
    assert {"front", "fashion-mnist", "avatars"} == found.keys()
    wanted = {"num_cpus": 0.0, "num_gpus": 0.0}
    for name, each in found.items():
        for resource, amount in each.ray_actor_options.items():
            wanted[resource] += amount * each.num_replicas
        assert each.num_replicas <= group["replicas"] * (limit.get(name) or group["replicas"])
    assert wanted["num_cpus"] <= cpus * group["replicas"]
    assert wanted["num_gpus"] == gpus * group["replicas"]


def test_a_replica_has_the_threads_of_its_pod(everything):
    found = {each["name"]: each for each in container(workers(everything)["template"])["env"]}
    assert found["OMP_NUM_THREADS"]["valueFrom"] == {"resourceFieldRef": {"resource": "requests.cpu"}}


def test_both_graces_are_longer_than_any_request(everything):
    service = one(everything, "RayService")
    variables = environment(everything, workers(everything)["template"])
    longest = max(
        each._deployment_config.graceful_shutdown_timeout_s for each in deployments(everything).values()
    )
    assert longest > float(variables["DDPM_DEADLINE_S"])
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > longest
    template = workers(everything)["template"]
    program, script, seconds = container(template)["lifecycle"]["preStop"]["exec"]["command"]
    assert (program, script) == ("python", "/app/leave.py")
    assert longest + 5 <= float(seconds) < template["spec"]["terminationGracePeriodSeconds"]


# ----------------------------------------------------------------------------------------------------
# The pods: as those of the Deployment.


def test_every_setting_exists_and_is_accepted(everything, monkeypatch):
    for template in templates(one(everything, "RayService")).values():
        values = environment(everything, template)
        known = {f"DDPM_{name}".upper() for name in Settings.model_fields}
        ours = {name: value for name, value in values.items() if name.startswith("DDPM_")}
        assert set(ours) <= known
        for name, value in ours.items():
            monkeypatch.setenv(name, value)
        Settings(_env_file=None)
        secret = {each["name"] for each in container(template)["env"] if "secretKeyRef" in each["valueFrom"]}
        assert secret == {"DDPM_API_KEYS", "DDPM_RESUME_SECRET"} <= known


def test_the_pods_are_as_locked_down_as_the_deployments(everything):
    plain = read(FOLDER / "base" / "deployment.yaml")["spec"]["template"]
    for template in templates(one(everything, "RayService")).values():
        for name in ("securityContext", "automountServiceAccountToken", "enableServiceLinks"):
            assert template["spec"][name] == plain["spec"][name]
        assert container(template)["securityContext"] == container(plain)["securityContext"]
        writable = {
            mount["mountPath"]
            for mount in container(template)["volumeMounts"]
            if not mount.get("readOnly", False)
        }
        assert writable == {"/tmp", "/cache"}
        volumes = {each["name"]: each for each in template["spec"]["volumes"]}
        assert all("sizeLimit" in volumes[name]["emptyDir"] for name in ("tmp", "cache"))


def test_the_keys_are_those_of_the_deployment(everything):
    plain = container(read(FOLDER / "base" / "deployment.yaml")["spec"]["template"])["env"]
    for template in templates(one(everything, "RayService")).values():
        assert [each for each in plain if each not in container(template)["env"]] == []


def test_workers_have_the_models(everything):
    mounts = {each["mountPath"]: each for each in container(workers(everything)["template"])["volumeMounts"]}
    assert mounts["/models"]["readOnly"] is True
    assert all(
        (ROOT / source.removeprefix("/app/") / "model_index.json").exists()
        for source in application(everything).args["models"].split(",")
    )


def test_every_selector_matches_its_pods(everything):
    worker, head = (
        {**pod["metadata"]["labels"], "ray.io/node-type": kind}  # as KubeRay sets it
        for pod, kind in zip(
            reversed([*pods(one(everything, "RayService"))]), ("worker", "head"), strict=True
        )
    )
    [spread] = workers(everything)["template"]["spec"]["topologySpreadConstraints"]
    for selector in (spread["labelSelector"], one(everything, "PodDisruptionBudget")["spec"]["selector"]):
        assert selects(selector, worker)
        assert not selects(selector, head)
    for kind, name in (
        ("NetworkPolicy", "ddpm-ray"),
        ("NetworkPolicy", "ddpm-ray-prometheus"),
        ("NetworkPolicy", "ddpm-hub"),
    ):
        assert selects(one(everything, kind, name)["spec"]["podSelector"], worker)
        assert selects(one(everything, kind, name)["spec"]["podSelector"], head)
    assert selects(one(everything, "PodMonitor")["spec"]["selector"], head)


def test_nothing_of_the_deployment_selects_the_pods(build):
    for manifest in build("cpu", "monitoring"):
        spec = manifest.get("spec", {})
        selector = (
            {"matchLabels": spec["selector"]} if manifest["kind"] == "Service" else spec.get("podSelector")
        )
        if selector:
            assert not selects(selector, {"app.kubernetes.io/name": "ddpm-ray"})


def test_ports_are_named_once_and_found(everything):
    names: dict[str, set[str]] = {}
    for name, template in templates(one(everything, "RayService")).items():
        ports = [port["name"] for port in container(template)["ports"]]
        assert len(ports) == len(set(ports))
        names[name] = set(ports)
    assert names["replicas"] == {"metrics", "serve"} < names["head"]
    scraped = [each["port"] for each in one(everything, "PodMonitor")["spec"]["podMetricsEndpoints"]]
    assert scraped == ["metrics", "serve"]
    let_in = {
        entry["port"]
        for name in ("ddpm-ray", "ddpm-ray-prometheus")
        for rule in one(everything, "NetworkPolicy", name)["spec"]["ingress"]
        for entry in rule.get("ports", [])
    }
    assert let_in == {"serve", "dashboard", "metrics"} <= names["head"]


def test_only_ray_and_its_operator_reach_rays_ports(everything):
    """Ray's dashboard runs programs for whoever asks, and its other ports trust everybody."""
    trusted = [
        {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "ddpm-ray"}}},
        {
            "namespaceSelector": {},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
        },
    ]
    for policy in (each for each in everything if each["kind"] == "NetworkPolicy"):
        if not selects(policy["spec"]["podSelector"], {"app.kubernetes.io/name": "ddpm-ray"}):
            continue
        for rule in policy["spec"].get("ingress", []):
            ports = {entry["port"] for entry in rule.get("ports", [])}
            assert (ports and ports <= {"serve", "metrics"}) or all(each in trusted for each in rule["from"])


def test_the_monitor_takes_the_fleet_once_under_the_job_that_the_alerts_select(everything):
    monitor = one(everything, "PodMonitor")["spec"]
    # Not a schema, which only the operator's own project has: the fields that are used, and no others.
    assert set(monitor) == {"selector", "podTargetLabels", "podMetricsEndpoints"}
    _, fleet = monitor["podMetricsEndpoints"]
    keep, job = fleet["relabelings"]
    assert (keep["action"], keep["regex"]) == ("keep", "head")
    assert keep["sourceLabels"] == ["__meta_kubernetes_pod_label_ray_io_node_type"]
    assert f'job="{job["replacement"]}"' in ALERTS.read_text()
    assert job["targetLabel"] == "job"
    # As docs/operations.md has it for Prometheus without the operator.
    document = (ROOT / "docs" / "operations.md").read_text()
    (block,) = re.findall(r"^```yaml\n(scrape_configs:.*?)^```", document, re.MULTILINE | re.DOTALL)
    (shown,) = yaml.safe_load(block)["scrape_configs"][0]["metric_relabel_configs"]
    (given,) = fleet["metricRelabelings"]
    names = {"source_labels": "sourceLabels", "target_label": "targetLabel"}
    assert given == {names.get(name, name): value for name, value in shown.items()}


def test_the_gpu_overlay_differs_in_what_it_says(build):
    texts = [one(build(each), "RayService")["spec"]["serveConfigV2"] for each in OVERLAYS]
    cpu, gpu = (yaml.safe_load(text) for text in texts)
    arguments = gpu["applications"][0]["args"]
    assert arguments.pop("num_gpus") == "1"
    assert arguments == cpu["applications"][0]["args"]
    assert {**cpu, "applications": []} == {**gpu, "applications": []}
    variables = [environment(build(each), workers(build(each))["template"]) for each in OVERLAYS]
    assert variables[1] == {**variables[0], "DDPM_DEVICE": "cuda"}
