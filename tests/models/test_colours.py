import struct
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, TiffImagePlugin

from models.colours import MOST_PROFILE, in_srgb
from models.images import decode
from tests.lesions import lesion

# Of D50, as ICC.1 has them: columns of red, green and blue.
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def numbers(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(primaries: tuple[tuple[float, ...], ...], space: bytes = b"RGB ") -> bytes:
    """The least profile of three primaries, with a gamma of 2.2 (ICC.1:2022, section 8)."""
    white = (0.9642, 1.0, 0.8249)
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(2.2 * 256), 0)
    tags = [(b"wtpt", b"XYZ \0\0\0\0" + numbers(*white))]
    for name, primary in zip((b"r", b"g", b"b"), primaries, strict=True):
        tags += [(name + b"XYZ", b"XYZ \0\0\0\0" + numbers(*primary)), (name + b"TRC", curve)]
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags:
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I", start + len(body)) + b"test\2\x40\0\0mntr" + space + b"XYZ "
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp"
    return head.ljust(68, b"\0") + numbers(*white).ljust(60, b"\0") + table + body


def picture() -> Image.Image:
    with Image.open(BytesIO(lesion(1, 160, 160))) as image:
        return image.convert("RGB")


def written(image: Image.Image, form: str, icc: bytes | None) -> bytes:
    file = BytesIO()
    image.save(file, form, icc_profile=icc, quality=95, subsampling=0, lossless=True)
    return file.getvalue()


def in_p3(image: Image.Image) -> Image.Image:
    to = ImageCms.ImageCmsProfile(BytesIO(profile(P3)))
    return ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), to)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_a_picture_in_other_colours_is_that_in_srgb(form: str) -> None:
    image = picture()
    plain = decode(written(image, form, None), 160, 160).pixels.astype(int)
    wide = decode(written(in_p3(image), form, profile(P3)), 160, 160).pixels
    unsaid = decode(written(in_p3(image), form, None), 160, 160).pixels
    assert np.abs(wide - plain).mean() < 1.5
    assert np.abs(unsaid - plain).mean() > 3


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_picture_that_says_that_it_is_in_srgb_is_as_one_that_says_nothing(form: str) -> None:
    image = picture()
    said = decode(written(image, form, SRGB), 160, 160).pixels
    assert (said == decode(written(image, form, None), 160, 160).pixels).all()


def test_a_progressive_jpeg_keeps_its_profile_though_it_is_decoded_small() -> None:
    image = in_p3(picture()).resize((2000, 2000))
    files = []
    for progressive in (False, True):
        file = BytesIO()
        image.save(file, "JPEG", progressive=progressive, icc_profile=profile(P3), quality=95)
        files.append(decode(file.getvalue(), 160, 160).pixels.astype(int))
    assert np.abs(files[0] - files[1]).max() <= 2


@pytest.mark.parametrize(
    "icc",
    [
        b"",
        b"no profile",
        profile(P3)[:200],
        profile(P3, b"GRAY"),
        profile(P3, b"CMYK"),
        profile(P3).ljust(MOST_PROFILE + 1, b"\0"),
        profile(P3) + b"mpet",  # of which LittleCMS makes gigabytes
        None,
        3,
        0.5,
    ],
)
def test_a_profile_of_no_use_says_nothing(icc: object) -> None:
    image = picture()
    assert in_srgb(image, icc) is image


@pytest.mark.parametrize(("kind", "value"), [(3, 7), (4, 7), (12, 0.5)])
def test_a_tiff_may_have_anything_for_a_profile(kind: int, value: float) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[34675] = kind
    tags[34675] = value
    file = BytesIO()
    picture().save(file, "TIFF", tiffinfo=tags)
    assert (decode(file.getvalue(), 160, 160).pixels == np.asarray(picture())).all()


def test_a_grey_picture_stays_grey() -> None:
    grey = picture().convert("L")
    pixels = decode(written(grey, "PNG", profile(P3)), 160, 160).pixels.astype(int)
    assert np.ptp(pixels, axis=2).max() <= 2


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=8))
def test_whatever_a_profile_says_there_is_a_picture(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(profile(P3))
    for at, value in changes:
        damaged[at % len(damaged)] = value
    found = in_srgb(picture(), bytes(damaged))
    assert (found.mode, found.size) == ("RGB", (160, 160))
