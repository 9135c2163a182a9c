"""What a clinic may change: the melanoma calibration and threshold, from logits and outcomes."""

import numpy as np
from numpy.typing import NDArray

from models.bundle import Calibration, OperatingPoint, melanoma_probability

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

SENSITIVITY = 0.90
_STEPS = 100
# In log-odds, of a threshold below every image: runtimes and answers round by less.
_MARGIN = 0.1
_FALLING = (
    "The logits do not rise with melanoma on these images, so they cannot be calibrated: check the "
    "outcomes, or the network."
)
_AS_IT_IS = Calibration(slope=1, intercept=0)


class CalibrationError(ValueError):
    """Logits and outcomes that no calibration can be fitted to; the message says why."""


def fit_calibration(logits: Floats, melanoma: Bools) -> Calibration:
    """Platt scaling by maximum likelihood (Platt 1999; no shrinkage of the targets).

    Args:
        logits: float [N], uncalibrated.
        melanoma: bool [N].

    Raises:
        CalibrationError: One class is missing, the logits separate the classes, or do not rise with
            melanoma.
    """
    x = np.asarray(logits, np.float64)
    y = np.asarray(melanoma, np.float64)
    if not 0 < y.sum() < len(y):
        raise CalibrationError(
            "Images with and without melanoma are needed to calibrate; one kind is missing."
        )
    if x.min() == x.max():
        raise CalibrationError("Every image has the same logit: there is nothing to calibrate.")
    if x[y == 1].min() >= x[y == 0].max():
        raise CalibrationError(
            "Every melanoma's logit is at or above every other image's: with so few images the "
            "slope has no bound. Add more."
        )
    if x[y == 1].max() <= x[y == 0].min():
        raise CalibrationError(_FALLING)
    centre, scale = x.mean(), max(float(x.std()), 1e-12)
    design = np.stack([(x - centre) / scale, np.ones_like(x)], axis=1)
    weights = np.array([0.0, np.log(y.mean() / (1 - y.mean()))])
    for _ in range(_STEPS):
        # Newton's method; a step that does not help is halved.
        p = _sigmoid(design @ weights)
        curvature = (design * (p * (1 - p))[:, None]).T @ design + 1e-12 * np.eye(2)
        step = np.linalg.solve(curvature, design.T @ (y - p))
        before = _likelihood(design @ weights, y)
        while np.abs(step).max() > 1e-12 and _likelihood(design @ (weights + step), y) < before:
            step /= 2
        weights = weights + step
        if np.abs(step).max() < 1e-8:
            break
    else:
        raise CalibrationError("The calibration did not converge: check the logits.")
    slope = float(weights[0] / scale)
    if slope <= 0:
        raise CalibrationError(_FALLING)
    return Calibration(slope=slope, intercept=float(weights[1] - weights[0] * centre / scale))


def choose_threshold(
    probabilities: Floats, melanoma: Bools, sensitivity: float = SENSITIVITY
) -> float:
    """A threshold at which this share of the melanomas, and no more than needed, is above it.

    It lies half-way to the next lower probability of any image, or a little below where there is
    none: on an image's own probability, the rounding of another runtime, or of an answer, would
    decide on which side that image falls.
    """
    probabilities = np.asarray(probabilities, np.float64)
    found = np.sort(probabilities[melanoma])[::-1]
    needed = int(np.ceil(sensitivity * len(found) - 1e-9))
    last = found[max(needed, 1) - 1]
    below = probabilities[probabilities < last]
    if not below.size:
        return shift_odds(float(last), -_MARGIN)
    halfway = float((last + below.max()) / 2)
    return halfway if halfway > below.max() else float(last)  # numbers without one between them


def calibrate(
    logits: Floats, melanoma: Bools, dataset: str, sensitivity: float = SENSITIVITY
) -> tuple[Calibration, float, OperatingPoint]:
    """The calibration and the threshold that images give, and what the threshold reaches on them.

    Args:
        logits: float [N], uncalibrated.
        melanoma: bool [N].
        dataset: What these images are called.
        sensitivity: That the threshold must reach.

    Raises:
        CalibrationError: As `fit_calibration` does.
    """
    calibration = fit_calibration(logits, melanoma)
    probability = melanoma_probability(logits, calibration)
    threshold = choose_threshold(probability, melanoma, sensitivity)
    criterion = f"sensitivity of at least {100 * sensitivity:g} %"
    point = operating_point(criterion, dataset, melanoma, probability >= threshold)
    return calibration, threshold, point


def operating_point(criterion: str, dataset: str, melanoma: Bools, called: Bools) -> OperatingPoint:
    """What calling some images melanoma reaches: `called`, bool [N], of `melanoma`, bool [N]."""
    return OperatingPoint(
        criterion=criterion,
        dataset=dataset,
        images=len(melanoma),
        melanomas=int(melanoma.sum()),
        sensitivity=float(called[melanoma].mean()),
        specificity=float((~called[~melanoma]).mean()),
    )


def log_odds(probability: float) -> float:
    """Of a probability in (0, 1)."""
    return float(np.log(probability / (1 - probability)))


def shift_prevalence(probability: float, old: float, new: float) -> float:
    """The same evidence's probability where another share has melanoma (Saerens et al. 2002)."""
    return shift_odds(probability, log_odds(new) - log_odds(old))


def shift_odds(probability: float, by: float) -> float:
    """The probability of other log-odds; 0 and 1 stay."""
    if not 0 < probability < 1:
        return probability
    return float(_sigmoid(np.array(log_odds(probability) + by)))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return melanoma_probability(x, _AS_IT_IS)


def _likelihood(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float((y * x - np.logaddexp(0, x)).sum())
