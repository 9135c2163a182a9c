import _thread
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from queue import SimpleQueue

import pytest

import models.threads
from models.threads import begin, begun_by, keep_off_this_core

HERE = os.sched_getaffinity(0)
needs_two_cores = pytest.mark.skipif(len(HERE) < 2, reason="one core")


@pytest.fixture
def ended() -> Iterator[threading.Event]:
    """Of the threads that a test begins."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def waiting(ended: threading.Event) -> int:
    """A thread that waits, by the kernel's number."""
    return begin_as_a_library(ended.wait)


def begin_as_a_library(work: Callable[[], object]) -> int:
    """A thread as a library begins it, which gives it no name."""
    numbers: SimpleQueue[int] = SimpleQueue()

    def run() -> None:
        numbers.put(threading.get_native_id())
        work()

    _thread.start_new_thread(run, ())
    return numbers.get(timeout=10)


def test_threads_that_some_work_begins_are_told_from_those_of_others(
    ended: threading.Event,
) -> None:
    go, gone = threading.Event(), threading.Event()

    def begin_another() -> None:
        go.wait()
        begin_as_a_library(ended.wait)
        gone.set()

    def work() -> int:
        go.set()
        assert gone.wait(10)
        return begin_as_a_library(ended.wait)

    begin_as_a_library(begin_another)
    mine, begun = begun_by(work)
    assert begun == [mine]


def test_the_one_that_begins_them_keeps_its_name() -> None:
    before = Path("/proc/thread-self/comm").read_text()

    def fail() -> None:
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        begun_by(fail)
    assert Path("/proc/thread-self/comm").read_text() == before


def test_where_the_kernel_tells_no_threads_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.threads, "_OWN_NAME", tmp_path / "nowhere")
    assert begun_by(lambda: "done") == ("done", [])


@needs_two_cores
def test_a_thread_is_kept_off_the_caller_s_core(
    waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_off_this_core([waiting])
    assert len(HERE - os.sched_getaffinity(waiting)) == 1
    for core in HERE:
        monkeypatch.setattr(models.threads, "_this_core", lambda core=core: core)
        keep_off_this_core([waiting])
        assert os.sched_getaffinity(waiting) == HERE - {core}


def test_where_the_caller_has_one_core_a_thread_stays_where_it_may_be(waiting: int) -> None:
    os.sched_setaffinity(0, {min(HERE)})
    try:
        keep_off_this_core([waiting])
    finally:
        os.sched_setaffinity(0, HERE)
    assert os.sched_getaffinity(waiting) == HERE


def test_work_in_a_thread_of_its_own_gives_what_it_finds_or_raises() -> None:
    assert begin(lambda: threading.current_thread().daemon).result(10) is True
    with pytest.raises(ZeroDivisionError):
        begin(lambda: 1 // 0).result(10)


@pytest.mark.parametrize("work", [lambda: 1, lambda: 1 // 0])
def test_who_no_longer_waits_for_such_work_costs_it_nothing(
    ended: threading.Event, work: Callable[[], int]
) -> None:
    done = threading.Event()

    def wait_and_work() -> int:
        ended.wait(10)
        done.set()
        return work()

    future = begin(wait_and_work)
    assert future.cancel()
    ended.set()
    assert done.wait(10)
    with pytest.raises(CancelledError):
        future.result(10)
