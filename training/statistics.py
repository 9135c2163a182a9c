"""Figures with an interval: a bootstrap over clusters, since images of one lesion are not two."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REPLICATES = 1000
CONFIDENCE = 0.95
# Clusters of each class: with fewer, a figure means nothing, and is not given.
LEAST_CLUSTERS = 10
# Share of resamples on which a figure must be defined for its interval to mean anything.
_LEAST_DEFINED = 0.95

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
        p_value: Two-sided, from the share of replicates on the other side of zero.
    """

    value: float
    low: float
    high: float
    p_value: float


def bounded(estimate: Estimate, clusters: int) -> Estimate:
    """The interval of a share, exact where all or none count (Clopper & Pearson 1934).

    There every resample gives the same share, and a bootstrap knows no uncertainty.

    Args:
        estimate: Of a share.
        clusters: That the share is of.
    """
    tail = ((1 - CONFIDENCE) / 2) ** (1 / max(clusters, 1))
    if estimate.value == estimate.low == estimate.high == 1:
        return Estimate(1.0, tail, 1.0)
    if estimate.value == estimate.low == estimate.high == 0:
        return Estimate(0.0, 0.0, 1 - tail)
    return estimate


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
        """Percentile intervals (Field & Welsh 2007 for the clustered case), all on the same draws.

        Args:
            statistics: Of the images at these positions; NaN where one is not defined.
            seed: Of the resampling.
            replicates: How often.
        """
        values = self._replicate(statistics, seed, replicates)
        everything = np.arange(self._count)
        return {
            name: Estimate(float(statistic(everything)), *_interval(values[name]))
            for name, statistic in statistics.items()
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

        both = {name: less(name) for name in first}
        values = self._replicate(both, seed, replicates)
        everything = np.arange(self._count)
        found = {}
        for name, difference in both.items():
            kept = values[name][~np.isnan(values[name])]
            # Never 0: so many replicates cannot show less (Davison & Hinkley 1997, 4.11).
            tail = (1 + min((kept <= 0).sum(), (kept >= 0).sum())) / (1 + len(kept))
            p_value = min(1.0, 2 * float(tail)) if len(kept) else float("nan")
            found[name] = Difference(
                float(difference(everything)), *_interval(values[name]), p_value
            )
        return found

    def _replicate(
        self, statistics: Mapping[str, Statistic], seed: int, replicates: int
    ) -> dict[str, NDArray[np.float64]]:
        generator = np.random.default_rng(seed)
        values: dict[str, list[float]] = {name: [] for name in statistics}
        for _ in range(replicates):
            chosen = self.resample(generator)
            for name, statistic in statistics.items():
                values[name].append(statistic(chosen))
        return {name: np.array(found, np.float64) for name, found in values.items()}


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    if not len(defined) or len(defined) < _LEAST_DEFINED * len(values):
        return float("nan"), float("nan")
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)
