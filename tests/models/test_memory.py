"""Memory that is given back, and an interrupt that comes meanwhile."""

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import weakref

import pytest

from models import memory
from models.memory import available_memory, give_back

# glibc describes its arenas, as heaps, to a C stream.
ARENAS = """
import ctypes, threading
from models.memory import limit_arenas
limit_arenas(1)
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
threads = [threading.Thread(target=c.malloc, args=[1000]) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
c.malloc_info(0, ctypes.c_void_p.in_dll(c, "stdout"))
c.fflush(None)
"""

# What is freed below the last block stays with the heap.
FREED = """
import ctypes, os
from models import memory
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
c.free.argtypes = [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
blocks = [c.malloc(50_000) for _ in range(1000)]
for block in blocks:
    c.memset(block, 1, 50_000)
for block in blocks[:-1]:
    c.free(block)
before = resident()
memory.NAME()
print(before - resident())
"""

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Cycle:
    def __init__(self) -> None:
        self.own = self


@pytest.mark.parametrize(
    ("limit", "found"),
    [("max", MACHINE), ("1000000", 1_000_000), (str(2 * MACHINE), MACHINE), ("nonsense", MACHINE)],
)
def test_the_container_s_limit_counts(
    monkeypatch: pytest.MonkeyPatch, limit: str, found: int
) -> None:
    monkeypatch.setattr(memory, "limits", lambda _: ["max", limit])
    assert available_memory() == found


def test_without_a_cgroup_the_machine_s_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "limits", lambda _: [])
    assert available_memory() == MACHINE


def test_cycles_are_collected() -> None:
    gone = weakref.ref(Cycle())
    give_back()
    assert gone() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_a_callback_of_the_collection_is_not_lost(
    number: signal.Signals,
) -> None:
    cycle = Cycle()
    watched = weakref.ref(cycle, lambda _: signal.raise_signal(number))
    before = signal.signal(number, signal.default_int_handler)
    gc.disable()
    try:
        del cycle
        with pytest.raises(KeyboardInterrupt):
            give_back()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        gc.enable()
        signal.signal(number, before)
    assert watched() is None


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_threads_share_the_arenas_that_they_may_have() -> None:
    for environment, shared in (({}, True), ({"MALLOC_ARENA_MAX": "8"}, False)):
        done = subprocess.run(
            [sys.executable, "-c", ARENAS],
            env={name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
            | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert (done.stdout.count("<heap nr=") == 1) is shared


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc")
@pytest.mark.parametrize("name", ["give_back", "trim_heaps"])
def test_what_is_freed_goes_back_to_the_kernel(name: str) -> None:
    code = FREED.replace("NAME", name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 40_000_000


def test_heaps_are_trimmed_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = threading.Semaphore(0)
    monkeypatch.setattr(memory, "trim_heaps", trimmed.release)
    for _ in range(3):
        memory.trim_heaps_soon(0.05)
    assert trimmed.acquire(timeout=5)
    assert not trimmed.acquire(timeout=0.2)
    with monkeypatch.context() as crowded:
        crowded.setattr("threading.Timer.start", fail)
        memory.trim_heaps_soon(0.0)
    memory.trim_heaps_soon(0.0)
    assert trimmed.acquire(timeout=5)


def test_a_process_that_is_forked_meanwhile_trims_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "trim_heaps", lambda: None)
    memory.trim_heaps_soon(0.2)
    child = os.fork()
    if not child:
        os._exit(memory._due.locked())
    assert os.waitpid(child, 0)[1] == 0


def fail(_: threading.Timer) -> None:
    raise RuntimeError("can't start new thread")
