"""A bundle's held-out figures, each with its interval and beside its baselines."""

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    roc_auc_score,
)
from tqdm import tqdm

from models.bundle import Artifact, Bundle, Metric, melanoma_probability
from models.files import write_atomically
from training.data.cache import Pixels
from training.data.manifest import DataError, Record, fingerprint
from training.data.vocabulary import Sex, Site, Split
from training.export import AGE_EDGES, Runner, onnx_runner, run_batches
from training.losses import MISSING, encode_targets
from training.robustness import compare_sizes, flagged_shares
from training.run import Run, rows
from training.statistics import LEAST_IMAGES, REPLICATES, Clusters

SEED = 0
BATCH_SIZE = 32
CALIBRATION_BINS = 15
PAPER = {
    "class_accuracy": 0.8625,
    "class_f1": 0.6249,
    "age_accuracy": 0.8253,
    "age_f1": 0.6078,
}
PAPER_IMAGES = 1962

Floats = NDArray[np.floating]
Classes = NDArray[np.int64]
Report = dict[str, Any]


def evaluate(bundle: Bundle, run: Run, data: Path) -> Report:
    """Every held-out figure of a bundle.

    Args:
        bundle: Its ONNX artifact is what is run.
        run: That the bundle was exported from; its training rows fit the baselines.
        data: The data folder, for `originals/` and `other/` where they are there.

    Returns:
        What `metrics.json` holds.

    Raises:
        DataError: The test split is too small to be judged, the bundle belongs to another run, or
            an image of `data` cannot be read.
    """
    artifact = bundle.artifact("onnx")
    records, pixels = run.load_data()
    if bundle.manifest.training_data.fingerprint != fingerprint(records):
        raise DataError(
            f"{bundle.folder} was fitted on other data than {run.folder} holds: its test images "
            "may be among them. Evaluate it with its own run."
        )
    runner = onnx_runner(bundle.path(artifact))
    predictions = Predictions(runner, artifact, records, pixels)
    tested = rows(records, Split.TEST, "HAM10000")
    if not predictions.can_be_judged(tested):
        raise DataError(
            f"{run.manifest}: the HAM10000 test split needs at least {LEAST_IMAGES} images with "
            "and without melanoma to be evaluated."
        )
    report: Report = {
        "bundle": {"name": bundle.manifest.name, "version": bundle.manifest.version},
        "artifact_sha256": artifact.sha256,
        "command": "mmtl-train evaluate",
        "seed": SEED,
        "replicates": REPLICATES,
        "interval": "95 %, percentile bootstrap over components (lesions)",
        "data_fingerprint": fingerprint(records),
        "images": {
            f"{dataset} {split}": images
            for (dataset, split), images in sorted(
                Counter((record.dataset, str(record.split)) for record in records).items()
            )
        },
        "HAM10000 test": predictions.report(tested),
    }
    balanced = rows(records, Split.TEST, "balanced")
    if balanced:
        groups = {"all": balanced}
        for row in balanced:
            groups.setdefault(records[row].dataset, []).append(row)
        report["balanced validation"] = {
            "caution": balanced_caution([records[row] for row in balanced]),
            "paper": PAPER,
            "groups": {
                name: predictions.table_4(members)
                for name, members in groups.items()
                if predictions.can_be_judged(members)
            },
            "not evaluated": [
                name for name, members in groups.items() if not predictions.can_be_judged(members)
            ],
        }
    shape = (pixels.shape[1], pixels.shape[2])
    if (data / "originals").is_dir():
        report["originals"] = compare_sizes(runner, artifact, data / "originals", shape)
    if (data / "other").is_dir():
        report["out of distribution"] = flagged_shares(
            runner, artifact, data / "other", shape, predictions.scores(records)
        )
    predictions.save(run.folder / "predictions.csv")
    return report


def balanced_caution(records: Sequence[Record]) -> str:
    """What must stand beside every figure on the balanced set."""
    melanomas = sum(bool(record.melanoma) for record in records)
    return (
        f"Not the paper's test set: {len(records):,} of its {PAPER_IMAGES:,} images have pixels "
        f"here, {melanomas / len(records):.0%} of them melanoma instead of 50 %, and none of those "
        "from ISIC 2020. They, and every image of the same lesion, were left out of training and "
        "tuning; the paper's own split shares lesions between training and test."
    )


def headline(report: Report) -> tuple[Metric, ...]:
    """The figures that the manifest repeats."""
    test = report["HAM10000 test"]
    rows_ = [
        ("melanoma AUROC", test["melanoma"]["auroc"], test["images"]),
        ("melanoma sensitivity", test["melanoma"]["sensitivity"], test["melanomas"]),
        (
            "melanoma specificity",
            test["melanoma"]["specificity"],
            test["images"] - test["melanomas"],
        ),
    ] + [
        (f"{task} accuracy", test[task]["accuracy"], test[task]["images"])
        for task in ("age", "site", "sex", "diagnosis")
    ]
    return tuple(
        Metric(name=name, dataset="HAM10000 test split", images=images, **estimate)
        for name, estimate, images in rows_
    )


class Predictions:
    """An artifact's outputs for every evaluated image of a manifest, beside what is known of it.

    Args:
        runner: The artifact.
        artifact: For its calibration and threshold.
        records: The manifest.
        pixels: Row for row with it.
    """

    def __init__(self, runner: Runner, artifact: Artifact, records: list[Record], pixels: Pixels):
        self.records = records
        self.threshold = artifact.melanoma_threshold
        self.positions = [
            row
            for row, record in enumerate(records)
            if record.split in (Split.TEST, Split.VALIDATION)
        ]
        progress = tqdm(self.positions, "predict", unit="image")
        parts = []
        for start in range(0, len(self.positions), BATCH_SIZE):
            batch = self.positions[start : start + BATCH_SIZE]
            parts.append(run_batches(runner, pixels, batch, BATCH_SIZE))
            progress.update(len(batch))
        progress.close()
        self.outputs = {
            name: _spread([part[name] for part in parts], self.positions, len(records))
            for name in parts[0]
        }
        self.probability = melanoma_probability(
            self.outputs["melanoma_logit"], artifact.calibration
        )
        self.targets = {
            task: values.numpy() for task, values in encode_targets(records).classes.items()
        }
        ages = np.array([np.nan if r.age is None else r.age for r in records])
        self.age_years = ages
        self.targets["age"] = np.where(
            np.isnan(ages), MISSING, np.searchsorted(AGE_EDGES, ages, side="right")
        )
        self.train = rows(records, Split.TRAIN)

    def report(self, positions: list[int]) -> Report:
        """All tasks on some images."""
        known = self._known("melanoma", positions)
        truth = self.targets["melanoma"][known] == 1
        clusters = self._clusters(known)
        probability = self.probability[known]
        measures: dict[str, Callable[[Classes, Floats], float]] = {
            "auroc": roc_auc_score,
            "average_precision": average_precision_score,
            "sensitivity": lambda y, p: (p[y == 1] >= self.threshold).mean(),
            "specificity": lambda y, p: (p[y == 0] < self.threshold).mean(),
            "brier": lambda y, p: ((p - y) ** 2).mean(),
            "calibration_in_the_large": lambda y, p: p.mean() - y.mean(),
        }
        melanoma: Report = {
            name: asdict(
                clusters.bootstrap(_of_both(measure, truth.astype(int), probability), SEED)
            )
            for name, measure in measures.items()
        }
        # Without an interval: resampling widens the gaps of the bins, so that a percentile interval
        # would lie above the figure itself.
        melanoma["expected_calibration_error"] = expected_calibration_error(
            truth.astype(int), probability
        )
        melanoma["prevalence"] = float(truth.mean())
        melanoma["brier_of_the_prevalence"] = float(truth.mean() * (1 - truth.mean()))
        melanoma["threshold"] = self.threshold
        melanoma["metadata_only_auroc"] = float(
            roc_auc_score(truth, self._from_metadata("melanoma", known)[:, 1])
        )
        return {
            "images": len(known),
            "components": len(clusters),
            "melanomas": int(truth.sum()),
            "melanoma": melanoma,
            **{task: self._categorical(task, positions) for task in ("age", "site", "sex")},
            "diagnosis": self._categorical("diagnosis", positions),
        }

    def can_be_judged(self, positions: list[int]) -> bool:
        """Whether there are enough images of both classes for a figure to mean anything."""
        melanoma = self.targets["melanoma"][positions]
        return min(int((melanoma == 1).sum()), int((melanoma == 0).sum())) >= LEAST_IMAGES

    def table_4(self, positions: list[int]) -> Report:
        """The paper's Table 4: class and age, accuracy and F1, in every reading of F1."""
        known = self._known("melanoma", positions)
        truth = self.targets["melanoma"][known]
        clusters = self._clusters(known)
        found = (self.probability[known] >= self.threshold).astype(int)
        baseline = self._from_metadata("melanoma", known)[:, 1]
        prior = float((self.targets["melanoma"][self.train] == 1).mean())

        def accuracy_50_50(y: Classes, p: Classes) -> float:
            return float((np.mean(p[y == 1] == 1) + np.mean(p[y == 0] == 0)) / 2)

        report: Report = {
            "images": len(known),
            "components": len(clusters),
            "melanomas": int(truth.sum()),
            "class_accuracy": asdict(clusters.bootstrap(_on(accuracy_score, truth, found), SEED)),
            "class_accuracy_50_50": asdict(
                clusters.bootstrap(_of_both(accuracy_50_50, truth, found), SEED)
            ),
            "class_f1": _f1_readings(truth, found, "binary"),
            "auroc": asdict(
                clusters.bootstrap(_of_both(roc_auc_score, truth, self.probability[known]), SEED)
            ),
            "class_majority_accuracy": float(max(truth.mean(), 1 - truth.mean())),
            "class_metadata_only": {
                "auroc": float(roc_auc_score(truth, baseline)),
                "accuracy_50_50": accuracy_50_50(truth, (baseline >= prior).astype(int)),
            },
            "age": self._categorical("age", positions),
        }
        return report

    def scores(self, records: list[Record]) -> dict[str, Floats]:
        """Out-of-distribution scores by dataset and split, of the images nothing was fitted on."""
        by_dataset: dict[str, list[int]] = {}
        for row in self.positions:
            by_dataset.setdefault(f"{records[row].dataset} {records[row].split}", []).append(row)
        return {name: self.outputs["ood_score"][rows_] for name, rows_ in by_dataset.items()}

    def save(self, path: Path) -> None:
        """Write one row an image, for whatever further analysis."""
        with write_atomically(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                ["image", "dataset", "split", "component", "melanoma", "logit", "probability"]
            )
            for row in self.positions:
                record = self.records[row]
                writer.writerow(
                    [
                        record.image,
                        record.dataset,
                        record.split,
                        record.component,
                        "" if record.melanoma is None else int(record.melanoma),
                        f"{self.outputs['melanoma_logit'][row]:.6f}",
                        f"{self.probability[row]:.6f}",
                    ]
                )

    def _categorical(self, task: str, positions: list[int]) -> Report:
        known = self._known(task, positions)
        truth = self.targets[task][known]
        found = self.outputs[task][known].argmax(axis=1)
        clusters = self._clusters(known)
        majority = np.bincount(truth).argmax()
        metadata = self._from_metadata(task, known)
        report: Report = {
            "images": len(known),
            "accuracy": asdict(clusters.bootstrap(_on(accuracy_score, truth, found), SEED)),
            "majority_accuracy": float((truth == majority).mean()),
            "metadata_only_accuracy": float((metadata.argmax(axis=1) == truth).mean()),
            "f1": _f1_readings(truth, found, "macro"),
        }
        if task == "age":
            error = np.abs(self.outputs["age_years"][known] - self.age_years[known])
            median = np.nanmedian(self.age_years[self.train])
            report["mean_absolute_error_years"] = asdict(
                clusters.bootstrap(lambda chosen: float(error[chosen].mean()), SEED)
            )
            report["median_age_error_years"] = float(np.abs(self.age_years[known] - median).mean())
        return report

    def _from_metadata(self, task: str, positions: list[int]) -> Floats:
        """Class probabilities from age, sex and site alone (less the task itself)."""
        used = [row for row in self.train if self.targets[task][row] != MISSING]
        features = self._metadata(task)
        model = LogisticRegression(max_iter=1000).fit(features[used], self.targets[task][used])
        classes = 1 + max(self.targets[task][used].max(), self.targets[task][positions].max())
        probabilities = np.zeros((len(positions), int(classes)))
        probabilities[:, model.classes_] = model.predict_proba(features[positions])
        return probabilities

    def _metadata(self, task: str) -> Floats:
        columns: list[Floats] = []
        if task != "age":
            age = self.age_years / 100
            columns += [np.nan_to_num(age, nan=0.5), np.isnan(age).astype(float)]
        for name, labels in (("sex", Sex), ("site", Site)):
            if task != name:
                columns += [
                    (self.targets[name] == label).astype(float) for label in range(len(labels))
                ]
        return np.stack(columns, axis=1)

    def _known(self, task: str, positions: list[int]) -> list[int]:
        return [row for row in positions if self.targets[task][row] != MISSING]

    def _clusters(self, positions: list[int]) -> Clusters:
        return Clusters([self.records[row].component for row in positions])


def expected_calibration_error(truth: Classes, probability: Floats) -> float:
    """ECE over equal-width bins (Naeini et al. 2015)."""
    numbers = np.minimum((probability * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(numbers, probability - truth, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(truth))


def _on(
    measure: Callable[..., float], truth: NDArray[Any], found: NDArray[Any]
) -> Callable[[NDArray[np.intp]], float]:
    return lambda chosen: float(measure(truth[chosen], found[chosen]))


def _of_both(
    measure: Callable[..., float], truth: NDArray[Any], found: NDArray[Any]
) -> Callable[[NDArray[np.intp]], float]:
    """A measure that is not defined on a resample with one class only."""

    def of(chosen: NDArray[np.intp]) -> float:
        if len(np.unique(truth[chosen])) < 2:
            return float("nan")
        return float(measure(truth[chosen], found[chosen]))

    return of


def _f1_readings(truth: Classes, found: Classes, first: str) -> Report:
    averages = dict.fromkeys((first, "macro", "weighted"))
    return {
        average: float(f1_score(truth, found, average=average, zero_division=0.0))
        for average in averages
    }


def _spread(
    parts: Sequence[NDArray[np.float32]], positions: list[int], count: int
) -> NDArray[np.float32]:
    values = np.concatenate(parts)
    spread = np.full((count, *values.shape[1:]), np.nan, np.float32)
    spread[positions] = values
    return spread
