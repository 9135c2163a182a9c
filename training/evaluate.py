"""A model's held-out figures, each with its interval, beside its baselines and its cautions."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import sklearn
from numpy.typing import NDArray
from sklearn.metrics import roc_curve
from tqdm import tqdm

from training import metrics
from training.baselines import MetadataModel, majority, truth_of
from training.data.components import with_components
from training.data.manifest import DataError, Record, collection_of, fingerprint
from training.data.vocabulary import Split
from training.metrics import Classes, Floats
from training.predictions import Predictions
from training.statistics import LEAST_CLUSTERS, REPLICATES, Clusters, Estimate, Statistic, bounded
from training.tasks import MISSING

SEED = 0
INTERVAL = (
    "95 %, bias-corrected and accelerated bootstrap over components (lesion, patient, "
    "near-duplicate), expanded to Student's t"
)
# Thresholds of the decision curve: from a clinic's that misses nothing to one's that cuts little.
CURVE = tuple(round(0.01 * step, 2) for step in range(1, 51))
# What is compared between groups, and between two models.
KEY_FIGURES = ("AUROC", "sensitivity", "specificity", "mean probability less prevalence")
# Means of as many figures as there are classes, each weighing the same.
OF_ALL_CLASSES = ("balanced accuracy", "F1, macro")
COMPARED = ("AUROC", "average precision", "sensitivity", "specificity", "Brier score")

Report = dict[str, Any]


def evaluate(
    predictions: Predictions,
    manifest: Sequence[Record],
    against: Predictions | None = None,
    subsets: Mapping[str, Sequence[int]] | None = None,
    own: bool = False,
) -> Report:
    """Every figure of a model on some images, by dataset.

    Args:
        predictions: Of images with labels; a dataset's rows are its source.
        manifest: Of these images: the baselines learn from its rows with split `train`, and all of
            them tell which pictures a dataset holds.
        against: Another model's predictions of the same images.
        subsets: Rows that are to be reported on their own as well, by name.
        own: Whether the model was fitted to this manifest's rows, and judged on others: of another
            one it is not known which pictures it never learned from.

    Returns:
        What `report.json` holds.

    Raises:
        DataError: No dataset has enough images with and without melanoma.
    """
    check_size(predictions.records)
    training = [record for record in manifest if record.split is Split.TRAIN]
    found = _Evaluation(predictions, training, against)
    by_dataset = _rows_by_dataset(predictions.records)
    by_dataset |= {name: list(rows) for name, rows in (subsets or {}).items()}
    judged = {
        name: rows
        for name, rows in by_dataset.items()
        if _can_be_judged(found.records[row] for row in rows)
    }
    # Ten thousands of resamples of arrays that are known to be sound.
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        sets = {
            name: found.report(rows) for name, rows in tqdm(judged.items(), "measure", unit="set")
        }
        unseen = found.unseen(manifest) if own else {}
    return {
        "model": predictions.model,
        "artifact_sha256": predictions.sha256,
        "trained_on": list(predictions.trained_on),
        "command": "mmtl-train evaluate",
        "seed": SEED,
        "replicates": REPLICATES,
        "interval": INTERVAL,
        "data_fingerprint": fingerprint([*training, *predictions.records]),
        "images": dict(Counter(record.dataset for record in predictions.records)),
        "threshold": predictions.threshold,
        "not evaluated": sorted(set(by_dataset) - set(judged)),
        "sets": sets,
        "not learned from": unseen,
    }


def check_size(records: Sequence[Record]) -> None:
    """Refuse images of which nothing could be said, before anybody predicts them.

    Raises:
        DataError: No dataset has enough images with and without melanoma.
    """
    linked = with_components(records)
    datasets = _rows_by_dataset(records)
    if not any(_can_be_judged([linked[row] for row in rows]) for rows in datasets.values()):
        raise DataError(
            f"None of the datasets ({', '.join(datasets) or 'there are none'}) has at least "
            f"{LEAST_CLUSTERS} lesions (or patients, where these are known) with and "
            f"{LEAST_CLUSTERS} without melanoma: nothing can be said."
        )


def _rows_by_dataset(records: Sequence[Record]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        rows.setdefault(collection_of(record.dataset), []).append(row)
    return rows


def _with_and_without(records: Iterable[Record]) -> tuple[int, int]:
    """Number of components with melanoma, and of those without."""
    found: dict[bool | None, set[str]] = {True: set(), False: set(), None: set()}
    for record in records:
        found[record.melanoma].add(record.component)
    return len(found[True]), len(found[False])


def _can_be_judged(records: Iterable[Record]) -> bool:
    """Whether there are enough components of both classes for a figure to mean anything."""
    return min(_with_and_without(records)) >= LEAST_CLUSTERS


class _Evaluation:
    """Truths and predictions as arrays, and what is computed on rows of them."""

    def __init__(
        self,
        predictions: Predictions,
        training: Sequence[Record],
        against: Predictions | None,
    ):
        self.predictions = predictions
        self.records = with_components(predictions.records)
        self.against = _align(against, predictions) if against is not None else None
        self.melanoma = np.array(
            [MISSING if r.melanoma is None else int(r.melanoma) for r in self.records]
        )
        labels, edges = predictions.labels, predictions.age_edges
        self.truths = {t: truth_of(t, self.records, labels[t], edges) for t in labels}
        self.metadata = MetadataModel(training, labels, edges)

    def report(self, rows: Sequence[int]) -> Report:
        """All tasks on some images."""
        known = [row for row in rows if self.melanoma[row] != MISSING]
        truth, probability = self.melanoma[known], self.predictions.probability[known]
        records = [self.records[row] for row in known]
        clusters = self._clusters(known)
        threshold = self.predictions.threshold
        called = (probability >= threshold).astype(np.int64)
        figures = clusters.bootstrap(
            _statistics(metrics.binary(threshold), truth, probability), SEED, REPLICATES
        )
        f1 = clusters.bootstrap(
            _statistics(metrics.f1_readings(truth, range(2)), truth, called), SEED, REPLICATES
        )
        # Of a patient's lesions one may be melanoma and the others not.
        lesions = Clusters([f"{r.component} {r.lesion or r.image}" for r in records])
        perfect, perfect_high = metrics.ece_if_calibrated(probability, lesions.numbers, SEED)
        report: Report = {
            "images": len(known),
            "components": len(clusters),
            "melanomas": int(truth.sum()),
            "prevalence": float(truth.mean()),
            "melanoma": self._written(figures, known),
            "class": {
                **{f"F1, {reading}": asdict(bounded(value)) for reading, value in f1.items()},
                "majority": majority(truth, range(2)),
                "metadata_only": self.metadata.melanoma(records, truth),
                "confusion": metrics.confusion(truth, called, ("not melanoma", "melanoma")),
            },
            "calibration": {
                # Without an interval: resampling widens the gaps of the bins.
                "expected calibration error": metrics.expected_calibration_error(
                    truth, probability
                ),
                "of a calibrated model of this size": perfect,
                "95 % quantile of that": perfect_high,
                "Brier score of the prevalence": float(truth.mean() * (1 - truth.mean())),
                "reliability": metrics.reliability(truth, probability),
            },
            "roc": _roc(truth, probability),
            "decision curve": [
                {
                    "threshold": cut,
                    "model": metrics.net_benefit(truth, probability, cut),
                    "all": metrics.net_benefit(truth, np.ones_like(probability), cut),
                }
                for cut in CURVE
            ],
            "tasks": {
                task: self._task(task, rows)
                for task in self.predictions.labels
                if self._components(row for row in rows if self.truths[task][row] != MISSING)
                >= LEAST_CLUSTERS
            },
            "groups": self._groups(known),
        }
        if self.against is not None:
            report["compared"] = self._compare(known, truth, clusters)
        return report

    def unseen(self, manifest: Sequence[Record]) -> Report:
        """AUROC on each source that was not learned from, less that on those that were.

        Both are of held-out images, of which a source's are those that no dataset that was learned
        from holds, too. Which images a source took in differs, so that a difference is not of the
        network alone. A source is a collection; or its datasets, of which some were learned from.

        Args:
            manifest: That the model was fitted with.
        """
        names = set(self.predictions.trained_on)
        linked = with_components(manifest)
        theirs = {r.component for r in linked if r.dataset in names}
        shared = {(r.dataset, r.image) for r in linked if r.component in theirs}
        own: list[int] = []
        strange: dict[str, list[int]] = {}
        for row, record in enumerate(self.records):
            if self.melanoma[row] == MISSING:
                continue
            if record.dataset in names:
                own.append(row)
            elif (record.dataset, record.image) not in shared:
                strange.setdefault(record.dataset, []).append(row)
        if not _can_be_judged(self.records[row] for row in own):
            return {}
        learned = {self.records[row].dataset for row in own}
        parted = set(map(collection_of, learned)) & set(map(collection_of, strange))

        def source(dataset: str) -> str:
            whole = collection_of(dataset)
            return dataset if whole in parted else whole

        sources: dict[str, list[int]] = {}
        for dataset, rows in strange.items():
            sources.setdefault(source(dataset), []).extend(rows)
        found: Report = {}
        for name, apart in sorted(sources.items()):
            if not _can_be_judged(self.records[row] for row in apart):
                continue
            rows = [*own, *apart]
            less = _auroc_difference(
                self.melanoma[rows],
                self.predictions.probability[rows],
                np.arange(len(rows)) >= len(own),
            )
            alone = _statistics(
                {"AUROC": metrics.auroc_or_nan},
                self.melanoma[apart],
                self.predictions.probability[apart],
            )
            there = self._clusters(apart).bootstrap(alone, SEED, REPLICATES)
            estimate = self._clusters(rows).bootstrap({"AUROC": less}, SEED, REPLICATES)["AUROC"]
            found[name] = {
                "learned from": sorted(set(map(source, learned))),
                "images": len(apart),
                "melanomas": int(self.melanoma[apart].sum()),
                **self._written(there, apart),
                "AUROC difference": asdict(bounded(estimate)),
            }
        return found

    def _task(self, task: str, rows: Sequence[int]) -> Report:
        known = [row for row in rows if self.truths[task][row] != MISSING]
        truth = self.truths[task][known]
        found = self.predictions.outputs[task][known].argmax(axis=1)
        labels = self.predictions.labels[task]
        records = [self.records[row] for row in known]
        statistics = _statistics(metrics.categorical(truth, range(len(labels))), truth, found)
        report: Report = {
            "images": len(known),
            "of no label": sum(self._is_of_no_label(task, row) for row in rows),
            "majority": majority(truth, range(len(labels))),
            "metadata_only": self.metadata.task(task, records, truth),
            "confusion": metrics.confusion(truth, found, labels),
        }
        if task == "age":
            statistics["quadratic kappa"] = lambda chosen: metrics.quadratic_kappa(
                truth[chosen], found[chosen], range(len(labels))
            )
            if self.predictions.age_years is not None:
                years = np.array([record.age for record in records], float)
                error = np.abs(self.predictions.age_years[known] - years)
                statistics["mean absolute error in years"] = lambda chosen: float(
                    error[chosen].mean()
                )
                report["median_age_error_years"] = self.metadata.median_age_error(records)
        clusters = self._clusters(known)
        estimates = clusters.bootstrap(statistics, SEED, REPLICATES)
        fewest = min(
            self._components(row for row in known if self.truths[task][row] == label)
            for label in set(truth.tolist())
        )
        if fewest < LEAST_CLUSTERS:
            # A class of an image or two is right or wrong in nearly every resample alike.
            estimates |= {
                name: Estimate(estimates[name].value, float("nan"), float("nan"))
                for name in OF_ALL_CLASSES
            }
        shares = {"accuracy": len(clusters)}
        return report | {
            name: asdict(bounded(estimate, shares.get(name)))
            for name, estimate in estimates.items()
        }

    def _is_of_no_label(self, task: str, row: int) -> bool:
        """Whether an image's class is known, and none that the model can answer."""
        known = getattr(self.records[row], task, None) is not None
        return known and bool(self.truths[task][row] == MISSING)

    def _groups(self, rows: Sequence[int]) -> Report:
        """Key figures by source, sex, age, site and diagnosis."""
        named = {
            "source": [self.records[row].dataset for row in rows],
            "sex": [str(self.records[row].sex or "unknown") for row in rows],
            "age": [self._age_label(self.records[row]) for row in rows],
            "site": [str(self.records[row].site or "unknown") for row in rows],
            "diagnosis": [str(self.records[row].diagnosis or "unknown") for row in rows],
        }
        return {
            attribute: {
                group: self._group(
                    [row for row, name in zip(rows, names, strict=True) if name == group]
                )
                for group in sorted(set(names))
            }
            for attribute, names in named.items()
            if len(set(names)) > 1
        }

    def _group(self, rows: Sequence[int]) -> Report:
        truth, probability = self.melanoma[list(rows)], self.predictions.probability[list(rows)]
        positive, negative = _with_and_without(self.records[row] for row in rows)
        figures = metrics.binary(self.predictions.threshold)
        clusters = self._clusters(rows)
        enough = {
            "AUROC": min(positive, negative),
            "sensitivity": positive,
            "specificity": negative,
            "mean probability less prevalence": min(positive, negative),
        }
        chosen = {name: figures[name] for name in KEY_FIGURES if enough[name] >= LEAST_CLUSTERS}
        estimates = clusters.bootstrap(_statistics(chosen, truth, probability), SEED, REPLICATES)
        return {
            "images": len(rows),
            "melanomas": int((truth == 1).sum()),
            **self._written(estimates, rows),
        }

    def _compare(self, rows: Sequence[int], truth: Classes, clusters: Clusters) -> Report:
        assert self.against is not None
        sides = []
        for predictions in (self.predictions, self.against):
            figures = metrics.binary(predictions.threshold)
            chosen = {name: figures[name] for name in COMPARED}
            sides.append(_statistics(chosen, truth, predictions.probability[list(rows)]))
        differences = clusters.compare(sides[0], sides[1], SEED, REPLICATES)
        return {
            "with": self.against.model,
            "threshold": self.against.threshold,
            "differences": {name: asdict(value) for name, value in differences.items()},
        }

    def _written(self, estimates: Mapping[str, Estimate], rows: Sequence[int]) -> Report:
        """For the report; a share of all or none with its exact interval.

        An AUROC of 1 is taken for a share of the class that has fewer lesions.
        """
        chosen = list(rows)
        called = self.predictions.probability[chosen] >= self.predictions.threshold
        positive, negative = _with_and_without(self.records[row] for row in rows)
        lesions = {
            "AUROC": min(positive, negative),
            "sensitivity": positive,
            "specificity": negative,
            "balanced accuracy": min(positive, negative),
            "positive predictive value": self._components(np.array(chosen)[called]),
            "negative predictive value": self._components(np.array(chosen)[~called]),
            "accuracy": self._components(chosen),
        }
        return {
            name: asdict(bounded(estimate, lesions.get(name)))
            for name, estimate in estimates.items()
        }

    def _components(self, rows: Iterable[int]) -> int:
        return len({self.records[row].component for row in rows})

    def _clusters(self, rows: Sequence[int]) -> Clusters:
        return Clusters([self.records[row].component for row in rows])

    def _age_label(self, record: Record) -> str:
        labels, edges = self.predictions.labels.get("age"), self.predictions.age_edges
        if record.age is None:
            return "unknown"
        if not labels:
            return f"{record.age // 20 * 20:.0f}-{record.age // 20 * 20 + 19:.0f}"
        return labels[int(np.searchsorted(edges, record.age, side="right"))]


def _align(other: Predictions, predictions: Predictions) -> Predictions:
    """The other model's predictions in the same order.

    Raises:
        DataError: It lacks an image.
    """
    rows = {(record.dataset, record.image): row for row, record in enumerate(other.records)}
    try:
        order = [rows[record.dataset, record.image] for record in predictions.records]
    except KeyError as missing:
        raise DataError(
            f"{other.model} has no prediction for {missing.args[0][1]}: two models are compared on "
            "the same images only."
        ) from None
    return Predictions(other.model, predictions.records, other.probability[order], other.threshold)


def _statistics(
    measures: Mapping[str, Any], truth: NDArray[Any], found: NDArray[Any]
) -> dict[str, Statistic]:
    """Measures of the rows that are drawn; NaN on a draw that lacks a class that one needs."""

    def on(name: str) -> Statistic:
        measure, need_both = measures[name], name in metrics.NEED_BOTH and set(truth) == {0, 1}

        def statistic(chosen: NDArray[np.intp]) -> float:
            drawn = truth[chosen]
            if need_both and drawn.min() == drawn.max():
                return float("nan")
            return float(measure(drawn, found[chosen]))

        return statistic

    return {name: on(name) for name in measures}


def _auroc_difference(truth: Classes, probability: Floats, there: NDArray[np.bool_]) -> Statistic:
    """AUROC on the rows that are `there`, less that on the others; NaN where a class is absent."""

    def auroc(rows: NDArray[np.intp]) -> float:
        return metrics.auroc_or_nan(truth[rows], probability[rows])

    return lambda chosen: auroc(chosen[there[chosen]]) - auroc(chosen[~there[chosen]])


def _roc(truth: Classes, probability: Floats) -> list[list[float]]:
    """False positive rate, sensitivity and threshold, thinned to what a plot shows."""
    rates = np.stack(roc_curve(truth, probability), axis=1)
    kept = np.unique(np.linspace(0, len(rates) - 1, min(len(rates), 201)).astype(int))
    return [[float(v) if np.isfinite(v) else 1.0 for v in rates[i]] for i in kept]
