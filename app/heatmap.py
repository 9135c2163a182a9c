"""The heat map of an answer, drawn over the picture."""

import base64
import zlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.images import (
    DEFAULT_LIMITS,
    DecodedImage,
    ImageTooLargeError,
    Limits,
    centred_box,
    decode,
)

LONG_SIDE = 512
# Contribution to the logit, per place, at which a colour is full. It is fixed, so that two pictures
# of one lesion can be compared, and a picture without any evidence stays pale.
FULL_AT = 6.0
MOST_OPAQUE = 0.6
_RAISES, _LOWERS = np.array([214, 39, 40], np.float32), np.array([31, 119, 180], np.float32)


def draw_overlay(
    data: bytes,
    image: DecodedImage,
    contributions: NDArray[np.float32],
    limits: Limits = DEFAULT_LIMITS,
) -> str:
    """Draw what raised (red) and lowered (blue) the melanoma logit over what the network saw.

    Args:
        data: The encoded image, already decoded once without error.
        image: That decoding.
        contributions: `melanoma_map`, float32 [h, w].
        limits: That the image was decoded under.

    Returns:
        A PNG of at most `LONG_SIDE` pixels a side, in base64.

    Raises:
        models.images.ImageError: Parts of it are damaged that the smaller decoding left out.
        models.turns.NotItsTurn: It is large, and others have all turns.
    """
    left, top, right, bottom = centred_box((image.width, image.height))
    width, height = right - left, bottom - top
    scale = LONG_SIDE / max(width, height)
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    try:
        shown = decode(data, *size, limits, wait=False).pixels
    except ImageTooLargeError:  # so long and thin that a scale of this size holds too many pixels
        shown = np.asarray(
            Image.fromarray(image.pixels).resize(size[::-1], Image.Resampling.BILINEAR)
        )
    picture = shown.astype(np.float32)
    heat = Image.fromarray(contributions.astype(np.float32)).resize(
        size[::-1], Image.Resampling.BICUBIC
    )
    strength = np.asarray(heat)[:, :, None] / FULL_AT
    opacity = MOST_OPAQUE * np.minimum(np.abs(strength), 1)
    colour = np.where(strength > 0, _RAISES, _LOWERS)
    blended = np.clip(picture * (1 - opacity) + colour * opacity, 0, 255)
    buffer = BytesIO()
    # Of photographs, run lengths of filtered lines take a quarter of the time of zlib's default,
    # and no more bytes.
    Image.fromarray(blended.astype(np.uint8)).save(buffer, "PNG", compress_type=zlib.Z_RLE)
    return base64.b64encode(buffer.getvalue()).decode()
