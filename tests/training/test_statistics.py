"""Intervals and comparisons: images of one component are drawn together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from training.statistics import Clusters, Estimate, _interval, _p_value, _Shape, _shape, bounded


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
        statistics = {"mean": lambda chosen: float(data[chosen].mean())}
        found = Clusters(units).bootstrap(statistics)["mean"]
        assert found.low < found.value < found.high
        return found.high - found.low

    assert width(4, clustered=True) == pytest.approx(width(1, clustered=True), rel=0.15)
    assert width(4, clustered=False) < 0.6 * width(1, clustered=True)


def test_a_statistic_that_is_nowhere_defined_has_no_interval() -> None:
    clusters = Clusters(["a", "b"])
    found = clusters.bootstrap({"none": lambda chosen: float("nan")}, replicates=10)["none"]
    assert np.isnan([found.value, found.low, found.high]).all()


def test_a_statistic_that_is_seldom_defined_has_no_interval() -> None:
    clusters = Clusters([str(number) for number in range(20)])
    seldom = {"seldom": lambda chosen: 1.0 if (chosen == 0).sum() else float("nan")}
    assert np.isnan(clusters.bootstrap(seldom)["seldom"].low)


def test_a_share_of_all_or_none_has_an_exact_interval() -> None:
    # Ten of ten: 0.9 to the tenth is 35 %, so 1.000 to 1.000 would be a lie.
    found = bounded(Estimate(1.0, 1.0, 1.0), clusters=10)
    assert (found.low, found.high) == (pytest.approx(0.692, abs=0.001), 1.0)
    assert bounded(Estimate(0.0, 0.0, 0.0), 10).high == pytest.approx(0.308, abs=0.001)
    assert bounded(Estimate(0.9, 0.8, 1.0), 10) == Estimate(0.9, 0.8, 1.0)


def test_another_figure_that_no_resample_changes_has_no_interval() -> None:
    found = bounded(Estimate(0.5, 0.5, 0.5))
    assert (found.value, np.isnan([found.low, found.high]).all()) == (0.5, True)
    assert bounded(Estimate(0.5, 0.4, 0.6)) == Estimate(0.5, 0.4, 0.6)
    for estimate, clusters in ((Estimate(0.5, 0.5, 0.5), 10), (Estimate(1.0, 1.0, 1.0), None)):
        assert np.isnan(bounded(estimate, clusters).low)


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    generator = np.random.default_rng(2)
    hard = generator.normal(size=300)
    first, second = hard + 0.1, hard + generator.normal(0, 0.05, 300)
    clusters = Clusters([str(number // 2) for number in range(300)])

    def mean(values: np.ndarray):
        return {"mean": lambda chosen: float(values[chosen].mean())}

    found = clusters.compare(mean(first), mean(second))["mean"]
    assert found.value == pytest.approx(0.1, abs=0.01)
    assert found.low > 0
    assert 0 < found.p_value < 0.005
    alone = clusters.bootstrap(mean(first))["mean"]
    assert found.high - found.low < 0.3 * (alone.high - alone.low)
    equal = clusters.compare(mean(first), mean(first))["mean"]
    assert (equal.value, equal.p_value) == (0, 1)


@settings(deadline=None, max_examples=30)
@given(shift=st.floats(-0.6, 0.6), seed=st.integers(0, 99))
def test_a_difference_is_significant_where_its_interval_leaves_zero_out(
    shift: float, seed: int
) -> None:
    first = np.random.default_rng(seed).exponential(size=60) - 1 + shift
    statistics = {"mean": lambda chosen: float(first[chosen].mean())}
    none = {"mean": lambda chosen: 0.0}
    clusters = Clusters([str(number) for number in range(60)])
    found = clusters.compare(statistics, none)["mean"]
    assert found.low < found.value < found.high
    if found.low > 0 or found.high < 0:
        assert found.p_value < 0.065
    else:
        assert found.p_value > 0.035


def test_the_interval_of_a_mean_is_students() -> None:
    # A plain percentile interval of twelve values is a sixth too narrow.
    clusters = Clusters([str(number) for number in range(12)])
    ratios = []
    for seed in range(40):
        values = np.random.default_rng(seed).normal(size=12)
        statistics = {"mean": lambda chosen, values=values: float(values[chosen].mean())}
        found = clusters.bootstrap(statistics, seed)["mean"]
        student = 2 * stats.t.ppf(0.975, 11) * values.std(ddof=1) / 12**0.5
        ratios.append((found.high - found.low) / student)
    assert np.mean(ratios) == pytest.approx(1, abs=0.07)


def test_the_interval_of_a_skewed_figure_reaches_further_where_it_is_skewed() -> None:
    values = np.random.default_rng(3).lognormal(sigma=0.7, size=80)
    clusters = Clusters([str(number) for number in range(80)])
    found = clusters.bootstrap({"mean": lambda chosen: float(values[chosen].mean())})["mean"]
    generator = np.random.default_rng(4)
    drawn = [values[generator.integers(80, size=80)].mean() for _ in range(1000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.high > high
    assert (found.high - found.value) / (found.value - found.low) > 1.1 * (
        (high - found.value) / (found.value - low)
    )


# Of which a quantile is its own level.
EVEN = np.linspace(0, 1, 100_001)


def test_a_difference_that_no_resample_changes_has_no_interval() -> None:
    """Of a handful of melanomas that both models find, nothing is known for certain."""
    clusters = Clusters([str(number) for number in range(20)])
    all_found = {"sensitivity": lambda chosen: 1.0}
    found = clusters.compare(all_found, all_found)["sensitivity"]
    assert (found.value, found.p_value) == (0, 1)
    assert np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize("bias", [-0.3, 0.2])
@pytest.mark.parametrize("acceleration", [-0.05, 0.1])
def test_an_interval_is_efrons(bias: float, acceleration: float) -> None:
    """Efron 1987, equation 2.3."""
    expected = [
        stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        for z in stats.norm.ppf([0.025, 0.975])
    ]
    found = _interval(EVEN, _Shape(0.5, bias, acceleration, np.inf))
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("freedom", [12.0, np.inf])
@pytest.mark.parametrize("bias", [-0.3, 0.2])
@pytest.mark.parametrize("acceleration", [-0.05, 0.1])
def test_where_an_interval_ends_at_zero_five_percent_are_left(
    bias: float, acceleration: float, freedom: float
) -> None:
    shape = _Shape(0.5, bias, acceleration, freedom)
    for end in _interval(EVEN, shape):
        assert _p_value(EVEN - end, shape) == pytest.approx(0.05, abs=1e-3)


def test_fewer_degrees_of_freedom_widen_an_interval_as_students_t_does() -> None:
    low, high = _interval(EVEN, _Shape(0.5, 0.0, 0.0, 5.0))
    reach = stats.t.ppf(0.975, 5) * np.sqrt(1 + 1 / 5)
    assert (low, high) == pytest.approx(stats.norm.cdf([-reach, reach]), abs=1e-4)


def test_a_figures_shape_is_that_of_its_replicates_and_its_jackknife() -> None:
    # Two of ten are below the figure, and two the figure itself, which count half.
    drawn = np.array([1.0, 2, 3, 3, 4, 5, 6, 7, 8, 9, np.nan])
    left = np.array([2.0, 3, 3, 9, np.nan])
    shape = _shape(3.0, drawn, left)
    assert shape.bias == pytest.approx(stats.norm.ppf(0.3))
    away = left[:4].mean() - left[:4]
    squares = (away**2).sum()
    skewness = (away**3).sum() / squares**1.5
    assert shape.acceleration == pytest.approx(skewness / 6)
    assert skewness < 0  # without the largest value, the figure is far higher
    unexplained = (away**4).sum() / squares**2 - 1 / 4 - skewness**2
    assert unexplained > 0
    assert shape.freedom == pytest.approx(max(2 / unexplained, 1))
    # Where all replicates are on one side, the bias is no more than so many can show.
    assert _shape(0.5, drawn, left).bias == pytest.approx(stats.norm.ppf(1 / 11))
    assert _shape(9.5, drawn, left).bias == pytest.approx(stats.norm.ppf(10 / 11))
    # Of a figure that no part changes there is nothing to correct.
    assert _shape(3.0, drawn, np.full(4, 3.0))[1:] == (0, 0, np.inf)
