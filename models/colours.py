"""A picture's colours in sRGB, as the network has learned them, where its profile says otherwise.

Phones store colours of Display P3, some editors Adobe RGB: the same numbers mean other colours
there. The profile (ICC.1) stands in the picture's file, and is applied by LittleCMS.
"""

from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from PIL import ImageCms

# Bytes; those of RGB have less than four thousand, or some hundred thousand where they are tables.
MOST_PROFILE = 1_000_000
# Elements that a profile may name ever so often, which makes minutes and gigabytes of a small one:
# floating-point pipelines (ICC.1:2022, 10.16), which no camera or editor writes.
_PIPELINE = b"mpet"
# Levels by which a profile of sRGB itself may move colours, as it rounds its curves.
_SAME = 2
_STEPS = 9


def in_srgb(image: Image.Image, profile: object) -> Image.Image:
    """An RGB picture in sRGB's colours; as it is, where its profile is sRGB's or of no use.

    Args:
        image: RGB.
        profile: What its file says of its colours, whatever that is: a TIFF may have numbers there.
            One that is damaged, has more than `MOST_PROFILE` bytes or pipelines, or is not of RGB,
            says nothing, as in viewers.
    """
    if not isinstance(profile, bytes) or not 0 < len(profile) <= MOST_PROFILE:
        return image
    if _PIPELINE in profile:
        return image
    transform = _transform(profile)
    return image if transform is None else transform.apply(image)


# As many as cameras and editors at one service have.
@lru_cache(maxsize=8)
def _transform(profile: bytes) -> "ImageCms.ImageCmsTransform | None":
    from PIL import ImageCms  # takes as long as a picture, and few need it

    try:
        found = ImageCms.buildTransform(
            ImageCms.getOpenProfile(BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            "RGB",
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        levels = np.linspace(0, 255, _STEPS).astype(np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=3).reshape(1, -1, 3)
        moved = np.asarray(found.apply(Image.fromarray(colours)))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    same = np.abs(moved.astype(int) - colours).max() <= _SAME
    return None if same else found
