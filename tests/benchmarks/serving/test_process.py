import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving import process
from benchmarks.serving.process import Process, System, surroundings

# Writes a line when a child of its has taken CPU time and ended, and another is there.
PROGRAM = """
import os, subprocess, sys, time
busy = "import time; end = time.process_time() + 0.5\\nwhile time.process_time() < end: pass"
subprocess.run([sys.executable, "-c", busy])
subprocess.Popen([sys.executable, "-c", "import time; held = b'x' * 50_000_000; time.sleep(60)"])
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    program = Path(sys.executable)
    monkeypatch.setattr(process, "make_environment", lambda _: program.parent)
    found = Process(System("own", (program.name, "-c", PROGRAM), port=1), tmp_path / "log")
    until = time.monotonic() + 30
    while "ready" not in (tmp_path / "log").read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    yield found
    found.stop()


STOPPED = """
import signal, sys, time
from benchmarks.serving.process import stop_on_signals
if sys.argv[1:] == ["ignored"]:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
stop_on_signals()
try:
    print("begun", flush=True)
    time.sleep(60)
finally:
    print("cleared", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_program_that_is_told_to_end_stops_what_it_has_started(number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"begun\n"
        program.send_signal(number)
        assert program.stdout.read() == b"cleared\n"
        assert program.wait() == 1


def test_a_terminal_that_is_closed_does_not_end_what_nohup_started() -> None:
    command = [sys.executable, "-c", STOPPED, "ignored"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        program.stdout.readline()
        program.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(0.5)
        program.terminate()
        assert program.stdout.read() == b"cleared\n"


def test_cpu_time_and_memory_are_those_of_children_too(running: Process) -> None:
    assert 0.4 < running.cpu_seconds() < 5
    until = time.monotonic() + 30
    while running.megabytes() < 50:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(list(running.pids())) == 2


def test_what_is_watched_is_what_is_taken_meanwhile(running: Process) -> None:
    with running.watched() as watched:
        time.sleep(0.1)
    assert watched["cpu_seconds"] < 0.4  # what the child took before is not in it
    assert watched["peak_megabytes"] > 5


def test_the_most_memory_is_seen_however_short_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    briefly = "bytearray(60_000_000); print('had', flush=True); input()"
    told = f"import sys; input(); {briefly}"
    program = Path(sys.executable)
    monkeypatch.setattr(process, "make_environment", lambda _: program.parent)
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    command = ("-c", f"import sys; sys.stdin = open({str(fifo)!r}); {told}")
    one = Process(System("own", (program.name, *command), port=1), tmp_path / "log")
    try:
        with fifo.open("w") as go:
            with one.watched() as before:
                time.sleep(0.1)
            with one.watched() as watched:
                print(file=go, flush=True)
                until = time.monotonic() + 30
                while "had" not in (tmp_path / "log").read_text():
                    assert time.monotonic() < until
                    time.sleep(0.02)
            assert watched["peak_megabytes"] > before["peak_megabytes"] + 50
            assert one.megabytes() < before["peak_megabytes"] + 10
    finally:
        one.stop()


def test_a_system_settles_when_none_of_its_processes_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter([0.0, 0.4, 0.4, 0.5, 0.5, 0.51])  # before and after each half second
    monkeypatch.setattr(Process, "cpu_seconds", lambda _: next(seconds))
    monkeypatch.setattr(process.time, "sleep", lambda _: None)
    Process.__new__(Process).settle()
    assert list(seconds) == []


def test_settings_of_whoever_measures_do_not_get_into_what_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MMTL_PRECISION", "fp32")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HOME", "/home/who")
    found = surroundings()
    assert "MMTL_PRECISION" not in found
    assert "OMP_NUM_THREADS" not in found
    assert found["HOME"] == "/home/who"


def test_a_system_that_is_stopped_has_no_process_left(running: Process) -> None:
    running.pause()
    running.stop()
    assert list(running.pids()) == []
