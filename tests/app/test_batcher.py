import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from app.batcher import (
    Answer,
    Batcher,
    DeadlineExceeded,
    Draining,
    InferenceFailed,
    Late,
    NotReady,
    Saturated,
)
from app.telemetry import Metrics
from models.turns import NotItsTurn, in_turn, is_anyones_turn
from tests.bundles import SIDE

POISON = 66
INFINITE = 77
pytestmark = pytest.mark.anyio


class Engine:
    """Answers each image's first pixel; holds every run while `gate` is shut."""

    name, device, runs_at_once, helpers, batch = "test", "cpu", 1, 1, 4

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.lone: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: BaseException | None = None

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        firsts = images[:, 0, 0, 0].astype(int).tolist()
        if images.any():  # not a warm-up
            self.batches.append(firsts)
            self.gate.wait(5)
            if self.error is not None:
                raise self.error
            if POISON in firsts:
                raise ValueError("poison")
        values = images[:, 0, 0, 0].astype(np.float32)
        return {"first": np.where(values == INFINITE, np.inf, values)}

    def run_alone(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        if images.any():
            self.lone.extend(images[:, 0, 0, 0].astype(int).tolist())
        return self.run(images)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def batcher(engine: Engine, tmp_path):
    made = Batcher(engine, (SIDE, SIDE), 2, 10, Metrics(4, ()), lambda _: {})
    made.start()
    until(lambda: made.ready)
    yield made
    engine.gate.set()
    made.close(5)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def image(value: int) -> NDArray[np.uint8]:
    return np.full((SIDE, SIDE, 3), value, np.uint8)


async def ask(batcher: Batcher, value: int, seconds: float = 5.0) -> float:
    future: Future[Answer] = Future()
    batcher.put(lambda: image(value), time.monotonic() + seconds, future)
    answer = await asyncio.wrap_future(future)
    return float(answer.outputs["first"])


async def hold(engine: Engine, batcher: Batcher) -> "asyncio.Task[float]":
    """Keep the engine busy with one image, so that what follows has to wait."""
    engine.gate.clear()
    task = asyncio.create_task(ask(batcher, 1))
    while not engine.batches:
        await asyncio.sleep(0.001)
    return task


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [1, 4]), ("cuda:0", [1, 2, 3, 4])])
def test_the_engine_has_run_every_size_before_the_first_image(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, device: str, sizes: list[int]
) -> None:
    ran: list[tuple[int, ...]] = []
    alone: list[tuple[int, ...]] = []

    def see(images: NDArray[np.uint8], shapes: list) -> dict[str, NDArray[np.float32]]:
        shapes.append(images.shape)
        return {"first": np.zeros(len(images), np.float32)}

    monkeypatch.setattr(engine, "device", device)
    monkeypatch.setattr(engine, "run", partial(see, shapes=ran))
    monkeypatch.setattr(engine, "run_alone", partial(see, shapes=alone))
    made = Batcher(engine, (SIDE, 2 * SIDE), 2, 10, Metrics(4, ()), lambda _: {})
    made.start()
    assert made.wait_ready()
    made.close(5)
    assert sorted(ran) == [(size, SIDE, 2 * SIDE, 3) for size in sizes]
    assert alone == [(1, SIDE, 2 * SIDE, 3)]


def test_who_waits_for_a_warm_up_that_fails_is_told(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(engine, "run", lambda _: refuse())
    made = Batcher(engine, (SIDE, SIDE), 2, 10, Metrics(4, ()), lambda _: {})
    made.start()
    assert not made.wait_ready()
    assert not made.ready
    made.close(5)


def test_a_warm_up_that_hangs_is_not_waited_for_for_ever(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr(engine, "run", lambda _: over.wait(30))
    made = Batcher(engine, (SIDE, SIDE), 2, 10, Metrics(4, ()), lambda _: {})
    made.start()
    assert not made.wait_ready(0.05)
    made.abandon()
    over.set()
    made.close(5)


async def test_a_free_engine_does_not_wait_for_more(
    batcher: Batcher, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, waited = batcher._changed.wait, []

    def note(timeout: float | None = None) -> bool:
        # An answer is out a moment before its run is over: what comes within it waits for that.
        free = batcher._running < engine.runs_at_once
        waited.append(free and bool(batcher._decoded))
        return wait(timeout)

    monkeypatch.setattr(batcher._changed, "wait", note)
    for _ in range(3):  # the first may be noticed by workers that wait already
        assert await ask(batcher, 7) == 7
    assert engine.batches == [[7]] * 3
    assert waited
    assert not any(waited)


@pytest.mark.parametrize(("admitted", "lone"), [(1, [7]), (2, [])])
async def test_an_image_that_is_alone_is_run_as_such(
    batcher: Batcher, engine: Engine, admitted: int, lone: list[int]
) -> None:
    with batcher.reserve(admitted):
        assert await ask(batcher, 7) == 7
    assert engine.lone == lone


async def test_what_waits_is_taken_together_up_to_the_largest_batch(
    batcher: Batcher, engine: Engine
) -> None:
    first = await hold(engine, batcher)
    others = [asyncio.create_task(ask(batcher, value)) for value in range(10, 16)]
    await asyncio.sleep(0.01)
    engine.gate.set()
    assert await asyncio.gather(first, *others) == [1, *range(10, 16)]
    assert [len(batch) for batch in engine.batches] == [1, 4, 2]
    assert sorted(value for batch in engine.batches for value in batch) == [1, *range(10, 16)]


async def test_what_is_measured_of_a_batch_joins_its_outputs(engine: Engine) -> None:
    batcher = Batcher(
        engine,
        (SIDE, SIDE),
        1,
        10,
        Metrics(4, ()),
        lambda pixels: {"mean": pixels.mean((1, 2, 3))},
    )
    batcher.start()
    until(lambda: batcher.ready)
    first = await hold(engine, batcher)
    futures: list[Future[Answer]] = [Future(), Future()]
    for value, future in zip((3, 5), futures, strict=True):
        batcher.put(partial(image, value), time.monotonic() + 5, future)
    engine.gate.set()
    answers = [await asyncio.wrap_future(future) for future in futures]
    assert [(answer.outputs["first"], answer.outputs["mean"]) for answer in answers] == [
        (3, 3),
        (5, 5),
    ]
    await first
    batcher.close(5)


async def test_how_long_an_image_waited_is_told(batcher: Batcher, engine: Engine) -> None:
    first = await hold(engine, batcher)
    future: Future[Answer] = Future()
    put = time.monotonic()
    batcher.put(partial(image, 2), put + 5, future)
    await asyncio.sleep(0.1)
    engine.gate.set()
    answer = await asyncio.wrap_future(future)
    assert 0.09 < answer.queue_seconds < answer.ended - put
    assert 0 < answer.inference_seconds <= answer.ended - put - answer.queue_seconds
    await first


async def test_a_caller_who_has_gone_is_not_run(batcher: Batcher, engine: Engine) -> None:
    first = await hold(engine, batcher)
    gone, stays = (asyncio.create_task(ask(batcher, value)) for value in (20, 21))
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.sleep(0.01)
    engine.gate.set()
    assert await asyncio.gather(first, stays) == [1, 21]
    assert engine.batches == [[1], [21]]


async def test_an_image_whose_deadline_has_passed_is_not_run(
    batcher: Batcher, engine: Engine
) -> None:
    first = await hold(engine, batcher)
    late = asyncio.create_task(ask(batcher, 30, seconds=0.01))
    await asyncio.sleep(0.05)
    engine.gate.set()
    with pytest.raises(DeadlineExceeded):
        await late
    await first
    assert engine.batches == [[1]]


async def test_why_an_image_is_dropped_is_counted(engine: Engine) -> None:
    metrics = Metrics(4, ())
    batcher = Batcher(engine, (SIDE, SIDE), 1, 10, metrics, lambda _: {})
    batcher.start()
    until(lambda: batcher.ready)
    first = await hold(engine, batcher)
    late, gone = (asyncio.create_task(ask(batcher, 30, seconds=s)) for s in (0.3, 30))
    await asyncio.to_thread(until, lambda: len(batcher._decoded) == 2)
    await asyncio.sleep(0.3)
    late.cancel()  # as the request does, whose deadline is the same
    gone.cancel()
    await asyncio.sleep(0.01)
    engine.gate.set()
    await first
    await asyncio.to_thread(batcher.close, 5)
    counted = {
        reason: metrics.dropped.labels(reason)._value.get() for reason in ("deadline", "gone")
    }
    assert counted == {"deadline": 1, "gone": 1}


def large_that_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[threading.Event, Callable[[], NDArray[np.uint8]]]:
    """When its turn has come, and the decoding of a large image that waits for it."""
    free = threading.Event()
    monkeypatch.setattr("app.batcher.is_anyones_turn", lambda _: free.is_set())

    def large() -> NDArray[np.uint8]:
        if not free.is_set():
            raise NotItsTurn
        return image(9)

    return free, large


async def test_no_worker_waits_for_the_turn_of_a_large_image(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, large = large_that_waits(monkeypatch)
    answers: list[Future[Answer]] = [Future() for _ in range(8)]
    for answer in answers:
        batcher.put(large, time.monotonic() + 9, answer)
    until(lambda: len(batcher._large) == 8)
    assert await ask(batcher, 1) == 1
    assert not batcher.broken(1)
    answers[0].cancel()
    free.set()
    for answer in answers[1:]:
        found = await asyncio.wait_for(asyncio.wrap_future(answer), 5)
        assert found.outputs["first"] == 9


async def test_fewer_large_images_are_decoded_at_once_while_others_wait(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, int]] = []

    def is_turn(sparing: bool) -> bool:
        asked.append((sparing, len(batcher._encoded)))
        return not sparing

    monkeypatch.setattr("app.batcher.is_anyones_turn", is_turn)
    tried = []

    def large() -> NDArray[np.uint8]:
        tried.append(batcher.others_wait)
        if len(tried) == 1:
            raise NotItsTurn
        return image(9)

    answers: list[Future[Answer]] = [Future() for _ in range(4)]
    with batcher._changed:  # no worker begins before all are there
        for decode, answer in zip([large, *[lambda: image(9)] * 3], answers, strict=True):
            batcher.put(decode, time.monotonic() + 9, answer)
        assert batcher.others_wait
    for answer in answers:
        found = await asyncio.wait_for(asyncio.wrap_future(answer), 5)
        assert found.outputs["first"] == 9
    assert all(sparing == bool(waiting) for sparing, waiting in asked)
    assert (len(tried), tried[-1]) == (2, False)


async def test_a_large_image_that_waits_when_the_batcher_closes_is_answered(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, large = large_that_waits(monkeypatch)
    answer: Future[Answer] = Future()
    batcher.put(large, time.monotonic() + 9, answer)
    until(lambda: batcher._large)
    closing = asyncio.get_running_loop().run_in_executor(None, batcher.close, 5)
    until(lambda: batcher._closed)
    await asyncio.sleep(0.1)  # in which a worker without anything to do would end
    free.set()
    found = await asyncio.wait_for(asyncio.wrap_future(answer), 5)
    assert found.outputs["first"] == 9
    await closing


@pytest.mark.parametrize("end", ["close", "abandon"])
async def test_large_images_that_wait_are_refused_in_the_end(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    def large() -> NDArray[np.uint8]:
        raise NotItsTurn

    monkeypatch.setattr("app.batcher.is_anyones_turn", lambda _: False)
    answer: Future[Answer] = Future()
    batcher.put(large, time.monotonic() + 9, answer)
    until(lambda: batcher._large)
    await asyncio.to_thread(getattr(batcher, end), *([0.1] if end == "close" else []))
    with pytest.raises(Draining if end == "close" else NotReady):
        await asyncio.wait_for(asyncio.wrap_future(answer), 5)


async def test_what_is_left_to_do_for_an_image_comes_before_other_images(
    batcher: Batcher, engine: Engine
) -> None:
    done: list[str] = []
    go_on = threading.Semaphore(0)

    def wait() -> NDArray[np.uint8]:
        go_on.acquire(timeout=5)
        return image(1)

    def decode() -> NDArray[np.uint8]:
        done.append("image")
        return image(1)

    def fail() -> str:
        raise ValueError("no picture")

    until_end = time.monotonic() + 9
    for _ in batcher._workers:
        batcher.put(wait, until_end, Future())
    until(lambda: len(batcher._busy) == len(batcher._workers))
    other: Future[Answer] = Future()
    batcher.put(decode, until_end, other)
    drawn: Future[str] = Future()
    batcher.finish(lambda: done.append("rest") or "drawn", until_end, drawn)
    failed: Future[str] = Future()
    batcher.finish(fail, until_end, failed)
    go_on.release()  # one worker alone, or what is taken first might be done last
    assert await asyncio.wrap_future(drawn) == "drawn"
    with pytest.raises(ValueError, match="no picture"):
        await asyncio.wrap_future(failed)
    await asyncio.wrap_future(other)
    assert done == ["rest", "image"]
    go_on.release(len(batcher._workers))


@pytest.mark.parametrize("end", ["abandon", "retire"])
async def test_a_decoder_that_hangs_keeps_its_turn_from_nobody(batcher: Batcher, end: str) -> None:
    hangs = threading.Event()

    def decode() -> NDArray[np.uint8]:
        in_turn(lambda: hangs.wait(5))
        return image(1)

    asked: Future[Answer] = Future()
    batcher.put(decode, time.monotonic() + 9, asked)
    until(lambda: not is_anyones_turn())
    await asyncio.to_thread(getattr(batcher, end), *([0.1] if end == "retire" else []))
    assert is_anyones_turn()

    def meanwhile() -> bool:
        hangs.set()
        batcher.close(5)
        return is_anyones_turn()  # the one that hung lets go of its own

    assert not in_turn(meanwhile, wait=False)
    assert is_anyones_turn()


@pytest.mark.parametrize("run", ["run", "run_alone"])
async def test_a_first_run_that_hangs_is_seen(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(engine, run, lambda images: hangs.wait(30))
    batcher = Batcher(engine, (SIDE, SIDE), 2, 10, Metrics(4, ()), lambda _: {})
    batcher.start()
    until(lambda: batcher.broken(0.1))
    assert not batcher.broken(20)
    hangs.set()
    until(lambda: batcher.ready)
    assert not batcher.broken(0)
    batcher.close(5)


async def test_a_worker_that_hangs_is_not_waited_for_as_one_that_works(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.batcher._LAST_SECONDS", 0.1)
    hangs, decodes = threading.Event(), threading.Event()

    def decode() -> NDArray[np.uint8]:
        decodes.set()
        hangs.wait(30)
        return image(1)

    batcher.put(decode, time.monotonic() + 99, Future())
    assert await asyncio.to_thread(decodes.wait, 5)
    batcher.abandon()
    began = time.monotonic()
    batcher.close(20)
    assert time.monotonic() - began < 10
    hangs.set()


async def test_a_large_image_that_waits_past_its_deadline_is_let_go(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large() -> NDArray[np.uint8]:
        raise NotItsTurn

    monkeypatch.setattr("app.batcher.is_anyones_turn", lambda _: False)
    answer: Future[Answer] = Future()
    batcher.put(large, time.monotonic() + 0.1, answer)
    until(lambda: batcher._large)
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(asyncio.wrap_future(answer), 5)
    until(lambda: not batcher._large)


async def test_a_failed_batch_is_retried_one_by_one(batcher: Batcher, engine: Engine) -> None:
    first = await hold(engine, batcher)
    values = (40, POISON, 41)
    others = [asyncio.create_task(ask(batcher, value)) for value in values]
    await asyncio.sleep(0.01)
    engine.gate.set()
    good, bad, fine = await asyncio.gather(*others, return_exceptions=True)
    assert (good, fine) == (40, 41)
    assert isinstance(bad, InferenceFailed)
    await first
    assert batcher.ready
    assert await ask(batcher, 42) == 42


async def test_a_failed_run_is_tried_again(
    batcher: Batcher, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine.run

    def fail_once(images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        monkeypatch.setattr(engine, "run", run)
        raise RuntimeError("once")

    monkeypatch.setattr(engine, "run", fail_once)
    assert await ask(batcher, 1) == 1


async def test_a_failed_run_that_was_alone_is_tried_again_as_others_are_run(
    batcher: Batcher, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        raise RuntimeError("always")

    monkeypatch.setattr(engine, "run_alone", fail)
    with batcher.reserve(1):
        assert await ask(batcher, 1) == 1


async def test_a_gpu_short_of_memory_gets_smaller_batches(
    batcher: Batcher, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine.run

    def short(images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        if len(images) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return run(images)

    monkeypatch.setattr(engine, "run", short)
    first = await hold(engine, batcher)
    values = range(80, 88)
    others = [asyncio.create_task(ask(batcher, value)) for value in values]
    await asyncio.sleep(0.01)
    engine.gate.set()
    assert await asyncio.gather(first, *others) == [1, *values]
    assert batcher._metrics.failed_runs._value.get() == 1  # and then never again


async def test_after_many_runs_batches_may_be_larger_again(
    batcher: Batcher, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher._runs_before_more = 3
    largest = engine.batch
    run, fails = engine.run, iter([True])

    def short_once(images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        if len(images) > 1 and next(fails, False):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return run(images)

    monkeypatch.setattr(engine, "run", short_once)
    first = await hold(engine, batcher)
    others = [asyncio.create_task(ask(batcher, value)) for value in (80, 81)]
    while len(batcher._decoded) < 2:
        await asyncio.sleep(0.001)
    engine.gate.set()
    assert await asyncio.gather(first, *others) == [1, 80, 81]
    seen = [batcher._max_batch]
    for value in range(12):
        assert await ask(batcher, value) == value
        seen.append(batcher._max_batch)
    assert seen[0] == 1
    assert seen == sorted(seen)
    assert seen[-1] == largest


async def test_a_worker_that_hangs_is_seen_and_its_callers_refused(
    batcher: Batcher, engine: Engine
) -> None:
    first = await hold(engine, batcher)
    waiting = asyncio.create_task(ask(batcher, 50))
    await asyncio.sleep(0.03)
    assert batcher.broken(0.01)
    assert not batcher.broken(60)
    batcher.abandon()
    for refused in (first, waiting):
        with pytest.raises(NotReady):
            await refused
    assert not batcher.ready


async def test_an_old_batcher_ends_with_its_last_request(batcher: Batcher, engine: Engine) -> None:
    with batcher.reserve(1):
        first = await hold(engine, batcher)
        retiring = asyncio.create_task(asyncio.to_thread(batcher.retire, 60))
        await asyncio.sleep(0.02)
        assert batcher.alive
        engine.gate.set()
        assert await first == 1
    await asyncio.wait_for(retiring, 5)
    assert not any(worker.is_alive() for worker in batcher._workers)


async def test_no_request_gets_in_while_an_old_batcher_closes(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[bool] = []

    def close(_: float) -> None:
        try:
            with batcher.reserve(1):
                refused.append(False)
        except Draining:
            refused.append(True)

    with monkeypatch.context() as patched:
        patched.setattr(batcher, "close", close)
        batcher.retire(5)
    assert refused == [True]


async def test_a_batcher_that_ends_with_its_last_request_loses_none_of_its_work(
    batcher: Batcher,
) -> None:
    with batcher.reserve(1):
        retiring = asyncio.create_task(asyncio.to_thread(batcher.retire, 5))
        await asyncio.sleep(0.02)
        for number in range(12):
            done: Future[int] = Future()
            batcher.finish(lambda number=number: number, time.monotonic() + 5, done)
            assert await asyncio.wait_for(asyncio.wrap_future(done), 2) == number
            await asyncio.sleep(0.005)  # the workers wait again
    await asyncio.wait_for(retiring, 5)


async def test_an_answer_that_is_not_finite_fails_alone(batcher: Batcher, engine: Engine) -> None:
    first = await hold(engine, batcher)
    others = [asyncio.create_task(ask(batcher, value)) for value in (43, INFINITE)]
    await asyncio.sleep(0.01)
    engine.gate.set()
    good, bad = await asyncio.gather(*others, return_exceptions=True)
    assert good == 43
    assert isinstance(bad, InferenceFailed)
    await first


async def test_a_network_that_answers_for_fewer_images_than_it_was_given_kills_no_worker(
    batcher: Batcher, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine.run

    def short(images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        return {"first": run(images)["first"][: 0 if images.max() > 250 else None]}

    monkeypatch.setattr(engine, "run", short)
    monkeypatch.setattr(engine, "run_alone", short)
    with pytest.raises(InferenceFailed):
        await ask(batcher, 255)
    assert await ask(batcher, 7) == 7


async def test_one_output_that_is_not_finite_is_enough(
    batcher: Batcher, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine.run

    def with_another(images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        return {**run(images), "other": np.ones(len(images), np.float32)}

    monkeypatch.setattr(engine, "run", with_another)
    monkeypatch.setattr(engine, "run_alone", with_another)
    with pytest.raises(InferenceFailed):
        await ask(batcher, INFINITE)
    assert await ask(batcher, 7) == 7


@pytest.mark.parametrize("gives", ["errors", "infinity"])
async def test_a_network_that_fails_for_blank_images_too_is_broken(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch, gives: str
) -> None:
    def fail(images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        if gives == "errors":
            raise RuntimeError("an illegal memory access was encountered")
        return {"first": np.full(len(images), np.inf, np.float32)}

    monkeypatch.setattr(batcher._engine, "run", fail)
    monkeypatch.setattr(batcher._engine, "run_alone", fail)
    for _ in range(3):
        assert not batcher.broken(60)
        with pytest.raises(InferenceFailed):
            await ask(batcher, 1)
    until(lambda: batcher.broken(60))
    with pytest.raises(NotReady):
        await ask(batcher, 1)


async def test_what_waits_when_a_network_is_given_up_is_refused(
    batcher: Batcher, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: NDArray[np.uint8]) -> None:
        engine.gate.wait(5)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(engine, "run", fail)
    monkeypatch.setattr(engine, "run_alone", fail)
    for _ in range(2):
        with pytest.raises(InferenceFailed):
            await ask(batcher, 1)
    until(lambda: not batcher._busy)
    engine.gate.clear()
    last = asyncio.create_task(ask(batcher, 1))
    while not batcher._running:
        await asyncio.sleep(0.001)
    waits = asyncio.create_task(ask(batcher, 2, 60))
    while not batcher._decoded:
        await asyncio.sleep(0.001)
    engine.gate.set()
    with pytest.raises(InferenceFailed):
        await last
    with pytest.raises(NotReady):
        await asyncio.wait_for(waits, 5)


async def test_images_that_fail_alone_break_no_network(batcher: Batcher) -> None:
    for value in [POISON] * 4 + [INFINITE] * 4:
        with pytest.raises(InferenceFailed):
            await ask(batcher, value)
    assert await ask(batcher, 1) == 1


async def test_failures_with_answers_between_them_break_no_network(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        with monkeypatch.context() as failing:
            failing.setattr(batcher._engine, "run", lambda _: refuse())
            failing.setattr(batcher._engine, "run_alone", lambda _: refuse())
            for _ in range(2):
                with pytest.raises(InferenceFailed):
                    await ask(batcher, 1)
                until(lambda: not batcher._busy)
        assert await ask(batcher, 1) == 1


async def test_what_a_decoder_raises_reaches_its_caller_alone(batcher: Batcher) -> None:
    def fail() -> NDArray[np.uint8]:
        raise ValueError("no picture")

    future: Future[Answer] = Future()
    batcher.put(fail, time.monotonic() + 5, future)
    with pytest.raises(ValueError, match="no picture"):
        await asyncio.wrap_future(future)
    assert await ask(batcher, 8) == 8


async def test_a_gpu_is_not_left_idle_while_more_is_decoded(engine: Engine, tmp_path: Path) -> None:
    engine.device = "cuda:0"
    batcher = Batcher(engine, (SIDE, SIDE), 2, 10, Metrics(4, ()), lambda _: {})
    batcher.start()
    until(lambda: batcher.ready)
    slow = threading.Event()

    def wait() -> NDArray[np.uint8]:
        slow.wait(5)
        return image(9)

    first: Future[Answer] = Future()
    others: list[Future[Answer]] = [Future() for _ in range(5)]
    for decode, future in [(lambda: image(8), first), *((wait, other) for other in others)]:
        batcher.put(decode, time.monotonic() + 5, future)
    answer = await asyncio.wait_for(asyncio.wrap_future(first), 5)
    assert float(answer.outputs["first"]) == 8
    assert not slow.is_set()
    slow.set()
    await asyncio.gather(*map(asyncio.wrap_future, others))
    batcher.close(5)


async def test_a_dead_worker_refuses_everyone_and_hangs_no_one(
    batcher: Batcher, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    first = await hold(engine, batcher)
    waiting = asyncio.create_task(ask(batcher, 50))
    await asyncio.sleep(0.01)
    engine.error = SystemExit()
    engine.gate.set()
    for task in (first, waiting):
        with pytest.raises(NotReady):
            await asyncio.wait_for(task, 5)
    until(lambda: not batcher.ready)
    with pytest.raises(NotReady), batcher.reserve(1):
        pass
    with pytest.raises(NotReady):
        await ask(batcher, 51)


@pytest.mark.parametrize("large", [False, True])
async def test_what_is_decoded_while_a_worker_dies_is_refused(
    batcher: Batcher, engine: Engine, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    decoding, go_on = threading.Event(), threading.Event()

    def decode() -> NDArray[np.uint8]:
        decoding.set()
        go_on.wait(5)
        if large:
            raise NotItsTurn
        return image(3)

    answer: Future[Answer] = Future()
    batcher.put(decode, time.monotonic() + 60, answer)
    assert await asyncio.to_thread(decoding.wait, 5)
    engine.error = SystemExit()
    with pytest.raises(NotReady):
        await ask(batcher, 1)
    until(lambda: not all(worker.is_alive() for worker in batcher._workers))
    go_on.set()
    with pytest.raises(NotReady):
        await asyncio.wait_for(asyncio.wrap_future(answer), 5)


async def test_draining_admits_no_more_and_answers_what_was_admitted(batcher: Batcher) -> None:
    with batcher.reserve(1):
        batcher.drain()
        assert not batcher.ready
        with pytest.raises(Draining), batcher.reserve(1):
            pass
        assert await ask(batcher, 5) == 5
    with batcher.reserve(1, begun=True):  # by a request whose upload took until now
        assert await ask(batcher, 6) == 6


def test_places_are_limited_and_given_back(batcher: Batcher) -> None:
    with batcher.reserve(8):
        with pytest.raises(Saturated), batcher.reserve(3):
            pass
        with batcher.reserve(2):
            pass
    with batcher.reserve(10):
        pass


def test_who_would_be_answered_too_late_is_refused_at_once(batcher: Batcher) -> None:
    batcher._pace.note_done(64, 0.0, 64.0)  # one a second
    now = time.monotonic()
    with batcher.reserve(5, deadline=now + 10):  # where none wait, whatever they may need
        with pytest.raises(Late), batcher.reserve(1, deadline=now + 5):
            pass
        assert batcher.admitted == 5
        with batcher.reserve(1, deadline=now + 60):
            pass
        with pytest.raises(Late), batcher.reserve(4, deadline=now + 12):
            pass
        with batcher.reserve(1):
            pass


async def test_what_is_answered_and_what_cannot_be_decoded_show_how_fast_work_goes(
    batcher: Batcher,
) -> None:
    def wrong() -> NDArray[np.uint8]:
        raise ValueError("wrong")

    seen = [batcher._pace._ended]
    failed: Future[Answer] = Future()
    batcher.put(wrong, time.monotonic() + 5, failed)
    with pytest.raises(ValueError, match="wrong"):
        await asyncio.wrap_future(failed)
    await asyncio.to_thread(until, lambda: batcher._pace._ended > seen[0])
    seen.append(batcher._pace._ended)
    assert await ask(batcher, 3) == 3
    await asyncio.to_thread(until, lambda: batcher._pace._ended > seen[1])


async def test_closing_answers_what_waits_and_refuses_the_rest(
    batcher: Batcher, engine: Engine
) -> None:
    first = await hold(engine, batcher)
    waiting = asyncio.create_task(ask(batcher, 60))
    await asyncio.sleep(0.01)
    closing = asyncio.get_running_loop().run_in_executor(None, batcher.close, 5)
    until(lambda: batcher._closed)
    with pytest.raises(Draining), batcher.reserve(1):
        pass
    engine.gate.set()
    assert await asyncio.gather(first, waiting) == [1, 60]
    await closing


async def test_what_is_being_worked_on_is_finished_though_nothing_is_waited_for(
    batcher: Batcher, engine: Engine
) -> None:
    first = await hold(engine, batcher)
    waiting = asyncio.create_task(ask(batcher, 60))
    await asyncio.to_thread(until, lambda: batcher._decoded)
    closing = asyncio.create_task(asyncio.to_thread(batcher.close, 0))
    with pytest.raises(Draining):
        await waiting
    assert not closing.done()
    engine.gate.set()
    await asyncio.wait_for(closing, 5)
    assert await first == 1
    assert not any(worker.is_alive() for worker in batcher._workers)


def test_workers_that_cannot_all_be_started_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = Batcher(engine, (SIDE, SIDE), 2, 10, Metrics(4, ()), lambda _: {})
    monkeypatch.setattr(batcher._workers[-1], "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        batcher.start()
    assert not any(worker.is_alive() for worker in batcher._workers)


def refuse() -> None:
    raise RuntimeError("can't start new thread")


async def test_closing_ends_every_worker_though_the_callers_have_gone(engine: Engine) -> None:
    engine.device, engine.runs_at_once, engine.helpers = "cuda:0", 2, 2
    batcher = Batcher(engine, (SIDE, SIDE), 8, 99, Metrics(4, ()), lambda _: {})
    batcher.start()
    until(lambda: batcher.ready)
    engine.gate.clear()
    asked: list[Future[Answer]] = [Future() for _ in range(40)]
    for future in asked:
        batcher.put(lambda: image(1), time.monotonic() + 30, future)
    until(lambda: len(engine.batches) == 2)
    for future in asked:
        future.cancel()
    closing = asyncio.create_task(asyncio.to_thread(batcher.close, 5))
    await asyncio.sleep(0.05)
    engine.gate.set()
    await closing
    assert not any(worker.is_alive() for worker in batcher._workers)


async def test_the_upload_of_a_caller_who_has_gone_is_not_held(batcher: Batcher) -> None:
    class Upload:
        pass

    def decode(upload: Upload) -> NDArray[np.uint8]:
        go_on.wait(5)
        return image(1)

    go_on = threading.Event()
    asked: list[Future[Answer]] = [Future() for _ in batcher._workers]
    for future in asked:
        batcher.put(partial(decode, Upload()), time.monotonic() + 9, future)
    until(lambda: len(batcher._busy) == len(batcher._workers))
    upload = Upload()
    gone: Future[Answer] = Future()
    held = weakref.ref(upload)
    batcher.put(partial(decode, upload), time.monotonic() + 9, gone)
    del upload
    assert held() is not None
    gone.cancel()
    assert held() is None
    go_on.set()
    for future in asked:
        await asyncio.wrap_future(future)


async def test_what_is_answered_is_freed_without_a_collection(batcher: Batcher) -> None:
    class Upload:
        pass

    def decode(upload: Upload) -> NDArray[np.uint8]:
        return image(1)

    gc.disable()  # uploads are large, and collections are far between
    try:
        held = []
        for _ in range(30):
            upload, future = Upload(), Future()
            held.append((weakref.ref(upload), weakref.ref(future)))
            batcher.put(partial(decode, upload), time.monotonic() + 9, future)
            future.result(5)
        del upload, future
        assert not any(upload() for upload, _ in held)
        # A worker keeps its last job until it has another.
        assert sum(future() is not None for _, future in held) <= len(batcher._workers) + 1
    finally:
        gc.enable()


async def test_an_image_that_is_decoded_while_the_network_is_given_up_is_refused(
    batcher: Batcher,
) -> None:
    decoding, given_up = threading.Event(), threading.Event()

    def decode() -> NDArray[np.uint8]:
        decoding.set()
        given_up.wait(5)
        return image(1)

    future: Future[Answer] = Future()
    batcher.put(decode, time.monotonic() + 60, future)
    assert await asyncio.to_thread(decoding.wait, 5)
    batcher.abandon()
    with pytest.raises(NotReady):
        future.result(0)
    given_up.set()


async def test_a_batch_that_nobody_waits_for_any_more_leaves_the_engine_free(
    batcher: Batcher, engine: Engine
) -> None:
    first = await hold(engine, batcher)
    gone = asyncio.create_task(ask(batcher, 2))
    while not batcher._decoded:
        await asyncio.sleep(0.001)
    gone.cancel()
    await asyncio.sleep(0.01)
    engine.gate.set()
    await first
    until(lambda: not batcher._decoded)
    assert await asyncio.wait_for(ask(batcher, 3), 5) == 3


async def test_what_waits_is_decoded_before_a_small_batch_is_run(engine: Engine) -> None:
    engine.helpers = 0
    batcher = Batcher(engine, (SIDE, SIDE), 1, 10, Metrics(4, ()), lambda _: {})
    batcher.start()
    until(lambda: batcher.ready)
    answers: list[Future] = [Future() for _ in range(4)]
    with batcher._changed:
        for value, answer in enumerate(answers, 1):
            batcher.put(partial(image, value), time.monotonic() + 5, answer)
    for answer in answers:
        await asyncio.wait_for(asyncio.wrap_future(answer), 5)
    batcher.close(5)
    assert engine.batches == [[1, 2, 3, 4]]


async def test_images_that_cannot_be_used_do_not_keep_another_waiting(engine: Engine) -> None:
    """However many come, one after the other."""
    engine.helpers = 0
    batcher = Batcher(engine, (SIDE, SIDE), 1, 10, Metrics(4, ()), lambda _: {})
    batcher.start()
    until(lambda: batcher.ready)
    answer: Future = Future()
    ends = time.monotonic() + 5

    def fail() -> NDArray[np.uint8]:
        if not answer.done() and time.monotonic() < ends:
            batcher.put(fail, ends, Future())
        raise ValueError("damaged")

    with batcher._changed:
        batcher.put(partial(image, 1), ends, answer)
        batcher.put(fail, ends, Future())
    assert (await asyncio.wrap_future(answer)).outputs["first"] == 1
    assert time.monotonic() < ends
    batcher.close(5)


async def test_to_decode_is_not_to_wait(batcher: Batcher) -> None:
    def slow():
        time.sleep(0.2)
        return image(3)

    answer: Future = Future()
    batcher.put(slow, time.monotonic() + 5, answer)
    assert (await asyncio.wrap_future(answer)).queue_seconds < 0.1


async def test_what_is_left_to_do_and_is_late_is_no_image_dropped(engine: Engine) -> None:
    metrics = Metrics(4, ())
    batcher = Batcher(engine, (SIDE, SIDE), 1, 10, metrics, lambda _: {})
    batcher.start()
    until(lambda: batcher.ready)
    late: Future = Future()
    batcher.finish(lambda: 1, time.monotonic() - 1, late)
    with pytest.raises(DeadlineExceeded):
        await asyncio.wrap_future(late)
    batcher.close(5)
    found = metrics.registry.get_sample_value("mmtl_dropped_total", {"reason": "deadline"})
    assert found == 0


async def test_an_overload_has_not_every_image_late(engine: Engine, tmp_path: Path) -> None:
    """Of twice as many as can be done, those that are begun are answered, and in time."""
    decoded, answered = [], []

    def decode() -> NDArray[np.uint8]:
        decoded.append(time.monotonic())
        time.sleep(0.01)
        return image(1)

    engine.helpers = 0
    made = Batcher(engine, (SIDE, SIDE), 1, 1000, Metrics(4, ()), lambda _: {})
    made.start()
    assert made.wait_ready()
    futures = []
    for _ in range(300):  # in one and a half seconds
        future: Future[Answer] = Future()
        future.add_done_callback(
            lambda done: answered.append(done) if done.exception() is None else None
        )
        made.put(decode, time.monotonic() + 0.2, future)
        futures.append(future)
        await asyncio.sleep(0.005)
    until(lambda: all(future.done() for future in futures))
    made.close(5)
    assert len(answered) > 0.8 * len(decoded) > 30


async def test_one_that_waits_for_nobody_is_begun_however_little_time_it_has(
    engine: Engine, batcher: Batcher
) -> None:
    batcher._pace.note_needed(60.0)
    assert await ask(batcher, 3, seconds=1.0) == 3


async def test_a_guess_that_is_far_too_long_does_not_refuse_what_has_just_come(
    engine: Engine, batcher: Batcher
) -> None:
    batcher._pace.note_needed(60.0)
    assert await asyncio.gather(*(ask(batcher, n, seconds=2.0) for n in range(1, 9))) == [
        *range(1, 9)
    ]


async def test_the_workers_of_a_network_that_is_given_up_end(batcher: Batcher) -> None:
    assert await ask(batcher, 1) == 1
    batcher.abandon()
    until(lambda: not any(worker.is_alive() for worker in batcher._workers))
