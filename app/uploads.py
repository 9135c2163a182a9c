"""A request's body to images in memory: multipart or raw, bounded, never written to disk."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from app import problems
from app.forms import FIELD, Form, Pieces
from app.problems import Problem
from app.settings import Settings
from models.images import MEDIA_TYPES

# Of a body that is one image; the last where its sender does not know which.
RAW_TYPES = (*MEDIA_TYPES, "application/octet-stream")
# Many call it so; what it is its bytes say.
_MISNAMED_JPEG = "image/jpg"
# A body that is refused is read on for so long, so that the caller gets to read the answer.
_LINGER_SECONDS = 5.0
_LINGER_BYTES = 512_000_000


@dataclass(frozen=True, slots=True)
class Upload:
    """One image as it was sent; a raw body has no file name."""

    filename: str | None
    data: bytes


class Held:
    """Bytes of uploads and answers that are in memory, over all requests.

    Args:
        most: That may be.
        most_undeclared: Of them, in bodies without a Content-Length, which nobody can refuse
            before they have come.
    """

    def __init__(self, most: int, most_undeclared: int):
        self._most = most
        self._most_undeclared = most_undeclared
        self._bytes = 0
        self._undeclared = 0

    def take(self, count: int, declared: bool) -> None:
        """Hold more; anything, where nothing is held.

        Raises:
            Problem: There is no room.
        """
        if self._bytes and self._bytes + count > self._most:
            raise Problem(
                problems.SATURATED,
                "Too many uploads, or answers that are not yet read, are in memory. Try again "
                "after Retry-After seconds.",
            )
        if not declared:
            if self._undeclared + count > self._most_undeclared:
                raise Problem(
                    problems.SATURATED,
                    "Too many uploads of unknown length at once. Send a Content-Length, or try "
                    "again after Retry-After seconds.",
                )
            self._undeclared += count
        self._bytes += count

    def give_back(self, count: int, declared: bool) -> None:
        """Hold less."""
        self._bytes -= count
        if not declared:
            self._undeclared -= count


class Body:
    """A request's body, read once, up to a limit; `release` when it is no longer needed.

    Args:
        request: Whose body it is.
        most: Bytes.
        held: Counts them with those of other requests.
    """

    def __init__(self, request: Request, most: int, held: Held):
        self._request = request
        self._most = most
        self._held = held
        self._declared = "content-length" in request.headers
        self._total = 0
        self._asked_for = False
        self._ended = False

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body, as it comes.

        Raises:
            Problem: It is longer than the limit, by its header or by what came, or there is no room
                for it.
            ClientDisconnect: The caller went before its end.
        """
        too_large = Problem(
            problems.BODY_TOO_LARGE,
            f"The request may have at most {self._most:,} bytes in all: send fewer images in each.",
        )
        declared = self._request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self._most:
            raise too_large
        while not self._ended:
            chunk = await self._receive()
            if self._total + len(chunk) > self._most:
                raise too_large
            self._held.take(len(chunk), self._declared)
            self._total += len(chunk)
            yield chunk

    def release(self) -> None:
        """The body is no longer in memory."""
        self._held.give_back(self._total, self._declared)
        self._total = 0

    async def drop_rest(self) -> None:
        """Read and forget what is still coming, within limits.

        A caller that is cut off in mid-upload sees a broken connection instead of the problem. One
        that waits for `100 Continue` has not sent anything, and is not told to.
        """
        waits = self._request.headers.get("expect", "").lower() == "100-continue"
        if waits and not self._asked_for:
            return
        self.release()
        dropped = 0
        with suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(_LINGER_SECONDS):
                while not self._ended and dropped < _LINGER_BYTES:
                    dropped += len(await self._receive())

    async def _receive(self) -> bytes:
        self._asked_for = True
        message = await self._request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._ended = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        return chunk


@asynccontextmanager
async def open_uploads(
    request: Request, settings: Settings, held: Held, check_open: Callable[[], Awaitable[None]]
) -> AsyncIterator[list[Upload]]:
    """The images of a request, in memory while the block runs.

    Args:
        request: Whose body they are.
        settings: The limits.
        held: Counts what is in memory, over all requests.
        check_open: Raises a `Problem` where the body need not be read at all.

    Raises:
        Problem: That of `check_open`; or the body is too large, too slow, of another content type,
            cannot be read, or holds no image; or too much is in memory already.
        ClientDisconnect: The caller went before the body's end.
    """
    body = Body(request, settings.max_bytes, held)
    uploads: list[Upload] = []
    try:
        uploads = await _read(request, body, settings, check_open)
        yield uploads
    finally:
        # Whoever has the list may wait for long: for the audit log's disk.
        uploads.clear()
        body.release()


async def _read(
    request: Request, body: Body, settings: Settings, check_open: Callable[[], Awaitable[None]]
) -> list[Upload]:
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    try:
        await check_open()
        coding = request.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise Problem(
                problems.UNSUPPORTED_MEDIA_TYPE,
                f"Send the body as it is: the Content-Encoding {coding[:20]} is not supported.",
                {"Accept-Encoding": "identity"},  # RFC 9110, section 15.5.16
            )
        async with asyncio.timeout(settings.upload_seconds):
            if media_type == "multipart/form-data":
                return await _read_form(request, body, settings)
            if media_type in (*RAW_TYPES, _MISNAMED_JPEG):
                return [await _read_raw(body)]
        raise Problem(
            problems.UNSUPPORTED_MEDIA_TYPE,
            f"Send multipart/form-data with the field `{FIELD}`, or one image as the body with "
            f"the content type {', '.join(RAW_TYPES)}.",
        )
    # Both have frames that hold what has been read; nothing of that is needed any more.
    except TimeoutError:
        refused = Problem(
            problems.UPLOAD_TOO_SLOW,
            f"The request has to arrive within {settings.upload_seconds:g} seconds.",
        )
    except Problem as problem:
        refused = problem.with_traceback(None)
        refused.__context__ = None
    if refused.kind is not problems.UPLOAD_TOO_SLOW:
        await body.drop_rest()
    raise refused


async def _read_raw(body: Body) -> Upload:
    pieces = Pieces()
    async for chunk in body.chunks():
        pieces.add(chunk)
    data = pieces.take()
    if not data:
        raise Problem(problems.EMPTY_IMAGE, "The request's body is empty (0 bytes): send an image.")
    return Upload(None, data)


async def _read_form(request: Request, body: Body, settings: Settings) -> list[Upload]:
    form = Form(request.headers["content-type"], settings.max_files)
    async for chunk in body.chunks():
        form.write(chunk)
    return [Upload(file.filename, file.pieces.take()) for file in form.end()]
