"""The whole evaluation of a model: held-out sets, the paper's table, sizes, strange pictures."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from models.bundle import Bundle, Metric
from training import paper
from training.data.components import shared
from training.data.layouts import Dataset, balanced, ham10000, image_files, read_datasets
from training.data.manifest import DataError, Record, fingerprint, usable
from training.data.vocabulary import LEARNED, Split
from training.evaluate import Report, evaluate
from training.predictions import Predictions
from training.robustness import compare_sizes, flagged_shares
from training.tasks import untaught


def held_out(records: Sequence[Record], split: Split, images: bool = True) -> list[Record]:
    """The records of a split that can be evaluated.

    Args:
        records: The manifest.
        split: Of it.
        images: Those with image files alone, which can be predicted.

    Raises:
        DataError: There is none.
    """
    asked = [record for record in records if record.split is split]
    if not asked:
        raise DataError(f"The manifest has no images of the split {split}: choose another --split.")
    found = [record for record in asked if record.path] if images else asked
    if not found:
        raise DataError(f"None of the manifest's {len(asked):,} images of {split} has a file here.")
    return found


def evaluate_model(
    predictions: Predictions,
    records: Sequence[Record],
    split: Split,
    data: Path | None = None,
    bundle: Bundle | None = None,
    against: Predictions | None = None,
) -> Report:
    """Every figure of a model.

    Args:
        predictions: Of the split's images.
        records: The manifest, whose training rows the baselines learn from.
        split: What of it was predicted.
        data: A folder with whatever datasets there are: the balanced set for the paper's table,
            others for the share that is flagged as out of distribution, `originals/` and `other/`.
        bundle: That made the predictions; None where they are a table.
        against: Another model's predictions of the same images.

    Raises:
        DataError: The split is too small to be judged, or an image cannot be read.
    """
    datasets = read_datasets([data]) if data else []
    published = next((d for d in datasets if paper.is_complete(d)), None)
    tested = predictions.records
    rows = [i for i, r in enumerate(tested) if balanced.is_part(r)]
    # A bundle's run keeps what is usable of a manifest; a table of predictions needs no files.
    data_fingerprint = fingerprint(records if bundle is None else usable(records))
    own = bundle is not None and bundle.manifest.training_data.fingerprint == data_fingerprint
    subsets, clean, known = {}, set[str](), None
    if published is not None and rows:
        clean = paper.find_clean(published, [d for d in datasets if d is not published])
        if own:
            known = paper.find_known(records)
        fair = clean - (known or set())
        subsets[paper.CLEAN] = [row for row in rows if tested[row].image in fair]
    report = evaluate(predictions, records, against, subsets, own)
    report["split"] = str(split)
    report["data_fingerprint"] = data_fingerprint
    report["cautions"] = _cautions(predictions, records, split, bundle, own)
    if against is not None and against.data_fingerprint != fingerprint(usable(records)):
        report["cautions"].append(
            f"Whether {against.model} has learned from these images, or from the same lesions, is "
            "not known. Where it has, differences are worse than they would be on others."
        )
    if against is not None and against.fitted_to_outcomes:
        report["cautions"].append(_fitted(f"{against.model}'s"))
    if published is not None and rows:
        evaluated = [tested[row] for row in rows]
        report["paper"] = paper.describe(published, clean, evaluated, predictions, known)
    if bundle is not None:
        report |= _robustness(bundle, predictions, records, split, own, datasets, data)
    return report


def headline_set(report: Report) -> str:
    """The set that a bundle's manifest and card speak of first."""
    return ham10000.TITLE if ham10000.TITLE in report["sets"] else str(next(iter(report["sets"])))


def headline(report: Report) -> tuple[Metric, ...]:
    """The figures that a bundle's manifest repeats."""
    name = headline_set(report)
    found = report["sets"][name]
    figures = [
        (f"melanoma {figure}", found["melanoma"][figure], images)
        for figure, images in (
            ("AUROC", found["images"]),
            ("sensitivity", found["melanomas"]),
            ("specificity", found["images"] - found["melanomas"]),
        )
    ]
    figures += [
        (f"{task} accuracy", values["accuracy"], values["images"])
        for task, values in found["tasks"].items()
    ]
    return tuple(
        Metric(name=figure, dataset=f"{name} {report['split']} split", images=images, **estimate)
        for figure, estimate, images in figures
        if all(map(isfinite, estimate.values()))  # else too few lesions tell how sure it is
    )


def _robustness(
    bundle: Bundle,
    predictions: Predictions,
    records: Sequence[Record],
    split: Split,
    own: bool,
    datasets: Sequence[Dataset],
    data: Path | None,
) -> Report:
    report: Report = {}
    originals, other = (
        folder if data and (folder := data / name).is_dir() and any(image_files(folder)) else None
        for name in ("originals", "other")
    )
    if originals is not None:
        report["originals"] = compare_sizes(bundle, originals)
    learned = [record for record in records if record.split in LEARNED]
    known = [record for dataset in datasets for record in dataset.records]
    report["out of distribution"] = flagged_shares(
        bundle, predictions, split, own, learned, known, other
    )
    return report


def _fitted(whose: str) -> str:
    return (
        f"{whose} calibration and threshold were fitted to outcomes: whether these images are "
        "among them is not known, and where they are, what follows from the threshold and the "
        "calibration is better than it would be on others."
    )


def _cautions(
    predictions: Predictions,
    records: Sequence[Record],
    split: Split,
    bundle: Bundle | None,
    own: bool,
) -> list[str]:
    """What a reader must know of every figure; the bundle was fitted to these records, if `own`."""
    cautions = []
    asked = len(held_out(records, split, images=False))
    if len(predictions.records) < asked:
        cautions.append(
            f"Only {len(predictions.records):,} of the {asked:,} images of this split have a "
            "prediction, or a file to predict."
        )
    if bundle is None:
        cautions.append(
            f"The threshold {predictions.threshold:g} is the one that was given: whether it was "
            "frozen before these images were seen is not known, nor what the model learned from."
        )
    elif not own:
        cautions.append(
            "This manifest is not the one that the bundle was fitted with: whether the bundle has "
            "learned from these images, or from the same lesions, is not known; "
            "mmtl-train data audit can tell."
        )
    elif split is Split.TEST:
        if known := shared(records, split, LEARNED):
            cautions.append(
                f"Of the {asked:,} images of this split, {known:,} are of a lesion, a patient or "
                "a picture that the network has learned from, or that stopped and calibrated it: "
                "the figures are better than they would be on others."
            )
    elif split is Split.EXCLUDED:
        cautions.append(
            "These are images that were left out, most for what they share with those that the "
            "network was judged on, or has learned from: figures may be better than on others."
        )
    else:
        cautions.append(
            f"These are images of the {split} split, which the network, its calibration or its "
            "threshold were fitted to: the figures are better than they would be on others."
        )
    if own and (tasks := untaught([r for r in records if r.split is Split.TRAIN])):
        cautions.append(
            "The images that it was trained on say nothing, or the same of all, of: "
            f"{', '.join(tasks)}. What the bundle answers of that means nothing, unless teachers "
            "knew, or a network before it did, what has been learned since then aside."
        )
    if predictions.fitted_to_outcomes:
        cautions.append(_fitted("Its"))
    if bundle is not None:
        cautions.append(
            "The melanoma probability is calibrated to a share of "
            f"{bundle.manifest.prevalence:.1%} melanoma; where the share differs, probabilities "
            "and predictive values do not hold until the bundle is recalibrated "
            "(mmtl bundle recalibrate)."
        )
    cautions.append(
        "Skin type is not recorded, so nothing can be said about how errors differ by it; the "
        "collections of ISIC are mostly of light skin."
    )
    return cautions
