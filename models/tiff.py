"""What a TIFF says of itself, read before a decoder is: lists and tiles may be larger than it.

Pillow builds the list of its strips, and libtiff a whole tile, before either looks at the picture's
size (TIFF 6.0, sections 2 and 15).
"""

import struct
from dataclasses import dataclass

_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
# Kinds of value: text and blobs, which may be long; and numbers of two and four bytes.
_BLOBS = {1, 2, 6, 7}
_NUMBERS = {3: 2, 4: 4}
_COMPRESSION, _TILE_WIDTH, _TILE_LENGTH = 259, 322, 323
# Where strips and tiles are, and how long: lists, whatever kind of value they say they are.
_LISTS = {273, 279, 324, 325}


@dataclass(frozen=True, slots=True)
class Directory:
    """A TIFF's first directory.

    Attributes:
        compression: As TIFF numbers it; 1 is none.
        tile_pixels: Of one tile; 0 where there are strips.
        longest_list: Entries of the longest value that is no text or blob.
        several_pages: Whether another directory follows.
    """

    compression: int
    tile_pixels: int
    longest_list: int
    several_pages: bool


def read_directory(data: bytes | memoryview) -> Directory | None:
    """The first directory; None where there is none that is whole, or the file is a BigTIFF."""
    order = _BYTE_ORDERS.get(bytes(data[:4]))
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        (following,) = struct.unpack_from(f"{order}I", data, start + 2 + 12 * count)
        entries = list(
            struct.iter_unpack(f"{order}HHI4s", data[start + 2 : start + 2 + 12 * count])
        )
    except struct.error:
        return None
    values: dict[int, int] = {}
    for tag, kind, length, value in entries:
        if tag in (_COMPRESSION, _TILE_WIDTH, _TILE_LENGTH):
            if tag in values or length != 1 or kind not in _NUMBERS:
                return None  # a decoder may read it otherwise than we do
            end = _NUMBERS[kind]
            values[tag] = int.from_bytes(value[:end], "little" if order == "<" else "big")
    return Directory(
        compression=values.get(_COMPRESSION, 1),
        tile_pixels=values.get(_TILE_WIDTH, 0) * values.get(_TILE_LENGTH, 0),
        longest_list=max(
            (n for tag, kind, n, _ in entries if kind not in _BLOBS or tag in _LISTS), default=0
        ),
        several_pages=following != 0,
    )
