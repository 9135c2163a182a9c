"""A small procedural lesion generator: no patient's picture is needed to test with."""

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def draw_lesion(
    seed: int, width: int = 200, height: int = 150, malignant: bool = False
) -> NDArray[np.uint8]:
    """A brown blot on skin; a malignant one is larger, ragged and of several colours."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    # Placed and stretched at random, so that no two pictures are near-duplicates.
    x, y = x - generator.uniform(-0.35, 0.35), y - generator.uniform(-0.35, 0.35)
    x = x * generator.uniform(0.7, 1.4)
    angle = np.arctan2(y, x)
    edge = 0.35 + 0.2 * malignant
    for waves in (2, 3, 5, 7):
        size = (0.12 if malignant else 0.02) * generator.random()
        edge = edge + size * np.sin(waves * angle + 6 * generator.random())
    inside = 1 / (1 + np.exp((np.hypot(x, y) - edge) * 25))
    skin = np.array([220, 180, 160]) + generator.normal(0, 6, 3)
    brown = np.array([110, 70, 50]) + generator.normal(0, 12, 3)
    lesion = np.broadcast_to(brown, (height, width, 3)).copy()
    if malignant:
        blotch = np.sin(6 * x + 9 * generator.random()) * np.sin(5 * y + 9 * generator.random())
        lesion += blotch[:, :, None] * np.array([60.0, 20.0, 70.0])
    picture = skin * (1 - inside[:, :, None]) + lesion * inside[:, :, None]
    picture += generator.normal(0, 5, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def encode(pixels: NDArray[np.uint8], image_format: str = "JPEG", **options: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def lesion(seed: int = 0, width: int = 200, height: int = 150, malignant: bool = False) -> bytes:
    """A lesion as a JPEG file."""
    return encode(draw_lesion(seed, width, height, malignant), quality=92)


def flat(red: int, width: int = 64, height: int = 64) -> bytes:
    """A PNG of one colour: its answer by the test bundle is known."""
    return encode(np.full((height, width, 3), (red, 100, 50), np.uint8), "PNG")


def huge_png() -> bytes:
    """A PNG whose header declares 30,000 x 30,000 pixels."""
    small = bytearray(flat(1))
    small[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    small[29:33] = zlib.crc32(bytes(small[12:29])).to_bytes(4, "big")
    return bytes(small)
