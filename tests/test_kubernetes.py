"""The manifests are valid, agree with each other, and agree with the service and its image."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import kubernetes_validate  # type: ignore[import-untyped]  # has no annotations
import pytest
import yaml

from service.server import FLUSH_S
from service.settings import Settings
from tests.manifests import COMPONENTS as ALL_COMPONENTS
from tests.manifests import FOLDER, ROOT, Manifest, builder, needs_kubectl, one, read, selects
from tests.prometheus_rule import ALERTS, RULE, prometheus_rule

DOCKERFILE = (ROOT / "Dockerfile").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
ADAPTER = FOLDER / "components" / "autoscaling" / "prometheus-adapter-values.yaml"
MANIFESTS = sorted(
    path for path in FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml" and path != ADAPTER
)
OVERLAYS = ("cpu", "gpu")
# The others are those of the RayService: test_ray_service.py.
COMPONENTS = tuple(name for name in ALL_COMPONENTS if not name.startswith("ray-"))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function that builds an overlay with components, as an overlay of the reader's own would."""
    return builder(tmp_path_factory)


@pytest.fixture(scope="module", params=OVERLAYS)
def everything(request, build):
    """An overlay with all components."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine")
    return build(request.param, *COMPONENTS)


def pod(manifests: list[Manifest]) -> Manifest:
    template: Manifest = one(manifests, "Deployment")["spec"]["template"]
    return template


def container(manifests: list[Manifest]) -> Manifest:
    [found] = pod(manifests)["spec"]["containers"]
    return dict(found)


def environment(manifests: list[Manifest]) -> dict[str, str]:
    """What the pod's settings are, from its generated ConfigMap."""
    settings = one(manifests, "ConfigMap")
    assert {"configMapRef": {"name": settings["metadata"]["name"]}} in container(manifests)["envFrom"]
    return dict(settings["data"])


def image_environment(name: str) -> str:
    match = re.search(rf"\b{name}=(\S+)", DOCKERFILE)
    assert match is not None
    return match[1]


# ----------------------------------------------------------------------------------------------------
# Files: all of them are used, and valid by themselves. This needs no kubectl.


def named_files(kustomization: Path) -> Iterator[Path]:
    content = read(kustomization)
    for name in (
        content.get("resources", []) + content.get("components", []) + content.get("configurations", [])
    ):
        yield (kustomization.parent / name).resolve()
    for patch in content.get("patches", []):
        if "path" in patch:
            yield (kustomization.parent / patch["path"]).resolve()


def test_kustomizations_name_every_file_and_no_other():
    named = {path for file in FOLDER.rglob("kustomization.yaml") for path in named_files(file)}
    assert {path for path in named if not path.exists()} == set()
    assert {path for path in named if path.is_file()} == {path.resolve() for path in MANIFESTS}


def of_kubernetes(manifests: list[Manifest]) -> list[Manifest]:
    """Those whose kind Kubernetes itself defines."""
    others = "monitoring.coreos.com/", "ray.io/"
    return [manifest for manifest in manifests if not manifest["apiVersion"].startswith(others)]


def written_out() -> list[Manifest]:
    contents = [read(path) for path in MANIFESTS]
    return of_kubernetes([each for each in contents if isinstance(each, dict) and "kind" in each])


# The oldest release that is meant to work, and the newest one with a schema.
RELEASES = ("1.30", kubernetes_validate.latest_version())


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("manifest", written_out(), ids=lambda m: f"{m['kind']}/{m['metadata']['name']}")
def test_a_manifest_is_valid(manifest, release):
    kubernetes_validate.validate(manifest, release, strict=True)


def test_a_misspelt_field_is_not_valid():
    broken = deepcopy(read(FOLDER / "base" / "deployment.yaml"))
    broken["spec"]["template"]["spec"]["enableServicelinks"] = False
    with pytest.raises(kubernetes_validate.ValidationError, match="enableServicelinks"):
        kubernetes_validate.validate(broken, RELEASES[0], strict=True)


def test_the_prometheus_rule_has_the_alerts():
    assert RULE.read_text() == prometheus_rule(ALERTS.read_text()), "run `make rules`"
    assert read(RULE)["spec"] == read(ALERTS)


# ----------------------------------------------------------------------------------------------------
# Overlays, with and without components.


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("components", [(), *((name,) for name in COMPONENTS), COMPONENTS], ids="+".join)
def test_a_combination_is_valid(build, overlay, components):
    manifests = build(overlay, *components)
    kinds = [manifest["kind"] for manifest in manifests]
    assert ("ServiceMonitor" in kinds) == ("monitoring" in components)
    assert ("HorizontalPodAutoscaler" in kinds) == ("autoscaling" in components)
    for manifest in of_kubernetes(manifests):
        for release in RELEASES:
            kubernetes_validate.validate(manifest, release, strict=True)


def test_every_selector_matches_the_pods(everything):
    labels = pod(everything)["metadata"]["labels"]
    deployment = one(everything, "Deployment")["spec"]
    [spread] = pod(everything)["spec"]["topologySpreadConstraints"]
    budget = one(everything, "PodDisruptionBudget")["spec"]
    policies = [manifest["spec"] for manifest in everything if manifest["kind"] == "NetworkPolicy"]
    selectors = [
        deployment["selector"],
        spread["labelSelector"],
        budget["selector"],
        {"matchLabels": one(everything, "Service")["spec"]["selector"]},
        *(policy["podSelector"] for policy in policies),
    ]
    assert len(policies) == 3
    assert all(selects(selector, labels) for selector in selectors)


def test_ports_are_named_once_and_found(everything):
    [port] = container(everything)["ports"]
    assert port["name"] == "http"
    assert str(port["containerPort"]) == image_environment("DDPM_PORT")
    service = one(everything, "Service")["spec"]
    assert [entry["targetPort"] for entry in service["ports"]] == ["http"]
    [scraped] = one(everything, "ServiceMonitor")["spec"]["endpoints"]
    assert scraped["port"] in {entry["name"] for entry in service["ports"]}
    let_in = [
        entry["port"]
        for manifest in everything
        if manifest["kind"] == "NetworkPolicy"
        for rule in manifest["spec"].get("ingress", [])
        for entry in rule["ports"]
    ]
    assert let_in == ["http", "http"]


def test_probes_and_scrapes_ask_for_routes_that_exist(everything):
    from service.app import create_app

    routes = create_app(Settings(_env_file=None)).openapi()["paths"]
    served = container(everything)
    paths = {name: served[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}
    [scraped] = one(everything, "ServiceMonitor")["spec"]["endpoints"]
    assert {*paths.values(), scraped["path"]} <= set(routes)


# ----------------------------------------------------------------------------------------------------
# The service's settings, and its image.


def test_every_setting_exists_and_is_accepted(everything, monkeypatch):
    values = environment(everything)
    separate = container(everything)["env"]
    assert [entry["name"] for entry in separate] == ["DDPM_API_KEYS"]
    assert "optional" not in separate[0]["valueFrom"]["secretKeyRef"]  # no keys, no start
    known = {f"DDPM_{name}".upper() for name in Settings.model_fields}
    assert set(values) <= known
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    Settings(_env_file=None)


def test_the_grace_covers_a_drain(everything):
    delay = container(everything)["lifecycle"]["preStop"]["exec"]["command"]
    assert delay[0] == "sleep"
    grace = pod(everything)["spec"]["terminationGracePeriodSeconds"]
    drain = float(environment(everything)["DDPM_DRAIN_S"])
    assert grace >= float(delay[1]) + drain + 2 * FLUSH_S + 5


def test_endpoints_are_gone_before_sigterm(everything):
    served = container(everything)
    readiness = served["readinessProbe"]
    assert float(served["lifecycle"]["preStop"]["exec"]["command"][1]) >= readiness["periodSeconds"]


def test_links_of_services_set_none_of_our_variables(everything):
    assert pod(everything)["spec"]["enableServiceLinks"] is False
    for manifest in everything:
        if manifest["kind"] == "Service":
            prefix = manifest["metadata"]["name"].upper().replace("-", "_")
            links = {f"{prefix}_PORT", f"{prefix}_SERVICE_HOST", f"{prefix}_SERVICE_PORT"}
            assert links.isdisjoint(f"DDPM_{name}".upper() for name in Settings.model_fields)


def test_the_pod_is_as_locked_down_as_the_container_of_compose(everything):
    spec, served = pod(everything)["spec"], container(everything)
    user = re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert user is not None
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": int(user[1]),
        "runAsGroup": int(user[2]),
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert served["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)


def test_only_caches_are_writable(everything):
    mounts = {
        mount["mountPath"]: mount.get("readOnly", False) for mount in container(everything)["volumeMounts"]
    }
    assert mounts == {"/tmp": False, "/cache": False, "/models": True}
    assert image_environment("HF_HOME").startswith("/cache/")
    assert image_environment("XDG_CACHE_HOME").startswith("/tmp/")
    volumes = {volume.pop("name"): volume for volume in deepcopy(pod(everything)["spec"]["volumes"])}
    assert volumes["models"] == {"persistentVolumeClaim": {"claimName": "ddpm-models", "readOnly": True}}
    assert all("sizeLimit" in volumes[name]["emptyDir"] for name in ("tmp", "cache"))


@needs_kubectl
def test_each_overlay_takes_its_image(build):
    gpu = read(ROOT / "docker" / "compose.gpu.yml")["services"]["ddpm"]["image"]
    assert container(build("cpu"))["image"] == f"ddpm-service:{VERSION}"
    assert container(build("gpu"))["image"] == f"ddpm-service:{VERSION}-cuda" == gpu


@needs_kubectl
def test_a_gpu_is_asked_for_and_used(build):
    assert container(build("gpu"))["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert environment(build("gpu"))["DDPM_DEVICE"] == "cuda"
    assert "nvidia.com/gpu" not in container(build("cpu"))["resources"]["limits"]
    assert "DDPM_DEVICE" not in environment(build("cpu"))


def test_the_memory_holds_what_is_in_memory_and_more(everything):
    resources = container(everything)["resources"]
    assert "cpu" not in resources["limits"]  # throttling one thread of a network call holds up the others
    assert set(resources["requests"]) >= {"cpu", "memory"}
    assert int(resources["limits"]["memory"].removesuffix("Gi")) >= 4


# ----------------------------------------------------------------------------------------------------
# Rollouts, autoscaling, monitoring.


def test_a_rollout_takes_no_pod_away_before_the_next_is_ready(everything):
    strategy = one(everything, "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 1, "maxUnavailable": 0}


@needs_kubectl
def test_the_autoscaler_alone_sets_the_replicas(build):
    assert one(build("cpu"), "Deployment")["spec"]["replicas"] == 2
    scaled = build("cpu", "autoscaling")
    assert "replicas" not in one(scaled, "Deployment")["spec"]
    target = one(scaled, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "ddpm"}


def test_the_autoscaler_reads_a_gauge_that_the_adapter_provides(everything):
    from service.telemetry import Telemetry

    gauges = {family.name for family in Telemetry().registry.collect() if family.type == "gauge"}
    [metric] = one(everything, "HorizontalPodAutoscaler")["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in gauges
    [rule] = read(ADAPTER)["rules"]["custom"]
    # Without a `name`, the adapter takes the series' own.
    assert rule["seriesQuery"].partition("{")[0] == name
    assert "name" not in rule


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on this machine")
def test_the_adapters_query_is_promql(tmp_path):
    [rule] = read(ADAPTER)["rules"]["custom"]
    query = rule["metricsQuery"]
    for template, value in (
        ("<<.Series>>", "ddpm_samples_waiting"),
        ("<<.LabelMatchers>>", 'namespace="a",pod=~"b|c"'),
        ("<<.GroupBy>>", "pod"),
    ):
        query = query.replace(template, value)
    assert "<<" not in query
    for text, code in ((query, 0), (query + ")", 1)):
        file = tmp_path / f"{code}.yml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "a", "rules": [{"record": "b", "expr": text}]}]}))
        checked = subprocess.run(
            ["promtool", "check", "rules", file], capture_output=True, text=True, check=False, timeout=60
        )
        assert checked.returncode == code, checked.stderr


def test_the_monitor_names_the_job_that_the_alerts_select(everything):
    monitor, service = one(everything, "ServiceMonitor")["spec"], one(everything, "Service")["metadata"]
    # Not a schema, which only the operator's own project has: the fields that are used, and no others.
    assert set(monitor) == {"jobLabel", "selector", "endpoints"}
    assert set(monitor["endpoints"][0]) == {"port", "path", "interval"}
    assert monitor["selector"]["matchLabels"].items() <= service["labels"].items()
    job = service["labels"][monitor["jobLabel"]]
    selected = set(re.findall(r'job="([^"]+)"', ALERTS.read_text()))
    assert selected == {job}
