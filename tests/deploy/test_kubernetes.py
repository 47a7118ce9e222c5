"""deploy/kubernetes: valid, whole, and in agreement with the settings and the ports of what it runs."""

from __future__ import annotations

import re
import shutil
from base64 import b64decode
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from argrad_service.settings import Settings, variable
from tests.deploy.manifests import Document, containers, load, render
from tests.deploy.support import CADDYFILE, DEPLOY, ROOT

KUBERNETES = DEPLOY / "kubernetes"
VARIANTS = {"base": Path("base"), "gpu": Path("overlays") / "gpu"}
SECRETS = {
    "service/api-keys": f"first:{'0' * 64}\n",
    "service/ARGRAD_STATE_SECRET": "a secret of these tests\n",
    "service/ARGRAD_REDIS_URL": "redis://:a-password@argrad-redis:6379/0\n",
    "redis/redis.conf": "requirepass a-password\n",
}
"""What `make secrets` makes; tests of docker-compose.yml see that it does."""
OLDEST = "1.30"
"""The first version in which a preStop hook may sleep without a shell."""


@pytest.fixture(params=VARIANTS, scope="module")
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def documents(variant: str, tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    """The manifests with secrets made: ours, and not those that may be here."""
    deploy = tmp_path_factory.mktemp("rendered") / "deploy"
    shutil.copytree(DEPLOY, deploy, ignore=shutil.ignore_patterns("service", "redis"))
    for name, text in SECRETS.items():
        (deploy / "secrets" / name).parent.mkdir(exist_ok=True)
        (deploy / "secrets" / name).write_text(text)
    return render(deploy / "kubernetes" / VARIANTS[variant])


def the(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


def workloads(documents: list[Document]) -> dict[str, Document]:
    return {d["metadata"]["name"]: d for d in documents if d["kind"] == "Deployment"}


def labels(workload: Document) -> dict[str, str]:
    return workload["spec"]["template"]["metadata"]["labels"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("version", [OLDEST, "1.37"])
def test_every_manifest_is_valid(documents: list[Document], version: str):
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_validator_would_object(documents: list[Document]):
    broken = {**the(documents, "Deployment", "argrad"), "spec": {"replicas": "three"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, OLDEST, strict=True)


def test_every_file_is_in_a_kustomization():
    named = {path.resolve() for folder in _folders() for path in _named(folder)}
    there = {path.resolve() for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml"}
    assert there <= named


def _folders() -> list[Path]:
    return [*(KUBERNETES / variant for variant in VARIANTS.values()), DEPLOY / "caddy", DEPLOY / "secrets"]


def _named(folder: Any) -> list[Any]:
    (kustomization,) = load(folder / "kustomization.yaml")
    return [folder / name for name in kustomization.get("resources", [])] + [
        folder / patch["path"] for patch in kustomization.get("patches", [])
    ]


def test_everything_that_is_referred_to_is_there(documents: list[Document]):
    config_maps = {d["metadata"]["name"]: d["data"] for d in documents if d["kind"] == "ConfigMap"}
    secrets = {d["metadata"]["name"] for d in documents if d["kind"] == "Secret"}
    for workload in workloads(documents).values():
        pod = workload["spec"]["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for volume in pod.get("volumes", []):
            if "configMap" in volume:
                assert volume["configMap"]["name"] in config_maps
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets
        for container in containers(workload):
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in config_maps
            for entry in container.get("env", []):
                if reference := entry.get("valueFrom", {}).get("configMapKeyRef"):
                    assert reference["key"] in config_maps[reference["name"]]


def selected(documents: list[Document], selector: dict[str, str]) -> list[str]:
    """Names of the workloads whose pods a selector means."""
    return [name for name, own in workloads(documents).items() if selector.items() <= labels(own).items()]


def ports(documents: list[Document], name: str) -> set[str]:
    """Names of the ports of a workload."""
    return {port["name"] for c in containers(workloads(documents)[name]) for port in c["ports"]}


def test_services_and_policies_lead_to_ports_that_there_are(documents: list[Document]):
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            (name,) = selected(documents, spec["selector"])
            assert {port["targetPort"] for port in spec["ports"]} <= ports(documents, name)
        if document["kind"] == "NetworkPolicy":
            names = selected(documents, spec["podSelector"].get("matchLabels", {}))
            wanted = {port["port"] for rule in spec.get("ingress", []) for port in rule.get("ports", [])}
            assert names, document["metadata"]["name"]
            assert wanted <= ports(documents, names[0]), document["metadata"]["name"]


def test_budgets_and_scalers_mean_what_there_is(documents: list[Document]):
    budgets = [d["spec"] for d in documents if d["kind"] == "PodDisruptionBudget"]
    assert [selected(documents, spec["selector"]["matchLabels"]) for spec in budgets] == [["argrad"], ["argrad-proxy"]]
    for document in documents:
        if document["kind"] == "HorizontalPodAutoscaler":
            assert document["spec"]["scaleTargetRef"]["name"] in workloads(documents)
            target = the(documents, "Deployment", document["spec"]["scaleTargetRef"]["name"])
            assert "replicas" not in target["spec"], "two would set one number"


def test_pods_are_their_workload_s_and_probes_ask_ports_that_there_are(documents: list[Document]):
    for name, workload in workloads(documents).items():
        assert name in selected(documents, workload["spec"]["selector"]["matchLabels"])
        for container in containers(workload):
            probes = [container[p] for p in ("startupProbe", "livenessProbe", "readinessProbe") if p in container]
            asked = {p[how]["port"] for p in probes for how in ("httpGet", "tcpSocket") if how in p}
            assert probes
            assert asked <= ports(documents, name)


def test_the_settings_are_settings_and_the_ports_are_theirs(documents: list[Document]):
    given = the(documents, "ConfigMap", "argrad-settings")["data"]
    (container,) = containers(the(documents, "Deployment", "argrad"))
    names = {entry["name"] for entry in container["env"]} | set(given)
    assert names <= {variable(field) for field in Settings.model_fields}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert str(ports["metrics"]) == given["ARGRAD_METRICS_PORT"]
    assert re.search(r"ARGRAD_PORT=(\d+)", (ROOT / "Dockerfile").read_text())[1] == str(ports["http"])
    redis = the(documents, "Service", "argrad-redis")
    url = b64decode(the(documents, "Secret", "argrad-secrets")["data"]["ARGRAD_REDIS_URL"]).decode()
    assert url.strip().endswith(f"@argrad-redis:{redis['spec']['ports'][0]['port']}/0")


def test_there_is_time_to_drain(documents: list[Document]):
    given = the(documents, "ConfigMap", "argrad-settings")["data"]
    workload = the(documents, "Deployment", "argrad")
    pod = workload["spec"]["template"]["spec"]
    needed = float(given["ARGRAD_DRAIN_DELAY_S"]) + float(given["ARGRAD_SHUTDOWN_TIMEOUT_S"])
    assert pod["terminationGracePeriodSeconds"] >= needed + 10
    (container,) = containers(workload)
    assert "lifecycle" not in container, "SIGTERM drains"
    probe = container["readinessProbe"]
    assert float(given["ARGRAD_DRAIN_DELAY_S"]) >= probe["periodSeconds"] * probe["failureThreshold"] + 3


def test_probes_ask_what_they_should(documents: list[Document]):
    (container,) = containers(the(documents, "Deployment", "argrad"))
    assert container["startupProbe"]["httpGet"]["path"] == "/health/ready"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live", "a busy solver is not dead"


def test_every_pod_is_held_down(documents: list[Document]):
    namespace = the(documents, "Namespace", "argrad")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    users = {}
    for name, workload in workloads(documents).items():
        pod = workload["spec"]["template"]["spec"]
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        users[name] = context["runAsUser"]
        for container in containers(workload):
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    assert f"USER {users['argrad']}:" in (ROOT / "Dockerfile").read_text()
    assert f"USER {users['argrad-proxy']}:" in (DEPLOY / "caddy" / "Dockerfile").read_text()


def test_secrets_are_files_and_nowhere_else(documents: list[Document]):
    found = {d["metadata"]["name"]: set(d["data"]) for d in documents if d["kind"] == "Secret"}
    assert found == {
        "argrad-secrets": {"api-keys", "ARGRAD_STATE_SECRET", "ARGRAD_REDIS_URL"},
        "argrad-redis": {"redis.conf"},
    }
    others = str([d for d in documents if d["kind"] != "Secret"])
    assert "a secret of these tests" not in others
    assert "a-password" not in others
    given = the(documents, "ConfigMap", "argrad-settings")["data"]
    for name, secret, folder in (
        ("argrad", "argrad-secrets", given["ARGRAD_SECRETS_DIR"]),
        ("argrad-redis", "argrad-redis", "/etc/redis"),
    ):
        workload = the(documents, "Deployment", name)
        (container,) = containers(workload)
        (volume,) = [v for v in workload["spec"]["template"]["spec"]["volumes"] if "secret" in v]
        (mount,) = [m for m in container["volumeMounts"] if m["name"] == volume["name"]]
        assert volume["secret"] == {"secretName": secret, "defaultMode": 0o440}, "its group's, which is fsGroup"
        assert mount == {"name": volume["name"], "mountPath": folder, "readOnly": True}, "a folder: changes are seen"
        context = workload["spec"]["template"]["spec"]["securityContext"]
        assert context["fsGroup"] == context["runAsGroup"]
        assert "secretKeyRef" not in str(container)
    assert given["ARGRAD_API_KEYS_FILE"] == f"{given['ARGRAD_SECRETS_DIR']}/api-keys"


def test_only_callers_of_the_proxy_come_from_outside(documents: list[Document]):
    policies = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "NetworkPolicy"}
    assert policies["nobody"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    open_to_all = {name for name, spec in policies.items() if any("from" not in r for r in spec.get("ingress", []))}
    assert open_to_all == {"proxy"}


def test_the_proxy_is_that_of_the_other_deployments_and_finds_ready_replicas(documents: list[Document]):
    assert the(documents, "ConfigMap", "argrad-caddyfile")["data"]["Caddyfile"] == CADDYFILE.read_text()
    (container,) = containers(the(documents, "Deployment", "argrad-proxy"))
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    asked = set(re.findall(r"\{\$([A-Z_]+)", CADDYFILE.read_text()))
    assert set(env) <= asked
    replicas = the(documents, "Service", env["ARGRAD_UPSTREAM"])
    assert replicas["spec"]["clusterIP"] == "None", "one address a replica"
    assert not replicas["spec"].get("publishNotReadyAddresses")
    (port,) = [p["port"] for p in replicas["spec"]["ports"] if p["name"] == "http"]
    assert f"ARGRAD_UPSTREAM_PORT:{port}}}" in CADDYFILE.read_text()


def test_a_gpu_for_each_replica_in_the_overlay_and_none_elsewhere(documents: list[Document], variant: str):
    (container,) = containers(the(documents, "Deployment", "argrad"))
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    scalers = [d for d in documents if d["kind"] == "HorizontalPodAutoscaler"]
    expected = {"base": ("argrad:cpu", "cpu", None, 1), "gpu": ("argrad:cuda", "cuda", "1", 0)}[variant]
    assert (container["image"], env["ARGRAD_DEVICE"], gpus, len(scalers)) == expected
    assert "ARGRAD_TORCH_THREADS" in env, "a patch adds to what there is"


def test_redis_is_told_the_same_as_in_docker_compose(documents: list[Document]):
    from ruamel.yaml import YAML

    (container,) = containers(the(documents, "Deployment", "argrad-redis"))
    composed = YAML(typ="safe").load(ROOT / "docker-compose.yml")["services"]["redis"]
    assert container["args"] == composed["command"]
    assert container["image"] == composed["image"]
