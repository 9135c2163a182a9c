"""A request's body to images in memory: multipart or raw, bounded, never written to disk."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from app import problems
from app.problems import Problem
from app.settings import Settings
from models.images import MEDIA_TYPES

FIELD = "files"
# A body that is refused is read on for so long, so that the caller gets to read the answer.
_LINGER_SECONDS = 5.0
_LINGER_BYTES = 512_000_000


@dataclass(frozen=True, slots=True)
class Upload:
    """One image as it was sent; a raw body has no file name."""

    filename: str | None
    data: bytes


class Body:
    """A request's body, read once, up to a limit.

    Args:
        request: Whose body it is.
        most: Bytes.
    """

    def __init__(self, request: Request, most: int):
        self._request = request
        self._most = most
        self._ended = False

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body, as it comes.

        Raises:
            Problem: It is longer than the limit, by its header or by what came.
            ClientDisconnect: The caller went before its end.
        """
        too_large = Problem(
            problems.BODY_TOO_LARGE, f"The request may have at most {self._most:,} bytes in all."
        )
        declared = self._request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self._most:
            raise too_large
        total = 0
        while not self._ended:
            chunk = await self._receive()
            total += len(chunk)
            if total > self._most:
                raise too_large
            yield chunk

    async def drop_rest(self) -> None:
        """Read and forget what is still coming, within limits.

        A caller that is cut off in mid-upload sees a broken connection instead of the problem. One
        that waits for `100 Continue` has not sent anything, and is not told to.
        """
        if self._request.headers.get("expect", "").lower() == "100-continue":
            return
        dropped = 0
        with suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(_LINGER_SECONDS):
                while not self._ended and dropped < _LINGER_BYTES:
                    dropped += len(await self._receive())

    async def _receive(self) -> bytes:
        message = await self._request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._ended = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        return chunk


async def read_uploads(request: Request, settings: Settings) -> list[Upload]:
    """Read the images of a request.

    Raises:
        Problem: The body is too large, of another content type, cannot be read, or holds no image.
        ClientDisconnect: The caller went before the body's end.
    """
    body = Body(request, settings.max_bytes)
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    try:
        if media_type == "multipart/form-data":
            return await _read_form(request, body, settings)
        if media_type in MEDIA_TYPES or media_type == "application/octet-stream":
            return [await _read_raw(body)]
        raise Problem(
            problems.UNSUPPORTED_MEDIA_TYPE,
            f"Send multipart/form-data with the field `{FIELD}`, or one image as the body with "
            f"the content type {', '.join(MEDIA_TYPES)}.",
        )
    except Problem:
        await body.drop_rest()
        raise


async def _read_raw(body: Body) -> Upload:
    data = b"".join([chunk async for chunk in body.chunks()])
    if not data:
        raise Problem(problems.EMPTY_IMAGE, "The request's body is empty (0 bytes).")
    return Upload(None, data)


async def _read_form(request: Request, body: Body, settings: Settings) -> list[Upload]:
    _, options = parse_options_header(request.headers["content-type"])
    if not options.get(b"boundary"):
        raise Problem(problems.MALFORMED_FORM, "The Content-Type header names no boundary.")
    parser = MultiPartParser(
        request.headers,
        body.chunks(),
        # One more than allowed, so that the problem is ours; a field that is no file is refused.
        max_files=settings.max_files + 1,
        max_fields=1,
    )
    # Starlette would spool a part of over 1 MB to a temporary file: patient data, on disk.
    parser.spool_max_size = settings.max_bytes + 1
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise _too_many(settings) from None
        raise Problem(problems.MALFORMED_FORM, error.message) from None
    try:
        return [await _upload(name, value) for name, value in _checked(form, settings)]
    finally:
        await form.close()


def _checked(form: FormData, settings: Settings) -> list[tuple[str, UploadFile | str]]:
    items = form.multi_items()
    if not items:
        raise Problem(
            problems.NO_FILES, f"Send at least one image as a file in the field `{FIELD}`."
        )
    if len(items) > settings.max_files:
        raise _too_many(settings)
    return items


async def _upload(name: str, value: UploadFile | str) -> Upload:
    if name != FIELD or not isinstance(value, UploadFile):
        what = "a file" if name == FIELD else f"`{FIELD}`"
        raise Problem(
            problems.UNEXPECTED_FIELD,
            f"The form has the field `{name[:60]}`, which is not {what}: send each image as a file "
            f"in the field `{FIELD}`.",
        )
    return Upload(value.filename or "", await value.read())


def _too_many(settings: Settings) -> Problem:
    return Problem(
        problems.TOO_MANY_FILES,
        f"A request may hold at most {settings.max_files} images; send the others in another.",
    )
