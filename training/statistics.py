"""Figures with an interval: a bootstrap over clusters, since images of one lesion are not two."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REPLICATES = 1000
CONFIDENCE = 0.95
# Of each class: with fewer, a figure means nothing, and is not given.
LEAST_IMAGES = 10

Positions = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Clusters:
    """Images grouped into the units that are resampled.

    Args:
        names: The cluster of each image.
    """

    def __init__(self, names: Sequence[str]):
        _, numbers = np.unique(np.asarray(names), return_inverse=True)
        order = np.argsort(numbers, kind="stable")
        starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
        self._members = np.split(order, starts[1:])

    def __len__(self) -> int:
        return len(self._members)

    def resample(self, generator: np.random.Generator) -> Positions:
        """Positions of the images of as many clusters, drawn with replacement."""
        drawn = generator.integers(len(self), size=len(self))
        return np.concatenate([self._members[number] for number in drawn])

    def bootstrap(
        self,
        statistic: Callable[[Positions], float],
        seed: int = 0,
        replicates: int = REPLICATES,
    ) -> Estimate:
        """A percentile interval (Field & Welsh 2007 for the clustered case).

        Args:
            statistic: Of the images at these positions; NaN where it is not defined.
            seed: Of the resampling.
            replicates: How often.
        """
        generator = np.random.default_rng(seed)
        total = sum(len(members) for members in self._members)
        values = [statistic(self.resample(generator)) for _ in range(replicates)]
        tail = (1 - CONFIDENCE) / 2
        low, high = np.nanquantile(values, [tail, 1 - tail])
        return Estimate(float(statistic(np.arange(total))), float(low), float(high))
