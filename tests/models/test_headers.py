"""What would keep Pillow busy before anything can be refused is refused first."""

import zlib
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.headers import MOST_PIECES, in_too_many_pieces, is_whole_png
from models.images import CorruptImageError, ImageTooLargeError, decode


def drawn(kind: str) -> bytes:
    buffer = BytesIO()
    Image.linear_gradient("L").convert("RGB").save(buffer, kind)
    return buffer.getvalue()


JPEG, PNG = drawn("JPEG"), drawn("PNG")
_AFTER_IHDR = 8 + 12 + 13


def segment(marker: int, content: bytes = b"") -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def in_jpeg(more: bytes) -> bytes:
    return JPEG[:2] + more + JPEG[2:]


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    checked = kind + content
    return len(content).to_bytes(4, "big") + checked + zlib.crc32(checked).to_bytes(4, "big")


def in_png(more: bytes) -> bytes:
    return PNG[:_AFTER_IHDR] + more + PNG[_AFTER_IHDR:]


@pytest.mark.parametrize(
    "data",
    [
        in_jpeg(300 * segment(0xE5)),
        in_jpeg(300 * segment(0xE1, b"Exif\0\0" + bytes(50))),
        in_jpeg(300 * segment(0xFE)),
        in_jpeg(300 * b"\xff\xd8"),
        in_jpeg(300 * b"\xff\xf0"),  # for which Pillow reads no length
        in_jpeg(b"\xff\xf0\xff\x00" + 300 * segment(0xE5)),
        in_jpeg(300 * b"\xff\xe5\x00\x00"),  # and a length that is none
        in_jpeg(segment(0xC0, bytes(19))),  # of more components than a picture has
        in_jpeg(100_000 * b"\xff"),
        in_jpeg(segment(0xE5) + 100_000 * b"\x00"),
        in_jpeg(50_000 * b"\xff" + segment(0xE5) + 50_000 * b"\xff"),
        JPEG[:3] + bytes(100_000),
        in_png(300 * chunk(b"prVt")),
        in_png(300 * chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1000)))),
        in_png(70_000 * chunk(b"IDAT")),
    ],
)
def test_many_pieces_are_refused(data: bytes) -> None:
    assert in_too_many_pieces(data)
    assert in_too_many_pieces(memoryview(data))
    with pytest.raises(ImageTooLargeError, match="Save the image anew"):
        decode(data, 32, 32)


@pytest.mark.parametrize(
    "data",
    [
        JPEG,
        PNG,
        drawn("WEBP"),
        drawn("TIFF"),
        drawn("BMP"),
        in_jpeg(100 * segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(60_000))),
        in_jpeg(1000 * b"\xff" + segment(0xE5)),
        in_png(100 * chunk(b"tEXt", b"a\0b")),
        # As an encoder writes that flushes after each row.
        PNG[:_AFTER_IHDR] + 2000 * chunk(b"IDAT") + PNG[_AFTER_IHDR:],
        JPEG + 1000 * segment(0xE5),  # after the picture nobody looks
    ],
)
def test_what_cameras_and_encoders_write_is_not(data: bytes) -> None:
    assert not in_too_many_pieces(data)
    assert decode(data, 32, 32).pixels.shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("start", "piece", "most"),
    [
        (b"\xff\xd8", segment(0xE5), 256),
        (b"\xff\xd8", b"\xff\xf0", 256),
        (PNG[:8], chunk(b"tEXt", b"a\0b"), 256),
        (PNG[:8], chunk(b"IDAT"), 65_536),
        (b"\xff\xd8\xff\xe5\0\4ab", b"\0", 65_536),
    ],
    ids=["segments", "markers", "chunks", "chunks-of-pixels", "fill"],
)
def test_so_many_pieces_are_the_most(start: bytes, piece: bytes, most: int) -> None:
    assert not in_too_many_pieces(start + most * piece)
    assert in_too_many_pieces(start + (most + 1) * piece)


def test_fill_is_counted_over_all_gaps() -> None:
    for gap, refused in ((32_768, False), (32_769, True)):
        data = JPEG[:2] + segment(0xE5) + 32_768 * b"\0" + segment(0xE5) + gap * b"\0"
        assert in_too_many_pieces(data + segment(0xE5)) is refused


@given(st.lists(st.sampled_from([b"\xff", b"\xff\xe5", b"\xd8", b"\x00", b"\x00\x04", b"ab"])))
def test_no_more_pieces_are_read_than_are_counted(parts: list[bytes]) -> None:
    data = JPEG[:3] + b"".join(parts) * 40 + JPEG[2:]
    if in_too_many_pieces(data):
        return
    try:
        with Image.open(BytesIO(data), formats=["JPEG"]) as image:
            assert len(image.applist) <= MOST_PIECES
    except (OSError, SyntaxError):
        pass


@given(st.binary(max_size=200), st.sampled_from([JPEG[:3], PNG[:8], PNG[:_AFTER_IHDR], b""]))
def test_any_bytes_are_walked(data: bytes, start: bytes) -> None:
    in_too_many_pieces(start + data)


NOISE = BytesIO()
Image.effect_noise((64, 64), 80).save(NOISE, "PNG")


@pytest.mark.parametrize(
    "damaged",
    [
        NOISE.getvalue()[:2000] + bytes(len(NOISE.getvalue()) - 2000),
        NOISE.getvalue()[:2000] + bytes(100) + NOISE.getvalue()[2100:],
        NOISE.getvalue()[:-12],
        PNG[:_AFTER_IHDR] + chunk(b"IDAT")[:-1] + b"x" + PNG[_AFTER_IHDR:],
        PNG[:-12] + chunk(b"\0\0\0\0") + PNG[-12:],
    ],
)
def test_a_png_is_whole_or_refused(damaged: bytes) -> None:
    assert not is_whole_png(damaged)
    with pytest.raises(CorruptImageError):
        decode(damaged, 32, 32)


@pytest.mark.parametrize(
    "whole", [PNG, PNG + b"more", in_png(chunk(b"tEXt", b"a\0b")[:-1] + b"x"), NOISE.getvalue()]
)
def test_what_is_not_of_a_pngs_pixels_may_be_damaged(whole: bytes) -> None:
    assert is_whole_png(whole)
