"""A real Prometheus scrapes the service, and what it is asked for is there.

Debian's package `prometheus` brings both programs; where they are not, these tests are skipped.
"""

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from fastapi.testclient import TestClient
from numpy.typing import NDArray

from app.engines.onnx import OnnxEngine
from app.keys import create_key
from app.main import create_app
from app.server import Server
from app.settings import Settings
from models.bundle import Outputs
from tests.bundles import make_bundle
from tests.conftest import ROOT
from tests.lesions import flat

RULES = ROOT / "docker" / "prometheus"
IMAGES = 40
pytestmark = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")),
    reason="Prometheus is not installed",
)


def promtool(*arguments: str, text: str | None = None) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=RULES, input=text, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_and_the_rules_are_prometheus_s() -> None:
    promtool("check", "config", "--syntax-only", "prometheus.yml")
    promtool("check", "rules", "alerts.yml")


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    tests = ("alerts.test.yml", "drift.test.yml")
    promtool("test", "rules", *tests)
    rules = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"][0]["rules"]
    cases = [case for name in tests for case in yaml.safe_load((RULES / name).read_text())["tests"]]
    fired = {
        case["alertname"]
        for test in cases
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in rules if "alert" in rule}


def test_the_metrics_are_as_prometheus_wants_them(client: TestClient) -> None:
    client.post("/predict", files={"files": flat(1)})
    promtool("check", "metrics", text=client.get("/metrics").text)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Prometheus:
    """On a free port, scraping one target every second with a key."""

    def __init__(self, folder: Path, target: int, key: str, rules: Path = RULES / "alerts.yml"):
        self.port = free_port()
        config = yaml.safe_load((RULES / "prometheus.yml").read_text())
        (folder / "key").write_text(key)
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(rules)]
        (job,) = [job for job in config["scrape_configs"] if job["job_name"] == "mmtl"]
        job["authorization"]["credentials_file"] = str(folder / "key")
        job["static_configs"] = [{"targets": [f"127.0.0.1:{target}"]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            stderr=self.log,
        )

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{query}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)["data"]

    def ask(self, expression: str) -> list[Any]:
        return self.get("query", query=expression)["result"]

    def until(self, expression: str, seconds: float = 30) -> float:
        """Wait for an answer other than none and zero."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                found = self.ask(expression)
            except OSError:
                found = []  # it still starts
            if found and float(found[0]["value"][1]):
                return float(found[0]["value"][1])
            time.sleep(0.2)
        raise AssertionError(f"{expression} stays empty")


@pytest.fixture(scope="module")
def scraped(
    tmp_path_factory: pytest.TempPathFactory, bundle_folder: Path
) -> Iterator[tuple[Prometheus, dict[str, str]]]:
    """Of a service that has answered IMAGES pictures, one text and a path that is not there."""
    folder = tmp_path_factory.mktemp("prometheus")
    keys = folder / "keys.json"
    key = create_key(keys, "prometheus", ("metrics",), None)
    headers = {"Authorization": "Bearer " + create_key(keys, "tool", ("predict",), None)}
    settings = Settings(bundle=bundle_folder, port=free_port(), keys=keys, threads=1)
    server = Server(create_app(settings), settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    prometheus = Prometheus(folder, settings.port, key)
    try:
        prometheus.until("mmtl_ready")

        def post(body: bytes) -> None:
            url = f"http://127.0.0.1:{settings.port}/predict"
            headed = {**headers, "Content-Type": "image/png"}
            with urllib.request.urlopen(urllib.request.Request(url, body, headed), timeout=10):
                pass

        with ThreadPoolExecutor(4) as pool:
            for half in (0, 1):  # with a scrape between, so that rates can be seen
                list(pool.map(post, [flat(value) for value in range(half, IMAGES, 2)]))
                time.sleep(2.5)
        yield prometheus, headers
    finally:
        prometheus.process.terminate()
        server.should_exit = True
        thread.join(20)
        prometheus.process.wait(20)
        prometheus.log.close()


def test_the_numbers_come_back(scraped: tuple[Prometheus, dict[str, str]]) -> None:
    prometheus, _ = scraped
    assert prometheus.until('mmtl_images_total{outcome="ok"}') == IMAGES
    assert prometheus.until("mmtl_melanoma_probability_count") == IMAGES
    status = 'mmtl_http_request_duration_seconds_count{route="/predict", status="200"}'
    assert prometheus.until(status) == IMAGES
    assert prometheus.until("sum(mmtl_batch_size_sum)") == IMAGES
    assert prometheus.until("mmtl_queue_limit") == 256


def test_every_panel_of_the_dashboard_has_something_to_show(
    scraped: tuple[Prometheus, dict[str, str]],
) -> None:
    prometheus, _ = scraped
    dashboard = json.loads((ROOT / "docker/grafana/dashboards/mmtl.json").read_text())
    asked = 0
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            expression = (
                target["expr"].replace("$__rate_interval", "30s").replace("$instance", ".*")
            )
            # The test's bundle has no such heads.
            if re.search(r'task="(sex|diagnosis)"', expression):
                continue
            assert prometheus.ask(expression), f"{panel['title']}: {expression}"
            asked += 1
    assert asked > 20


def test_the_rules_can_be_evaluated(scraped: tuple[Prometheus, dict[str, str]]) -> None:
    prometheus, _ = scraped
    (group,) = prometheus.get("rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert not [rule for rule in group["rules"] if rule.get("state") == "firing"]


def firing(prometheus: Prometheus, name: str) -> bool:
    return any(
        alert["labels"]["alertname"] == name and alert["state"] == "firing"
        for alert in prometheus.get("alerts")["alerts"]
    )


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_alerts_fire_for_a_service_that_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped rules, but for how long a condition has to last."""
    hangs = threading.Event()
    run = OnnxEngine._run

    def hang(
        engine: OnnxEngine, session: onnxruntime.InferenceSession, images: NDArray[np.uint8]
    ) -> Outputs:
        if images.any() and hangs.is_set():
            hangs.clear()
            threading.Event().wait(30)
        return run(engine, session, images)

    monkeypatch.setattr(OnnxEngine, "_run", hang)
    bundle = make_bundle(tmp_path / "bundle").folder
    keys = tmp_path / "keys.json"
    key = create_key(keys, "all", ("predict", "metrics", "admin"), None)
    rules = tmp_path / "alerts.yml"
    rules.write_text(re.sub(r"for: \d+[mh]", "for: 1s", (RULES / "alerts.yml").read_text()))
    settings = Settings(bundle=bundle, port=free_port(), keys=keys, threads=1, hang_seconds=0.5)
    server = Server(create_app(settings), settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    prometheus = Prometheus(tmp_path, settings.port, key, rules)
    url = f"http://127.0.0.1:{settings.port}"
    headers = {"Authorization": f"Bearer {key}"}

    def post(path: str, body: bytes = b"") -> int:
        headed = {**headers, "Content-Type": "image/png"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url + path, body, headed), timeout=20
            ) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    try:
        prometheus.until("mmtl_ready")
        assert prometheus.until("count(mmtl_network_replacements_total)") == 1
        until(lambda: not prometheus.get("alerts")["alerts"])  # nor is the target missing any more
        hangs.set()
        assert post("/predict", flat(1)) == 503
        until(lambda: post("/predict", flat(1)) == 200)
        until(lambda: firing(prometheus, "MmtlNetworkReplaced"))
        (bundle / "model.onnx").write_bytes(b"damaged")
        assert post("/admin/reload") == 409
        until(lambda: firing(prometheus, "MmtlReloadRefused"))
        server.should_exit = True
        thread.join(20)
        until(lambda: firing(prometheus, "MmtlNotReady"))
    finally:
        server.should_exit = True
        thread.join(20)
        prometheus.process.terminate()
        prometheus.process.wait(20)
        prometheus.log.close()
