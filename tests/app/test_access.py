import errno
import io
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.access import Exposed, check_exposure
from app.cli import main
from app.keys import create_key, read_keys
from app.settings import Settings
from tests.bundles import make_bundle
from tests.conftest import started
from tests.lesions import flat


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def settings(tmp_path: Path, **more: object) -> Settings:
    return Settings(bundle=make_bundle(tmp_path / "bundle").folder, **more)


def predict(client: TestClient, key: str | None = None):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return client.post("/predict", files={"files": flat(1)}, headers=headers)


def test_where_there_are_keys_one_is_asked_for(tmp_path: Path, path: Path) -> None:
    key = create_key(path, "tool", ("predict",), None)
    with started(settings(tmp_path, keys=path)) as client:
        for refused in (predict(client), predict(client, "mmtl_wrong_key")):
            assert refused.status_code == 401
            assert refused.json()["type"] == "urn:mmtl:problem:unauthorized"
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.headers["content-type"] == "application/problem+json"
        assert client.get("/model").status_code == 401
        assert predict(client, key).status_code == 200
        bearer = {"Authorization": f"Bearer {key}"}
        assert client.get("/model", headers=bearer).status_code == 200
        assert client.get("/health/ready").status_code == 200
        assert client.get("/health/live").status_code == 200


def test_a_key_file_that_is_damaged_is_told_by_the_metrics(tmp_path: Path, path: Path) -> None:
    key = create_key(path, "prometheus", ("metrics",), None)
    bearer = {"Authorization": f"Bearer {key}"}
    with started(settings(tmp_path, keys=path)) as client:
        assert "mmtl_keys_stale 0.0" in client.get("/metrics", headers=bearer).text
        path.write_text("{")
        until = time.monotonic() + 30  # it is looked at once a second
        while "mmtl_keys_stale 1.0" not in client.get("/metrics", headers=bearer).text:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_body_is_not_read_without_a_key(tmp_path: Path, path: Path) -> None:
    create_key(path, "tool", ("predict",), None)
    with started(settings(tmp_path, keys=path)) as client:
        refused = client.post("/predict", content=b"x", headers={"Content-Type": "text/plain"})
        assert refused.status_code == 401  # and not 415


def test_a_key_is_for_its_scopes(tmp_path: Path, path: Path) -> None:
    key = create_key(path, "tool", ("predict",), None)
    scraper = create_key(path, "prometheus", ("metrics",), None)
    with started(settings(tmp_path, keys=path)) as client:
        refused = predict(client, scraper)
        assert refused.status_code == 403
        assert "for metrics; the path asks for one for predict" in refused.json()["detail"]
        for bearer, status in ((key, 403), (scraper, 200)):
            headers = {"Authorization": f"Bearer {bearer}"}
            assert client.get("/metrics", headers=headers).status_code == status
        assert client.get("/metrics").status_code == 401
    with started(settings(tmp_path, keys=path, open_metrics=True)) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/model").status_code == 401
        assert predict(client).status_code == 401
        assert client.post("/admin/reload").status_code == 401


def test_who_has_no_key_is_told_nothing_else(tmp_path: Path, path: Path) -> None:
    key = create_key(path, "tool", ("predict",), None)
    with started(settings(tmp_path, keys=path)) as client:
        for query in ("explain=maybe", "api_key=1"):
            assert client.post(f"/predict?{query}").status_code == 401
            headers = {"Authorization": f"Bearer {key}"}
            assert client.post(f"/predict?{query}", headers=headers).status_code == 422
        headers = {"Authorization": f"Basic {key}"}  # whose user and password are other things
        assert client.get("/model", headers=headers).status_code == 401


def test_a_quota_that_is_used_up_says_when_to_come_back(tmp_path: Path, path: Path) -> None:
    key = create_key(path, "tool", ("predict",), 2)
    other = create_key(path, "other", ("predict", "metrics"), None)
    with started(settings(tmp_path, keys=path)) as client:
        assert [predict(client, key).status_code for _ in range(3)] == [200, 200, 429]
        refused = predict(client, key)
        assert refused.json()["type"] == "urn:mmtl:problem:quota-exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert predict(client, other).status_code == 200
        asking = {"Authorization": f"Bearer {key}"}
        assert client.get("/model", headers=asking).status_code == 200  # is not of the quota
        metrics = client.get("/metrics", headers={"Authorization": f"Bearer {other}"}).text
    assert 'mmtl_rejected_total{reason="quota-exceeded"} 2.0' in metrics


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_this_machine_alone_needs_no_keys(host: str) -> None:
    check_exposure(Settings(host=host), insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "clinic.example"])
def test_others_are_let_in_with_keys_or_when_it_is_said(path: Path, host: str) -> None:
    with pytest.raises(Exposed, match=f"MMTL_HOST={host} lets other machines in.* --insecure"):
        check_exposure(Settings(host=host), insecure=False)
    check_exposure(Settings(host=host), insecure=True)
    check_exposure(Settings(host=host, keys=path), insecure=False)


def test_serve_refuses_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MMTL_HOST", "0.0.0.0")
    monkeypatch.setattr("sys.argv", ["mmtl", "serve", "--check"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "mmtl: MMTL_HOST=0.0.0.0 lets other machines in" in capsys.readouterr().err


def test_keys_are_made_shown_and_revoked_on_the_command_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["mmtl", "keys", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return err if stopped.value.code else out

    monkeypatch.setenv("MMTL_KEYS", str(path))
    key = run("create", "clinic tool", "--scope", "predict", "--per-minute", "60").strip()
    assert key.startswith("mmtl_")
    assert "root is none of predict, metrics, admin" in run("create", "x", "--scope", "root")
    shown = run("list")
    assert "clinic tool" in shown
    assert key.split("_", 2)[2] not in shown
    assert "(clinic tool)" in run("revoke", "clinic tool")
    assert "no active key" in run("revoke", "clinic tool")
    monkeypatch.delenv("MMTL_KEYS")
    assert "--file keys.json" in run("list")


def test_a_key_that_nobody_saw_is_not_left_active(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class FullDisk(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.argv", ["mmtl", "keys", "create", "tool", "--file", str(path)])
    monkeypatch.setattr("sys.stdout", FullDisk())
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "(No space left on device), and so was revoked" in capsys.readouterr().err
    (key,) = read_keys(path)
    assert key.revoked is not None
