"""What a TIFF says of itself, read before a decoder is: it may be read wrong, or for long.

Pillow builds the list of its strips, and libtiff a whole tile, before either looks at the picture's
size; of some that are stored otherwise than cameras do, Pillow makes other pixels, without a word
(TIFF 6.0, sections 2, 8, 15 and 19).
"""

import struct
from dataclasses import dataclass
from math import ceil

_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
# Kinds of value: text and blobs, which may be long; and numbers of two and four bytes.
_BLOBS = {1, 2, 6, 7}
_NUMBERS = {3: "H", 4: "I"}
_WIDTH, _LENGTH, _COMPRESSION, _PHOTOMETRIC = 256, 257, 259, 262
_SAMPLES, _PLANAR = 277, 284
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_SINGLE = {
    *(_WIDTH, _LENGTH, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR),
    *(_TILE_WIDTH, _TILE_LENGTH),
}
_BITS, _SAMPLE_FORMAT = 258, 339
# Strips or tiles that one may have; longer lists are counted, and not read.
MOST_STRIPS = 65_536
# Of each sample: red, green, blue, and whatever is beside them.
_MOST_SAMPLES = 16
# How long strips and tiles are.
_BYTE_COUNTS = {279, 325}
# Those, and where they are: lists, whatever kind of value they say they are.
_LISTS = {273, 324, *_BYTE_COUNTS}
_SIGNED, _APART, _RGB = 2, 2, 2
# That Pillow reads right in eight bits where each sample is stored apart: RGB, CMYK, YCbCr.
_READ_APART = {_RGB, 5, 6}


@dataclass(frozen=True, slots=True)
class Directory:
    """A TIFF's first directory.

    Attributes:
        compression: As TIFF numbers it; 1 is none.
        tile_pixels: Of one tile; 0 where there are strips.
        tiles_pixels: Of all tiles together, which are decoded whole.
        stored_bytes: Of all strips or tiles, those that share their bytes counted each.
        longest_list: Entries of the longest value that is no text or blob.
        several_pages: Whether another directory follows.
        misread: Whether Pillow would make other pixels of it: numbers with a sign, and samples
            stored apart, but for colours of eight bits, and RGB of sixteen that is compressed.
    """

    compression: int
    tile_pixels: int
    tiles_pixels: int
    stored_bytes: int
    longest_list: int
    several_pages: bool
    misread: bool


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
        values: dict[int, int] = {}
        lists: dict[int, tuple[int, ...]] = {}
        for tag, kind, length, raw in entries:
            if tag in _SINGLE:
                if tag in values or length != 1 or kind not in _NUMBERS:
                    return None  # a decoder may read it otherwise than we do
                (values[tag],) = _numbers(data, order, kind, 1, raw)
            elif tag in _BYTE_COUNTS or tag in (_BITS, _SAMPLE_FORMAT):
                several = tag in _BYTE_COUNTS or length <= _MOST_SAMPLES
                if tag in lists or kind not in _NUMBERS or not several:
                    return None
                lists[tag] = _numbers(data, order, kind, min(length, MOST_STRIPS), raw)
    except struct.error:
        return None
    tile_width, tile_length = values.get(_TILE_WIDTH, 0), values.get(_TILE_LENGTH, 0)
    across, down = (
        ceil(values.get(whole, 0) / of_one) if of_one else 0
        for whole, of_one in ((_WIDTH, tile_width), (_LENGTH, tile_length))
    )
    apart = values.get(_PLANAR, 1) == _APART and values.get(_SAMPLES, 1) > 1
    bits, colour = set(lists.get(_BITS, (1,))), values.get(_PHOTOMETRIC)
    plain = bits == {8} and colour in _READ_APART
    plain |= bits == {16} and colour == _RGB and values.get(_COMPRESSION, 1) != 1
    return Directory(
        compression=values.get(_COMPRESSION, 1),
        tile_pixels=tile_width * tile_length,
        tiles_pixels=across * tile_width * down * tile_length,
        stored_bytes=max((sum(lists.get(tag, ())) for tag in _BYTE_COUNTS), default=0),
        longest_list=max(
            (n for tag, kind, n, _ in entries if kind not in _BLOBS or tag in _LISTS), default=0
        ),
        several_pages=following != 0,
        misread=_SIGNED in lists.get(_SAMPLE_FORMAT, ()) or (apart and not plain),
    )


def _numbers(
    data: bytes | memoryview, order: str, kind: int, count: int, raw: bytes
) -> tuple[int, ...]:
    """The numbers of an entry, which stand in it where they fit.

    Raises:
        struct.error: They are not there.
    """
    one = _NUMBERS[kind]
    if count * struct.calcsize(f"{order}{one}") <= len(raw):
        return struct.unpack_from(f"{order}{count}{one}", raw)
    (start,) = struct.unpack(f"{order}I", raw)
    return struct.unpack_from(f"{order}{count}{one}", data, start)
