import asyncio
import socket
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from app.keys import create_key
from app.main import create_app
from app.settings import Settings
from app.siblings import RELOADED, Siblings, merge_metrics
from tests.lesions import flat

pytestmark = pytest.mark.anyio


def registry(count: int) -> CollectorRegistry:
    made = CollectorRegistry()
    Counter("images", "Of {all} kinds.", ("outcome",), registry=made).labels('o"k}').inc(count)
    Gauge("ready", "1 or 0.", registry=made).set(1)
    Histogram("seconds", "Of work.", buckets=(1,), registry=made).observe(
        count, {"trace_id": "a" * 32}
    )
    return made


def test_metrics_of_several_processes_are_one_exposition_that_tells_them_apart() -> None:
    text = merge_metrics({1: generate_latest(registry(5)), 0: generate_latest(registry(2))})
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }
    assert found["images_total", ("outcome", 'o"k}'), ("process", "0")] == 2
    assert found["images_total", ("outcome", 'o"k}'), ("process", "1")] == 5
    assert found["ready", ("process", "1")] == 1
    assert found["seconds_bucket", ("le", "+Inf"), ("process", "0")] == 1
    assert text.count(b"# TYPE images_total") == 1


def test_openmetrics_keep_their_exemplars_and_end_once() -> None:
    texts = {n: openmetrics.generate_latest(registry(n)) for n in (0, 1)}
    text = merge_metrics(texts).decode()
    assert text.endswith("# EOF\n")
    assert text.count("# EOF") == 1
    families = list(openmetrics_parser.text_string_to_metric_families(text))
    exemplars = [s.exemplar for f in families for s in f.samples if s.exemplar]
    assert len(exemplars) == 2


async def test_the_others_are_asked_and_one_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    async def number(about: str) -> bytes:
        return f"{about}!".encode()

    go_on = asyncio.Event()

    async def late(_: str) -> bytes:
        await go_on.wait()
        return b""

    first, second, third = (Siblings(tmp_path, n, 3) for n in range(3))
    await first.listen({"say": number})
    await second.listen({"say": number})
    await third.listen({"say": late})
    assert await first.ask("say", "text/plain; q=1", 0.2) == {1: b"text/plain; q=1!"}
    second.close()
    assert not (tmp_path / "1.socket").exists()
    assert await first.ask("say", "a", 0.2) == {}
    with socket.socket(socket.AF_UNIX) as left:  # by one that died
        left.bind(str(tmp_path / "1.socket"))
    again = Siblings(tmp_path, 1, 3)
    await again.listen({"say": number})
    assert await first.ask("say", "b", 0.2) == {1: b"b!"}
    assert await first.ask("what", "b", 0.2) == {}
    go_on.set()
    for each in (first, again, third):
        each.close()
    await asyncio.sleep(0.01)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_question_may_be_as_long_as_headers_are(tmp_path: Path) -> None:
    async def repeat(about: str) -> bytes:
        return str(len(about)).encode()

    one, other = (Siblings(tmp_path, number, 2) for number in range(2))
    await other.listen({"repeat": repeat})
    try:
        assert await one.ask("repeat", "é" * 100_000, 5) == {1: b"100000"}
    finally:
        other.close()


def test_two_processes_tell_the_metrics_of_both_and_reload_together(
    settings: Settings, tmp_path: Path
) -> None:
    apps = [create_app(settings, Siblings(tmp_path, n, 2)) for n in (0, 1)]
    with TestClient(apps[0]) as first, TestClient(apps[1]) as second:
        assert first.get("/health/ready").status_code == 200  # it began when it was warm
        for client, times in ((first, 1), (second, 2)):
            for _ in range(times):
                answer = client.post("/predict", files=[("files", ("a.png", flat(9)))])
                assert answer.status_code == 200
        for client in (first, second):
            text = client.get("/metrics").text
            assert 'mmtl_images_total{process="0",outcome="ok"} 1.0' in text
            assert 'mmtl_processes{process="0"} 2.0' in text
            assert 'mmtl_images_total{process="1",outcome="ok"} 2.0' in text
        before = [app.state.networks.current for app in apps]
        asked = apps[0].state.siblings.ask("reload", "", 30)
        assert first.portal is not None
        assert first.portal.call(lambda: asked) == {1: RELOADED}
        assert apps[1].state.networks.current is not before[1]
        assert apps[0].state.networks.current is before[0]


def test_a_reload_says_which_processes_did_not_take_the_bundle(
    bundle_folder: Path, tmp_path: Path
) -> None:
    key = create_key(tmp_path / "keys.json", "admin", ("admin",), None)
    settings = Settings(bundle=bundle_folder, keys=tmp_path / "keys.json", threads=1)
    apps = [create_app(settings, Siblings(tmp_path, n, 3)) for n in (0, 1)]
    with TestClient(apps[0]) as first, TestClient(apps[1]):
        answer = first.post("/admin/reload", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 409
        assert answer.json()["title"] == "Not every process took the bundle"
        assert answer.json()["detail"] == (
            "2 of 3 processes have it, and answer by it. Ask again. Not so process 2: no answer"
        )
        with TestClient(create_app(settings, Siblings(tmp_path, 2, 3))):
            for _ in range(50):  # what they loaded before may still end
                answer = first.post("/admin/reload", headers={"Authorization": f"Bearer {key}"})
                if answer.status_code == 200:
                    break
                time.sleep(0.1)
            assert answer.json()["version"] == "1.2.3"


def test_a_process_takes_no_connection_before_it_is_warm_and_may(
    settings: Settings, tmp_path: Path
) -> None:
    asked: list[bool] = []

    def may_listen() -> bool:
        asked.append(app.state.networks.current.batcher.ready)
        return len(asked) == 3

    app = create_app(settings, Siblings(tmp_path, 0, 2), may_listen)
    with TestClient(app) as client:
        assert asked == [True] * 3
        assert client.get("/health/ready").status_code == 200
