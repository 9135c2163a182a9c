"""What Xie & Zhang (ICCBDC 2024) report, and what may be said beside it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.baselines import MetadataModel, truth_of
from training.data.audit import audit
from training.data.components import with_components
from training.data.layouts import Dataset, balanced
from training.data.manifest import Record
from training.data.vocabulary import LEARNED, Split
from training.predictions import Predictions

TABLE_4 = {
    "class accuracy": 0.8625,
    "class F1": 0.6249,
    "age accuracy": 0.8253,
    "age F1": 0.6078,
}
IMAGES = 1962
BACKBONES = 86
# Accuracies of its table of backbones that were not trained.
BEST_BACKBONE = {"name": "RegNetX_16GF", "value": 0.5984}
WORST_BACKBONE = {"name": "MnasNet0_75", "value": 0.3558}
CLEAN = "balanced, clean"


def find_clean(dataset: Dataset, knowing: Sequence[Dataset]) -> set[str]:
    """Image ids of the balanced set's `val` that no id gives away in its `train`.

    Args:
        dataset: The balanced set, both tables.
        knowing: Other datasets, whose tables know more of the same images.
    """
    first, second = (_part(dataset, split) for split in (Split.TRAIN, Split.TEST))
    leaking = {leak.record.image for leak in audit([first], [second], knowing).leaks}
    return {record.image for record in second.records} - leaking


def find_known(records: Sequence[Record]) -> set[str]:
    """Image ids of the balanced set in a manifest that share a component with what it teaches.

    Args:
        records: The manifest, whose rows for training and validation a network has learned from or
            was chosen by.
    """
    linked = with_components(records)
    learned = {record.component for record in linked if record.split in LEARNED}
    return {r.image for r in linked if balanced.is_part(r) and r.component in learned}


def describe(
    dataset: Dataset,
    clean: set[str],
    evaluated: Sequence[Record],
    predictions: Predictions,
    known: set[str] | None = None,
) -> dict[str, Any]:
    """What must stand beside every figure on the balanced set, and what metadata alone reaches.

    Metadata need no pixels: learned from all rows of the paper's `train`, they are tested on all of
    its `val`, leaks and all, and on its clean part.

    Args:
        dataset: The balanced set, both tables.
        clean: See `find_clean`.
        evaluated: Its rows that the model was evaluated on.
        predictions: For the age bins.
        known: See `find_known`; None where it is not known what the model has learned from.
    """
    train, val = (_part(dataset, split).records for split in (Split.TRAIN, Split.TEST))
    cautions = []
    if len(evaluated) < IMAGES:
        melanomas = np.mean([bool(record.melanoma) for record in evaluated])
        absent = sorted({r.dataset for r in val} - {r.dataset for r in evaluated})
        cautions.append(
            f"Not the paper's test set: {len(evaluated):,} of its {IMAGES:,} images have pixels "
            f"here, {melanomas:.0%} of them melanoma instead of 50 %"
            + (f", and none of {', '.join(absent)}." if absent else ".")
        )
    seen = sum(record.image in (known or ()) for record in evaluated)
    if known is not None:
        cautions.append(
            f"{seen:,} of these images share a lesion, a patient or a picture with those that this "
            "network was fitted to or tuned on, or are among them: figures on the clean split "
            "leave them out."
            if seen
            else "These images, and every image of the same lesion, patient or picture, were left "
            "out of fitting, stopping and calibration here. Whether their labels chose its "
            "backbone, the bundle does not say."
        )
    ages = {name: labels for name, labels in predictions.labels.items() if name == "age"}
    model = MetadataModel(train, ages, predictions.age_edges)

    def metadata(rows: Sequence[Record]) -> dict[str, Any]:
        truth = np.array([int(bool(record.melanoma)) for record in rows])
        aged = [record for record in rows if record.age is not None]
        found = {"images": len(rows), "class": model.melanoma(rows, truth), "age": None}
        if ages:
            classes = truth_of("age", aged, ages["age"], predictions.age_edges)
            found["age"] = model.task("age", aged, classes)
        return found

    return {
        "table_4": TABLE_4,
        "cautions": [
            *cautions,
            f"The paper's own split leaks: {len(val) - len(clean):,} of its {len(val):,} test "
            "images are joined to its training images by lesion, patient or a listed duplicate. "
            f"The {len(clean):,} others are the clean split (by ids: pictures were not compared).",
            "The paper says neither which reading of F1 it reports nor what its age classes are: "
            "its age figures and these bins may not be one task.",
        ],
        "clean_images": len(clean),
        "metadata_only": {
            "trained on the paper's train, tested on all of its val": metadata(val),
            "tested on its clean part": metadata([r for r in val if r.image in clean]),
        },
    }


def _part(dataset: Dataset, split: Split) -> Dataset:
    records = [record for record in dataset.records if record.split is split]
    return Dataset(dataset.layout, dataset.place, records, dataset.faults, dataset.pairs)


def is_complete(dataset: Dataset) -> bool:
    """Whether it is the balanced set with the metadata of both parts, not just their folders."""
    named = {r.split for r in dataset.records if r.lesion is not None or r.patient is not None}
    return dataset.layout.TITLE == balanced.TITLE and {Split.TRAIN, Split.TEST} <= named
