import asyncio
import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress

import pytest
from starlette.requests import ClientDisconnect, Request

from app import uploads
from app.problems import SATURATED, Problem
from app.settings import Settings
from app.uploads import Held, Upload, open_uploads

pytestmark = pytest.mark.anyio


def request(messages: Iterable[dict], **headers: str) -> Request:
    """A request whose body comes as these ASGI messages, and then not at all."""
    coming = iter(messages)

    async def receive() -> dict:
        for message in coming:
            return message
        await asyncio.sleep(60)
        raise AssertionError

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


def part(body: bytes, more: bool = True) -> dict:
    return {"type": "http.request", "body": body, "more_body": more}


async def is_open() -> None:
    """The service takes requests."""


async def read(request: Request, held: Held | None = None, **settings: object) -> list[Upload]:
    opened = open_uploads(request, Settings(**settings), held or Held(10**9, 10**9), is_open)
    async with opened as uploads:
        return list(uploads)


@pytest.mark.parametrize("refused", [False, True])
async def test_whoever_waits_afterwards_holds_no_image(refused: bool) -> None:
    sent = request([part(b"x", more=False)], content_type="image/jpeg")
    kept: list[Upload] | None = None
    with suppress(ValueError):
        async with open_uploads(sent, Settings(), Held(10, 10), is_open) as kept:
            assert len(kept) == 1
            if refused:
                raise ValueError
    assert kept == []


async def test_a_busy_service_refuses_in_a_way_that_a_sender_can_read() -> None:
    async def is_busy() -> None:
        raise Problem(SATURATED, "busy")

    refused = request([part(b"x"), part(b"x", more=False)], content_type="image/jpeg")
    with pytest.raises(Problem, match="busy"):
        async with open_uploads(refused, Settings(), Held(0, 0), is_busy):
            pass
    with pytest.raises(TimeoutError):  # what was sent has been read, and nothing of it held
        await asyncio.wait_for(refused.receive(), 0.05)


async def test_what_still_comes_is_read_before_a_refusal() -> None:
    messages = [part(b"x")] * 3 + [part(b"x", more=False)]
    refused = request(messages, content_type="text/plain")
    with pytest.raises(Problem, match="multipart/form-data"):
        await read(refused)
    with pytest.raises(TimeoutError):  # nothing is left
        await asyncio.wait_for(refused.receive(), 0.05)


async def test_a_sender_that_stalls_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_LINGER_SECONDS", 0.05)
    with pytest.raises(Problem):
        await read(request([part(b"x")], content_type="text/plain"))


async def test_a_sender_that_waits_for_100_continue_is_answered_at_once() -> None:
    stalled = request([], content_type="text/plain", expect="100-continue")
    with pytest.raises(Problem):
        await asyncio.wait_for(read(stalled), 1)


async def test_a_caller_who_goes_in_mid_upload() -> None:
    held = Held(10, 10)
    gone = request([part(b"x"), {"type": "http.disconnect"}], content_type="image/jpeg")
    with pytest.raises(ClientDisconnect):
        await read(gone, held)
    held.take(10, declared=True)  # what was held has been given back


async def test_an_upload_has_to_arrive_in_time() -> None:
    with pytest.raises(Problem, match=r"within 0\.05 seconds") as caught:
        await read(request([part(b"x")], content_type="image/jpeg"), upload_seconds=0.05)
    assert caught.value.kind.status == 408


async def test_all_uploads_together_are_bounded() -> None:
    held = Held(10, 10)
    body = [part(b"123456", more=False)]
    async with open_uploads(request(body, content_type="image/jpeg"), Settings(), held, is_open):
        with pytest.raises(Problem) as caught:
            await read(request(body, content_type="image/jpeg"), held)
        assert caught.value.kind.name == "saturated"
    assert await read(request(body, content_type="image/jpeg"), held) == [Upload(None, b"123456")]


async def test_uploads_of_unknown_length_are_bounded_more_tightly() -> None:
    held = Held(100, 10)
    body = [part(b"123456", more=False)]
    known = {"content_type": "image/jpeg", "content_length": "6"}
    async with (
        open_uploads(request(body, content_type="image/jpeg"), Settings(), held, is_open),
        open_uploads(request(body, **known), Settings(), held, is_open),
    ):
        with pytest.raises(Problem, match="Send a Content-Length") as caught:
            await read(request(body, content_type="image/jpeg"), held)
        assert caught.value.kind.name == "saturated"
        assert await read(request(body, **known), held) == [Upload(None, b"123456")]
    assert await read(request(body, content_type="image/jpeg"), held) == [Upload(None, b"123456")]


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("length", [6, 7])
async def test_a_limit_is_the_most_that_is_taken(length: int, declared: bool) -> None:
    headers = {"content_length": str(length)} if declared else {}
    sent = request([part(b"1234567"[:length], more=False)], content_type="image/jpeg", **headers)
    if length == 6:
        assert await read(sent, Held(6, 6), max_bytes=6) == [Upload(None, b"123456")]
        return
    with pytest.raises(Problem) as caught:
        await read(sent, max_bytes=6)
    assert caught.value.kind.name == "body-too-large"


@pytest.mark.parametrize("declared", [True, False])
def test_as_much_is_held_as_may_be(declared: bool) -> None:
    held = Held(10, 10)
    held.take(4, declared)
    held.take(6, declared)
    with pytest.raises(Problem) as caught:
        held.take(1, declared)
    assert caught.value.kind.name == "saturated"


async def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploads, "_LINGER_SECONDS", 0.05)
    stalled = request([], content_type="image/jpeg", content_length="999999999999")
    with pytest.raises(Problem, match="may have at most") as caught:
        await asyncio.wait_for(read(stalled), 5)
    assert caught.value.kind.name == "body-too-large"


async def test_what_was_held_of_a_refused_body_is_given_back_once() -> None:
    held = Held(10, 10)
    for _ in range(3):
        with pytest.raises(Problem, match="may have at most"):
            await read(
                request([part(b"1234"), part(b"5678", more=False)], content_type="image/jpeg"),
                held,
                max_bytes=6,
            )
    assert (held._bytes, held._undeclared) == (0, 0)


async def test_a_refused_body_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_LINGER_BYTES", 30)
    read_of_it = 0

    def endless() -> Iterator[dict]:
        nonlocal read_of_it
        for _ in range(1000):
            read_of_it += 10
            yield part(b"0123456789")

    with pytest.raises(Problem):
        await read(request(endless(), content_type="text/plain"))
    assert read_of_it == 30


async def test_a_form_that_is_cut_short_is_refused() -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    whole = head + b"one\r\n" + head + b"two\r\n--x--\r\n"
    content_type = "multipart/form-data; boundary=x"
    assert len(await read(request([part(whole, more=False)], content_type=content_type))) == 2
    for end in (len(whole) - 30, len(whole) - 10):
        cut = request([part(whole[:end], more=False)], content_type=content_type)
        with pytest.raises(Problem, match="before its closing boundary"):
            await read(cut)


@pytest.mark.parametrize("content_type", ["image/jpeg", "multipart/form-data; boundary=x"])
async def test_what_has_been_read_is_not_held_while_a_refusal_waits_for_the_rest(
    content_type: str,
) -> None:
    class Traced(bytearray):
        """Bytes that can be watched."""

    watched: list[weakref.ref[Traced]] = []

    def coming() -> Iterator[dict]:
        yield part(b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n')
        large = Traced(900)
        watched.append(weakref.ref(large))
        yield {"type": "http.request", "body": large, "more_body": True}
        del large
        yield part(bytes(900))

    held = Held(10_000, 10_000)
    gc.disable()
    try:
        refused = request(coming(), content_type=content_type)
        reading = asyncio.create_task(read(refused, held, max_bytes=1500))
        async with asyncio.timeout(1):
            while not watched or watched[0]() is not None:
                await asyncio.sleep(0.001)
        assert not reading.done()
        held.take(10_000, declared=True)
        reading.cancel()
    finally:
        gc.enable()


async def test_what_came_of_a_slow_upload_is_not_held_by_its_refusal() -> None:
    class Traced(bytearray):
        """Bytes that can be watched."""

    watched: list[weakref.ref[Traced]] = []

    def watch(body: Traced) -> Traced:
        watched.append(weakref.ref(body))
        return body

    def coming() -> Iterator[dict]:
        yield {"type": "http.request", "body": watch(Traced(900)), "more_body": True}

    gc.disable()
    try:
        with pytest.raises(Problem) as caught:
            await read(request(coming(), content_type="image/jpeg"), upload_seconds=0.05)
        assert caught.value.kind.status == 408
        await asyncio.sleep(0)  # as whoever has a refusal waits for something
        assert watched[0]() is None
    finally:
        gc.enable()


async def test_a_form_that_cannot_be_read_is_not_held_while_the_rest_is() -> None:
    class Traced(bytearray):
        pass

    watched = []

    def coming() -> Iterator[dict]:
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        yield part(head)
        large = Traced(b"\r\n--x nonsense" + bytes(900))
        watched.append(weakref.ref(large))
        yield {"type": "http.request", "body": large, "more_body": True}
        del large
        yield part(bytes(9))

    gc.disable()
    try:
        sent = request(coming(), content_type="multipart/form-data; boundary=x")
        reading = asyncio.create_task(read(sent, Held(10_000, 10_000)))
        await asyncio.sleep(0.3)
        assert not reading.done()
        assert watched[0]() is None
        reading.cancel()
    finally:
        gc.enable()


def test_what_alone_is_more_than_may_be_held_is_held() -> None:
    Held(10, 10).take(11, True)
