import struct
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, TiffImagePlugin

from models import images
from models.images import (
    FORMATS,
    CorruptImageError,
    EmptyImageError,
    ImageError,
    ImageTooLargeError,
    Limits,
    UnsupportedImageError,
    decode,
)
from models.turns import NotItsTurn, allow_at_once, in_turn, is_anyones_turn
from tests.lesions import draw_lesion, encode, flat, huge_png, lesion


def reference(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Height and width of `size`; what Pillow gives for an image that needs no cropping."""
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))


def test_what_large_images_took_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[bool] = []
    monkeypatch.setattr("models.turns.trim_heaps_soon", lambda: turns.append(is_anyones_turn()))
    decode(flat(1, 64, 64), 32, 32)
    assert not turns
    decode(flat(1, 2100, 2100), 32, 32)
    assert turns == [False]
    with pytest.raises(CorruptImageError):
        decode(flat(1, 2100, 2100)[:-200], 32, 32)
    assert turns == [False, False]
    assert is_anyones_turn()


def test_large_images_are_decoded_one_at_a_time() -> None:
    small, large = flat(1, 64, 64), flat(1, 2100, 2100)

    def meanwhile() -> None:
        decode(small, 32, 32, wait=False)
        with pytest.raises(NotItsTurn):
            decode(large, 32, 32, wait=False)

    in_turn(meanwhile)
    assert is_anyones_turn()
    decode(large, 32, 32, wait=False)


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_gives_the_same_picture(image_format: str) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    options = {"quality": 98, "subsampling": 0} if image_format == "JPEG" else options
    pixels = draw_lesion(1)
    found = decode(encode(pixels, image_format, **options), 48, 64)
    difference = np.abs(found.pixels.astype(int) - reference(pixels, (48, 64)))
    assert found.format == image_format
    assert (found.width, found.height) == (200, 150)
    assert difference.max() <= (6 if image_format == "JPEG" else 0)


@pytest.fixture
def decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Width and height of what is decoded, before it is resized."""
    sizes: list[tuple[int, int]] = []
    to_channels = images._to_channels

    def see(image: Image.Image, data: bytes) -> Image.Image:
        sizes.append(image.size)
        return to_channels(image, data)

    monkeypatch.setattr(images, "_to_channels", see)
    return sizes


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    ("target", "size"),
    [(150, (200, 150)), (151, (400, 300)), (301, (800, 600)), (601, (1600, 1200))],
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_fills_the_target(
    decoded_sizes: list[tuple[int, int]], target: int, size: tuple[int, int], progressive: bool
) -> None:
    decode(encode(draw_lesion(2, 1600, 1200), progressive=progressive), target, target)
    assert decoded_sizes == [size]


def test_a_progressive_jpeg_loses_scans_at_an_eighth_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(images, "for_an_eighth", lambda data: asked.append(len(data)) or data)
    data = encode(draw_lesion(2, 1600, 1200), progressive=True)
    decode(data, 151, 151)
    assert asked == []
    decode(data, 150, 150)
    decode(encode(draw_lesion(2, 1600, 1200)), 150, 150)
    assert asked == [len(data)]


def test_a_large_jpeg_looks_the_same_at_a_smaller_scale() -> None:
    pixels = draw_lesion(2, 1600, 1200)
    found = decode(encode(pixels, quality=95), 160, 160)
    difference = np.abs(found.pixels.astype(int) - reference(pixels, (160, 160)))
    assert (found.width, found.height) == (1600, 1200)
    assert difference.mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    shown = Image.fromarray(draw_lesion(3, 120, 90))
    # How a camera stores what is shown under each orientation (EXIF 2.32, tag 0x0112).
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = shown.transpose(undo[orientation]) if orientation in undo else shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encode(np.asarray(stored), "PNG", exif=exif), 40, 60)
    assert (found.width, found.height) == (120, 90)
    assert np.abs(found.pixels.astype(int) - reference(np.asarray(shown), (40, 60))).max() <= 1


# Pillow says so once; the service has it in its log.
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_does_not_refuse_the_picture() -> None:
    data = encode(draw_lesion(4), exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff")
    assert decode(data, 32, 32).pixels.shape == (32, 32, 3)


def exif(*entries: tuple[int, int, int, int], values: bytes = b"") -> bytes:
    """A block of tag, kind, count and value of each entry, or where its values are: from `at`."""
    listed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + listed + bytes(4) + values


# After the header, the count, one entry and the mark of the end.
AFTER_ONE = 8 + 2 + 12 + 4


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_of_many_values_is_not_read(
    image_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would read each, in Python: a second for 4 MB of them."""
    read: list[bytes] = []
    load = Image.Exif.load
    monkeypatch.setattr(
        Image.Exif, "load", lambda self, data: read.append(data) or load(self, data)
    )
    picture = draw_lesion(4, 60, 40)
    many = exif((274, 5, 2_000, AFTER_ONE), values=struct.pack("<II", 6, 1) * 2_000)
    found = decode(encode(picture, image_format, exif=many), 32, 32)
    assert (found.width, found.height, read) == (60, 40, [])
    turned = decode(encode(picture, image_format, exif=exif((274, 3, 1, 6))), 32, 32)
    assert (turned.width, turned.height, len(read)) == (40, 60, 1)


def test_what_imagemagick_calls_exif_in_a_png_is_read() -> None:
    picture = Image.fromarray(draw_lesion(4, 60, 40))
    block = exif((274, 3, 1, 6)).hex()
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(block) // 2:8}\n{block}\n", zip=True)
    found = decode(encode(np.asarray(picture), "PNG", pnginfo=text), 32, 32)
    assert (found.width, found.height) == (40, 60)


def test_directories_within_a_tiff_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Image.Exif()
    inner[0x0112] = 6
    inner.get_ifd(34665)[37510] = b"a comment"
    inner.get_ifd(34853)[1] = "N"
    data = encode(draw_lesion(4, 60, 40), "TIFF", exif=inner.tobytes())
    assert b"a comment" in data
    monkeypatch.setattr(Image.Exif, "get_ifd", lambda self, tag: pytest.fail(f"reads {tag}"))
    found = decode(data, 32, 32)
    assert (found.width, found.height) == (40, 60)


def test_a_tiffs_xmp_may_be_text() -> None:
    """Where there is no orientation, Pillow looks for one in it, and takes bytes for granted."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[700] = "<x:xmpmeta/>"
    tags.tagtype[700] = 2
    data = encode(draw_lesion(4), "TIFF", tiffinfo=tags)
    assert decode(data, 32, 32).format == "TIFF"


def test_a_resolution_that_is_none_says_nothing_about_the_pixels() -> None:
    block = exif((0x011A, 2, 1, ord("7")), (0x0128, 3, 1, 2))
    whole = encode(draw_lesion(4), exif=block)
    jfif = whole.index(b"\xff\xe0")
    data = whole[:jfif] + whole[whole.index(b"\xff\xe1") :]
    assert decode(data, 32, 32).format == "JPEG"


def with_chunks(*chunks: bytes) -> bytes:
    """A PNG with these before its pixels."""
    whole = encode(draw_lesion(4), "PNG")
    at = whole.index(b"IHDR") + 4 + 13 + 4
    parts = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    ]
    return whole[:at] + b"".join(parts) + whole[at:]


@pytest.mark.parametrize(
    "chunks",
    [
        [b"iCCPx\0\0" + zlib.compress(bytes(2_000_000))],
        # Of which Pillow keeps each character in four bytes.
        [
            b"iTXt%d\0\1\0\0\0" % n + zlib.compress(1_000_000 * b"a" + "\U0001f600".encode())
            for n in range(5)
        ],
    ],
    ids=["profile", "texts"],
)
def test_texts_and_profiles_that_are_too_large_are_named(chunks: list[bytes]) -> None:
    with pytest.raises(ImageTooLargeError, match="text or colour profile is too large"):
        decode(with_chunks(*chunks), 32, 32)


def test_exif_of_any_length_as_text_is_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_exif", lambda image: pytest.fail("reads it"))
    data = with_chunks(b"tEXtRaw profile type exif\0" + b"ab\n" * 100_000)
    assert decode(data, 32, 32).format == "PNG"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bmp_of_black_and_white_in_more_than_bits_is_refused(bits: int) -> None:
    """Pillow would take each of its bits for a pixel."""
    pixels = bytes([0x11 if bits == 4 else 1]) * (64 * 64 * bits // 8)
    head = struct.pack("<IiiHHIIiiII", 40, 64, 64, 1, bits, 0, len(pixels), 0, 0, 2, 0)
    palette = bytes([0, 0, 0, 0, 255, 255, 255, 0])
    start = 14 + len(head) + len(palette)
    data = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + head + palette + pixels
    with pytest.raises(UnsupportedImageError, match="more than one bit a pixel"):
        decode(data, 32, 32)


@pytest.mark.parametrize("bits", [1, 8])
def test_an_os2_bmp_has_its_depth_elsewhere(bits: int) -> None:
    pixels = bytes([0xFF if bits == 1 else 1]) * (64 * 64 * bits // 8)
    head = struct.pack("<IHHHH", 12, 64, 64, 1, bits) + bytes([0, 0, 0, 255, 255, 255])
    head += bytes(3 * 254 if bits == 8 else 0)
    start = 14 + len(head)
    data = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + head + pixels
    assert decode(data, 32, 32).pixels.min() == 255


def test_a_bmp_of_bits_is_decoded() -> None:
    assert decode(encode(np.full((64, 64), 255, np.uint8) > 0, "BMP"), 32, 32).pixels.min() == 255


@pytest.mark.parametrize(
    ("name", "image_format"),
    [("open", "JPEG"), ("Image.load", "PNG"), ("Image.resize", "JPEG"), ("Image.getexif", "JPEG")],
)
def test_that_there_is_no_memory_says_nothing_about_the_image(
    name: str, image_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(draw_lesion(4), image_format, exif=exif((274, 3, 1, 6)))

    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError

    for whose in (f"PIL.Image.{name}", f"PIL.ImageFile.ImageFile.{name.rpartition('.')[2]}"):
        with suppress(AttributeError):
            monkeypatch.setattr(whose, fail)
    with pytest.raises(MemoryError):
        decode(data, 32, 32)


def test_a_jpeg_too_long_and_thin_for_a_smaller_scale_waits_as_what_is_held_in_full() -> None:
    long = encode(np.full((100, 60_000, 3), 90, np.uint8), "JPEG")
    assert decode(long, 32, 32, wait=False).width == 60_000

    def meanwhile() -> None:
        decode(long, 32, 32, wait=False)  # at a half of its size
        with pytest.raises(NotItsTurn):
            decode(long, 64, 64, wait=False)
        allow_at_once(2)
        in_turn(sparingly)

    def sparingly() -> None:
        with pytest.raises(NotItsTurn):
            decode(long, 64, 64, wait=False, sparing=True)
        assert decode(long, 64, 64, wait=False).width == 60_000

    in_turn(meanwhile)
    few = Limits(max_pixels_in_full=5_000_000)
    assert decode(long, 32, 32, few).width == 60_000
    with pytest.raises(ImageTooLargeError, match="at most 5 are accepted for JPEG as long"):
        decode(long, 64, 64, few)


def test_what_is_wider_than_4_to_3_loses_its_ends() -> None:
    wide = np.zeros((60, 200, 3), np.uint8)
    wide[:, 60:140] = 200  # the middle 4:3 box
    found = decode(encode(wide, "PNG"), 32, 32).pixels
    assert np.all(found[:, 1:-1] == 200)  # the outermost columns are blended with what is beside


def test_what_is_higher_than_4_to_3_does_too() -> None:
    high = np.zeros((200, 60, 3), np.uint8)
    high[60:140] = 200
    found = decode(encode(high, "PNG"), 32, 32).pixels
    assert np.all(found[1:-1] == 200)


@pytest.mark.parametrize(
    ("in_full", "target", "held"),
    [
        (False, (160, 160), 750 * 500),
        (False, (500, 100), 750 * 500),
        (False, (100, 501), 1500 * 1000),
        (False, (1001, 100), 3000 * 2000),
        (False, (2000, 2000), 3000 * 2000),
        (False, (2001, 100), 6000 * 4000),
        (True, (160, 160), 6000 * 4000),
    ],
)
def test_so_many_pixels_are_held(in_full: bool, target: tuple[int, int], held: int) -> None:
    for size in ((6000, 4000), (4000, 6000)):
        assert images._held_pixels(size, in_full, *target) == held


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert decode(encode(np.asarray(clear), "PNG"), 32, 32).pixels.min() == 255


@pytest.mark.parametrize(("alpha", "shown"), [(0, [200, 30, 40]), (1, [255, 255, 255])])
def test_a_bmp_whose_fourth_byte_was_left_at_0_is_opaque(alpha: int, shown: list[int]) -> None:
    """Of BITMAPV4HEADER, with a mask for alpha."""
    masks = [0xFF0000, 0xFF00, 0xFF, 0xFF000000]
    fields = [108, 8, 8, 1 | 32 << 16, 3, 256, 0, 0, 0, 0, *masks, *[0] * 13]
    head = b"BM" + struct.pack("<3I27I", 14 + 108 + 256, 0, 14 + 108, *fields)
    pixels = bytes([40, 30, 200, 0]) * 63 + bytes([40, 30, 200, alpha])
    assert decode(head + pixels, 8, 8).pixels[7, 0].tolist() == shown


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    from io import BytesIO

    buffer = BytesIO()
    image = Image.fromarray(draw_lesion(5)).convert(mode)
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    found = decode(buffer.getvalue(), 32, 32).pixels
    expected = reference(np.asarray(image.convert("RGB")), (32, 32))
    assert np.abs(found.astype(int) - expected).max() <= 1


def png(depth: int, colour: int, rows: np.ndarray, **chunks: bytes) -> bytes:
    """A PNG of rows of bytes, in that colour type, with further chunks."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    channels = {0: 1, 2: 3, 3: 1}[colour]
    height, width = len(rows), rows.shape[1] * 8 // depth // channels
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = {"IHDR": head, **chunks, "IDAT": pixels, "IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(n.encode(), d) for n, d in parts.items())


def test_a_palette_that_is_missing_is_damage() -> None:
    with pytest.raises(CorruptImageError):
        decode(png(8, 3, np.zeros((64, 64), np.uint8)), 32, 32)


@pytest.mark.parametrize(
    ("depth", "colour", "left", "right", "transparent", "shown"),
    [
        (4, 0, [0x55], [0xAA], [0, 5], [170, 170, 170]),
        (8, 0, [50], [200], [0, 50], [200, 200, 200]),
        (16, 0, [40, 7], [200, 7], [40, 7], [200, 200, 200]),
        (8, 2, [9, 8, 7], [200, 90, 30], [0, 9, 0, 8, 0, 7], [200, 90, 30]),
        (16, 2, [9, 7] * 3, [200, 0, 90, 0, 30, 0], [9, 7] * 3, [200, 90, 30]),
    ],
)
def test_a_transparent_colour_is_one_at_any_depth(
    depth: int, colour: int, left: list, right: list, transparent: list, shown: list
) -> None:
    rows = np.tile(np.array(left * 32 + right * 32, np.uint8), (48, 1))
    found = decode(png(depth, colour, rows, tRNS=bytes(transparent)), 48, 64).pixels
    assert (found[:, :30] == 255).all()
    assert (found[:, -30:] == shown).all()


def grey_tiff(values: np.ndarray, bits: int, white_is_zero: bool = False) -> bytes:
    """One strip of packed bytes, 64 pixels wide."""
    entries = [(256, 64), (257, 48), (258, bits), (259, 1), (262, 0 if white_is_zero else 1)]
    entries += [(273, 8 + 2 + 12 * 9 + 4), (277, 1), (278, 48), (279, values.nbytes)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, 9) + directory + bytes(4) + values.tobytes()


def test_a_grey_tiff_says_how_many_bits_it_has_and_which_end_is_white() -> None:
    sixteen = np.full((48, 64), 10_000, "<u2")
    assert decode(grey_tiff(sixteen, 16), 48, 64).pixels[0, 0, 0] == 39
    assert decode(grey_tiff(sixteen, 16, white_is_zero=True), 48, 64).pixels[0, 0, 0] == 216
    twelve = np.tile(np.array([0x80, 0x08, 0x00], np.uint8), 48 * 32)
    assert decode(grey_tiff(twelve, 12), 48, 64).pixels[0, 0, 0] == 128


def test_sixteen_bit_greyscale_keeps_its_range() -> None:
    grey = np.full((64, 64), 40_000, np.uint16)
    assert np.all(decode(encode(grey, "PNG"), 32, 32).pixels == 40_000 >> 8)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", EmptyImageError),
        (b"not an image", UnsupportedImageError),
        (b"GIF89a" + bytes(100), UnsupportedImageError),
        (lesion()[:2000], CorruptImageError),
        (flat(1)[:60], CorruptImageError),
        (huge_png(), ImageTooLargeError),
    ],
    ids=["empty", "text", "gif", "truncated-jpeg", "truncated-png", "declares-900-megapixels"],
)
def test_what_cannot_be_used_has_its_own_error(data: bytes, error: type[ImageError]) -> None:
    with pytest.raises(error) as caught:
        decode(data, 32, 32)
    assert str(caught.value).endswith((".", ")."))


def test_a_png_damaged_in_the_middle_is_refused() -> None:
    data = bytearray(encode(draw_lesion(0, 400, 300), "PNG"))
    middle = len(data) // 3
    data[middle : middle + 200] = bytes(200)
    with pytest.raises(CorruptImageError):
        decode(bytes(data), 32, 32)


def test_what_is_too_large_is_told_how_large_it_may_be() -> None:
    with pytest.raises(ImageTooLargeError) as caught:
        decode(huge_png(), 32, 32)
    assert str(caught.value) == (
        "The image has 30000 x 30000 = 900.0 megapixels; at most 30 are accepted for PNG. "
        "Send a smaller copy."
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("turned", [False, True], ids=["wide", "high"])
def test_no_side_is_longer_than_a_jpeg_may_have_it(kind: str, turned: bool) -> None:
    def of(longest: int) -> bytes:
        pixels = np.full((1, longest, 3), 90, np.uint8)
        return encode(pixels.transpose(1, 0, 2) if turned else pixels, kind)

    assert max(decode(of(65_535), 32, 32).width, decode(of(65_535), 32, 32).height) == 65_535
    with pytest.raises(ImageTooLargeError, match="at most 65,535 a side are accepted"):
        decode(of(65_536), 32, 32)


def test_several_pages_are_refused() -> None:
    from io import BytesIO

    buffer = BytesIO()
    page = Image.fromarray(draw_lesion(0))
    page.save(buffer, "TIFF", save_all=True, append_images=[page])
    with pytest.raises(UnsupportedImageError, match="several frames"):
        decode(buffer.getvalue(), 32, 32)


def test_bytes_and_pixels_are_limited_before_decoding() -> None:
    data = lesion(0, 200, 150)
    with pytest.raises(ImageTooLargeError, match="bytes"):
        decode(data, 32, 32, Limits(max_bytes=len(data) - 1))
    assert decode(data, 32, 32, Limits(max_bytes=len(data)))
    with pytest.raises(ImageTooLargeError, match="megapixels"):
        decode(data, 32, 32, Limits(max_pixels=29_999))
    assert decode(data, 32, 32, Limits(max_pixels=30_000, max_pixels_in_full=1))


@pytest.mark.parametrize("options", [{"progressive": True}, {"image_format": "PNG"}])
def test_what_is_decoded_in_full_has_the_lower_limit(options: dict) -> None:
    data = encode(draw_lesion(0), **options)
    with pytest.raises(ImageTooLargeError):
        decode(data, 32, 32, Limits(max_pixels_in_full=29_999))


# Of a JPEG, PNG, BMP, WebP and TIFF: without one, no parser is asked.
MARKS = (
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"BM",
    b"RIFF\x80\0\0\0WEBP",
    b"II*\0",
    b"MM\0*",
)


@given(st.sampled_from(MARKS), st.binary(max_size=300))
def test_no_bytes_raise_anything_but_an_image_error(mark: bytes, data: bytes) -> None:
    with warnings.catch_warnings(), pytest.raises(ImageError):
        warnings.simplefilter("ignore")  # Pillow comments on damaged metadata
        decode(mark + data, 32, 32)


@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP"]),
    st.integers(0, 99) | st.integers(0, 10_000),
    st.integers(0, 255),
    st.just(0) | st.integers(1, 399),
)
def test_a_flipped_byte_or_a_cut_gives_pixels_or_an_image_error(
    image_format: str, place: int, value: int, cut: int
) -> None:
    data = bytearray(encode(draw_lesion(0, 40, 30), image_format))
    data[place % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow comments on damaged metadata
        try:
            found = decode(bytes(data[: max(len(data) - cut, 1)]), 32, 32)
        except ImageError:
            return
    assert found.pixels.shape == (32, 32, 3)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(32, 64), st.integers(32, 64))
def test_any_size_fits_any_target(width: int, height: int, to_width: int, to_height: int) -> None:
    found = decode(flat(200, width, height), to_height, to_width)
    assert found.pixels.shape == (to_height, to_width, 3)
    assert np.all(found.pixels == (200, 100, 50))


@pytest.mark.parametrize("compression", [1, 2])
def test_run_lengths_of_bmp_are_refused_before_they_are_decoded_in_python(compression: int) -> None:
    plain = bytearray(encode(draw_lesion(0), "BMP"))
    assert decode(bytes(plain), 32, 32).format == "BMP"
    plain[30] = compression
    with pytest.raises(UnsupportedImageError, match="run lengths"):
        decode(bytes(plain), 32, 32)
