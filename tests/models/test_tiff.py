import struct
import warnings
import zlib
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.images import (
    ImageError,
    ImageTooLargeError,
    UnsupportedImageError,
    decode,
)
from models.tiff import MOST_ENTRIES, read_directory, takes_long
from tests.lesions import draw_lesion, encode

TILE_WIDTH, TILE_LENGTH, STRIPS, COMPRESSION = 322, 323, 273, 259


def tiff(*entries: tuple[int, int, int, int], order: str = "<", following: int = 0) -> bytes:
    """A TIFF of a directory alone: tag, kind, count and value (or both, if two) of each entry."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    listed = b"".join(
        struct.pack(f"{order}HHI", *entry[:3])
        + (
            struct.pack(f"{order}HH", entry[3], entry[3] if entry[2] == 2 else 0)
            if entry[1] == 3
            else struct.pack(f"{order}I", entry[3])
        )
        for entry in entries
    )
    count = struct.pack(f"{order}H", len(entries))
    return mark + struct.pack(f"{order}I", 8) + count + listed + struct.pack(f"{order}I", following)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_directory_is_read_in_either_byte_order(order: str) -> None:
    found = read_directory(
        tiff(
            (COMPRESSION, 3, 1, 8),
            (TILE_WIDTH, 3, 1, 512),
            (TILE_LENGTH, 4, 1, 256),
            (STRIPS, 4, 9, 200),
            (700, 1, 1_000_000, 8),
            order=order,
            following=8,
        )
        + bytes(300)
    )
    assert found is not None
    assert (found.compression, found.tile_pixels) == (8, 512 * 256)
    assert (found.longest_list, found.several_pages) == (9, True)


def test_what_a_directory_does_not_say() -> None:
    found = read_directory(tiff())
    assert found is not None
    assert (found.compression, found.tile_pixels) == (1, 0)
    assert (found.longest_list, found.several_pages) == (0, False)


@pytest.mark.parametrize("kind", range(1, 14))
def test_text_and_blobs_alone_may_be_long(kind: int) -> None:
    found = read_directory(tiff((700, kind, 1_000_000, 8)))
    assert found is not None
    assert found.longest_list == (0 if kind in (1, 2, 7) else 1_000_000)


def picture(*entries: tuple[int, int, list[int]], stored: list[bytes], tiled: bool) -> bytes:
    """A TIFF of 64 x 64 pixels, the directory first: tag, kind and values of each further entry."""
    size = {3: 2, 4: 4}
    places = (324, 325) if tiled else (273, 279)
    listed = sorted([(256, 3, [64]), (257, 3, [64]), *entries, *((p, 4, [0]) for p in places)])
    beyond = 8 + 2 + 12 * len(listed) + 4
    values = {tag: (kind, numbers) for tag, kind, numbers in listed}
    data = beyond + sum(
        size[kind] * len(n) for kind, n in values.values() if size[kind] * len(n) > 4
    )
    assert len(stored) == 1
    values[places[0]], values[places[1]] = (4, [data]), (4, [len(stored[0])])
    head, blobs = struct.pack("<H", len(values)), b""
    for tag, (kind, numbers) in sorted(values.items()):
        packed = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            place, blobs = struct.pack("<I", beyond + len(blobs)), blobs + packed
        else:
            place = packed.ljust(4, b"\0")
        head += struct.pack("<HHI", tag, kind, len(numbers)) + place
    return b"II*\0" + struct.pack("<I", 8) + head + bytes(4) + blobs + b"".join(stored)


@pytest.mark.parametrize("said", [None, 0])
def test_a_fourth_sample_that_is_not_said_to_be_transparency_is_none(said: int | None) -> None:
    extra = [] if said is None else [(338, 3, [said])]
    of_rgb = [(258, 3, [8] * 4), (259, 3, [1]), (262, 3, [2]), (277, 3, [4]), (278, 3, [64])]
    data = picture(*of_rgb, *extra, stored=[bytes([200, 30, 40, 0]) * 64 * 64], tiled=False)
    assert decode(data, 32, 32).pixels[16, 16].tolist() == [200, 30, 40]


@pytest.mark.parametrize("kind", [(254, 4, [1]), (255, 3, [2])])
def test_a_small_copy_of_another_picture_is_refused(kind: tuple[int, int, list[int]]) -> None:
    of_rgb = [(258, 3, [8] * 3), (259, 3, [1]), (262, 3, [2]), (277, 3, [3]), (278, 3, [64])]
    stored = [bytes(3 * 64 * 64)]
    whole = (kind[0], kind[1], [0 if kind[0] == 254 else 1])
    assert decode(picture(*of_rgb, whole, stored=stored, tiled=False), 32, 32).width == 64
    with pytest.raises(UnsupportedImageError, match="a small copy of another one"):
        decode(picture(*of_rgb, kind, stored=stored, tiled=False), 32, 32)


@pytest.mark.parametrize("colours", [2, 6])
@pytest.mark.parametrize("tiled", [False, True])
def test_a_compressed_tiff_that_ends_early_is_refused(colours: int, tiled: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    entries = [(258, 3, [8] * 3), (259, 3, [8]), (262, 3, [colours]), (277, 3, [3])]
    entries += [(322, 3, [64]), (323, 3, [64])] if tiled else [(278, 3, [64])]
    entries += [(530, 3, [1, 1])] if colours == 6 else []
    data = picture(*entries, stored=[zlib.compress(pixels.tobytes())], tiled=tiled)
    assert decode(data, 32, 32).width == 64
    for share in (0.6, 0.9, 0.995):
        with pytest.raises(ImageError):
            decode(data[: int(share * len(data))], 32, 32)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_what_cameras_write_is_decoded(compression: str | None) -> None:
    data = encode(draw_lesion(0), "TIFF", compression=compression)
    assert decode(data, 32, 32).format == "TIFF"


def test_the_compressions_of_fax_machines_are_refused() -> None:
    buffer = BytesIO()
    Image.new("1", (64, 64)).save(buffer, "TIFF", compression="group4")
    with pytest.raises(UnsupportedImageError, match="compression 4"):
        decode(buffer.getvalue(), 32, 32)


def test_the_compressions_of_photographs_are_those_that_are_known() -> None:
    known = set()
    for number in (
        *range(20),
        *range(32_765, 32_950),
        *range(34_600, 34_950),
        *range(49_990, 50_010),
    ):
        try:
            decode(tiff((COMPRESSION, 3, 1, number)), 32, 32)
        except UnsupportedImageError as error:
            if f"compression {number} is not supported" in str(error):
                continue
        except ImageError:
            pass
        known.add(number)
    assert known == {1, 5, 7, 8, 32_773, 32_946, 50_000}


@pytest.mark.parametrize(
    "entries",
    [
        [(TILE_WIDTH, 3, 1, 26_000), (TILE_LENGTH, 3, 1, 26_000)],
        [(STRIPS, 4, 1_000_000, 8)],
    ],
    ids=["a-tile-larger-than-the-picture", "a-million-strips"],
)
def test_what_is_larger_than_the_picture_is_refused(entries: list) -> None:
    with pytest.raises(ImageTooLargeError, match="tiles of more than 4 megapixels, "):
        decode(tiff(*entries) + bytes(300_000), 32, 32)


@pytest.mark.parametrize(
    "entries",
    [
        [(TILE_WIDTH, 4, 2, 8)],
        [(TILE_WIDTH, 1, 1, 8)],
        [(COMPRESSION, 3, 1, 1)] * 2,
        [(279, 2, 1_000_000, 8)],
        [(325, 4, 9, 8)],
        [(258, 3, 17, 8)],
        [(258, 3, 1, 8)] * 2,
        [(339, 5, 1, 8)],
        [(STRIPS, 4, 2, 0), (STRIPS, 4, 1, 8)],
        [(324, 4, 2, 0), (324, 4, 1, 8)],
        [(STRIPS, 1, 1, 8)],
        [(324, 2, 1_000_000, 8)],
    ],
    ids=[
        *("several", "of-another-kind", "twice", "lengths-as-text", "lengths-that-are-not-there"),
        *("many-samples", "samples-twice", "formats-as-fractions", "strips-twice", "tiles-twice"),
        *("strips-as-bytes", "tiles-as-text"),
    ],
)
def test_what_decoders_might_read_differently_is_refused(entries: list) -> None:
    assert read_directory(tiff(*entries)) is None
    with pytest.raises(UnsupportedImageError, match="header is damaged"):
        decode(tiff(*entries), 32, 32)


def small(
    *entries: tuple[int, int, int, int], order: str = "<", pixels: bytes = bytes(range(0, 160, 10))
) -> bytes:
    """A whole one of 4 x 4 grey pixels, which begin at 8, but for these entries."""
    own = {
        256: (256, 3, 1, 4),
        257: (257, 3, 1, 4),
        258: (258, 3, 1, 8),
        COMPRESSION: (COMPRESSION, 3, 1, 1),
        262: (262, 3, 1, 1),
        STRIPS: (STRIPS, 4, 1, 8),
        277: (277, 3, 1, 1),
        278: (278, 3, 1, 4),
        279: (279, 4, 1, len(pixels)),
    } | {entry[0]: entry for entry in entries}
    made = tiff(*(own[tag] for tag in sorted(own)), order=order)
    return made[:4] + struct.pack(f"{order}I", 8 + len(pixels)) + pixels + made[8:]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "entries",
    [[], [(284, 3, 1, 2)], [(284, 3, 1, 1)], [(339, 3, 1, 1)], [(266, 3, 1, 1)]],
    ids=["nothing", "one-sample-apart", "together", "unsigned", "high-bit-first"],
)
def test_what_is_said_of_an_ordinary_picture_changes_nothing(entries: list, order: str) -> None:
    found = decode(small(*entries, order=order), 32, 32)
    assert (found.width, found.height, found.pixels[0, 0, 0]) == (4, 4, 0)
    assert found.pixels[-1, -1].tolist() == [150, 150, 150]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "entries",
    [
        [(339, 3, 1, 2)],
        [(284, 3, 1, 2), (277, 3, 1, 2), (258, 3, 1, 8)],
        [(284, 3, 1, 2), (277, 3, 1, 3), (258, 3, 1, 16), (262, 3, 1, 2)],
        [(284, 3, 1, 2), (277, 3, 1, 3), (258, 3, 1, 8), (262, 3, 1, 8)],
        [(277, 3, 1, 3), (258, 3, 1, 8), (262, 3, 1, 6)],
        [(262, 3, 1, 3), (320, 3, 1, 255)],
    ],
    ids=[
        *("signed", "grey-and-alpha-apart", "sixteen-bits-apart", "lab-apart"),
        *("subsampled", "a-palette-of-eight-bits"),
    ],
)
def test_what_pillow_makes_other_pixels_of_is_refused(entries: list, order: str) -> None:
    with pytest.raises(UnsupportedImageError, match="signs, its samples are stored apart"):
        decode(small(*entries, order=order), 32, 32)


@pytest.mark.parametrize(
    "more",
    [
        [(277, 3, 1, 3), (262, 3, 1, 6), (530, 3, 2, 1)],
        [(277, 3, 1, 3), (262, 3, 1, 6), (COMPRESSION, 3, 1, 8)],
        [(262, 3, 1, 3), (320, 3, 1, 256)],
    ],
    ids=["as many samples of each colour", "compressed", "a palette of sixteen bits"],
)
def test_what_pillow_reads_right_is_not(more: list) -> None:
    found = read_directory(small(*more))
    assert found is not None
    assert not found.misread


def test_a_palette_without_colours_is_no_image() -> None:
    with pytest.raises(UnsupportedImageError):
        decode(small((262, 3, 1, 3), (320, 3, 0, 0)), 32, 32)


_TAGS = (256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284, 317, 320, 322, 324, 338, 339, 530)
_ENTRIES = st.tuples(
    st.sampled_from(_TAGS),
    st.integers(1, 13),
    st.sampled_from([0, 1, 2, 3, 4, 17, 70_000]),
    st.integers(0, 60),
)


@given(st.lists(_ENTRIES, max_size=6), st.sampled_from(["<", ">"]))
def test_whatever_a_directory_says_there_are_pixels_or_an_image_error(
    entries: list[tuple[int, int, int, int]], order: str
) -> None:
    with suppress(ImageError), warnings.catch_warnings(action="ignore"):
        assert decode(small(*entries, order=order), 32, 32).pixels.shape == (32, 32, 3)


def test_which_colours_it_has_is_said() -> None:
    """Pillow takes grey values of eight bits for inverted then, and those of sixteen not."""
    with pytest.raises(UnsupportedImageError, match="does not say what its colours are"):
        decode(small().replace(struct.pack("<H", 262), struct.pack("<H", 261), 1), 32, 32)


@pytest.mark.parametrize("more", [[], [(258, 3, 1, 16), (COMPRESSION, 3, 1, 8)]])
def test_colours_may_be_stored_apart_as_pillow_reads_them(more: list) -> None:
    found = read_directory(small((284, 3, 1, 2), (277, 3, 1, 3), (262, 3, 1, 2), *more))
    assert found is not None
    assert not found.misread


@pytest.mark.parametrize(
    "entries",
    [
        # 2,500 tiles of 16 x 240,000 pixels over a picture of 40,000 x 64, all of the same bytes.
        [
            (256, 4, 1, 40_000),
            (257, 3, 1, 64),
            (TILE_WIDTH, 3, 1, 16),
            (TILE_LENGTH, 4, 1, 240_000),
        ],
        [(279, 4, 1, 4_000_000_000)],
        [(STRIPS, 4, 2, 8)],
        [(278, 3, 1, 2), (STRIPS, 4, 3, 8)],
        [(TILE_WIDTH, 3, 1, 16), (TILE_LENGTH, 3, 1, 16), (324, 4, 2, 8)],
        *([(tag, 5, 17, 8)] for tag in (274, 282, 283, 296)),
        *([(tag, 3, 17, 8)] for tag in (266, 338, 700, 34675)),
        [(266, 6, 60_000_000, 8)],
        [(tag, 3, 1, 1) for tag in range(1000, 5200)],
    ],
    ids=[
        *("tiles-far-larger-than-the-picture", "more-bytes-than-there-are"),
        *("a-strip-too-many", "a-strip-of-two-rows-too-many", "a-tile-too-many"),
        *(f"many-of-{tag}" for tag in (274, 282, 283, 296, 266, 338, 700, 34675)),
        *("many-signed-bytes", "many-entries"),
    ],
)
def test_what_would_take_long_to_read_is_refused(entries: list) -> None:
    with pytest.raises(ImageTooLargeError, match="tiles far larger than the picture, lists"):
        decode(small(*entries), 32, 32)


def strips(*places: int) -> bytes:
    """Four, a row each, of pixels that begin here: after their list, at 8 + 16."""
    listed = struct.pack("<4I", *places)
    return small((278, 3, 1, 1), (STRIPS, 4, 4, 8), (279, 4, 4, 8), pixels=listed + bytes(64))


@pytest.mark.parametrize("places", [(24, 28, 32, 36), (36, 32, 28, 24), (24, 40, 44, 60)])
def test_strips_may_stand_in_any_order(places: tuple[int, ...]) -> None:
    found = read_directory(strips(*places))
    assert found is not None
    assert not found.takes_long


@pytest.mark.parametrize("places", [(24, 25, 26, 27), (24, 24, 24, 24), (24, 28, 31, 36)])
def test_strips_that_begin_within_each_other_take_long(places: tuple[int, ...]) -> None:
    """Pillow reads each as far as the next: byte by byte, and all that it has anew each time."""
    with pytest.raises(ImageTooLargeError):
        decode(strips(*places), 32, 32)


@pytest.mark.parametrize(("compression", "refused"), [(1, True), (8, False)])
def test_so_many_strips_may_be_uncompressed(compression: int, refused: bool) -> None:
    for count, too_many in ((16_384, False), (16_385, refused)):
        places = struct.pack(f"<{count}I", *range(70_000, 70_000 + 4 * count, 4))
        data = small(
            (257, 4, 1, count),
            (COMPRESSION, 3, 1, compression),
            (278, 3, 1, 1),
            (STRIPS, 4, count, 8),
            pixels=places,
        )
        found = read_directory(data)
        assert found is not None
        assert found.takes_long == too_many


@given(st.sampled_from([b"II*\0", b"MM\0*", b"II+\0", b"MM"]), st.binary(max_size=120))
def test_no_bytes_are_too_odd(mark: bytes, rest: bytes) -> None:
    with pytest.raises(ImageError):
        decode(mark + rest, 32, 32)


ORIENTATION = (274, 3, 1, 6)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_cameras_exif_does_not_take_long(order: str) -> None:
    assert not takes_long(tiff(ORIENTATION, order=order))
    assert not takes_long(tiff(*[ORIENTATION] * MOST_ENTRIES, order=order))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 3, 5, 12])
def test_an_orientation_of_many_values_takes_long(kind: int, order: str) -> None:
    assert not takes_long(tiff((274, kind, 16, 8), order=order))
    assert takes_long(tiff((274, kind, 17, 8), order=order))
    # Which nobody reads of EXIF.
    assert not takes_long(tiff((282, kind, 1_000_000, 8), order=order))


@pytest.mark.parametrize("mark", [b"II\0*", b"MM*\0"])
def test_a_mark_the_other_way_round_is_one_of_exif(mark: bytes) -> None:
    order = "<" if mark[:1] == b"I" else ">"
    assert not takes_long(mark + tiff(ORIENTATION, order=order)[4:])


def test_exif_that_is_cut_off_is_what_stands_before_the_cut() -> None:
    whole = tiff(ORIENTATION, (274, 5, 17, 8))
    assert takes_long(whole)
    assert not takes_long(whole[:-6])


def test_exif_of_many_entries_takes_long() -> None:
    assert takes_long(tiff(*[ORIENTATION] * (MOST_ENTRIES + 1)))


@given(st.sampled_from([b"", b"II*\0", b"MM\0*", b"II+\0"]), st.binary(max_size=60))
def test_exif_of_any_bytes_is_looked_at(mark: bytes, rest: bytes) -> None:
    assert takes_long(mark + rest) in (True, False)
