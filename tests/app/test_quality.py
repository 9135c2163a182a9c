import numpy as np
import pytest
from PIL import Image, ImageFilter

from app import quality
from app.quality import find_warnings, measure
from app.schemas import QualityWarning
from tests.conftest import ROOT
from tests.lesions import draw_lesion


def found(pixels: np.ndarray, width: int = 640, height: int = 480) -> list[QualityWarning]:
    measures = {name: values[0] for name, values in measure(pixels[None]).items()}
    return find_warnings(measures, width, height, 160)


@pytest.fixture
def good() -> np.ndarray:
    return draw_lesion(0, 160, 160)


def test_the_documented_thresholds_are_those_of_the_rules() -> None:
    page = (ROOT / "docs" / "quality.md").read_text()
    for words in (
        f"Laplacian over the inner half of the picture below {quality.SHARPNESS:g}",
        f"mean luma below {quality.DARK:g}",
        f"mean luma of the inner half above {quality.BRIGHT:g}",
        f"more than {100 * quality.BORDER_SHARE:g} % of the outermost twentieth",
        f"darker than {quality.BORDER_DARK:g}",
    ):
        assert words in page


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


def test_pictures_are_measured_together_as_alone(good: np.ndarray) -> None:
    pictures = np.stack([good, good[::-1] // 2, np.full_like(good, 255)])
    together = measure(pictures)
    for row, picture in enumerate(pictures):
        for name, values in measure(picture[None]).items():
            assert together[name].shape == (3,)
            np.testing.assert_allclose(together[name][row], values[0], rtol=1e-5, atol=1e-4)
