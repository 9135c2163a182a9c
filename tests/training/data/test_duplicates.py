"""Near-duplicates are found whatever was done to the copy, and other lesions are not."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from tests.lesions import draw_lesion
from training.data.duplicates import find_duplicates, pair_up, thumbnail
from training.data.layouts import read_datasets
from training.data.manifest import Record


def lit(seed: int) -> NDArray[np.uint8]:
    """A lesion in uneven light, as every dermatoscope gives it."""
    y, x = np.mgrid[-1:1:150j, -1:1:200j]
    angle = np.random.default_rng(seed).uniform(0, 6)
    light = 0.85 + 0.15 * (np.cos(angle) * x + np.sin(angle) * y) - 0.1 * x * y
    return (draw_lesion(seed, 200, 150, seed % 3 == 0) * light[:, :, None]).astype(np.uint8)


ORIGINALS = [lit(seed) for seed in range(60)]


def jpeg(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=40)
    return np.asarray(Image.open(buffer))


def resized(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).resize((96, 96)))


def recoloured(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    faded = ImageEnhance.Color(Image.fromarray(pixels)).enhance(0.4)
    return np.asarray(ImageEnhance.Brightness(faded).enhance(1.1))


@pytest.mark.parametrize(
    "change",
    [
        jpeg,
        resized,
        recoloured,
        lambda pixels: np.rot90(pixels),
        lambda pixels: pixels[:, ::-1],
        lambda pixels: np.rot90(pixels, 2)[:, ::-1],
    ],
    ids=["recompressed", "resized", "recoloured", "turned", "mirrored", "upside down"],
)
def test_a_copy_is_found(change) -> None:
    images = [*ORIGINALS, change(ORIGINALS[7])]
    assert find_duplicates(np.stack([thumbnail(image) for image in images])) == [(7, 60)]


def test_other_lesions_and_blank_pictures_are_no_duplicates() -> None:
    blank = [np.full((50, 50, 3), shade, np.uint8) for shade in (0, 0, 255)]
    images = np.stack([thumbnail(image) for image in [*ORIGINALS, *blank]])
    assert find_duplicates(images) == []
    assert find_duplicates(images[:0]) == []


def test_positions_are_those_of_the_records(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        Image.fromarray(ORIGINALS[seed]).save(tmp_path / f"{name}.png")
    (tmp_path / "d.png").write_bytes(b"no image")
    records = [
        Record("a", str(tmp_path / "a.png"), "A"),
        Record("x", "", "A"),
        Record("b", str(tmp_path / "b.png"), "A"),
        Record("c", str(tmp_path / "c.png"), "A"),
        Record("d", str(tmp_path / "d.png"), "A"),
    ]
    assert pair_up(records) == [(0, 3)]


def test_every_real_copy_is_found(shared_data: Path) -> None:
    folder = shared_data / "balanced" / "train_balanced_224x224" / "val"
    copies = [record for d in read_datasets([folder]) for record in d.records]
    names = {record.image for record in copies}
    ham = [r for d in read_datasets([shared_data / "ham10000"]) for r in d.records]
    originals = [record for record in ham if record.image in names]
    pairs = {
        (originals[one].image, copies[other - len(originals)].image)
        for one, other in pair_up([*originals, *copies])
        if one < len(originals) <= other
    }
    same = {(record.image, record.image) for record in originals}
    assert len(same) > 300
    assert same <= pairs
