import errno
import signal
import socket
import tempfile
from multiprocessing import Pipe
from pathlib import Path

import pytest
from fastapi import FastAPI

from app import cli, predict_command
from app.main import create_app
from app.networks import Networks
from app.processes import Place
from app.server import Server
from app.settings import Settings
from tests.conftest import ROOT
from tests.lesions import flat

pytestmark = pytest.mark.usefixtures("logs_as_before")


def test_what_is_checked_and_predicts_has_the_threads_of_one_of_several_processes(
    run, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMTL_THREADS", "4")
    monkeypatch.setenv("MMTL_PROCESSES", "2")
    threads: list[int] = []

    def create(settings: Settings) -> FastAPI:
        threads.append(settings.threads)
        return create_app(settings)

    for command in (cli, predict_command):
        monkeypatch.setattr(command, "create_app", create)
    assert run("serve", "--check")[0] == run("predict", picture)[0] == 0
    assert threads == [2, 2]


def test_an_audit_log_is_begun_by_the_service_alone(
    run, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "audit.jsonl"
    monkeypatch.setenv("MMTL_AUDIT_LOG", str(log))
    assert run("serve", "--check")[0] == 0
    assert run("predict", picture)[0] == 0
    with monkeypatch.context() as patch:
        patch.setenv("MMTL_BUNDLE", "/nowhere")
        assert run("serve", "--check")[0] == 2
    assert not log.exists()
    log.write_text("{}\n")
    assert run("serve", "--check")[0] == 0
    assert log.read_text() == "{}\n"
    link, there = tmp_path / "link.jsonl", tmp_path / "there.jsonl"
    link.symlink_to(there)
    monkeypatch.setenv("MMTL_AUDIT_LOG", str(link))
    assert run("serve", "--check")[0] == 0
    assert link.is_symlink()
    assert not there.exists()


def test_check_validates_and_exits(run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("serve", "--check")[:2] == (0, "ok: test 1.2.3 on 127.0.0.1:8000\n")
    monkeypatch.setenv("MMTL_BUNDLE", "/nowhere")
    status, _, error = run("serve", "--check")
    assert (status, error) == (
        2,
        "mmtl: /nowhere is not a bundle: bundle.json cannot be read (No such file or directory).\n",
    )


@pytest.mark.parametrize("comes", [True, False])
def test_a_hangup_while_the_bundle_is_loaded_reloads_it_then(
    run, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    reloaded: list[Networks] = []
    before = signal.getsignal(signal.SIGHUP)

    def create(settings: Settings) -> FastAPI:
        app = create_app(settings)
        if comes:
            signal.raise_signal(signal.SIGHUP)
        return app

    monkeypatch.setattr("app.cli.check_address", lambda *_: None)
    monkeypatch.setattr("app.cli.create_app", create)
    monkeypatch.setattr("app.cli._serve", lambda server: server.on_start())
    monkeypatch.setattr(Networks, "hang_up", lambda networks: reloaded.append(networks))
    for name in ("keep_no_core", "allow_files"):  # which are of the whole process
        monkeypatch.setattr(f"app.cli.{name}", lambda *_: None)
    try:
        assert run("serve")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(reloaded) == comes


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("a..b", "a..b is not the name of a host: set another MMTL_HOST."),
        ("127.0.0.1", "cannot be listened on: Address already in use. Set another MMTL_PORT or"),
        (
            "192.0.2.1",
            "cannot be listened on: Cannot assign requested address. Set another",
        ),  # RFC 5737
    ],
)
def test_where_nobody_can_listen_nothing_is_loaded(
    run, monkeypatch: pytest.MonkeyPatch, host: str, said: str
) -> None:
    monkeypatch.setattr("app.cli.create_app", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MMTL_HOST", host)
        monkeypatch.setenv("MMTL_PORT", str(taken.getsockname()[1]))
        status, _, error = run("serve", "--insecure")
    assert status == 2
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"), [("MMTL_KEYS", "/nowhere"), ("MMTL_AUDIT_LOG", "/nowhere/a")]
)
def test_a_file_that_cannot_be_used_is_named_with_its_setting(
    run, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    status, _, error = run("serve", "--check")
    assert status == 2
    assert error.startswith(f"mmtl: {name}: {value} cannot be ")


def test_without_a_folder_for_what_processes_share_it_says_so(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: str) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setenv("MMTL_PROCESSES", "2")
    monkeypatch.setattr("app.processes.TemporaryDirectory", refuse)
    status, _, error = run("serve")
    assert status == 2
    assert error == "mmtl: No usable temporary directory found in ['/tmp'].\n"


def test_a_key_that_nobody_would_see_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.argv", ["mmtl", "keys", "create", "x", "--file", str(tmp_path / "k")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert not (tmp_path / "k").exists()


@pytest.mark.parametrize("page", ["settings", "problems"])
def test_a_page_of_reference_is_the_program_s(run, page: str) -> None:
    assert (ROOT / "docs" / f"{page}.md").read_text() == run(page)[1], "run `make docs`"


def test_a_name_moves_nothing_on_the_terminal(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    picture = Path("a\x1b[2Jb\nc.png")
    picture.write_bytes(flat(160))
    _, output, _ = run("predict", picture)
    assert "a\\x1b[2Jb\\nc.png" in output
    missing = run("bundle", "inspect", "\x1b[2J")[2]
    assert missing.startswith("mmtl: \\x1b[2J is not a bundle")


def test_one_of_several_processes_stops_when_the_one_that_watches_says_so(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Server] = []
    monkeypatch.setenv("MMTL_BUNDLE", str(bundle_folder))
    monkeypatch.setenv("MMTL_PROCESSES", "2")
    monkeypatch.setattr(tempfile, "tempdir", tempfile.tempdir)
    for name in ("be_watched", "allow_files", "tune"):
        monkeypatch.setattr(f"app.cli.{name}", lambda *_: None)
    monkeypatch.setattr("app.cli.keep_no_core", lambda: None)
    monkeypatch.setattr("app.cli._serve", lambda server, listener: served.append(server))
    link, theirs = Pipe()
    with link, theirs:
        place = Place(1, tmp_path, ("127.0.0.1", 0), theirs)
        monkeypatch.setattr(Place, "listener", lambda _: None)
        cli._serve_beside(place)
        served[0].on_start()
        assert link.recv() == "listens"
    served[0].handle_exit(signal.SIGTERM, None)  # as systemd sends it to each
    assert not served[0].should_exit
    served[0].handle_exit(signal.SIGINT, None)
    assert served[0].should_exit
