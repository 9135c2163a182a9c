"""The pieces of a JPEG's or PNG's file, counted and checked before Pillow reads them.

It reads all of them before it says how large the picture is, one by one, in Python, and keeps what
it reads: a few megabytes of empty pieces, which no camera writes, would take seconds and hundreds
of megabytes. What is walked here is what it walks (`JpegImageFile._open`, `PngImagePlugin`).
"""

import re
import zlib

from PIL.JpegImagePlugin import MARKER

from models.progressive import FRAMES

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# Of a JPEG before its first scan, and of a PNG beside its pixels. A camera writes about ten; what
# carries depth maps or long metadata, some hundred of 64 KB.
MOST_PIECES = 256
# Of a PNG, with pixels; some encoders write one for each row.
_MOST_CHUNKS = 65_536
# Bytes between a JPEG's segments that belong to none.
_MOST_FILL = 65_536
_SCAN = 0xDA
# Of four components: Pillow reads as many as there are.
_LONGEST_FRAME = 8 + 4 * 3
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_CHUNK = re.compile(rb"\w{4}")


def in_too_many_pieces(data: bytes | memoryview) -> bool:
    """Whether Pillow would take long to find out what an image is.

    Args:
        data: An encoded image, of any format.
    """
    start = bytes(data[: len(_PNG)])
    if start.startswith(_JPEG):
        return _jpeg_is(data)
    return start == _PNG and _png_is(data)


def is_whole_png(data: bytes | memoryview) -> bool:
    """Whether a PNG's critical chunks are as they were written, to the last (ISO/IEC 15948, 5.3).

    Pillow does not look at the sums of its pixels: rows that were lost would be black.
    """
    view, at = memoryview(data), len(_PNG)
    while at + 12 <= len(view):
        end = at + 8 + int.from_bytes(view[at : at + 4], "big")
        kind = bytes(view[at + 4 : at + 8])
        if not _CHUNK.fullmatch(kind):
            return False  # to which a decoder does not read on
        if (
            kind[:1].isupper()
            and zlib.crc32(view[at + 4 : end]).to_bytes(4, "big") != view[end : end + 4]
        ):
            return False
        if kind == b"IEND":
            return True
        at = end + 4
    return False


def _jpeg_is(data: bytes | memoryview) -> bool:
    at, pieces, fill = 2, 0, 0
    # Whatever is no marker is skipped, byte by byte.
    while found := _MARKER.search(data, at, at + _MOST_FILL + 2):
        fill += found.start() - at
        pieces += 1
        if pieces > MOST_PIECES or fill > _MOST_FILL:
            return True
        marker, at = data[found.start() + 1], found.end()
        if marker == _SCAN or 0xFF00 + marker not in MARKER:  # at which it gives up
            return False
        _, _, has_length = MARKER[0xFF00 + marker]
        if has_length:
            length = max(int.from_bytes(data[at : at + 2], "big"), 2)
            if marker in FRAMES and length > _LONGEST_FRAME:
                return True
            at += length
    return len(data) - at > _MOST_FILL


def _png_is(data: bytes | memoryview) -> bool:
    at, chunks, others = len(_PNG), 0, 0
    while at + 8 <= len(data):
        kind = bytes(data[at + 4 : at + 8])
        if kind == b"IEND" or not _CHUNK.fullmatch(kind):
            return False
        chunks += 1
        others += kind != b"IDAT"
        if others > MOST_PIECES or chunks > _MOST_CHUNKS:
            return True
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return False
