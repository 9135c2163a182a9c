"""How a bundle answers for a picture at another size, and for pictures that show no lesion."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from models.bundle import Artifact, melanoma_probability
from models.images import ImageError, decode
from training.data.cache import Pixels
from training.data.manifest import DataError
from training.export import Runner

THUMBNAIL_WIDTH = 200

Floats = NDArray[np.floating]
Report = dict[str, Any]


def compare_sizes(
    runner: Runner, artifact: Artifact, folder: Path, shape: tuple[int, int]
) -> Report:
    """The melanoma probability of each original, and of its copy at 200 pixels' width.

    Raises:
        DataError: There is none, or one cannot be read.
    """
    pairs = []
    for path in sorted(folder.glob("*.jpg")):
        data = path.read_bytes()
        both = np.stack([read_pixels(path, version, shape) for version in (data, thumbnail(data))])
        logits = runner(both)["melanoma_logit"]
        pairs.append(melanoma_probability(logits, artifact.calibration))
    if not pairs:
        raise DataError(f"{folder} holds no .jpg files.")
    change = np.abs(np.diff(np.array(pairs), axis=1)).ravel()
    return {
        "images": len(change),
        "copy_width": THUMBNAIL_WIDTH,
        "median_change_of_probability": float(np.median(change)),
        "largest_change_of_probability": float(change.max()),
    }


def read_pixels(path: Path, data: bytes, shape: tuple[int, int]) -> Pixels:
    """Decode an image of the data folder.

    Raises:
        DataError: It cannot be.
    """
    try:
        return decode(data, *shape).pixels
    except ImageError as error:
        raise DataError(f"{path}: {error}") from None


def thumbnail(data: bytes) -> bytes:
    """A JPEG's copy at 200 pixels' width, as a viewer would save it."""
    with Image.open(BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        height = round(upright.height * THUMBNAIL_WIDTH / upright.width)
        small = upright.resize((THUMBNAIL_WIDTH, height), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def flagged_shares(
    runner: Runner,
    artifact: Artifact,
    folder: Path,
    shape: tuple[int, int],
    scores: dict[str, Floats],
) -> Report:
    """Share of images over the out-of-distribution threshold, by kind of image."""
    kinds: dict[str, list[float]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".jpg", ".png"):
            pixels = read_pixels(path, path.read_bytes(), shape)[None]
            kind = "other: " + path.name.split("_")[0]
            kinds.setdefault(kind, []).append(float(runner(pixels)["ood_score"][0]))
    measured = {**scores, **{kind: np.array(values) for kind, values in kinds.items()}}
    return {
        "threshold": artifact.ood_threshold,
        "flagged": {
            name: {
                "images": len(values),
                "share": float((values > artifact.ood_threshold).mean()),
            }
            for name, values in measured.items()
        },
    }
