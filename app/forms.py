"""A multipart body to its files, in memory: never spooled to disk, no large piece copied twice."""

import re
from dataclasses import dataclass, field
from urllib.parse import unquote

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app import problems
from app.problems import Problem

FIELD = "files"
# Without a way back: what is not closed is quoted to its end, and looked at once.
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
# Bytes below which pieces are put together: each by itself would take more than it holds.
_SMALL = 4_096
# Of the charsets that RFC 8187 has; some others decode to what no JSON can hold.
_EXTENDED = re.compile(rb";\s*filename\*=(utf-8|iso-8859-1)'[\w-]*'([^;\s]+)", re.IGNORECASE)


class Pieces:
    """Bytes that come one after the other; large pieces are copied once, in `take`."""

    def __init__(self) -> None:
        self._held: list[bytes | bytearray | memoryview] = []

    def add(self, piece: bytes | memoryview) -> None:
        """Hold more."""
        if len(piece) >= _SMALL:
            self._held.append(piece)
        elif self._held and isinstance(self._held[-1], bytearray):
            self._held[-1] += piece
        else:
            self._held.append(bytearray(piece))

    def take(self) -> bytes:
        """All of them, in one piece; they are no longer held here."""
        whole = b"".join(self._held)
        self._held.clear()
        return whole


@dataclass(slots=True)
class File:
    """One file of a form.

    Attributes:
        filename: As it was sent, without the folders of Windows.
        pieces: Its bytes, as they came.
    """

    filename: str
    pieces: Pieces = field(default_factory=Pieces)


class Form:
    """A form that is read as it comes; what does not belong in it is refused at its header.

    Args:
        content_type: Of the request.
        max_files: It may hold.

    Raises:
        Problem: The content type names no boundary.
    """

    def __init__(self, content_type: str, max_files: int):
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if not boundary:
            raise Problem(
                problems.MALFORMED_FORM,
                "The Content-Type header names no boundary: leave it to the HTTP client to write.",
            )
        # The parser knows its parts, which know nothing of it: in a cycle of the two, the bytes of
        # an upload would be held until the next garbage collection.
        parts = self._parts = _Parts(max_files)
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": parts.on_part_begin,
                    "on_part_data": parts.on_part_data,
                    "on_header_field": parts.on_header_field,
                    "on_header_value": parts.on_header_value,
                    "on_header_end": parts.on_header_end,
                    "on_headers_finished": parts.on_headers_finished,
                    "on_end": parts.on_end,
                },
            )
        except FormParserError:
            raise Problem(
                problems.MALFORMED_FORM,
                "The boundary is too long: take one of at most 70 characters.",
            ) from None

    def write(self, chunk: bytes) -> None:
        """Read on.

        Raises:
            Problem: The form cannot be read, or holds something else than up to `max_files` files
                in the field `files`.
        """
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise Problem(
                problems.MALFORMED_FORM,
                "The body is no multipart data (RFC 7578), or the headers of a part, with the file "
                "name, are longer than 4 kB.",
            ) from None

    def end(self) -> list[File]:
        """The files, in order.

        Raises:
            Problem: The form is cut short, or holds no file.
        """
        if not self._parts.ended:
            raise Problem(
                problems.MALFORMED_FORM, "The form ends before its closing boundary: send it again."
            )
        if not self._parts.files:
            raise Problem(
                problems.NO_FILES, f"Send at least one image as a file in the field `{FIELD}`."
            )
        return self._parts.files


class _Parts:
    """What the parser finds; data comes as a buffer and the part of it that is meant."""

    def __init__(self, max_files: int):
        self.files: list[File] = []
        self.ended = False
        self._max_files = max_files
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""

    def on_part_begin(self) -> None:
        self._disposition = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise Problem(
                problems.MALFORMED_FORM,
                f"A part of the form has no name: send each image in the field `{FIELD}`.",
            )
        name = options[b"name"].decode("utf-8", "replace")
        filename = _filename(self._disposition, options)
        if name != FIELD or filename is None:
            what = "a file, but text" if name == FIELD else f"`{FIELD}`"
            raise Problem(
                problems.UNEXPECTED_FIELD,
                f"The form has the field `{name[:60]}`, which is not {what}: send each image as a "
                f"file in the field `{FIELD}`, and none without a file.",
            )
        if len(self.files) == self._max_files:
            raise Problem(
                problems.TOO_MANY_FILES,
                f"A request may hold at most {self._max_files} images; send the others in another.",
            )
        self.files.append(File(filename))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.files[-1].pieces.add(memoryview(data)[start:end])

    def on_end(self) -> None:
        self.ended = True


def _filename(disposition: bytes, options: dict[bytes, bytes]) -> str | None:
    """A part's file name.

    RFC 7578 asks for UTF-8 in `filename`, and the parser takes nothing else; some clients send
    `filename*` (RFC 8187) instead, or beside a `filename` for those who cannot read it.
    """
    extended = _EXTENDED.search(_QUOTED.sub(b'""', disposition))
    if extended:
        charset, quoted = (group.decode("latin-1") for group in extended.groups())
        return unquote(quoted, charset, "replace")
    name = options.get(b"filename")
    return None if name is None else name.decode("utf-8", "replace")
