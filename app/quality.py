"""Warnings about a picture itself: a closed vocabulary, one rule each (docs/quality.md)."""

import numpy as np
from numpy.typing import NDArray

from app.schemas import QualityWarning
from models.images import DecodedImage

# Thresholds on luma (0 to 255) at the network's input size; docs/quality.md says how many images of
# each dataset they flag.
DARK = 60.0
BRIGHT = 235.0
SHARPNESS = 2.0
BORDER_DARK = 40.0
BORDER_SHARE = 0.35


def find_warnings(image: DecodedImage) -> list[QualityWarning]:
    """The warnings that hold, except `out_of_distribution`, which the network gives."""
    height, width, _ = image.pixels.shape
    luma = image.pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    centre = luma[height // 4 : -(height // 4), width // 4 : -(width // 4)]
    rules = {
        QualityWarning.BLURRED: sharpness(luma) < SHARPNESS,
        QualityWarning.TOO_DARK: float(luma.mean()) < DARK,
        QualityWarning.TOO_BRIGHT: float(centre.mean()) > BRIGHT,
        QualityWarning.LOW_RESOLUTION: min(image.width, image.height) < min(height, width),
        QualityWarning.DARK_BORDER: dark_border_share(luma) > BORDER_SHARE,
    }
    return [warning for warning, holds in rules.items() if holds]


def sharpness(luma: NDArray[np.float32]) -> float:
    """Standard deviation of the Laplacian over the inner half, where the lesion is."""
    height, width = luma.shape
    inner = luma[height // 4 : -(height // 4), width // 4 : -(width // 4)]
    laplacian = (
        inner[:-2, 1:-1] + inner[2:, 1:-1] + inner[1:-1, :-2] + inner[1:-1, 2:]
    ) - 4 * inner[1:-1, 1:-1]
    return float(laplacian.std())


def dark_border_share(luma: NDArray[np.float32]) -> float:
    """Share of the outermost twentieth, all round, that is nearly black (a dermatoscope's rim)."""
    margin = max(min(luma.shape) // 20, 1)
    border = np.ones(luma.shape, bool)
    border[margin:-margin, margin:-margin] = False
    return float((luma[border] < BORDER_DARK).mean())
