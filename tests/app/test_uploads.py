import asyncio
import time

import pytest
from starlette.requests import ClientDisconnect, Request

from app import uploads
from app.problems import Problem
from app.settings import Settings
from app.uploads import read_uploads

pytestmark = pytest.mark.anyio


def request(messages: list[dict], **headers: str) -> Request:
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


async def test_what_still_comes_is_read_before_a_refusal() -> None:
    messages = [part(b"x")] * 3 + [part(b"x", more=False)]
    started = time.monotonic()
    with pytest.raises(Problem):
        await read_uploads(request(messages, content_type="text/plain"), Settings())
    assert time.monotonic() - started < 2


async def test_a_sender_that_stalls_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_LINGER_SECONDS", 0.05)
    with pytest.raises(Problem):
        await read_uploads(request([part(b"x")], content_type="text/plain"), Settings())


async def test_a_sender_that_waits_for_100_continue_is_answered_at_once() -> None:
    stalled = request([], content_type="text/plain", expect="100-continue")
    with pytest.raises(Problem):
        await asyncio.wait_for(read_uploads(stalled, Settings()), 1)


async def test_a_caller_who_goes_in_mid_upload() -> None:
    gone = request([part(b"x"), {"type": "http.disconnect"}], content_type="image/jpeg")
    with pytest.raises(ClientDisconnect):
        await read_uploads(gone, Settings())
