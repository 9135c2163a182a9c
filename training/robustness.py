"""How a bundle answers for a picture at another size, and for pictures unlike what it learned."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from models.bundle import Bundle, melanoma_probability
from models.images import ImageError, decode
from training.data.components import key_of, with_components
from training.data.layouts import image_files
from training.data.manifest import DataError, Record
from training.data.vocabulary import Split
from training.predictions import Predictions, predict
from training.runners import onnx_runner
from training.statistics import Clusters, Estimate, bounded

THUMBNAIL_WIDTH = 200
# Images of each dataset that was not learned from, so that large ones do not take all the time.
MOST_IMAGES = 2000

Report = dict[str, Any]


def compare_sizes(bundle: Bundle, folder: Path) -> Report:
    """The melanoma probability of each original, and of its copy at 200 pixels' width.

    Raises:
        DataError: There is none, or one cannot be read.
    """
    artifact = bundle.artifact_for_cpu()
    run = onnx_runner(bundle.path(artifact))
    size = bundle.manifest.input.height, bundle.manifest.input.width
    pairs = []
    for path in sorted(image_files(folder)):
        data = path.read_bytes()
        try:
            decode(data, *size)  # what is no image is told as such
            both = np.stack([decode(version, *size).pixels for version in (data, thumbnail(data))])
        except ImageError as error:
            raise DataError(f"{path}: {error}") from None
        pairs.append(melanoma_probability(run(both)["melanoma_logit"], artifact.calibration))
    if not pairs:
        raise DataError(f"{folder} holds no image files.")
    change = np.abs(np.diff(np.array(pairs), axis=1)).ravel()
    return {
        "images": len(change),
        "copy_width": THUMBNAIL_WIDTH,
        "median_change_of_probability": float(np.median(change)),
        "largest_change_of_probability": float(change.max()),
    }


def thumbnail(data: bytes) -> bytes:
    """A JPEG's copy at 200 pixels' width, as a viewer would save it."""
    with Image.open(BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        height = max(round(upright.height * THUMBNAIL_WIDTH / upright.width), 1)
        small = upright.resize((THUMBNAIL_WIDTH, height), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def flagged_shares(
    bundle: Bundle,
    predictions: Predictions,
    split: Split,
    own: bool,
    learned: Sequence[Record],
    known: Sequence[Record],
    other: Path | None,
) -> Report:
    """Share of images over the shipped out-of-distribution threshold, by kind of image.

    Args:
        bundle: With its threshold.
        predictions: Its predictions.
        split: Of whose images.
        own: Whether the bundle was fitted to `learned`; else it is not known what it never saw.
        learned: What it was fitted to and tuned on, or would have been.
        known: Images of any dataset; of those whose dataset was not learned from, the ones that no
            learned or held-out dataset holds as well are looked at.
        other: A folder of what is not dermoscopic; the first word of a file's name is its kind.

    Raises:
        DataError: An image cannot be read.
    """
    artifact = bundle.artifact_for_cpu()
    flags: dict[str, tuple[list[bool], list[str]]] = {}

    def note(found: Predictions, kinds: Sequence[str]) -> None:
        assert found.ood_score is not None
        flagged = (found.ood_score > artifact.ood_threshold).tolist()
        linked = with_components(found.records)
        for kind, record, flag in zip(kinds, linked, flagged, strict=True):
            values, names = flags.setdefault(kind, ([], []))
            values.append(flag)
            names.append(record.component)

    kind = "held out" if own and split is Split.TEST else split
    strange = "dermoscopy not learned from" if own else "dermoscopy of another dataset"
    note(predictions, [f"{kind}: {record.dataset}" for record in predictions.records])
    datasets = {source.name for source in bundle.manifest.training_data.sources}
    datasets |= {record.dataset for record in predictions.records}
    seen = {key_of(record, "image") for record in (*learned, *predictions.records)}
    foreign: dict[str, list[Record]] = {}
    for record in known:
        new = record.dataset not in datasets and key_of(record, "image") not in seen
        if record.path and new:
            foreign.setdefault(record.dataset, []).append(record)
    for dataset, records in foreign.items():
        records.sort(key=_drawn_by)
        chosen = records[:MOST_IMAGES]
        note(predict(bundle, chosen), [f"{strange}: {dataset}"] * len(chosen))
    if other is not None:
        pictures = [Record(path.stem, str(path), "other") for path in sorted(image_files(other))]
        note(predict(bundle, pictures), [f"other: {r.image.split('_')[0]}" for r in pictures])
    return {
        "threshold": artifact.ood_threshold,
        "flagged": {
            kind: {"images": len(values), "share": asdict(_share(values, names))}
            for kind, (values, names) in flags.items()
        },
    }


def _drawn_by(record: Record) -> bytes:
    return hashlib.sha256(record.image.encode(errors="surrogateescape")).digest()


def _share(values: Sequence[bool], names: Sequence[str]) -> Estimate:
    flags, clusters = np.array(values, float), Clusters(names)
    found = clusters.bootstrap({"share": lambda chosen: float(flags[chosen].mean())})["share"]
    return bounded(found, len(clusters))
