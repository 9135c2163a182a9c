"""Figures of predictions against the truth: scikit-learn's, and what it does not have."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    cohen_kappa_score,
    confusion_matrix,
    f1_score,
    roc_auc_score,
)

Floats = NDArray[np.floating]
Classes = NDArray[np.int64]
Measure = Callable[[Classes, Floats], float]
Reading = Callable[[Classes, Classes], float]

CALIBRATION_BINS = 15
LEAST_SENSITIVITY = 0.80
PARTIAL_AUROC = "partial AUROC above 80 % sensitivity"
_EPSILON = 1e-6
_DRAWS = 1000
# Figures that mean nothing where one class is missing.
NEED_BOTH = frozenset(
    {
        "AUROC",
        "average precision",
        PARTIAL_AUROC,
        "balanced accuracy",
        "calibration slope",
        "calibration intercept",
    }
)


def partial_auroc(truth: Classes, score: Floats) -> float:
    """Area under the ROC curve above 80 % sensitivity: 0 to 0.2, 0.02 without skill (ISIC 2024).

    Where few melanomas may be missed, only this part of the curve matters. The area is between the
    curve and the line at 80 %: with the classes exchanged, scikit-learn's partial AUROC up to a
    false positive rate of 20 %, with McClish's standardisation taken back.
    """
    most = 1 - LEAST_SENSITIVITY
    scaled = roc_auc_score(1 - truth, -score, max_fpr=most)
    least = 0.5 * most**2
    return float(least + (most - least) * (scaled - 0.5) / 0.5)


def expected_calibration_error(truth: Classes, probability: Floats) -> float:
    """ECE over 15 equal-width bins (Naeini et al. 2015)."""
    numbers = bin_numbers(probability)
    gaps = np.bincount(numbers, probability - truth, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(truth))


def ece_if_calibrated(
    probability: Floats, clusters: NDArray[np.int64], seed: int
) -> tuple[float, float]:
    """What the ECE of these probabilities would be if they were true: its mean and 95 % quantile.

    The ECE is never 0 for a finite set: without this value beside it, it cannot be read. Images of
    one cluster are melanoma or not together, as those of one lesion are.

    Args:
        probability: float [N].
        clusters: The number of each image's cluster, from 0: int [N].
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    values = [
        expected_calibration_error(
            (generator.random(clusters.max() + 1)[clusters] < probability).astype(np.int64),
            probability,
        )
        for _ in range(_DRAWS)
    ]
    return float(np.mean(values)), float(np.quantile(values, 0.95))


def bin_numbers(probability: Floats) -> NDArray[np.int64]:
    """The equal-width bin of each probability."""
    return np.minimum((probability * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)


def reliability(truth: Classes, probability: Floats) -> list[dict[str, float]]:
    """Mean probability, share of melanomas and number of images, by bin that holds any."""
    numbers = bin_numbers(probability)
    return [
        {
            "probability": float(probability[numbers == number].mean()),
            "share": float(truth[numbers == number].mean()),
            "images": int((numbers == number).sum()),
        }
        for number in np.unique(numbers)
    ]


def auroc_or_nan(truth: Classes | NDArray[np.bool_], score: Floats) -> float:
    """The AUROC; NaN without both classes."""
    if len(set(truth.tolist())) < 2:
        return float("nan")
    return float(roc_auc_score(truth, score))


def calibration_slope(truth: Classes, probability: Floats) -> float:
    """Slope of the truth's log-odds on the predicted ones (Cox 1958): 1 when calibrated.

    Below 1, probabilities are too extreme. NaN where they separate the classes: there is no slope.
    """
    logits = _log_odds(probability)
    ours, others = logits[truth == 1], logits[truth == 0]
    if ours.min() >= others.max() or ours.max() <= others.min():
        return float("nan")
    line = LogisticRegression(C=np.inf, solver="newton-cholesky").fit(logits[:, None], truth)
    return float(line.coef_[0, 0])


def calibration_intercept(truth: Classes, probability: Floats) -> float:
    """What must be added to the predicted log-odds, their slope left at 1: 0 when calibrated.

    Calibration in the large (Van Calster et al. 2019): above 0, melanomas are more than foretold.
    """
    logits = _log_odds(probability)
    return float(brentq(lambda by: expit(logits + by).mean() - truth.mean(), -40, 40))


def net_benefit(truth: Classes, probability: Floats, threshold: float) -> float:
    """True positives less false ones, these weighed by the threshold's odds (Vickers & Elkin 2006).

    In units of melanomas found per image seen; NaN at a threshold of 1.
    """
    if threshold >= 1:
        return float("nan")
    found = probability >= threshold
    hits, alarms = (found & (truth == 1)).mean(), (found & (truth == 0)).mean()
    return float(hits - alarms * threshold / (1 - threshold))


def at_threshold(threshold: float) -> dict[str, Measure]:
    """What follows from deciding at a threshold."""

    def share(of: Callable[[Classes, NDArray[np.bool_]], NDArray[np.bool_]]) -> Measure:
        def measure(truth: Classes, probability: Floats) -> float:
            values = of(truth, probability >= threshold)
            return float(values.mean()) if len(values) else float("nan")

        return measure

    return {
        "sensitivity": share(lambda truth, found: found[truth == 1]),
        "specificity": share(lambda truth, found: ~found[truth == 0]),
        "positive predictive value": share(lambda truth, found: truth[found] == 1),
        "negative predictive value": share(lambda truth, found: truth[~found] == 0),
        "balanced accuracy": lambda truth, p: float(
            ((p >= threshold)[truth == 1].mean() + (p < threshold)[truth == 0].mean()) / 2
        ),
        "accuracy": share(lambda truth, found: found == (truth == 1)),
        "net benefit": lambda truth, p: net_benefit(truth, p, threshold),
    }


def binary(threshold: float) -> dict[str, Measure]:
    """Every figure of a melanoma probability that can be given an interval."""
    return {
        "AUROC": lambda truth, p: float(roc_auc_score(truth, p)),
        "average precision": lambda truth, p: float(average_precision_score(truth, p)),
        PARTIAL_AUROC: partial_auroc,
        **at_threshold(threshold),
        "Brier score": lambda truth, p: float(brier_score_loss(truth, p)),
        "mean probability less prevalence": lambda truth, p: float(p.mean() - truth.mean()),
        "calibration slope": calibration_slope,
        "calibration intercept": calibration_intercept,
    }


def f1_readings(truth: Classes, labels: Sequence[int]) -> dict[str, Reading]:
    """F1 in every reading that a paper may have meant.

    Args:
        truth: The classes of the whole set: those that are there are averaged over, in every
            resample of it too.
        labels: All classes of the task. Only a task of two has the reading "binary".
    """
    present = np.unique(truth)

    def reading(average: str) -> Reading:
        return lambda truth, found: float(
            f1_score(truth, found, labels=present, average=average, zero_division=0.0)
        )

    readings = {average: reading(average) for average in ("macro", "weighted")}
    if len(labels) > 2:
        return readings
    return {"binary": lambda t, f: float(f1_score(t, f, zero_division=0.0)), **readings}


def categorical(truth: Classes, labels: Sequence[int]) -> dict[str, Reading]:
    """Figures of a predicted class that can be given an interval; arguments as `f1_readings`."""
    return {
        "accuracy": lambda truth, found: float(accuracy_score(truth, found)),
        "balanced accuracy": _balanced_accuracy(np.unique(truth)),
        **{f"F1, {name}": of for name, of in f1_readings(truth, labels).items()},
    }


def quadratic_kappa(truth: Classes, found: Classes, labels: Sequence[int]) -> float:
    """Agreement of ordered classes beyond chance, far misses weighing more (Cohen 1968).

    Args:
        truth: int [N].
        found: int [N].
        labels: All classes in order, present or not: distances are between these.

    Returns:
        NaN where all are of one class, and found to be: chance could not do worse.
    """
    if (truth == truth[:1]).all() and (found == truth[:1]).all():  # of which scikit-learn warns
        return float("nan")
    return float(cohen_kappa_score(truth, found, labels=list(labels), weights="quadratic"))


def confusion(truth: Classes, found: Classes, labels: Sequence[str]) -> dict[str, Any]:
    """Counts, a row a true class, a column a predicted one."""
    counts = confusion_matrix(truth, found, labels=range(len(labels)))
    return {"labels": list(labels), "counts": counts.tolist()}


def _balanced_accuracy(present: Classes) -> Reading:
    """Mean recall of these classes; 0 of one that a resample lacks, as F1 has it."""

    def reading(truth: Classes, found: Classes) -> float:
        right = truth == found
        return float(
            np.mean([right[truth == k].mean() if (truth == k).any() else 0.0 for k in present])
        )

    return reading


def _log_odds(probability: Floats) -> Floats:
    found: Floats = logit(np.clip(probability, _EPSILON, 1 - _EPSILON))
    return found
