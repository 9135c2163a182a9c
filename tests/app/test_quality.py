import numpy as np
import pytest
from PIL import Image, ImageFilter

from app.quality import find_warnings
from app.schemas import QualityWarning
from models.images import DecodedImage
from tests.lesions import draw_lesion


def found(pixels: np.ndarray, width: int = 640, height: int = 480) -> list[QualityWarning]:
    return find_warnings(DecodedImage(pixels, width, height, "JPEG"))


@pytest.fixture
def good() -> np.ndarray:
    return draw_lesion(0, 160, 160)


def test_a_good_picture_has_none(good: np.ndarray) -> None:
    assert found(good) == []


def test_each_rule_has_its_warning(good: np.ndarray) -> None:
    blurred = np.asarray(Image.fromarray(good).filter(ImageFilter.GaussianBlur(4)))
    assert found(blurred) == ["blurred"]
    assert "too_dark" in found((good * 0.2).astype(np.uint8))
    assert "too_bright" in found(np.clip(good.astype(int) + 150, 0, 255).astype(np.uint8))
    assert found(good, 200, 150) == ["low_resolution"]
    y, x = np.mgrid[-1:1:160j, -1:1:160j]
    rimmed = np.where((np.hypot(x, y) > 0.9)[:, :, None], 0, good).astype(np.uint8)
    assert found(rimmed) == ["dark_border"]
