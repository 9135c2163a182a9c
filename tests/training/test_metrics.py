"""Figures against worked cases."""

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from training import metrics


def simulated(count: int = 4000, slope: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    logits = generator.normal(-1, 2, count)
    truth = (generator.random(count) < 1 / (1 + np.exp(-slope * logits))).astype(int)
    return truth, 1 / (1 + np.exp(-logits))


def test_ece_of_a_worked_case() -> None:
    probability = np.array([0.05, 0.05, 0.95, 0.95])
    truth = np.array([0, 1, 1, 1])
    # The lower bin says 5 % and has 50 %, the upper says 95 % and has 100 %.
    found = metrics.expected_calibration_error(truth, probability)
    assert found == pytest.approx((0.45 + 0.05) / 2)
    assert metrics.reliability(truth, probability) == [
        {"probability": pytest.approx(0.05), "share": 0.5, "images": 2},
        {"probability": pytest.approx(0.95), "share": 1.0, "images": 2},
    ]


def test_a_calibrated_model_shows_the_ece_that_is_foretold() -> None:
    truth, probability = simulated()
    alone = np.arange(len(truth))
    mean, high = metrics.ece_if_calibrated(probability, alone, seed=1)
    assert 0 < mean < high
    assert metrics.expected_calibration_error(truth, probability) < 1.5 * high
    too_sure, same = simulated(slope=0.4)
    assert metrics.expected_calibration_error(too_sure, same) > 3 * high


def test_images_of_one_lesion_make_a_larger_error_likely() -> None:
    _, probability = simulated(1000)
    ten_each = np.repeat(np.arange(1000), 10)
    together = metrics.ece_if_calibrated(np.repeat(probability, 10), ten_each, seed=1)[0]
    alone = metrics.ece_if_calibrated(np.repeat(probability, 10), np.arange(10_000), seed=1)[0]
    assert together > 2 * alone


def test_slope_and_intercept_find_what_is_wrong() -> None:
    truth, probability = simulated(40_000)
    assert metrics.calibration_slope(truth, probability) == pytest.approx(1, abs=0.05)
    assert metrics.calibration_intercept(truth, probability) == pytest.approx(0, abs=0.05)
    flat, same = simulated(40_000, 0.5)
    assert metrics.calibration_slope(flat, same) == pytest.approx(0.5, abs=0.05)
    # With the slope left at 1, one added to the log-odds is found as just that.
    odds = probability / (1 - probability) / np.e
    assert metrics.calibration_intercept(truth, odds / (1 + odds)) == pytest.approx(1, abs=0.05)
    assert np.isnan(
        metrics.calibration_slope(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.2, 0.9]))
    )


def test_the_slope_of_a_worked_case_is_not_drawn_to_zero() -> None:
    """Two probabilities are a line through two points: log-odds of 3 in 5 where 4 in 5 are said."""
    probability = np.repeat([0.2, 0.8], 5)
    truth = np.array([1, 1, 0, 0, 0, 1, 1, 1, 0, 0])
    found = metrics.calibration_slope(truth, probability)
    assert found == pytest.approx(np.log(3 / 2) / np.log(4), abs=1e-4)


def test_a_certain_probability_is_in_the_last_bin_and_has_finite_log_odds() -> None:
    assert metrics.bin_numbers(np.array([0.0, 1 / 15, 0.99, 1.0])).tolist() == [0, 1, 14, 14]
    truth = np.array([0, 1, 1, 0])
    assert np.isfinite(metrics.calibration_slope(truth, np.array([0.0, 0.3, 1.0, 0.6])))


def test_the_bins_of_a_reliability_diagram_have_their_own_images() -> None:
    found = metrics.reliability(np.array([0, 1, 1]), np.array([0.01, 0.03, 0.99]))
    assert found == [
        {"probability": pytest.approx(0.02), "share": 0.5, "images": 2},
        {"probability": pytest.approx(0.99), "share": 1.0, "images": 1},
    ]


def test_too_high_probabilities_are_above_the_prevalence() -> None:
    of = metrics.binary(0.5)["mean probability less prevalence"]
    assert of(np.array([0, 0, 0, 1]), np.full(4, 0.5)) == pytest.approx(0.25)


def test_the_partial_auroc_is_the_area_above_80_percent_sensitivity() -> None:
    truth, probability = simulated()
    rate, sensitivity, _ = roc_curve(truth, probability)
    grid = np.linspace(0, 1, 200_001)
    above = np.maximum(np.interp(grid, rate, sensitivity) - 0.8, 0)
    assert metrics.partial_auroc(truth, probability) == pytest.approx(above.mean(), abs=1e-4)
    assert metrics.partial_auroc(truth, truth.astype(float)) == pytest.approx(0.2)
    chance = np.random.default_rng(3).random(len(truth))
    assert metrics.partial_auroc(truth, chance) == pytest.approx(0.02, abs=0.005)


def test_figures_at_a_threshold_of_a_worked_case() -> None:
    truth = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    probability = np.array([0.9, 0.6, 0.1, 0.7, 0.2, 0.2, 0.1, 0.0])
    found = {name: of(truth, probability) for name, of in metrics.at_threshold(0.5).items()}
    assert found == {
        "sensitivity": pytest.approx(2 / 3),
        "specificity": pytest.approx(4 / 5),
        "positive predictive value": pytest.approx(2 / 3),
        "negative predictive value": pytest.approx(4 / 5),
        "balanced accuracy": pytest.approx((2 / 3 + 4 / 5) / 2),
        "accuracy": pytest.approx(6 / 8),
        # Two hits, and one alarm that weighs as much at even odds.
        "net benefit": pytest.approx((2 - 1) / 8),
    }
    # Who is at the threshold is called.
    called = {name: of(truth, probability) for name, of in metrics.at_threshold(0.6).items()}
    assert called == {**found, "net benefit": pytest.approx((2 - 1.5) / 8)}
    assert metrics.net_benefit(truth, probability, 0.2) == pytest.approx((2 - 3 / 4) / 8)
    assert np.isnan(metrics.net_benefit(truth, probability, 1.0))
    nothing_called = metrics.at_threshold(1.0)["positive predictive value"]
    assert np.isnan(nothing_called(truth, probability))


def test_f1_is_given_in_every_reading() -> None:
    truth, found = np.array([1, 0, 0, 0]), np.array([1, 1, 0, 0])
    assert {n: of(truth, found) for n, of in metrics.f1_readings(truth, range(2)).items()} == {
        "binary": pytest.approx(2 / 3),
        "macro": pytest.approx((2 / 3 + 4 / 5) / 2),
        "weighted": pytest.approx((2 / 3 + 3 * 4 / 5) / 4),
    }
    # Three classes, of which two are there: no reading is binary, and nothing is averaged over what
    # is not there.
    of_three = metrics.f1_readings(np.array([0, 1]), range(3))
    assert set(of_three) == {"macro", "weighted"}
    assert of_three["macro"](np.array([0, 1]), np.array([0, 2])) == pytest.approx(0.5)


def test_nothing_found_is_an_f1_of_zero() -> None:
    truth, nothing = np.array([1, 0, 0]), np.zeros(3, int)
    readings = metrics.f1_readings(truth, range(2))
    assert readings["binary"](truth, nothing) == 0
    assert readings["binary"](np.zeros(3, int), nothing) == 0
    assert readings["macro"](truth, nothing) == pytest.approx(4 / 5 / 2)


def test_the_balanced_accuracy_is_the_mean_recall_of_the_classes_that_are_there() -> None:
    truth, found = np.array([0, 0, 0, 0, 2]), np.array([0, 0, 0, 1, 1])
    of = metrics.categorical(truth, range(3))["balanced accuracy"]
    assert of(truth, found) == pytest.approx(3 / 4 / 2)
    # A resample without one of them is no easier: it would be of another figure than the value.
    assert of(truth[:4], found[:4]) == pytest.approx(3 / 4 / 2)


def test_far_misses_weigh_more_in_the_quadratic_kappa() -> None:
    truth = np.array([0, 1, 2, 3, 4] * 4)
    near, far = truth.copy(), truth.copy()
    near[0], far[0] = 1, 4
    labels = range(5)
    assert metrics.quadratic_kappa(truth, truth, labels) == 1
    assert metrics.quadratic_kappa(truth, near, labels) > metrics.quadratic_kappa(
        truth, far, labels
    )
    # Bins that are absent keep their distance: from 4 to 1 is three steps.
    two = metrics.quadratic_kappa(np.array([0, 0, 4, 4]), np.array([0, 0, 4, 1]), labels)
    assert two == pytest.approx(0.690, abs=0.001)
    # Of one class nothing can be told from chance.
    one = np.full(4, 2)
    assert np.isnan(metrics.quadratic_kappa(one, one, labels))
    assert metrics.quadratic_kappa(one, np.array([2, 2, 2, 3]), labels) == 0
    assert metrics.quadratic_kappa(one, np.full(4, 3), labels) == 0


def test_a_confusion_matrix_has_a_row_a_true_class() -> None:
    found = metrics.confusion(np.array([0, 0, 2]), np.array([0, 2, 2]), ("a", "b", "c"))
    assert found == {"labels": ["a", "b", "c"], "counts": [[1, 0, 1], [0, 0, 0], [0, 0, 1]]}
