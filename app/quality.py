"""Warnings about a picture itself: a closed vocabulary, one rule each (docs/quality.md)."""

from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from app.schemas import QualityWarning

# Thresholds on luma (0 to 255) at the network's input size; docs/quality.md says how many images of
# each dataset they flag.
DARK = 60.0
BRIGHT = 235.0
SHARPNESS = 2.0
BORDER_DARK = 40.0
BORDER_SHARE = 0.35
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def measure(pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """What the rules need to know of each picture.

    Of a batch at once: numpy lets the interpreter go for each step, and to get it back, on cores
    that are all busy, can take longer than the step.

    Args:
        pixels: uint8 [N, height, width, 3], RGB, at the network's input size.

    Returns:
        float32 [N] each. `luma` and `luma_centre`: means, the second over the inner half, where the
        lesion is. `sharpness`: standard deviation of the Laplacian there. `dark_border`: share of
        the outermost twentieth, all round, that is nearly black (a dermatoscope's rim).
    """
    _, height, width, _ = pixels.shape
    luma = pixels.astype(np.float32) @ _LUMA
    inner = luma[:, height // 4 : -(height // 4), width // 4 : -(width // 4)]
    laplacian = (
        inner[:, :-2, 1:-1] + inner[:, 2:, 1:-1] + inner[:, 1:-1, :-2] + inner[:, 1:-1, 2:]
    ) - 4 * inner[:, 1:-1, 1:-1]
    border = luma.reshape(len(luma), -1).take(_border(height, width), 1)
    return {
        "luma": luma.mean((1, 2)),
        "luma_centre": inner.mean((1, 2)),
        "sharpness": laplacian.std((1, 2)),
        "dark_border": (border < BORDER_DARK).mean(1, np.float32),
    }


@cache
def _border(height: int, width: int) -> NDArray[np.intp]:
    """Where the outermost twentieth is, in pixels counted line by line."""
    margin = max(min(height, width) // 20, 1)
    border = np.ones((height, width), bool)
    border[margin:-margin, margin:-margin] = False
    return np.flatnonzero(border)


def find_warnings(
    measures: Mapping[str, NDArray[np.float32]], width: int, height: int, smallest: int
) -> list[QualityWarning]:
    """The warnings that hold, except `out_of_distribution`, which the network gives.

    Args:
        measures: Of one picture, a scalar each: a row of what `measure` returns.
        width: Of the original, in pixels.
        height: Likewise.
        smallest: Side of the network's input that an original's shorter side should have.
    """
    rules = {
        QualityWarning.BLURRED: measures["sharpness"] < SHARPNESS,
        QualityWarning.TOO_DARK: measures["luma"] < DARK,
        QualityWarning.TOO_BRIGHT: measures["luma_centre"] > BRIGHT,
        QualityWarning.LOW_RESOLUTION: min(width, height) < smallest,
        QualityWarning.DARK_BORDER: measures["dark_border"] > BORDER_SHARE,
    }
    return [warning for warning, holds in rules.items() if holds]
