import re
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

from models.images import CorruptImageError, ImageTooLargeError, decode
from models.progressive import for_an_eighth, has_several_scans, may_be_lossless, most_scans
from tests.lesions import draw_lesion, encode


def progressive(pixels: np.ndarray, quality: int = 85, subsampling: int = 2) -> bytes:
    buffer = BytesIO()
    image = Image.fromarray(pixels)
    with pytest.MonkeyPatch.context() as patch:
        # Pillow's own guess of how large a progressive file gets is too small for noise.
        patch.setattr(ImageFile, "MAXBLOCK", 1 << 22)
        image.save(buffer, "JPEG", quality=quality, subsampling=subsampling, progressive=True)
    return buffer.getvalue()


def eighth(data: bytes) -> np.ndarray:
    """As a decoder shows it at an eighth of its size."""
    with Image.open(BytesIO(data)) as image:
        image.draft("RGB", (image.width // 8, image.height // 8))
        return np.asarray(image.convert("RGB"))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 1000),
    st.integers(64, 200),
    st.integers(64, 200),
    st.integers(5, 100),
    st.sampled_from([0, 1, 2]),
)
def test_the_pixels_are_the_same_to_the_bit(
    seed: int, width: int, height: int, quality: int, subsampling: int
) -> None:
    noise = np.random.default_rng(seed).integers(-25, 25, (height, width, 3))
    pixels = np.clip(draw_lesion(seed, width, height) + noise, 0, 255).astype(np.uint8)
    data = progressive(pixels, quality, subsampling)
    fewer = for_an_eighth(data)
    assert len(fewer) < len(data)
    assert np.array_equal(eighth(fewer), eighth(data))


def scans(data: bytes) -> list[tuple[bytes, int, int]]:
    """Channels, first coefficient and the bits that were sent before, of each scan."""
    found = []
    for start in re.finditer(b"\xff\xda", data):
        count = data[start.end() + 2]
        at = start.end() + 3 + 2 * count
        found.append((data[start.end() + 3 : at : 2], data[at], data[at + 2] >> 4))
    return found


def test_only_brightness_loses_scans_and_not_its_first_look() -> None:
    data = progressive(draw_lesion(6, 320, 240))
    assert len(scans(data)) == 10  # as libjpeg's `jpeg_simple_progression` has it
    fine = {(b"\x01", 6, 0), (b"\x01", 1, 2), (b"\x01", 1, 1)}
    assert fine < set(scans(data))
    assert scans(for_an_eighth(data)) == [each for each in scans(data) if each not in fine]


def test_grey_too() -> None:
    data = progressive(draw_lesion(1, 320, 240)[:, :, 0])
    fewer = for_an_eighth(data)
    assert len(fewer) < len(data)
    assert np.array_equal(eighth(fewer), eighth(data))


def test_a_baseline_file_is_left_as_it_is() -> None:
    buffer = BytesIO()
    Image.fromarray(draw_lesion(2, 320, 240)).save(buffer, "JPEG")
    assert for_an_eighth(buffer.getvalue()) == buffer.getvalue()


@pytest.mark.parametrize("sampling", [0x12, 0x21, 0x22])
def test_channels_that_are_sampled_more_finely_than_the_first_are_left_as_they_are(
    sampling: int,
) -> None:
    data = bytearray(progressive(draw_lesion(3, 320, 240), subsampling=0))
    frame = data.index(b"\xff\xc2")
    data[frame + 4 + 6 + 4] = sampling  # of the second component
    assert for_an_eighth(bytes(data)) == bytes(data)


@given(st.binary(max_size=200), st.integers(0, 4000), st.integers(0, 4000))
def test_no_bytes_are_too_odd(noise: bytes, start: int, end: int) -> None:
    data = progressive(draw_lesion(4, 128, 128))
    for_an_eighth(data[:start] + noise + data[end:])
    for_an_eighth(b"\xff\xd8" + noise)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_file_that_is_cut_short_is_still_found_out(share: float) -> None:
    data = progressive(draw_lesion(5, 640, 480))
    with pytest.raises(CorruptImageError):
        decode(data[: int(share * len(data))], 48, 64)


def marker(code: int, payload: bytes, data: bytes = b"") -> bytes:
    return bytes([0xFF, code]) + (len(payload) + 2).to_bytes(2, "big") + payload + data


def frame(code: int) -> bytes:
    return marker(code, bytes([8, 0, 16, 0, 16, 3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0]))


def scan(*channels: int) -> bytes:
    chosen = b"".join(bytes([channel, 0]) for channel in channels)
    return marker(0xDA, bytes([len(channels)]) + chosen + bytes([0, 63, 0]), b"pixels\xff\x00")


def test_a_scan_of_every_channel_is_all_of_a_baseline_jpeg() -> None:
    thumbnail = marker(0xE1, b"Exif" + frame(0xC2) + scan(1))
    tables = marker(0xDB, bytes(65)) + marker(0xC4, bytes(19)) + marker(0xFE, b"a comment")
    assert not has_several_scans(b"\xff\xd8" + thumbnail + tables + frame(0xC0) + scan(1, 2, 3))
    assert not has_several_scans(encode(draw_lesion(0)))


@pytest.mark.parametrize(
    "before",
    [
        frame(0xC2) + scan(1, 2, 3),
        frame(0xC0) + scan(1) + scan(2) + scan(3),
        b"garbage" + frame(0xC0) + scan(1, 2, 3),
        b"\xff\x01" + frame(0xC0) + scan(1, 2, 3),
        frame(0xC0) + frame(0xC0) + scan(1, 2, 3),
        scan(1, 2, 3),
        b"",
    ],
    ids=["progressive", "one-each", "garbage", "no-length", "two-frames", "no-frame", "nothing"],
)
def test_a_jpeg_is_held_whole_where_a_decoder_might_find_several_scans(before: bytes) -> None:
    assert has_several_scans(b"\xff\xd8" + before)


def test_tables_and_segments_of_applications_may_stand_before_a_scan_and_nothing_else() -> None:
    known = {
        code
        for code in range(1, 255)
        if not has_several_scans(
            b"\xff\xd8" + marker(code, bytes(20)) + frame(0xC0) + scan(1, 2, 3)
        )
    }
    assert known == {0xC4, 0xCC, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}


def test_of_all_frames_two_are_read_row_by_row() -> None:
    known = {
        code
        for code in range(1, 255)
        if not has_several_scans(b"\xff\xd8" + frame(code) + scan(1, 2, 3))
    }
    assert known == {0xC0, 0xC1}


@pytest.mark.parametrize("length", range(2, 8))
def test_a_frame_that_ends_before_it_says_how_many_channels_it_has(length: int) -> None:
    short = b"\xff\xc0" + length.to_bytes(2, "big") + bytes([8, 0, 16, 0, 16])[: length - 2]
    assert has_several_scans(b"\xff\xd8" + short + scan(1, 2, 3))
    assert has_several_scans(b"\xff\xd8" + short)


@given(st.binary(max_size=200))
def test_any_bytes_can_be_asked(data: bytes) -> None:
    assert has_several_scans(b"\xff\xd8" + data) in (True, False)


@pytest.mark.parametrize("between", [b"", b"garbage", b"\xff\x01"])
@pytest.mark.parametrize("before", [b"", b"\xff\xd8\xff\xd9"], ids=["", "nothing before it"])
def test_a_jpeg_of_endless_scans_is_refused(between: bytes, before: bytes) -> None:
    data = progressive(draw_lesion(0))
    last = data.rindex(b"\xff\xda")
    again = before + data[:-2] + (between + data[last:-2]) * 100 + data[-2:]
    assert most_scans(again) == most_scans(data) + 100
    with pytest.raises(ImageTooLargeError, match="more than 100 scans"):
        decode(again, 32, 32)


def test_what_follows_the_picture_is_no_scan() -> None:
    data = progressive(draw_lesion(0))
    thumbnail = b"\xff\xe1" + (len(data) + 2).to_bytes(2, "big") + data
    assert most_scans(data[:2] + thumbnail + data[2:]) == most_scans(data) > 2
    behind = data + bytes([0xFF, 0xDA]) * 200  # as a motion photo's video has by chance
    assert most_scans(behind) == most_scans(data)
    assert decode(behind, 32, 32).format == "JPEG"


def test_scans_behind_what_is_not_understood_count() -> None:
    data = progressive(draw_lesion(0))
    filled = data[:2] + b"\xff" + data[2:]  # a marker may begin with any number of these
    assert most_scans(filled + bytes([0xFF, 0xDA]) * 200) >= most_scans(data) + 200


def lossless(pixels: np.ndarray) -> bytes:
    """Grey, each pixel less the one before it, its length in four bits (ITU-T T.81, annex H)."""
    height, width = pixels.shape
    before = np.full_like(pixels, 128, dtype=int)
    before[:, 1:], before[1:, 0] = pixels[:, :-1], pixels[:-1, 0]
    bits = ""
    for value in (pixels.astype(int) - before).ravel().tolist():
        length = abs(value).bit_length()
        bits += f"{length:04b}"
        if length:
            bits += f"{value if value > 0 else value + (1 << length) - 1:0{length}b}"
    bits += "1" * (-len(bits) % 8)
    coded = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body

    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return b"".join(
        [
            b"\xff\xd8",
            segment(0xC3, b"\x08" + size + bytes([1, 1, 0x11, 0])),
            segment(0xC4, bytes([0, 0, 0, 0, 10, *[0] * 12, *range(10)])),
            segment(0xDA, bytes([1, 1, 0, 1, 0, 0])),
            coded,
            b"\xff\xd9",
        ]
    )


@pytest.mark.skipif(
    not features.check("libjpeg_turbo")
    or tuple(map(int, (features.version("libjpeg_turbo") or "0").split("."))) < (3,),
    reason="libjpeg-turbo decodes lossless JPEG from version 3 on",
)
@pytest.mark.parametrize("size", [16, 200])
@pytest.mark.parametrize(
    "within", [b"", b"\xff\xd9\xff\xd8", b"\xff", b"\xff\xd0"], ids=["", "end", "fill", "restart"]
)
def test_a_lossless_jpeg_is_decoded_at_any_size(size: int, within: bytes) -> None:
    """Drafted, its rows would be written beyond the room that Pillow makes for them."""
    pixels = np.asarray(Image.fromarray(draw_lesion(0)).convert("L").resize((160, 120)))
    whole = lossless(pixels)
    data = whole[:2] + within + whole[2:]
    assert may_be_lossless(data)
    assert not may_be_lossless(progressive(draw_lesion(0)))
    assert not may_be_lossless(encode(draw_lesion(0)))
    shown = Image.fromarray(pixels).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode(data, size, size).pixels, np.asarray(shown))
