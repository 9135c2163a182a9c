"""Figures with an interval: a bootstrap over clusters, since images of one lesion are not two.

A plain percentile interval of an AUROC near 0.9 covers too seldom: it is taken from a skewed
distribution, and of twenty melanomas it knows less than it pretends. So the intervals are
bias-corrected and accelerated (BCa: Efron 1987), and expanded to Student's t (Hesterberg 2015,
section 3.2) with the degrees of freedom that the figure's standard error really has.
benchmarks/coverage.py measures what they cover.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

REPLICATES = 1000
CONFIDENCE = 0.95
# Clusters of each class: with fewer, a figure means nothing, and is not given.
LEAST_CLUSTERS = 10
# Share of resamples on which a figure must be defined for its interval to mean anything.
_LEAST_DEFINED = 0.95
# Parts of the clusters that the jackknife leaves out, one at a time: more say no more.
_JACKKNIFE_PARTS = 200

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]
Statistic = Callable[[Positions], float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """How much higher one model's figure is than another's, on the same images.

    Attributes:
        value: The difference.
        low: Of its 95 % confidence interval.
        high: Likewise.
        p_value: Two-sided, by the same distribution. Of few lesions it may be above 0.05 where
            the interval leaves zero out: so few resamples show no less.
    """

    value: float
    low: float
    high: float
    p_value: float


def bounded(estimate: Estimate, clusters: int | None = None) -> Estimate:
    """What to say where every resample gives the same figure: a bootstrap knows no uncertainty.

    A share of all or none has its exact interval (Clopper & Pearson 1934), another figure none.

    Args:
        estimate: By a bootstrap.
        clusters: That it is a share of; None where it is no share.
    """
    if not estimate.value == estimate.low == estimate.high:
        return estimate
    if clusters is not None and estimate.value in (0, 1):
        tail = ((1 - CONFIDENCE) / 2) ** (1 / max(clusters, 1))
        return Estimate(1.0, tail, 1.0) if estimate.value else Estimate(0.0, 0.0, 1 - tail)
    return Estimate(estimate.value, float("nan"), float("nan"))


class Clusters:
    """Images grouped into the units that are resampled.

    Args:
        names: The cluster of each image.

    Attributes:
        numbers: The cluster of each image as a number, from 0.
    """

    def __init__(self, names: Sequence[str]):
        _, numbers = np.unique(np.asarray(names), return_inverse=True)
        self.numbers = numbers
        order = np.argsort(numbers, kind="stable")
        starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
        self._members = np.split(order, starts[1:])
        self._count = len(names)

    def __len__(self) -> int:
        return len(self._members)

    def resample(self, generator: np.random.Generator) -> Positions:
        """Positions of the images of as many clusters, drawn with replacement."""
        drawn = generator.integers(len(self), size=len(self))
        return np.concatenate([self._members[number] for number in drawn])

    def bootstrap(
        self, statistics: Mapping[str, Statistic], seed: int = 0, replicates: int = REPLICATES
    ) -> dict[str, Estimate]:
        """Intervals of several figures, all on the same draws (Field & Welsh 2007).

        Args:
            statistics: Of the images at these positions; NaN where one is not defined.
            seed: Of the resampling.
            replicates: How often.
        """
        return {
            name: Estimate(shape.value, *_interval(drawn, shape))
            for name, (drawn, shape) in self._replicate(statistics, seed, replicates).items()
        }

    def compare(
        self,
        first: Mapping[str, Statistic],
        second: Mapping[str, Statistic],
        seed: int = 0,
        replicates: int = REPLICATES,
    ) -> dict[str, Difference]:
        """`first` less `second`, paired: both are evaluated on every resample.

        Args:
            first: One model's statistics.
            second: The other's, by the same names.
            seed: Of the resampling.
            replicates: How often.
        """

        def less(name: str) -> Statistic:
            return lambda chosen: first[name](chosen) - second[name](chosen)

        found = {}
        both = {name: less(name) for name in first}
        for name, (drawn, shape) in self._replicate(both, seed, replicates).items():
            own = bounded(Estimate(shape.value, *_interval(drawn, shape)))
            found[name] = Difference(own.value, own.low, own.high, _p_value(drawn, shape))
        return found

    def _replicate(
        self, statistics: Mapping[str, Statistic], seed: int, replicates: int
    ) -> dict[str, tuple[Floats, "_Shape"]]:
        """Every statistic on every resample, and the shape of its distribution."""
        generator = np.random.default_rng(seed)
        values: dict[str, list[float]] = {name: [] for name in statistics}
        for _ in range(replicates):
            chosen = self.resample(generator)
            for name, statistic in statistics.items():
                values[name].append(statistic(chosen))
        order = generator.permutation(len(self))
        everything = np.arange(self._count)
        left: dict[str, list[float]] = {name: [] for name in statistics}
        for part in np.array_split(order, min(len(self), _JACKKNIFE_PARTS)):
            chosen = np.flatnonzero(~np.isin(self.numbers, part))
            for name, statistic in statistics.items():
                left[name].append(statistic(chosen) if len(chosen) else float("nan"))
        return {
            name: (
                np.array(values[name]),
                _shape(float(statistic(everything)), np.array(values[name]), np.array(left[name])),
            )
            for name, statistic in statistics.items()
        }


class _Shape(NamedTuple):
    """How a figure is distributed.

    Attributes:
        value: The figure itself, on all images.
        bias: The normal quantile of the share of replicates below it.
        acceleration: How its standard error changes with it, from its jackknife's third moment.
        freedom: Degrees of freedom of that standard error (Satterthwaite's), for what the third
            moment does not explain already: of a share next to nothing.
    """

    value: float
    bias: float
    acceleration: float
    freedom: float

    @property
    def expansion(self) -> float:
        """Of the standard error, since resamples vary about their own mean."""
        return float(np.sqrt(1 + 1 / self.freedom))


def _shape(value: float, drawn: Floats, left: Floats) -> _Shape:
    """From the replicates, and from the figure with one part of the clusters left out at a time."""
    defined, left = drawn[~np.isnan(drawn)], left[~np.isnan(left)]
    influence = left.mean() - left if len(left) else left
    squares = float((influence**2).sum())
    if not squares or not len(defined):
        return _Shape(value, 0.0, 0.0, np.inf)
    # Ties count half: a share of few takes few values.
    below = (np.sum(defined < value) + np.sum(defined <= value)) / (2 * len(defined))
    least = 1 / (len(defined) + 1)
    bias = float(stats.norm.ppf(np.clip(below, least, 1 - least)))
    skewness = float((influence**3).sum()) / squares**1.5
    # The squared standard error's own relative variance, less what goes with the figure.
    unexplained = float((influence**4).sum()) / squares**2 - 1 / len(influence) - skewness**2
    freedom = max(2 / unexplained, 1.0) if unexplained > 0 else np.inf
    return _Shape(value, bias, skewness / 6, freedom)


def _defined(drawn: Floats) -> Floats | None:
    """The replicates that are a number, where they are enough to mean anything."""
    defined = drawn[~np.isnan(drawn)]
    return defined if len(defined) and len(defined) >= _LEAST_DEFINED * len(drawn) else None


def _interval(drawn: Floats, shape: _Shape) -> tuple[float, float]:
    defined = _defined(drawn)
    if defined is None:
        return float("nan"), float("nan")
    tail = (1 - CONFIDENCE) / 2
    reach = shape.expansion * stats.t.ppf([tail, 1 - tail], shape.freedom) + shape.bias
    # Where one cluster decides almost alone the correction runs past the last replicate.
    faster = np.maximum(1 - shape.acceleration * reach, 1e-9)
    quantiles = stats.norm.cdf(shape.bias + reach / faster)
    low, high = np.quantile(defined, quantiles)
    return float(low), float(high)


def _p_value(drawn: Floats, shape: _Shape) -> float:
    """Of zero: the interval that ends there, read backwards."""
    defined = _defined(drawn)
    if defined is None:
        return float("nan")
    # Never 0 or 1: so many replicates cannot show less (Davison & Hinkley 1997, 4.11).
    below = (np.sum(defined < 0) + np.sum(defined <= 0)) / 2
    distance = stats.norm.ppf((below + 0.5) / (len(defined) + 1)) - shape.bias
    reach = distance / max(1 + shape.acceleration * distance, 1e-9) - shape.bias
    return float(2 * stats.t.cdf(-abs(reach) / shape.expansion, shape.freedom))
