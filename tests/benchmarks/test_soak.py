"""Whether a service grows is told from its slope, and one that answers wrongly does not pass."""

from collections import Counter

import numpy as np
import pytest

from benchmarks.soak import slope_of, unexpected


def test_a_service_that_grows_has_the_slope_it_grows_by() -> None:
    requests = np.arange(10_000, 100_000, 500.0)
    noise = np.random.default_rng(0).normal(0, 0.05, len(requests))
    slope, low, high = slope_of(requests, 200 + 7.0 * requests / 100_000 + noise)
    assert slope == pytest.approx(7.0, abs=0.3)
    assert 0 < low < 7.0 < high


def test_one_that_wanders_about_a_level_has_none_that_can_be_told() -> None:
    requests = np.arange(10_000, 100_000, 500.0)
    _, low, high = slope_of(requests, 200 + np.sin(requests / 9_000))
    assert low < 0 < high


def test_the_damaged_image_is_refused_and_the_others_are_answered() -> None:
    assert unexpected(Counter({"200": 900, "422": 101}), images=10) == 0


@pytest.mark.parametrize(
    ("statuses", "images"),
    [
        ({"200": 900, "422": 99, "500": 1}, 10),
        ({"200": 900, "422": 99, "broken": 1}, 10),
        ({"200": 700, "422": 300}, 10),
        ({"200": 1000}, 10),
        ({"422": 1000}, 10),
        ({"422": 1000}, 2),
    ],
)
def test_anything_else_is_not_expected(statuses: dict[str, int], images: int) -> None:
    assert unexpected(Counter(statuses), images) > 0
