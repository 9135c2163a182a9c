import base64
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from app.heatmap import draw_overlay
from models.images import decode
from tests.lesions import flat


def overlay(contributions: list[list[float]], width: int = 400, height: int = 300) -> np.ndarray:
    data = flat(100, width, height)
    picture = draw_overlay(data, decode(data, 32, 32), np.float32(contributions))
    return np.asarray(Image.open(BytesIO(base64.b64decode(picture)))).astype(int)


def test_what_raises_the_logit_is_red_and_what_lowers_it_blue() -> None:
    picture = overlay([[8, -8], [8, -8]])
    raised, lowered = picture[:, :150].mean((0, 1)), picture[:, -150:].mean((0, 1))
    assert picture.shape == (384, 512, 3)
    assert raised[0] > 140 > lowered[0]
    assert lowered[2] > 110 > raised[2]


@pytest.mark.parametrize(
    ("contribution", "share", "colour"),
    [
        (1.5, 0.15, (214, 39, 40)),
        (6, 0.6, (214, 39, 40)),
        (12, 0.6, (214, 39, 40)),
        (-3, 0.3, (31, 119, 180)),
        (-6, 0.6, (31, 119, 180)),
    ],
)
def test_the_colour_is_as_opaque_as_the_evidence_is_strong_up_to_six_tenths(
    contribution: float, share: float, colour: tuple[int, int, int]
) -> None:
    blended = (1 - share) * np.array((100, 100, 50)) + share * np.array(colour)
    assert np.abs(overlay([[contribution]]) - blended).max() <= 1.5


def test_without_evidence_the_picture_stays_as_it_is() -> None:
    assert np.abs(overlay([[0, 0], [0, 0]]) - (100, 100, 50)).max() <= 1


def test_the_overlay_has_the_shape_of_what_the_network_saw() -> None:
    assert overlay([[0]], 300, 400).shape == (512, 384, 3)
    assert overlay([[0]], 900, 100).shape == (384, 512, 3)
