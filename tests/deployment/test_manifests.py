"""What an operator deploys fits the tools that will read it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from app.problems import KINDS
from app.settings import Settings
from app.telemetry import Metrics
from tests.conftest import ROOT

TOOLS = Path(sys.executable).parent
COMPOSE = ("docker-compose.yml", "docker-compose.gpu.yml")
KUBERNETES = sorted(path.name for path in (ROOT / "kubernetes").glob("*.yaml"))
# Of the Prometheus operator and of kustomize: not in Kubernetes' own description.
ELSEWHERE = {"servicemonitor.yaml", "kustomization.yaml"}


def run(tool: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [TOOLS / tool, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_dockerfile_is_as_hadolint_wants_it(tmp_path: Path) -> None:
    run("hadolint", "docker/Dockerfile")
    unfit = tmp_path / "Dockerfile"
    unfit.write_text("FROM debian:latest\nRUN cd /tmp\n")
    with pytest.raises(AssertionError, match="DL3007"):
        run("hadolint", unfit)


def test_compose_files_fit_the_specification() -> None:
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *COMPOSE)


def test_every_container_is_locked_down() -> None:
    for name in COMPOSE:
        for service, is_ in load(name)["services"].items():
            if "image" not in is_ or (name == COMPOSE[1] and service == "mmtl"):
                continue  # the override adds to what the other file says
            assert is_["cap_drop"] == ["ALL"], service
            assert is_["security_opt"] == ["no-new-privileges:true"], service
            assert "mem_limit" in is_, service
            assert re.search(r":\D*\d+\.\d+|^mmtl:", is_["image"]), f"{service} is of no version"
        served = load(name)["services"]["mmtl"]
        assert served["memswap_limit"] == served["mem_limit"]  # no swap, which is a disk
    for service in load(COMPOSE[0])["services"].values():
        assert service["read_only"] is True


def test_what_compose_names_is_there_and_no_secret_is_in_git() -> None:
    for name in COMPOSE:
        found = load(name)
        for config in found.get("configs", {}).values():
            assert (ROOT / config["file"]).is_file()
        assert "docker/secrets/service" in (ROOT / COMPOSE[0]).read_text()
        for secret in [*found.get("secrets", {}).values(), {"file": "docker/secrets/service/x"}]:
            ignored = subprocess.run(["git", "check-ignore", "-q", secret["file"]], cwd=ROOT)
            assert ignored.returncode == 0


def variables() -> set[str]:
    return {f"MMTL_{name.upper()}" for name in Settings.model_fields}


def test_containers_are_given_settings_that_exist_and_time_to_drain() -> None:
    service = load(COMPOSE[0])["services"]["mmtl"]
    assert set(service["environment"]) <= variables()
    assert set(load(COMPOSE[1])["services"]["mmtl"]["environment"]) <= variables()
    pod = load("kubernetes/deployment.yaml")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {entry["name"] for entry in container["env"]} <= variables()
    longest = Settings().deadline_seconds + 5
    assert int(service["stop_grace_period"].removesuffix("s")) > longest
    assert pod["terminationGracePeriodSeconds"] > longest + 3  # and preStop
    assert pod["enableServiceLinks"] is False  # Kubernetes' MMTL_* are no settings


@pytest.mark.parametrize("name", [name for name in KUBERNETES if name not in ELSEWHERE])
def test_kubernetes_takes_the_manifest(name: str) -> None:
    run("kubernetes-validate", "--strict", f"kubernetes/{name}")


def test_kustomize_names_every_manifest() -> None:
    named = load("kubernetes/kustomization.yaml")["resources"]
    assert sorted(named) == [name for name in KUBERNETES if name != "kustomization.yaml"]


def test_selectors_meet() -> None:
    deployment = load("kubernetes/deployment.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    ports = {p["name"] for p in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    service = load("kubernetes/service.yaml")
    assert service["spec"]["selector"].items() <= labels.items()
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    monitor = load("kubernetes/servicemonitor.yaml")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {end["port"] for end in monitor["endpoints"]} <= {
        port["name"] for port in service["spec"]["ports"]
    }


def test_the_dashboard_asks_the_provisioned_source() -> None:
    (source,) = load("docker/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    dashboard = json.loads((ROOT / "docker/grafana/dashboards/mmtl.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == source["uid"]
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_rules_and_dashboards_ask_for_metrics_that_the_service_has() -> None:
    exposed = Metrics(8, KINDS).expose("text/plain")[0].decode()
    families = re.findall(r"^# TYPE (mmtl_\w+)", exposed, re.MULTILINE)
    parts = ("", "_total", "_sum", "_count", "_bucket")
    known = {family + part for family in families for part in parts}
    files = [path for folder in ("docker", "kubernetes") for path in (ROOT / folder).rglob("*.*")]
    asked = {
        name
        for path in files
        if path.suffix in (".yml", ".yaml", ".json") and "secrets" not in path.parts
        for name in re.findall(r"\bmmtl_[a-z_]+", path.read_text())
    }
    assert {"mmtl_ready", "mmtl_rejected_total"} <= asked <= known
