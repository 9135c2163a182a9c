"""Who had which image answered by which network, and nothing more."""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.audit import AuditError, AuditLog
from app.keys import create_key
from app.schemas import ModelFacts
from app.settings import Settings
from app.telemetry import OUTCOMES
from models.bundle import sha256_of
from tests.conftest import started
from tests.lesions import flat

MODEL = ModelFacts(name="m", version="1.2.3", sha256="m" * 64, manifest_sha256="b" * 64)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def test_every_image_of_a_request_has_its_line(settings: Settings, path: Path) -> None:
    keys = path.with_name("keys.json")
    key = create_key(keys, "tool", ("predict",), None)
    with started(settings.model_copy(update={"audit_log": path, "keys": keys})) as client:
        facts = client.app.state.networks.current.facts
        headers = {"Authorization": f"Bearer {key}", "X-Request-ID": "one"}
        files = [("files", ("Jane Doe.png", flat(7))), ("files", ("b.png", b"no picture"))]
        assert client.post("/predict", files=files, headers=headers).status_code == 200
        headers["X-Request-ID"] = "two"
        headers["Content-Type"] = "text/plain"
        client.post("/predict", content=b"x", headers=headers)
        client.post("/predict", files={"files": flat(1)}, headers={"X-Request-ID": "three"})
    good, bad, refused = lines(path)  # and nothing of who has no key
    assert good.pop("time")
    assert good == {
        "request_id": "one",
        "key": key.split("_")[1],
        "model": facts.sha256,
        "manifest": sha256_of(settings.bundle / "bundle.json"),
        "image": hashlib.sha256(flat(7)).hexdigest(),
        "outcome": "ok",
    }
    assert (bad["image"], bad["outcome"]) == (
        hashlib.sha256(b"no picture").hexdigest(),
        "unsupported-image",
    )
    assert (refused["request_id"], refused["outcome"]) == (
        "two",
        "unsupported-media-type",
    )
    assert refused["image"] == ""
    assert "Jane" not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


def test_an_answer_for_which_there_is_no_room_is_written_down_as_refused(
    settings: Settings, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(settings.model_copy(update={"audit_log": path})) as client:
        monkeypatch.setattr("app.routes.predict._UNCOUNTED_BYTES", 0)
        held = client.app.state.held
        held._bytes, held._most = 1_000_000, 1_000_000 + len(flat(1))
        small = {"Content-Type": "image/png"}
        assert client.post("/predict", content=flat(1), headers=small).status_code == 503
        assert counted(client) == {"refused": 1}
        held._bytes = 0
        held._most = 10  # of nothing else, anything may be held
        assert client.post("/predict", content=flat(1), headers=small).status_code == 200
        assert held._bytes == 0
    assert [line["outcome"] for line in lines(path)] == ["saturated", "ok"]


def counted(client: TestClient) -> dict[str, float]:
    """Images by what became of them, as the metrics have it; none of them was predicted."""
    sample = client.app.state.metrics.registry.get_sample_value
    assert sample("mmtl_melanoma_probability_count") == 0
    found = {each: sample("mmtl_images_total", {"outcome": each}) for each in OUTCOMES}
    return {outcome: count for outcome, count in found.items() if count}


def test_what_cannot_be_written_down_is_not_answered(
    settings: Settings, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(settings.model_copy(update={"audit_log": path})) as client:

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("app.audit.os.write", full)
        answer = client.post("/predict", files={"files": flat(1)})
        assert answer.status_code == 503
        assert answer.json()["type"] == "urn:mmtl:problem:audit-unavailable"
        assert answer.headers["Retry-After"] == "30"
        assert counted(client) == {"refused": 1}
        monkeypatch.undo()
        assert client.post("/predict", files={"files": flat(1)}).status_code == 200


def test_a_part_of_a_line_is_taken_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(path, 10_000)
    log.write("one", None, MODEL, [("a", "ok")])
    write = os.write
    monkeypatch.setattr("app.audit.os.write", lambda file, data: write(file, data[:20]))
    with pytest.raises(AuditError, match="no space is left"):
        log.write("two", None, MODEL, [("b", "ok")])
    monkeypatch.undo()
    log.write("three", None, MODEL, [("c", "ok")])
    log.close()
    assert [line["request_id"] for line in lines(path)] == ["one", "three"]


def test_a_disk_that_fails_at_the_end_is_logged(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    log = AuditLog(path, 10_000)
    log.write("one", None, MODEL, [("a", "ok")])
    monkeypatch.setattr("app.audit.os.fsync", fail)
    log.close()
    assert "is not on the disk: Input/output error" in capsys.readouterr().out


def test_a_line_torn_by_a_crash_harms_no_other(path: Path) -> None:
    path.write_text('{"request_id": "torn')
    log = AuditLog(path, 10_000)
    log.write("next", None, MODEL, [("a", "ok")])
    log.close()
    assert json.loads(path.read_text().splitlines()[1])["request_id"] == "next"


def test_a_full_file_is_kept_and_another_begun(path: Path) -> None:
    log = AuditLog(path, 400)
    for number in range(20):
        log.write(str(number), None, MODEL, [("a", "ok")])
    log.close()
    files = sorted(path.parent.glob("audit.jsonl.*"))
    assert len(files) > 3
    kept = [line["request_id"] for file in [*files, path] for line in lines(file)]
    assert kept == [str(number) for number in range(20)]


def test_a_full_file_behind_a_link_stays_beside_its_successor(path: Path, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    path.symlink_to(volume / "audit.jsonl")
    audit = AuditLog(path, 1)
    for _ in range(2):
        audit.write("r", None, MODEL, [("i", "ok")])
    audit.close()
    assert path.is_symlink()
    assert len(lines(path)) == 1
    assert len([*volume.iterdir()]) == 2


def test_a_thread_that_is_not_to_be_had_costs_no_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = AuditLog(path, 1_000_000)
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", refuse)
        audit.write("r", None, MODEL, [("i", "ok")])
    assert len(synced) == 1
    audit.write("r", None, MODEL, [("i", "ok")])
    until_synced = threading.Event()
    monkeypatch.setattr("os.fsync", lambda _: until_synced.set())
    assert until_synced.wait(5)
    audit.close()
    assert len(lines(path)) == 2


def test_a_file_that_was_moved_away_is_followed_by_another(path: Path) -> None:
    log = AuditLog(path, 10_000)
    log.write("one", None, MODEL, [("a", "ok")])
    path.rename(path.with_name("moved"))
    log.write("two", None, MODEL, [("a", "ok")])
    log.close()
    assert [line["request_id"] for line in lines(path)] == ["two"]


def test_lines_of_many_threads_are_whole(path: Path) -> None:
    log = AuditLog(path, 5_000)

    def write(thread: int) -> None:
        for number in range(50):
            log.write(f"{thread}-{number}", None, MODEL, [("a", "ok"), ("b", "ok")])

    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    found = [line for file in path.parent.iterdir() for line in lines(file)]
    assert len(found) == 400


def test_a_log_that_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match=r"cannot be written: No such file or directory\."):
        AuditLog(tmp_path / "nowhere" / "audit.jsonl", 10)


def test_a_line_is_on_the_disk_soon_whether_or_not_another_follows(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = threading.Event()
    sizes = []

    def fsync(file: int) -> None:
        sizes.append(os.fstat(file).st_size)
        synced.set()

    monkeypatch.setattr("app.audit.os.fsync", fsync)
    monkeypatch.setattr("app.audit._SYNC_SECONDS", 0.05)
    log = AuditLog(path, 10_000)
    for _ in range(2):
        synced.clear()
        log.write("one", None, MODEL, [("a", "ok")])
        assert synced.wait(5)
        assert sizes[-1] == path.stat().st_size
    log.close()


def test_lines_of_many_processes_are_whole_and_none_is_lost(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from app.audit import AuditLog; "
        "log = AuditLog(Path(sys.argv[1]), 2000); "
        "[log.write(f'{sys.argv[2]}-{n}', None, None, [('a', 'ok'), ('b', 'ok')]) "
        "for n in range(60)]; log.close()"
    )
    arguments = [sys.executable, "-c", code, str(path)]
    writing = [subprocess.Popen([*arguments, str(process)]) for process in range(4)]
    assert [each.wait(60) for each in writing] == [0] * 4
    found = [line["request_id"] for file in path.parent.iterdir() for line in lines(file)]
    assert sorted(found) == sorted(2 * [f"{p}-{n}" for p in range(4) for n in range(60)])
    assert len([*path.parent.iterdir()]) > 10


def test_neither_a_turn_nor_a_sync_leaves_a_file_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.audit._SYNC_SECONDS", 0.001)
    log = AuditLog(path, 1)  # every line turns the file
    for number in range(10):
        log.write(str(number), None, MODEL, [("a", "ok")])
        time.sleep(0.01)
        if number == 4:
            before = len(os.listdir("/proc/self/fd"))
    log.close()
    assert len([*path.parent.iterdir()]) == 10
    assert len(os.listdir("/proc/self/fd")) <= before


def test_neither_an_end_nor_a_failure_leaves_a_file_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    log = AuditLog(path, 10_000)
    log.write("one", None, MODEL, [("a", "ok")])
    log.close()

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("app.audit.os.pread", fail)
    with pytest.raises(AuditError, match=r"audit\.jsonl cannot be written: Input/output error\."):
        AuditLog(path, 10_000)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_line_that_another_process_is_writing_is_not_taken_for_a_torn_one(path: Path) -> None:
    other = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    fcntl.flock(other, fcntl.LOCK_EX)
    os.write(other, b'{"half":')
    opened: list[AuditLog] = []
    opening = threading.Thread(target=lambda: opened.append(AuditLog(path, 10_000)))
    opening.start()
    opening.join(0.1)
    os.write(other, b" 1}\n")
    os.close(other)
    opening.join(10)
    opened[0].close()
    assert path.read_bytes() == b'{"half": 1}\n'


def test_a_disk_that_hangs_keeps_no_caller_waiting_and_no_service_from_ending(
    settings: Settings, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.audit._HANG_SECONDS", 0.1)
    monkeypatch.setattr("app.routes.predict._AUDIT_SECONDS", 0.3)
    hangs, write = threading.Event(), os.write

    def write_late(file: int, data: bytes) -> int:
        hangs.wait(30)
        return write(file, data)

    with started(settings.model_copy(update={"audit_log": path})) as client:
        monkeypatch.setattr("app.audit.os.write", write_late)
        for _ in range(2):  # the one that hangs, and one that finds the log taken
            refused = client.post("/predict", files={"files": flat(1)})
            assert refused.status_code == 503
            assert refused.json()["type"] == "urn:mmtl:problem:audit-unavailable"
    assert not hangs.is_set()
    hangs.set()


def test_a_disk_that_no_longer_hangs_is_written_to(
    settings: Settings, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.routes.predict._AUDIT_SECONDS", 0.2)
    hangs, write = threading.Event(), os.write
    with started(settings.model_copy(update={"audit_log": path})) as client:
        monkeypatch.setattr("app.audit.os.write", lambda *a: (hangs.wait(30), write(*a))[1])
        assert client.post("/predict", files={"files": flat(1)}).status_code == 503
        hangs.set()
        assert client.post("/predict", files={"files": flat(1)}).status_code == 200
    assert len(lines(path)) == 2


def test_a_log_that_is_closed_is_one_that_cannot_be_written(path: Path) -> None:
    log = AuditLog(path, 1000)
    log.close()
    with pytest.raises(AuditError, match="is closed"):
        log.write("request", "", None, [("", "ok")])


def test_a_line_waits_while_another_process_has_the_file(path: Path) -> None:
    log = AuditLog(path, 10_000)
    other = os.open(path, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    writing = threading.Thread(target=log.write, args=["one", None, MODEL, [("a", "ok")]])
    writing.start()
    writing.join(0.3)
    assert path.read_bytes() == b""
    os.close(other)
    writing.join(10)
    log.close()
    assert len(lines(path)) == 1
