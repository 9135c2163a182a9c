"""Calibration, thresholds, intervals and calibration error: against worked cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.bundle import melanoma_probability
from training.calibrate import (
    choose_ood_threshold,
    choose_threshold,
    fit_calibration,
    fit_feature_distance,
)
from training.data.manifest import DataError
from training.evaluate import expected_calibration_error
from training.statistics import Clusters


def test_calibration_finds_slope_and_intercept_again() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, 20_000)
    melanoma = generator.random(20_000) < 1 / (1 + np.exp(-(0.5 * logits - 1)))
    found = fit_calibration(logits, melanoma)
    assert (found.slope, found.intercept) == pytest.approx((0.5, -1), abs=0.06)
    assert melanoma_probability(logits, found).mean() == pytest.approx(melanoma.mean(), abs=1e-3)


def test_logits_that_fall_with_melanoma_cannot_be_calibrated() -> None:
    with pytest.raises(DataError, match="do not rise"):
        fit_calibration(np.array([3.0, 2.5, 1.0, 2.0, -1.0]), np.array([0, 0, 1, 0, 1], bool))


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1), st.floats(0.5, 1))
def test_the_threshold_is_the_highest_that_is_sensitive_enough(rows: list, wanted: float) -> None:
    probabilities, melanoma = (np.array(column) for column in zip(*rows, strict=True))
    if not melanoma.any():
        return
    threshold = choose_threshold(probabilities, melanoma, wanted)
    found = probabilities[melanoma]
    above = found[found >= threshold]
    assert len(above) / len(found) >= wanted - 1e-6
    fewer = above[above > above.min()]
    assert len(fewer) / len(found) < wanted


def test_the_threshold_keeps_off_every_image() -> None:
    probabilities = np.array([0.1, 0.2, 0.4, 0.5])
    assert choose_threshold(probabilities, np.array([0, 1, 0, 1], bool), 0.5) == pytest.approx(0.45)
    assert choose_threshold(probabilities, np.array([0, 1, 0, 1], bool), 1.0) == pytest.approx(0.15)


def test_the_distance_is_mahalanobis() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(5000, 3)) @ np.diag([1.0, 5.0, 0.2]) + 7
    mean, whitening = (value.numpy() for value in fit_feature_distance(features))
    distances = np.linalg.norm((features - mean) @ whitening, axis=1)
    assert (distances**2).mean() == pytest.approx(3, rel=0.1)
    along = np.linalg.norm((np.array([7.0, 12.0, 7.0]) - mean) @ whitening)
    assert along == pytest.approx(1, rel=0.1)


def test_the_ood_threshold_is_a_quantile() -> None:
    assert choose_ood_threshold(np.arange(101.0), 0.95) == 95


def test_ece_of_a_worked_case() -> None:
    probability = np.array([0.05, 0.05, 0.95, 0.95])
    truth = np.array([0, 1, 1, 1])
    # The lower bin says 5 % and has 50 %, the upper says 95 % and has 100 %.
    assert expected_calibration_error(truth, probability) == pytest.approx((0.45 + 0.05) / 2)


def test_images_of_one_lesion_are_drawn_together() -> None:
    clusters = Clusters(["a", "b", "a", "c", "b", "b"])
    assert len(clusters) == 3
    generator = np.random.default_rng(0)
    for _ in range(20):
        counts = np.bincount(clusters.resample(generator), minlength=6)
        assert counts[0] == counts[2]
        assert counts[1] == counts[4] == counts[5]


def test_copies_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(1).normal(size=200)
    names = [str(number) for number in range(200)]

    def width(copies: int, clustered: bool) -> float:
        data = np.tile(values, copies)
        units = names * copies if clustered else [str(n) for n in range(200 * copies)]
        found = Clusters(units).bootstrap(lambda chosen: float(data[chosen].mean()))
        assert found.low < found.value < found.high
        return found.high - found.low

    assert width(4, clustered=True) == pytest.approx(width(1, clustered=True), rel=0.15)
    assert width(4, clustered=False) < 0.6 * width(1, clustered=True)
