"""One network takes the place of another: by a reload, or where a worker hangs."""

import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from app import engines
from app.batcher import Batcher, Draining
from app.engines.onnx import OnnxEngine
from app.keys import create_key
from app.main import create_app
from app.networks import Network, Networks, ReloadError
from app.settings import Settings
from models.bundle import BundleError
from models.threads import begin
from tests.bundles import make_bundle
from tests.conftest import started
from tests.lesions import flat

HANGS = 200


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle").folder


@pytest.fixture
def headers(tmp_path: Path) -> dict[str, str]:
    key = create_key(tmp_path / "keys.json", "operator", ("predict", "metrics", "admin"), None)
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def client(folder: Path, tmp_path: Path, headers: dict[str, str]) -> Iterator[TestClient]:
    settings = Settings(
        bundle=folder, keys=tmp_path / "keys.json", threads=1, hang_seconds=0.3, max_batch=2
    )
    with started(settings) as running:
        running.headers.update(headers)
        yield running


def predict(client: TestClient, red: int = 1):
    return client.post("/predict", files={"files": flat(red)})


def metric(client: TestClient, name: str) -> float:
    (line,) = [x for x in client.get("/metrics").text.splitlines() if x.startswith(name)]
    return float(line.split()[-1])


def test_a_reload_serves_the_new_bundle(client: TestClient, folder: Path) -> None:
    assert predict(client).headers["X-Model-Version"] == "1.2.3"
    make_bundle(folder, version="1.3.0")
    assert client.post("/admin/reload").json()["version"] == "1.3.0"
    answer = predict(client)
    assert answer.headers["X-Model-Version"] == "1.3.0" == answer.json()["model"]["version"]
    assert client.get("/model").json()["version"] == "1.3.0"
    assert metric(client, 'mmtl_reloads_total{outcome="switched"}') == 1
    assert metric(client, "mmtl_model_info{") == 1  # a single line
    assert 'version="1.3.0"' in client.get("/metrics").text
    assert metric(client, "mmtl_ready") == 1


def test_what_is_admitted_to_a_network_that_retires_is_in_the_queue_still(
    client: TestClient, folder: Path
) -> None:
    with client.app.state.networks.current.batcher.reserve(2):
        make_bundle(folder, version="1.3.0")
        assert client.post("/admin/reload").json()["version"] == "1.3.0"
        assert metric(client, "mmtl_queue_depth") == 2
    assert metric(client, "mmtl_queue_depth") == 0


def test_no_request_fails_while_networks_change(client: TestClient, folder: Path) -> None:
    stop = threading.Event()

    def ask(red: int) -> list[tuple[int, str, str, float]]:
        found = []
        while not stop.is_set():
            answer = predict(client, red)
            body = answer.json()
            found.append(
                (
                    answer.status_code,
                    answer.headers["X-Model-Version"],
                    body["model"]["version"],
                    body["results"][0]["prediction"]["melanoma"]["probability"],
                )
            )
        return found

    with ThreadPoolExecutor(3) as pool:
        asked = {red: pool.submit(ask, red) for red in (100, 128, 156)}
        for number in range(4):
            make_bundle(folder, version=f"2.0.{number}")
            deadline = time.monotonic() + 10
            while client.post("/admin/reload").status_code == 409:  # the last one still ends
                assert time.monotonic() < deadline
        stop.set()
    answers = {red: found.result() for red, found in asked.items()}
    everything = [answer for found in answers.values() for answer in found]
    assert {status for status, *_ in everything} == {200}
    assert all(header == body for _, header, body, _ in everything)
    assert len({version for _, version, *_ in everything}) > 1
    for red, found in answers.items():
        expected = 1 / (1 + np.exp(-(red - 128) / 16))
        assert all(abs(probability - expected) < 0.01 for *_, probability in found)


def test_networks_that_each_look_broken_once_are_not_replaced(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = client.app.state.networks
    looked_at: list[Batcher] = []
    replaced: list[Batcher] = []

    def broken_at_first_sight(batcher: Batcher, _: float) -> bool:
        looked_at.append(batcher)
        with suppress(ReloadError):  # the one before still ends
            networks.reload()
        return looked_at.count(batcher) == 1

    def replace(broken: Batcher) -> bool:
        replaced.append(broken)
        return True

    monkeypatch.setattr(Batcher, "broken", broken_at_first_sight)
    monkeypatch.setattr(networks, "_replace", replace)
    deadline = time.monotonic() + 20
    while len(set(looked_at)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not replaced


def test_a_request_that_meets_a_network_just_retired_is_given_to_its_successor(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = client.app.state.networks
    old = networks.current
    reserve = Batcher.reserve

    def reload_first(batcher: Batcher, count: int, *rest: float):
        if batcher is old.batcher and networks.current is old:
            networks.reload()
            while batcher.alive:
                time.sleep(0.01)
        return reserve(batcher, count, *rest)

    monkeypatch.setattr(Batcher, "reserve", reload_first)
    assert predict(client).status_code == 200
    assert networks.current is not old


def test_a_bundle_that_does_not_fit_is_refused_and_the_old_one_stays(
    client: TestClient, folder: Path
) -> None:
    (folder / "model.onnx").write_bytes(b"damaged")
    refused = client.post("/admin/reload")
    assert refused.status_code == 409
    assert refused.json()["type"] == "urn:mmtl:problem:reload-refused"
    assert "model.onnx" in refused.json()["detail"]
    assert predict(client).status_code == 200
    assert metric(client, 'mmtl_reloads_total{outcome="refused"}') == 1


def test_a_bundle_that_answers_otherwise_than_it_was_made_to_is_refused(
    client: TestClient, folder: Path
) -> None:
    (golden,) = make_bundle(folder).manifest.golden
    wrong = golden.model_copy(update={"outputs": {**golden.outputs, "melanoma_logit": (9.0,)}})
    make_bundle(folder, golden=(wrong,))
    assert "melanoma_logit" in client.post("/admin/reload").json()["detail"]
    assert predict(client).status_code == 200


def test_what_is_refused_does_not_stay_in_memory(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (golden,) = make_bundle(folder).manifest.golden
    wrong = golden.model_copy(update={"outputs": {**golden.outputs, "melanoma_logit": (9.0,)}})
    make_bundle(folder, golden=(wrong,))
    load, loaded = engines._load, []

    def note(*arguments: Any) -> Any:
        engine = load(*arguments)
        loaded.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(engines, "_load", note)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            assert client.post("/admin/reload").status_code == 409
        until(lambda: not any(engine() for engine in loaded))
    finally:
        gc.enable()
    assert len(loaded) >= 2


def test_only_administrators_reload(client: TestClient, tmp_path: Path, folder: Path) -> None:
    client.headers["Authorization"] = "Bearer " + create_key(
        tmp_path / "keys.json", "tool", ("predict",), None
    )
    time.sleep(1.1)  # the file is looked at once a second
    refused = client.post("/admin/reload")
    assert (refused.status_code, refused.json()["type"]) == (403, "urn:mmtl:problem:forbidden")
    with started(Settings(bundle=folder)) as without_keys:
        refused = without_keys.post("/admin/reload")
        assert refused.json()["type"] == "urn:mmtl:problem:admin-closed"
        assert "SIGHUP" in refused.json()["detail"]


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While this is not set, a picture of HANGS red is never answered."""
    release = threading.Event()
    run = OnnxEngine._run

    def hang(engine: OnnxEngine, session, images):
        if any(abs(image[..., 0] - float(HANGS)).max() < 3 for image in images):
            release.wait(30)
        return run(engine, session, images)

    monkeypatch.setattr(OnnxEngine, "_run", hang)
    yield release
    release.set()


def ready_again(client: TestClient) -> None:
    deadline = time.monotonic() + 10
    while client.get("/health/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_network_that_hangs_is_replaced_and_no_caller_hangs(
    client: TestClient, hanging: threading.Event
) -> None:
    refused = predict(client, HANGS)
    assert refused.status_code == 503
    assert refused.json()["type"] == "urn:mmtl:problem:not-ready"
    assert refused.headers["Retry-After"] == "5"
    ready_again(client)
    assert predict(client).status_code == 200
    assert metric(client, "mmtl_network_replacements_total") == 1


def test_a_process_that_was_stopped_for_a_while_is_not_taken_for_hung(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[bool] = []

    def broken(_: Batcher, seconds: float) -> bool:
        looks.append(len(looks) % 2 == 0)  # by the next look, what seemed to hang has gone on
        return looks[-1]

    monkeypatch.setattr(Batcher, "broken", broken)
    while len(looks) < 4:
        assert predict(client).status_code == 200
    assert metric(client, "mmtl_network_replacements_total") == 0


def test_a_network_that_goes_on_hanging_ends_the_process(
    client: TestClient, hanging: threading.Event
) -> None:
    ended = threading.Event()
    client.app.state.networks.on_failure = ended.set
    for _ in range(3):
        assert predict(client, HANGS).status_code == 503
        ready_again(client)
    assert predict(client, HANGS).status_code == 503
    assert ended.wait(5)
    assert client.get("/health/ready").status_code == 503


def test_a_service_that_is_to_end_while_its_network_is_replaced_ends_well(
    client: TestClient, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, begun, go_on = Networks._load_warm, threading.Event(), threading.Event()

    def load_slowly(networks: Networks) -> Network:
        begun.set()
        assert go_on.wait(10)
        return load(networks)

    monkeypatch.setattr(Networks, "_load_warm", load_slowly)
    failures: list[str] = []
    networks = client.app.state.networks
    networks.on_failure = lambda: failures.append("failed")
    (watch,) = (each for each in threading.enumerate() if each.name == "mmtl-watch")
    assert predict(client, HANGS).status_code == 503
    assert begun.wait(10)
    networks._stopped.set()
    with capture_logs() as logs:
        go_on.set()
        watch.join(10)
    assert not watch.is_alive()
    assert (failures, [line["event"] for line in logs if line["log_level"] == "error"]) == ([], [])


def test_the_successor_of_a_broken_network_is_left_alone(client: TestClient) -> None:
    networks = client.app.state.networks
    broken = networks.current.batcher
    networks.begin_reload().result(10)  # just now
    until(lambda: not networks._switching.locked())
    assert networks._replace(broken)
    assert predict(client).status_code == 200
    assert metric(client, "mmtl_network_replacements_total") == 0


def test_a_network_that_a_reload_has_replaced_serves_while_the_next_reload_is_slow(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = client.app.state.networks
    broken = networks.current.batcher
    networks.begin_reload().result(10)
    until(lambda: not networks._switching.locked())
    longest = networks._settings.deadline_seconds
    monkeypatch.setattr("app.networks._LOAD_SECONDS", 0.01 - longest)
    with networks._switching:
        assert networks._replace(broken)
        assert not networks._replace(networks.current.batcher)


def test_memory_of_a_network_that_was_replaced_is_given_back_when_nothing_holds_it(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = client.app.state.networks
    engine = weakref.ref(networks.current.engine)
    held: list[bool] = []

    def note() -> None:
        gc.collect()
        held.append(engine() is not None)

    monkeypatch.setattr("app.networks.give_back", note)
    networks.current.batcher.abandon()
    until(lambda: held)
    assert held == [False]


def test_a_file_system_that_fails_just_now_keeps_no_network_from_taking_over(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = os.stat

    def fail(path, **named):
        if path == folder / "model.onnx":
            raise OSError(errno.ESTALE, "Stale file handle")
        return found(path, **named)

    announce = Networks._announce

    def announce_what_is_away(networks: Networks) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "stat", fail)
            announce(networks)

    monkeypatch.setattr(Networks, "_announce", announce_what_is_away)
    for _ in range(2):
        assert client.post("/admin/reload").status_code == 200
        until(lambda: not client.app.state.networks._switching.locked())


@pytest.mark.parametrize(("drained", "least", "most"), [(False, 30, 30), (True, 0, 29.9)])
def test_work_is_waited_for_since_the_drain_and_no_longer(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, drained: bool, least: float, most: float
) -> None:
    waited: list[float] = []
    close = Batcher.close
    with monkeypatch.context() as patch:
        patch.setattr(Batcher, "close", lambda batcher, longest: waited.append(longest))
        networks = client.app.state.networks
        if drained:
            networks.drain()
            time.sleep(0.2)
            networks.drain()  # a second signal
        networks.close(30)
    assert least <= waited[0] <= most
    close(networks.current.batcher, 5)


def test_a_network_that_cannot_be_loaded_again_ends_the_process(
    client: TestClient, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: Networks) -> Network:
        raise RuntimeError("can't start new thread")

    ended = threading.Event()
    networks = client.app.state.networks
    networks.on_failure = ended.set
    monkeypatch.setattr(Networks, "_load", load)
    assert predict(client, HANGS).status_code == 503
    assert ended.wait(5)


def test_a_network_that_cannot_be_started_leaves_no_worker_behind(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, workers = threading.Thread.start, []

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("mmtl-work") and workers:
            raise RuntimeError("can't start new thread")
        workers.append(thread)
        start(thread)

    with started(settings.model_copy(update={"threads": 2})) as client:
        before = threading.active_count()
        monkeypatch.setattr(threading.Thread, "start", refused)
        with pytest.raises(ReloadError, match="can't start new thread"):
            client.app.state.networks.reload()
        workers[0].join(5)
        assert threading.active_count() == before
        assert predict(client).status_code == 200


def test_a_reload_that_hangs_is_refused_and_what_it_gives_late_is_ended(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, release = Networks._load, threading.Event()
    late: list[Network] = []

    def load_late(networks: Networks) -> Network:
        release.wait(10)
        late.append(load(networks))
        return late[-1]

    monkeypatch.setattr(Networks, "_load", load_late)
    monkeypatch.setattr("app.networks._LOAD_SECONDS", 0.1)
    networks = client.app.state.networks
    with pytest.raises(ReloadError, match="not loaded in"):
        networks.begin_reload().result(10)
    assert predict(client).status_code == 200
    release.set()
    until(lambda: late and late[0].batcher._closed)
    until(lambda: not any(worker.is_alive() for worker in late[0].batcher._workers))
    assert networks.current is not late[0]
    until(lambda: networks._loading is None)  # which would hold it in memory


def test_a_network_that_is_loaded_while_the_service_ends_is_waited_for_and_ended(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, begun, loaded = Networks._load, threading.Event(), []

    def load_slowly(networks: Networks) -> Network:
        begun.set()
        time.sleep(0.3)
        loaded.append(load(networks))
        return loaded[-1]

    with started(settings) as client:
        monkeypatch.setattr(Networks, "_load", load_slowly)
        reloading = client.app.state.networks.begin_reload()
        assert begun.wait(10)
    assert loaded
    with pytest.raises(ReloadError, match="shutting down"):
        reloading.result(10)
    assert not any(worker.is_alive() for worker in loaded[0].batcher._workers)


def test_a_hangup_within_a_reload_is_not_lost(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, read, go_on = Networks._load, threading.Event(), threading.Event()

    def load_slowly(networks: Networks) -> Network:
        loaded = load(networks)
        read.set()
        assert go_on.wait(10)
        return loaded

    monkeypatch.setattr(Networks, "_load", load_slowly)
    networks = client.app.state.networks
    networks.hang_up()
    assert read.wait(10)
    make_bundle(folder, version="1.3.0")  # once the old one has been read
    for _ in range(3):
        networks.hang_up()
    with pytest.raises(ReloadError, match="just now"):  # which may try again: no alert
        networks.begin_reload().result(10)
    go_on.set()
    until(lambda: networks.current.facts.version == "1.3.0")
    until(lambda: not networks._switching.locked())
    assert metric(client, 'mmtl_reloads_total{outcome="switched"}') == 2
    assert metric(client, 'mmtl_reloads_total{outcome="refused"}') == 0


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_a_thread_to_be_had_a_reload_is_refused_or_ends_the_old_network_itself(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []

    def begin_at_most(count: int) -> None:
        def begin_or_not(work: Callable[[], object]):
            if len(begun) == count:
                raise RuntimeError("can't start new thread")
            begun.append(work)
            return begin(work)

        begun.clear()
        monkeypatch.setattr("app.networks.begin", begin_or_not)

    networks = client.app.state.networks
    old = networks.current
    begin_at_most(0)
    with pytest.raises(ReloadError, match="can't start new thread"):
        networks.begin_reload().result(10)
    for _ in range(2):  # a hangup is refused, too, and the next one not passed over for it
        networks.hang_up()
    assert metric(client, 'mmtl_reloads_total{outcome="refused"}') == 3
    begin_at_most(1)
    assert networks.reload() is networks.current is not old
    assert not old.batcher.alive
    begin_at_most(3)
    networks.reload()
    assert predict(client).status_code == 200


def test_whatever_a_reload_meets_the_old_network_stays(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: Networks) -> Network:
        raise MemoryError

    monkeypatch.setattr(Networks, "_load", load)
    for _ in range(2):
        with pytest.raises(ReloadError, match="MemoryError"):
            client.app.state.networks.reload()
    assert predict(client).status_code == 200


def test_a_network_that_comes_while_the_service_drains_takes_no_new_request(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Networks._load
    networks = client.app.state.networks
    before = networks.current

    def load_while_draining(_: Networks) -> Network:
        networks.drain()
        return load(networks)

    monkeypatch.setattr(Networks, "_load", load_while_draining)
    assert networks.reload() is not before
    with pytest.raises(Draining), networks.reserve(1):
        pass


def test_a_network_that_fails_while_it_is_warmed_up_takes_over_from_nobody(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = client.app.state.networks
    before = networks.current
    monkeypatch.setattr(Batcher, "wait_ready", lambda *_: False)
    with pytest.raises(ReloadError, match="failed while it was warmed up"):
        networks.reload()
    assert networks.current is before
    assert predict(client).status_code == 200


def test_where_nobody_watches_the_network_any_more_the_process_ends(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def fail(*_: object) -> bool:
        raise RuntimeError("of the watch itself")

    client.app.state.networks.on_failure = ended.set
    monkeypatch.setattr(Batcher, "broken", fail)
    assert ended.wait(5)


def test_a_bundle_that_must_be_signed_and_is_not_is_not_served(
    settings: Settings, tmp_path: Path
) -> None:
    public = tmp_path / "public.pem"
    form = Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(Ed25519PrivateKey.generate().public_key().public_bytes(*form))
    signed = settings.model_copy(update={"bundle_signed_by": public})
    with pytest.raises(BundleError, match=r"cannot be trusted: there is no bundle\.json\.sig"):
        create_app(signed)


def test_a_network_that_replaces_another_while_the_service_drains_takes_no_new_request(
    client: TestClient, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Networks._load_warm
    networks = client.app.state.networks
    before = networks.current

    def load_while_draining(those: Networks) -> Network:
        networks.drain()
        return load(those)

    monkeypatch.setattr(Networks, "_load_warm", load_while_draining)
    assert predict(client, HANGS).status_code == 503
    until(lambda: networks.current is not before)
    until(lambda: networks.current.batcher._draining)
    assert not networks.current.batcher.ready
