"""What a TIFF says of itself, read before a decoder is: it may be read wrong, or for long.

Pillow builds the list of its strips, and libtiff a whole tile, before either looks at the picture's
size; of some that are stored otherwise than cameras do, Pillow makes other pixels, without a word
(TIFF 6.0, sections 2, 5, 8, 15, 19 and 21). A block of EXIF is a TIFF without a picture.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
# In EXIF Pillow takes the next two bytes either way round.
_EXIF_BYTE_ORDERS = {b"II": "<", b"MM": ">"}
# Kinds of value: text and blobs, which may be long; and numbers of two and four bytes.
_BLOBS = {1, 2, 7}
_NUMBERS = {3: "H", 4: "I"}
_WIDTH, _LENGTH, _COMPRESSION, _PHOTOMETRIC = 256, 257, 259, 262
_SAMPLES, _STRIP_LENGTH, _PLANAR = 277, 278, 284
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_SINGLE = {
    *(_WIDTH, _LENGTH, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _STRIP_LENGTH, _PLANAR),
    *(_TILE_WIDTH, _TILE_LENGTH),
}
_BITS, _SAMPLE_FORMAT, _SUBSAMPLING = 258, 339, 530
_OF_SAMPLES = {_BITS, _SAMPLE_FORMAT, _SUBSAMPLING}
_COLOUR_MAP = 320
# What kind of picture it is, in new files and in old ones: a small copy of another, say.
_KIND, _OLD_KIND = 254, 255
_IS_SMALL, _OLD_SMALL = 1, 2
# Of a palette for eight bits.
_MOST_COLOURS = 3 * 256
# Strips or tiles that one may have; longer lists are counted, and not read.
MOST_STRIPS = 65_536
# Those of a picture that is not compressed: Pillow decodes each by itself, in Python.
MOST_PLAIN_STRIPS = 16_384
# A camera writes a hundred entries, of which each of these has a few values: Pillow reads all that
# they have, in Python. Of EXIF it reads the orientation alone; of a TIFF, the order of bits, the
# resolutions and their unit, and what is beside the colours, too.
MOST_ENTRIES = 4_096
_ORIENTATION = 274
_READ = {_ORIENTATION, 266, 282, 283, 296, 338}
# XMP and a colour profile, which are texts and blobs, or nothing.
_METADATA = {700, 34675}
# Of each sample: red, green, blue, and whatever is beside them.
_MOST_SAMPLES = 16
# How long strips and tiles are.
_BYTE_COUNTS = {279, 325}
# Those, and where they are: lists, whatever kind of value they say they are.
_STRIPS, _TILES = 273, 324
_LISTS = {_STRIPS, _TILES, *_BYTE_COUNTS}
_SIGNED, _APART, _RGB, _PALETTE, _YCBCR = 2, 2, 2, 3, 6
_UNCOMPRESSED = 1
# That Pillow reads right in eight bits where each sample is stored apart: RGB, CMYK, YCbCr.
_READ_APART = {_RGB, 5, _YCBCR}


@dataclass(frozen=True, slots=True)
class Directory:
    """A TIFF's first directory.

    Attributes:
        compression: As TIFF numbers it; 1 is none.
        tile_pixels: Of one tile; 0 where there are strips.
        tiles_pixels: Of all tiles together, which are decoded whole.
        stored_bytes: Of all strips or tiles, those that share their bytes counted each.
        longest_list: Numbers of the longest value that is no text or blob.
        takes_long: Whether Pillow would take long over it: more strips or tiles than the picture
            has; many that are not compressed, or that begin within each other; or what
            `takes_long` says.
        several_pages: Whether another directory follows.
        preview: Whether the picture is a small copy of another, as those of cameras' raw files are.
        ends_early: Whether a strip or tile that is compressed ends behind the end of the file.
        misread: Whether Pillow would make other pixels of it: numbers with a sign; samples stored
            apart, but for colours of eight bits, and RGB of sixteen that is compressed; colours of
            which some have fewer samples (uncompressed YCbCr); a palette of eight bits; and what
            does not say which colours it has.
    """

    compression: int
    tile_pixels: int
    tiles_pixels: int
    stored_bytes: int
    longest_list: int
    takes_long: bool
    several_pages: bool
    preview: bool
    ends_early: bool
    misread: bool


def takes_long(exif: bytes) -> bool:
    """Whether Pillow would take long to find the orientation, or there is none to be found.

    Args:
        exif: The block, from its byte order on.
    """
    order = _EXIF_BYTE_ORDERS.get(exif[:2])
    try:
        return order is None or _take_long(_entries(exif, order), {_ORIENTATION})
    except struct.error:
        return True


def read_directory(data: bytes | memoryview) -> Directory | None:
    """The first directory; None where there is none that is whole, or the file is a BigTIFF."""
    order = _BYTE_ORDERS.get(bytes(data[:4]))
    if order is None:
        return None
    try:
        entries = _entries(data, order)
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        (following,) = struct.unpack_from(f"{order}I", data, start + 2 + 12 * count)
        values: dict[int, int] = {}
        lists: dict[int, tuple[int, ...]] = {}
        preview = False
        for tag, kind, length, raw in entries:
            if tag in _SINGLE:
                if tag in values or length != 1 or kind not in _NUMBERS:
                    return None  # a decoder may read it otherwise than we do
                (values[tag],) = _numbers(data, order, kind, 1, raw)
            elif tag in _LISTS or tag in _OF_SAMPLES or tag == _COLOUR_MAP:
                several = tag not in _OF_SAMPLES or length <= _MOST_SAMPLES
                if tag in lists or kind not in _NUMBERS or not several:
                    return None
                most = _MOST_COLOURS if tag == _COLOUR_MAP else MOST_STRIPS
                lists[tag] = _numbers(data, order, kind, min(length, most), raw)
            elif tag in (_KIND, _OLD_KIND) and length == 1 and kind in _NUMBERS:
                (said,) = _numbers(data, order, kind, 1, raw)
                preview |= said == _OLD_SMALL if tag == _OLD_KIND else bool(said & _IS_SMALL)
    except struct.error:
        return None
    tile_width, tile_length = values.get(_TILE_WIDTH, 0), values.get(_TILE_LENGTH, 0)
    strip_length = values.get(_STRIP_LENGTH, values.get(_LENGTH, 0))
    across, down, strips = (
        ceil(values.get(whole, 0) / of_one) if of_one else 0
        for whole, of_one in (
            (_WIDTH, tile_width),
            (_LENGTH, tile_length),
            (_LENGTH, strip_length),
        )
    )
    apart = values.get(_PLANAR, 1) == _APART and values.get(_SAMPLES, 1) > 1
    planes = values.get(_SAMPLES, 1) if apart else 1
    counts = {tag: length for tag, _, length, _ in entries}
    bits, colour = set(lists.get(_BITS, (1,))), values.get(_PHOTOMETRIC)
    compressed = values.get(_COMPRESSION, _UNCOMPRESSED) != _UNCOMPRESSED
    samples = (tile_width or values.get(_WIDTH, 0)) * values.get(_SAMPLES, 1) // planes
    row = max(samples * max(bits, default=1) // 8, 1)
    plain = bits == {8} and colour in _READ_APART
    plain |= bits == {16} and colour == _RGB and compressed
    fewer = colour == _YCBCR and not compressed and lists.get(_SUBSAMPLING, (2, 2)) != (1, 1)
    dark = colour == _PALETTE and max(lists.get(_COLOUR_MAP, ()), default=256) < 256
    return Directory(
        compression=values.get(_COMPRESSION, _UNCOMPRESSED),
        tile_pixels=tile_width * tile_length,
        tiles_pixels=across * tile_width * down * tile_length,
        stored_bytes=max((sum(lists.get(tag, ())) for tag in _BYTE_COUNTS), default=0),
        longest_list=max(
            (n for tag, kind, n, _ in entries if kind not in _BLOBS or tag in _LISTS), default=0
        ),
        takes_long=_take_long(entries, _READ)
        or counts.get(_STRIPS, 0) > strips * planes
        or counts.get(_TILES, 0) > across * down * planes
        or (not compressed and any(_is_slow(lists.get(tag, ()), row) for tag in (_STRIPS, _TILES))),
        several_pages=following != 0,
        preview=preview,
        ends_early=compressed
        and any(
            place + size > len(data)
            for places, sizes in zip((_STRIPS, _TILES), sorted(_BYTE_COUNTS), strict=True)
            for place, size in zip(lists.get(places, ()), lists.get(sizes, ()), strict=False)
        ),
        misread=_SIGNED in lists.get(_SAMPLE_FORMAT, ())
        or (apart and not plain)
        or (fewer or dark or colour is None),
    )


def _entries(data: bytes | memoryview, order: str) -> list[tuple[int, int, int, bytes]]:
    """Of the first directory: tag, kind, how many values, and they or where they are.

    Those that are whole, where it is cut off.

    Raises:
        struct.error: They are not there.
    """
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    there = min(count, max(len(data) - start - 2, 0) // 12)
    return list(struct.iter_unpack(f"{order}HHI4s", data[start + 2 : start + 2 + 12 * there]))


def _take_long(entries: list[tuple[int, int, int, bytes]], read: set[int]) -> bool:
    """Whether there are many, or many values of those that Pillow reads."""
    return len(entries) > MOST_ENTRIES or any(
        length > _MOST_SAMPLES
        for tag, kind, length, _ in entries
        if tag in read or (tag in _METADATA and kind not in _BLOBS)
    )


def _is_slow(places: Sequence[int], row: int) -> bool:
    """Whether uncompressed strips or tiles are many, or one begins within a row of another.

    Pillow reads each as far as the next one's beginning, at a time, and begins with a whole row.
    """
    if len(places) > MOST_PLAIN_STRIPS:
        return True
    return any(after - before < row for before, after in pairwise(sorted(places)))


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
