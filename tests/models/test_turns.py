import gc
import multiprocessing
import os
import threading
import time
import weakref
from functools import partial

import pytest

from models import turns
from models.turns import (
    NotItsTurn,
    allow_at_once,
    in_turn,
    is_anyones_turn,
    most_at_once,
    skip_turn,
)


def hold(until: threading.Event) -> threading.Thread:
    """Somebody whose turn it is until then."""
    begun = threading.Event()

    def work() -> None:
        begun.set()
        until.wait(5)

    holder = threading.Thread(target=in_turn, args=[work])
    holder.start()
    assert begun.wait(5)
    return holder


def test_work_is_done_one_at_a_time() -> None:
    over = threading.Event()
    holder = hold(over)
    with pytest.raises(NotItsTurn):
        in_turn(int, wait=False)
    threading.Timer(0.05, over.set).start()
    assert in_turn(over.is_set)
    holder.join()
    assert is_anyones_turn()


@pytest.mark.parametrize(("most", "sparingly"), [(1, 1), (2, 1), (3, 2), (8, 4)])
def test_half_of_the_turns_are_left_where_there_is_other_work(most: int, sparingly: int) -> None:
    allow_at_once(most)
    over = threading.Event()
    holders = [hold(over) for _ in range(sparingly - 1)]
    assert is_anyones_turn(sparing=True)
    assert in_turn(int, wait=False, sparing=True) == 0
    holders.append(hold(over))
    assert not is_anyones_turn(sparing=True)
    with pytest.raises(NotItsTurn):
        in_turn(int, wait=False, sparing=True)
    assert is_anyones_turn() == (sparingly < most)
    over.set()
    for holder in holders:
        holder.join()


def test_as_much_is_done_at_once_as_is_allowed() -> None:
    allow_at_once(2)
    over, later = threading.Event(), threading.Event()
    first, second = hold(later), hold(over)
    assert not is_anyones_turn()
    with pytest.raises(NotItsTurn):
        in_turn(int, wait=False)
    over.set()
    second.join()
    assert in_turn(int, wait=False) == 0
    assert first.is_alive()
    later.set()
    first.join()


def test_a_heap_that_has_grown_is_used_again_before_another_grows() -> None:
    allow_at_once(3)
    assert len({in_turn(threading.get_ident) for _ in range(5)}) == 1


@pytest.mark.parametrize(
    ("cores", "gigabytes", "megapixels", "processes", "most"),
    [
        (2, 8, 30, 1, 2),
        (16, 64, 30, 1, 16),
        (16, 8, 30, 1, 4),  # 600 MB each, of a third of the memory
        (16, 8, 60, 1, 2),
        (16, 64, 30, 8, 2),
        (16, 8, 30, 3, 1),
        (1, 1, 30, 1, 1),  # one there is always
    ],
)
def test_memory_and_cores_say_how_many_may_be_decoded_at_once(
    cores: int,
    gigabytes: int,
    megapixels: int,
    processes: int,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "available_cores", lambda: cores)
    monkeypatch.setattr(turns, "available_memory", lambda: gigabytes * 1_000_000_000)
    assert most_at_once(megapixels * 1_000_000, processes) == most


def test_all_of_it_in_one_thread_which_is_nobody_s_own() -> None:
    threads = []
    askers = [
        threading.Thread(target=lambda: threads.append(in_turn(threading.get_ident)))
        for _ in range(4)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(threads) == 4
    assert len(set(threads)) == 1
    assert not set(threads) & {threading.get_ident(), *(asker.ident for asker in askers)}


def test_an_error_is_the_asker_s_and_nothing_is_kept_of_it() -> None:
    def fail(_: set[int]) -> None:
        raise ValueError("damaged")

    image = {1}
    held = weakref.ref(image)
    gc.disable()
    try:
        with pytest.raises(ValueError, match="damaged"):
            in_turn(partial(fail, image))
        del image
        deadline = time.monotonic() + 5  # the thread lets go of it just after the asker
        while held() is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        gc.enable()
    assert is_anyones_turn()


def test_what_was_taken_is_given_back_before_the_next_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(turns, "trim_heaps_soon", lambda: asked.append(is_anyones_turn()))
    in_turn(int)
    with pytest.raises(ZeroDivisionError):
        in_turn(lambda: 1 // 0)
    assert asked == [False, False]


def test_who_hangs_keeps_the_turn_from_nobody_and_ends_with_its_thread() -> None:
    over = threading.Event()
    holder = hold(over)
    hung = next(t for t in reversed(threading.enumerate()) if t.name == "mmtl-large")
    skip_turn()
    assert in_turn(threading.get_ident, wait=False) != hung.ident
    over.set()
    holder.join(5)
    hung.join(5)
    assert not hung.is_alive()
    assert is_anyones_turn()


def test_as_many_turns_are_there_after_one_was_skipped() -> None:
    allow_at_once(2)
    over, later = threading.Event(), threading.Event()
    hung = hold(over)
    skip_turn()
    holders = [hold(later), hold(later)]
    over.set()
    hung.join(5)
    assert not is_anyones_turn()  # the one that hung brings none back
    later.set()
    for holder in holders:
        holder.join(5)
    assert is_anyones_turn()


def test_a_turn_that_nobody_has_ends_with_its_thread_when_it_is_skipped() -> None:
    in_turn(int)
    resting = next(t for t in reversed(threading.enumerate()) if t.name == "mmtl-large")
    skip_turn()
    resting.join(5)
    assert not resting.is_alive()


def test_without_another_thread_the_asker_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as crowded:
        crowded.setattr("threading.Thread.start", fail)
        assert in_turn(threading.get_ident) == threading.get_ident()
    assert in_turn(threading.get_ident) != threading.get_ident()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked there")
def test_a_forked_process_has_turns_of_its_own() -> None:
    over = threading.Event()
    holder = hold(over)
    try:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply_async(in_turn, [os.getppid]).get(10) == os.getpid()
    finally:
        over.set()
        holder.join()


def test_a_turn_that_who_is_sparing_may_not_take_goes_to_who_may() -> None:
    allow_at_once(2)
    over, later, begun = threading.Event(), threading.Event(), threading.Event()
    holders = [hold(over), hold(later)]
    spares = threading.Thread(target=in_turn, args=[int], kwargs={"sparing": True})
    asks = threading.Thread(target=in_turn, args=[begun.set])
    for number, waiter in enumerate((spares, asks), 1):  # the sparing one is woken first
        waiter.start()
        deadline = time.monotonic() + 5
        while len(turns._turns[0]._changed._waiters) < number:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    over.set()
    taken = begun.wait(3)
    later.set()
    for thread in (*holders, spares, asks):
        thread.join(5)
    assert taken
