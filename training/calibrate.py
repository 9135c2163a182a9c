"""What is fitted after the network: calibration, thresholds and the distance in feature space."""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from models.bundle import Calibration
from training.data.manifest import DataError

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

SENSITIVITY = 0.90
# Share of validation images that the out-of-distribution threshold lets pass.
IN_DISTRIBUTION = 0.99


def fit_calibration(logits: Floats, melanoma: Bools) -> Calibration:
    """Platt scaling by maximum likelihood (Platt 1999; no shrinkage of the targets).

    Args:
        logits: float [N], uncalibrated.
        melanoma: bool [N].

    Raises:
        DataError: The logits do not rise with melanoma.
    """
    regression = LogisticRegression(C=np.inf).fit(np.asarray(logits)[:, None], melanoma)
    slope, intercept = float(regression.coef_[0, 0]), float(regression.intercept_[0])
    if slope <= 0:
        raise DataError(
            "The network's logits do not rise with melanoma on the validation images, so they "
            "cannot be calibrated: fit longer, or check the labels."
        )
    return Calibration(slope=slope, intercept=intercept)


def choose_threshold(
    probabilities: Floats, melanoma: Bools, sensitivity: float = SENSITIVITY
) -> float:
    """A threshold at which this share of the melanomas, and no more than needed, is above it.

    It lies half-way to the next lower probability of any image: on an image's own probability, the
    rounding of another runtime would decide on which side that image falls.
    """
    probabilities = np.asarray(probabilities, np.float64)
    found = np.sort(probabilities[melanoma])[::-1]
    needed = int(np.ceil(sensitivity * len(found) - 1e-9))
    last = found[max(needed, 1) - 1]
    below = probabilities[probabilities < last]
    return float((last + below.max()) / 2) if below.size else float(last)


def fit_feature_distance(features: Floats) -> tuple[Tensor, Tensor]:
    """A Mahalanobis distance (Lee et al. 2018, one class), its covariance shrunk (Ledoit-Wolf).

    Args:
        features: float [N, F], of the training images.

    Returns:
        The mean, float32 [F], and a matrix W, float32 [F, F], such that the distance of a feature f
        is the length of (f - mean) @ W.
    """
    estimate = LedoitWolf().fit(np.asarray(features, np.float64))
    whitening = np.linalg.cholesky(estimate.precision_)
    return (
        torch.from_numpy(estimate.location_.astype(np.float32)),
        torch.from_numpy(whitening.astype(np.float32)),
    )


def choose_ood_threshold(scores: Floats, share: float = IN_DISTRIBUTION) -> float:
    """The score that this share of the validation images does not exceed."""
    return float(np.quantile(scores, share))
