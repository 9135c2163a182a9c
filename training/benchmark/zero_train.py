"""The paper's table, and the truth about it: accuracy of random heads on frozen features.

A two-way head that was never trained answers by chance; which side of chance it falls on depends on
its seed and the backbone's features, and hardly on how good these are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest, kendalltau

Floats = NDArray[np.floating]
Truth = NDArray[np.int64]

SEEDS = 1000
_TAU_PAIRS = 200
_DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class Chance:
    """What random heads give, over seeds.

    Attributes:
        mean: Of each backbone's accuracy, [B].
        low: 5 % quantile of it, [B].
        high: 95 % quantile of it, [B].
        called_best: Share of the seeds with which each backbone would have been called best, [B].
        best: Mean over seeds of the best backbone's accuracy.
        worst: Of the worst's.
        tau: Mean of Kendall's rank correlation between two seeds' rankings.
        tau_low: 5 % quantile of it.
        tau_high: 95 % quantile of it.
    """

    mean: Floats
    low: Floats
    high: Floats
    called_best: Floats
    best: float
    worst: float
    tau: float
    tau_low: float
    tau_high: float


def accuracies(features: Floats, truth: Truth, seeds: int = SEEDS) -> Floats:
    """The accuracy of a random head on the features, by seed: [seeds].

    Args:
        features: float32 [N, C].
        truth: 0 or 1, [N].
        seeds: 0 to this, exclusive.
    """
    weights, biases = _heads(features.shape[1], seeds)
    answers = features.astype(np.float32, copy=False) @ weights + biases > 0
    right: Floats = (answers == (truth == 1)[:, None]).mean(axis=0)
    return right


@lru_cache(maxsize=4)
def _heads(channels: int, seeds: int) -> tuple[Floats, Floats]:
    """Second output less first of `nn.Linear(channels, 2)` as PyTorch draws it, by seed."""
    bound = channels**-0.5
    weights = np.empty((channels, seeds), np.float32)
    biases = np.empty(seeds, np.float32)
    for seed in range(seeds):
        # What nn.Linear draws after torch.manual_seed(seed), without touching the global state.
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(2, channels).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(2).uniform_(-bound, bound, generator=generator)
        weights[:, seed] = (weight[1] - weight[0]).numpy()
        biases[seed] = float(bias[1] - bias[0])
    return weights, biases


def wilson(accuracy: float, images: int) -> tuple[float, float]:
    """95 % interval of a share of independent images (Wilson 1927)."""
    interval = binomtest(round(accuracy * images), images).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def chance(table: Sequence[Floats]) -> Chance:
    """What the accuracies of several backbones over the same seeds say.

    Args:
        table: By backbone, as `accuracies` gives them.
    """
    values = np.stack(table)
    best = values == values.max(axis=0)
    low, high = np.quantile(values, [0.05, 0.95], axis=1)
    taus = _taus(values)
    return Chance(
        mean=values.mean(axis=1),
        low=low,
        high=high,
        # Several best share one seed.
        called_best=(best / best.sum(axis=0)).mean(axis=1),
        best=float(values.max(axis=0).mean()),
        worst=float(values.min(axis=0).mean()),
        tau=float(taus.mean()),
        tau_low=float(np.quantile(taus, 0.05)),
        tau_high=float(np.quantile(taus, 0.95)),
    )


def extremes_by_chance(images: int, backbones: int) -> tuple[float, float]:
    """The worst and best accuracy to expect of so many classifiers that toss a coin an image."""
    coins = np.random.default_rng(0).binomial(images, 0.5, (_DRAWS, backbones)) / images
    return float(coins.min(axis=1).mean()), float(coins.max(axis=1).mean())


def _taus(values: Floats) -> Floats:
    if len(values) < 2 or values.shape[1] < 2:
        return np.array([np.nan])
    generator = np.random.default_rng(0)
    pairs = [generator.choice(values.shape[1], 2, replace=False) for _ in range(_TAU_PAIRS)]
    taus = np.array([kendalltau(values[:, one], values[:, other])[0] for one, other in pairs])
    # Undefined where all backbones tie.
    return taus[~np.isnan(taus)] if not np.isnan(taus).all() else np.array([np.nan])
