"""Processes behind one port, with targets that do nothing else."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from app.processes import (
    LISTENS,
    WARM,
    Place,
    PortTaken,
    _reserve,
    _Supervisor,
    be_watched,
    supervise,
)

NOTES = "MMTL_TEST_NOTES"


def note(place: Place, what: str) -> None:
    with (Path(os.environ[NOTES]) / what).open("a") as file:
        file.write(f"{place.number} {os.getpid()}\n")


def wait_for_others(place: Place) -> None:
    note(place, "warm")
    place.link.send(WARM)
    place.link.recv()


def listen(place: Place) -> None:
    """Takes connections until it is told to stop."""
    be_watched(place)
    listener = place.listener()
    wait_for_others(place)
    listener.listen()
    signal.signal(signal.SIGHUP, lambda *_: note(place, "reloaded"))
    note(place, "listening")
    place.link.send(LISTENS)
    while True:
        listener.accept()[0].close()


def fail(place: Place) -> None:
    """Cannot start."""
    be_watched(place)
    note(place, "failed")
    raise SystemExit(2)


def die(place: Place) -> None:
    """Starts, and is killed."""
    be_watched(place)
    wait_for_others(place)
    note(place, "listening")
    place.link.send(LISTENS)
    os.kill(os.getpid(), signal.SIGKILL)


def fail_when_there_are_others(place: Place) -> None:
    """The second cannot start again, twice."""
    be_watched(place)
    if place.number == 1 and noted(Path(os.environ[NOTES]), "listening"):
        note(place, "failed")
        if len(noted(Path(os.environ[NOTES]), "failed")) < 3:
            raise SystemExit(2)
    listen(place)


def listen_when_another_has_loaded_anew(place: Place) -> None:
    """The second, when it is started again, is warm and does not listen before that."""
    be_watched(place)
    notes = Path(os.environ[NOTES])
    again = place.number == 1 and bool(noted(notes, "listening"))
    listener = place.listener()
    wait_for_others(place)
    listener.listen()
    signal.signal(signal.SIGHUP, lambda *_: note(place, "reloaded"))
    if again:
        until(lambda: bool(noted(notes, "reloaded")))
    note(place, "listening")
    place.link.send(LISTENS)
    while True:
        listener.accept()[0].close()


def be_deaf(place: Place) -> None:
    """Listens, and does not end."""
    be_watched(place)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wait_for_others(place)
    note(place, "listening")
    place.link.send(LISTENS)
    while True:
        time.sleep(60)


THREADS: list[threading.Thread] = []


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(NOTES, str(tmp_path))
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield tmp_path
    while THREADS:  # each ends with a signal that would end the tests
        THREADS.pop().join()
    for each, handler in before.items():
        signal.signal(each, handler)


def noted(notes: Path, what: str) -> list[str]:
    path = notes / what
    return path.read_text().splitlines() if path.exists() else []


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def meanwhile(do: Callable[[], None]) -> threading.Thread:
    """In a thread, and then SIGTERM in any case."""

    def work() -> None:
        try:
            do()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=work)
    THREADS.append(thread)
    thread.start()
    return thread


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_all_listen_on_one_port_until_they_are_told_to_stop(notes: Path) -> None:
    port = free_port()
    answered = []

    def visit() -> None:
        until(lambda: len(noted(notes, "listening")) == 3)
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as caller:
                answered.append(caller.recv(1) == b"")
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: len(noted(notes, "reloaded")) == 3)

    visitor = meanwhile(visit)
    assert supervise(listen, 3, "127.0.0.1", port, 9.0) == 0
    visitor.join()
    assert answered == [True] * 20
    assert sorted(line.split()[0] for line in noted(notes, "reloaded")) == ["0", "1", "2"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def listen_late(place: Place) -> None:
    if place.number == 2:
        until(lambda: len(noted(Path(os.environ[NOTES]), "warm")) == 2)
        time.sleep(0.2)  # in which the others could begin, and shall not
        assert not noted(Path(os.environ[NOTES]), "listening")
    listen(place)


def test_none_listens_before_all_are_warm(notes: Path) -> None:
    waiter = meanwhile(lambda: until(lambda: len(noted(notes, "listening")) == 3))
    assert supervise(listen_late, 3, "127.0.0.1", 0, 9.0) == 0
    waiter.join()


def never_be_warm(place: Place) -> None:
    """The second hangs."""
    if place.number == 1:
        be_watched(place)
        note(place, "hangs")
        time.sleep(600)
    listen(place)


def test_one_that_hangs_at_its_start_does_not_keep_the_others_for_ever(
    notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.processes._LONGEST_WAIT", 1.0)

    def wait() -> None:
        until(lambda: len(noted(notes, "hangs")) == 1)
        until(lambda: len(noted(notes, "listening")) == 1)

    waiter = meanwhile(wait)
    assert supervise(never_be_warm, 2, "127.0.0.1", 0, 9.0) == 0
    waiter.join()


def test_one_that_dies_is_started_again(notes: Path) -> None:
    def kill() -> None:
        until(lambda: len(noted(notes, "listening")) == 2)
        killed = next(x for x in noted(notes, "listening") if x.startswith("1"))
        os.kill(int(killed.split()[1]), signal.SIGKILL)
        until(lambda: len(noted(notes, "listening")) == 3)
        assert noted(notes, "listening")[-1].startswith("1")

    killer = meanwhile(kill)
    assert supervise(listen, 2, "127.0.0.1", 0, 9.0) == 0
    killer.join()
    assert len(noted(notes, "listening")) == 3


def test_what_the_first_cannot_start_with_no_other_tries(notes: Path) -> None:
    assert supervise(fail, 3, "127.0.0.1", 0, 9.0) == 2
    assert len(noted(notes, "failed")) == 1


def test_processes_that_die_again_and_again_are_given_up(notes: Path) -> None:
    assert supervise(die, 1, "127.0.0.1", 0, 9.0) == 1
    assert len(noted(notes, "listening")) == 4


def test_one_that_cannot_start_again_at_once_is_tried_again_beside_the_others(notes: Path) -> None:
    def kill() -> None:
        until(lambda: len(noted(notes, "listening")) == 2)
        killed = next(x for x in noted(notes, "listening") if x.startswith("1"))
        os.kill(int(killed.split()[1]), signal.SIGKILL)
        until(lambda: len(noted(notes, "listening")) == 3)

    killer = meanwhile(kill)
    assert supervise(fail_when_there_are_others, 2, "127.0.0.1", 0, 9.0) == 0
    killer.join()
    assert len(noted(notes, "failed")) == 3


def test_one_that_starts_while_all_are_to_load_the_bundle_anew_is_told_then(notes: Path) -> None:
    def kill_and_reload() -> None:
        until(lambda: len(noted(notes, "listening")) == 2)
        killed = next(x for x in noted(notes, "listening") if x.startswith("1"))
        os.kill(int(killed.split()[1]), signal.SIGKILL)
        until(lambda: len(noted(notes, "warm")) == 3)  # it has read the bundle of before
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: len(noted(notes, "reloaded")) >= 2)

    reloader = meanwhile(kill_and_reload)
    assert supervise(listen_when_another_has_loaded_anew, 2, "127.0.0.1", 0, 9.0) == 0
    reloader.join()
    assert {line.split()[0] for line in noted(notes, "reloaded")} == {"0", "1"}


def test_one_that_does_not_end_is_killed(notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teller = meanwhile(lambda: until(lambda: len(noted(notes, "listening")) == 2))
    assert supervise(be_deaf, 2, "127.0.0.1", 0, 0.5) == 0
    teller.join()
    assert "processes killed" in capsys.readouterr().out


def listen_when_let(place: Place) -> None:
    """The second takes its time to be warm."""
    note(place, "started")
    if place.number == 1:
        until(lambda: bool(noted(Path(os.environ[NOTES]), "let")))
    listen(place)


def test_those_that_die_before_all_are_warm_are_started_once_each(notes: Path) -> None:
    def kill_both() -> None:
        until(lambda: len(noted(notes, "started")) == 2)
        for line in noted(notes, "started"):
            os.kill(int(line.split()[1]), signal.SIGKILL)
        until(lambda: len(noted(notes, "started")) == 4)
        (notes / "let").write_text("now\n")
        until(lambda: len(noted(notes, "listening")) == 2)

    killer = meanwhile(kill_both)
    assert supervise(listen_when_let, 2, "127.0.0.1", 0, 9.0) == 0
    killer.join()
    assert len(noted(notes, "started")) == 4
    assert sorted(line.split()[0] for line in noted(notes, "listening")) == ["0", "1"]


def test_a_port_that_somebody_listens_on_is_a_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=f"127.0.0.1:{port} cannot be listened on: Address"):
            supervise(listen, 2, "127.0.0.1", port, 9.0)


def test_folders_too_long_for_sockets_are_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 25)))
    (tmp_path / ("long" * 25)).mkdir()
    with pytest.raises(OSError, match="set TMPDIR"):
        supervise(fail, 2, "127.0.0.1", 0, 1.0)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
def test_an_address_of_version_six_takes_no_other_connections(tmp_path: Path) -> None:
    link, theirs = multiprocessing.Pipe()
    with link, theirs, Place(0, tmp_path, ("::", 0), theirs).listener() as listener:
        listener.listen()
        port = listener.getsockname()[1]
        socket.create_connection(("::1", port), 1).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 1)


def test_two_services_do_not_share_a_port_by_mistake(notes: Path) -> None:
    port = free_port()
    refused = []

    def start_another() -> None:
        until(lambda: len(noted(notes, "listening")) == 2)
        try:
            supervise(listen, 2, "127.0.0.1", port, 9.0)
        except PortTaken as error:
            refused.append(error)

    another = meanwhile(start_another)
    supervise(listen, 2, "127.0.0.1", port, 9.0)
    another.join()
    assert refused


def test_processes_end_with_the_one_that_watches_them_and_leave_nothing(
    notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Path(mkdtemp(prefix="mmtl-test-"))  # of a short name, for sockets
    monkeypatch.setenv("TMPDIR", str(shared))
    watching = multiprocessing.get_context("spawn").Process(
        target=supervise, args=(listen, 2, "127.0.0.1", 0, 9.0)
    )
    watching.start()
    until(lambda: len(noted(notes, "listening")) == 2)
    pids = [int(line.split()[1]) for line in noted(notes, "listening")]
    watching.kill()
    watching.join()

    def gone(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    until(lambda: all(map(gone, pids)))
    shared.rmdir()  # which is empty


def test_a_second_signal_does_not_put_off_the_end(tmp_path: Path) -> None:
    supervisor = _Supervisor(fail, 1, tmp_path, ("127.0.0.1", 0), 9.0)
    supervisor._stop()
    kill_at = supervisor._kill_at
    assert 0 < kill_at - time.monotonic() <= 9.0
    supervisor._stop()
    assert supervisor._kill_at == kill_at


def die_beside_another(place: Place) -> None:
    """The second dies whenever it is started, five times."""
    be_watched(place)
    if place.number == 1 and len(noted(Path(os.environ[NOTES]), "died")) < 5:
        if os.environ.get("MMTL_TEST_LISTENS"):
            until(lambda: bool(noted(Path(os.environ[NOTES]), "listening")))
        note(place, "died")
        os.kill(os.getpid(), signal.SIGKILL)
    listen(place)


@pytest.mark.parametrize(("wait", "status", "deaths"), [(0.1, 0, 5), (120.0, 1, 4)])
def test_one_that_dies_again_and_again_is_given_up_only_where_no_other_listens(
    notes: Path, monkeypatch: pytest.MonkeyPatch, wait: float, status: int, deaths: int
) -> None:
    monkeypatch.setattr("app.processes._LONGEST_PAUSE", 0.05)
    monkeypatch.setattr("app.processes._LONGEST_WAIT", wait)
    if not status:
        monkeypatch.setenv("MMTL_TEST_LISTENS", "1")
    ended: list[int] = []
    waiter = meanwhile(lambda: until(lambda: bool(ended) or len(noted(notes, "listening")) == 2))
    ended.append(supervise(die_beside_another, 2, "127.0.0.1", 0, 9.0))
    waiter.join()
    assert ended == [status]
    assert len(noted(notes, "died")) == deaths


def note_what_is_blocked(place: Place) -> None:
    """Before it is watched."""
    if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []):
        note(place, "blocked")
    raise SystemExit(2)


def test_ctrl_c_at_a_terminal_ends_none_that_is_just_being_started(notes: Path) -> None:
    assert supervise(note_what_is_blocked, 1, "127.0.0.1", 0, 9.0) == 2
    assert len(noted(notes, "blocked")) == 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_port_is_one_service_s_before_it_listens() -> None:
    with _reserve("127.0.0.1", 0) as reserved, pytest.raises(PortTaken):
        _reserve(*reserved.getsockname()).close()


def test_one_that_is_started_just_when_all_are_to_stop_is_told_so(notes: Path) -> None:
    supervisor = _Supervisor(listen, 1, notes, ("127.0.0.1", 0), 9.0)
    supervisor._stopping = True
    supervisor._start(0)
    (child,) = supervisor._children.values()
    try:
        child.process.join(20)
        assert child.process.exitcode == -signal.SIGINT
    finally:
        child.process.kill()
        child.process.join()
        child.link.close()


def test_deaths_of_long_ago_count_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = _Supervisor(fail, 1, tmp_path, ("127.0.0.1", 0), 9.0)
    now = 1000.0
    monkeypatch.setattr("app.processes.time.monotonic", lambda: now)
    for _ in range(9):
        supervisor._start_later(0)
        assert supervisor._due == {0: now}  # at once
        now += 601
    assert supervisor._status == 0
