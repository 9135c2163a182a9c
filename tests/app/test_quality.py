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


def test_what_is_at_a_threshold_has_no_warning() -> None:
    def at(step: float) -> list[QualityWarning]:
        """Beyond every threshold by a step, or short of it."""
        measures = {
            "sharpness": quality.SHARPNESS - step,
            "luma": quality.DARK - step,
            "luma_centre": quality.BRIGHT + step,
            "dark_border": quality.BORDER_SHARE + step,
        }
        shorter = 160 - (step > 0)
        values = {name: np.float32(value) for name, value in measures.items()}
        assert find_warnings(values, shorter, 480, 160) == find_warnings(values, 480, shorter, 160)
        return find_warnings(values, shorter, 480, 160)

    assert at(0) == at(-0.01) == []
    assert set(at(0.01)) == {*QualityWarning} - {QualityWarning.OUT_OF_DISTRIBUTION}


def test_the_centre_is_the_inner_half() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    centred = np.zeros((40, 60, 3), np.uint8)
    centred[10:30, 15:45] = 200
    beside = noise.copy()
    beside[10:30, 15:45] = 200
    for pixels in (centred, beside):
        measures = measure(pixels[None])
        assert measures["luma_centre"][0] == pytest.approx(200)
        assert measures["sharpness"][0] == pytest.approx(0, abs=1e-3)
    assert measure(centred[None])["luma"][0] == pytest.approx(50)
    for edge in ((10, 20), (29, 20), (20, 15), (20, 44)):
        spotted = centred.copy()
        spotted[edge] = 0
        assert measure(spotted[None])["luma_centre"][0] < 199.9
        assert measure(spotted[None])["sharpness"][0] > 1


@pytest.mark.parametrize(
    ("height", "width", "margin"), [(40, 60, 2), (60, 40, 2), (59, 59, 2), (10, 30, 1)]
)
def test_the_border_is_the_outermost_twentieth(height: int, width: int, margin: int) -> None:
    for black in (0, 1, 2, 3):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[black : height - black, black : width - black] = 200
        edge, dark = (
            height * width - (height - 2 * side) * (width - 2 * side)
            for side in (margin, min(black, margin))
        )
        assert measure(pixels[None])["dark_border"][0] == pytest.approx(dark / edge)


def test_pictures_are_measured_together_as_alone(good: np.ndarray) -> None:
    pictures = np.stack([good, good[::-1] // 2, np.full_like(good, 255)])
    together = measure(pictures)
    for row, picture in enumerate(pictures):
        for name, values in measure(picture[None]).items():
            assert together[name].shape == (3,)
            np.testing.assert_allclose(together[name][row], values[0], rtol=1e-5, atol=1e-4)
