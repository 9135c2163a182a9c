"""Calibration and threshold, found again from simulated outcomes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.bundle import melanoma_probability
from models.calibration import (
    CalibrationError,
    choose_threshold,
    fit_calibration,
    shift_prevalence,
)


def test_calibration_finds_slope_and_intercept_again() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, 20_000)
    melanoma = generator.random(20_000) < 1 / (1 + np.exp(-(0.5 * logits - 1)))
    found = fit_calibration(logits, melanoma)
    assert (found.slope, found.intercept) == pytest.approx((0.5, -1), abs=0.06)
    assert melanoma_probability(logits, found).mean() == pytest.approx(melanoma.mean(), abs=1e-9)


@given(
    # Of hundredths: what no logit tells apart, another scale may not either.
    st.lists(st.tuples(st.integers(-3000, 3000), st.booleans()), min_size=4, max_size=50),
    st.floats(0.1, 100),
    st.floats(-1000, 1000),
)
def test_whatever_the_scale_the_probabilities_are_the_same(rows, scale, shift) -> None:
    hundredths, melanoma = (np.array(column) for column in zip(*rows, strict=True))
    logits = hundredths / 100
    try:
        found = fit_calibration(logits, melanoma)
    except (CalibrationError, ValueError):
        return
    if found.slope > 50 or found.slope * logits.std() < 1e-6:
        return
    moved = fit_calibration(scale * logits + shift, melanoma)
    np.testing.assert_allclose(
        melanoma_probability(logits, found),
        melanoma_probability(scale * logits + shift, moved),
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("logits", "melanoma", "sentence"),
    [
        ([3.0, 2.5, 1.0, 2.0, -1.0], [0, 0, 1, 0, 1], "do not rise with melanoma"),
        ([1.0, 2.0, 3.0], [0, 0, 0], "one kind is missing"),
        ([1.0, 2.0, 2.0, 4.0], [0, 0, 1, 1], "slope has no bound"),
    ],
)
def test_outcomes_that_cannot_be_fitted_are_refused(logits, melanoma, sentence) -> None:
    with pytest.raises(CalibrationError, match=sentence):
        fit_calibration(np.array(logits), np.array(melanoma, bool))


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


@pytest.mark.parametrize("lower", [0.0, 0.5])
def test_the_threshold_is_above_the_next_lower_probability_however_near_that_is(lower) -> None:
    probabilities = np.array([lower, np.nextafter(lower, 1)])
    assert choose_threshold(probabilities, np.array([1, 1], bool), 0.5) == probabilities[1]


def test_the_threshold_keeps_off_every_image() -> None:
    probabilities = np.array([0.1, 0.2, 0.4, 0.5])
    assert choose_threshold(probabilities, np.array([0, 1, 0, 1], bool), 0.5) == pytest.approx(0.45)
    assert choose_threshold(probabilities, np.array([0, 1, 0, 1], bool), 1.0) == pytest.approx(0.15)
    lowest = choose_threshold(probabilities, np.array([1, 1, 0, 1], bool), 1.0)
    assert 0.09 < lowest < 0.1 - 1e-4  # by more than an answer's last digit


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_another_prevalence_and_back_is_the_same(probability, old, new) -> None:
    moved = shift_prevalence(probability, old, new)
    assert shift_prevalence(moved, new, old) == pytest.approx(probability, abs=1e-9)
    # An image that says nothing has the prevalence itself.
    assert shift_prevalence(old, old, new) == pytest.approx(new)
