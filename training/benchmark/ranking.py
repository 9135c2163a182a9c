"""The ranking: which backbones are best, which are tied with the best, and which to take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, norm

from training.benchmark.probes import AUROC, Judged

Floats = NDArray[np.floating]

SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Place:
    """One backbone's place.

    Attributes:
        name: Of the backbone.
        behind: How far its AUROC is behind the best's.
        p_value: Of that difference, adjusted for all pairs (Holm 1979); 1 for the best.
        tied: Not shown to be worse than the best.
    """

    name: str
    behind: float
    p_value: float
    tied: bool


def rank(judged: Mapping[str, Judged]) -> list[Place]:
    """Backbones by AUROC, best first, each compared with the best on the same resamples.

    Which one is best is read off the same data, so all pairs of backbones count as compared.
    """
    order = sorted(judged, key=lambda name: -judged[name].values[AUROC])
    pairs = [(i, j) for i in range(len(order)) for j in range(i + 1, len(order))]
    raw = [_p_value(judged[order[i]], judged[order[j]]) for i, j in pairs]
    adjusted = dict(zip(pairs, holm(raw), strict=True))
    places = []
    for number, name in enumerate(order):
        p_value = adjusted[0, number] if number else 1.0
        behind = judged[order[0]].values[AUROC] - judged[name].values[AUROC]
        places.append(Place(name, behind, p_value, p_value >= SIGNIFICANT))
    return places


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, step down (Holm 1979)."""
    adjusted = [0.0] * len(p_values)
    least = 0.0
    for done, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - done) * p_values[index]))
        adjusted[index] = least
    return adjusted


def rank_correlation(one: Sequence[float | None], other: Sequence[float | None]) -> float | None:
    """Kendall's tau over what both have; None with fewer than three, or where one is constant."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    if len(pairs) < 3:
        return None
    tau = float(kendalltau(*zip(*pairs, strict=True))[0])
    return None if np.isnan(tau) else tau


def recommend(
    places: Sequence[Place], milliseconds: Mapping[str, float], budget: float | None
) -> str | None:
    """The fastest of those tied for first within a budget; else the best that keeps it.

    Args:
        places: Best first.
        milliseconds: One image, by name.
        budget: Milliseconds; None for no limit.

    Returns:
        Its name, or None where none keeps the budget (or none was measured).
    """
    kept = [
        place
        for place in places
        if place.name in milliseconds and (budget is None or milliseconds[place.name] <= budget)
    ]
    tied = [place for place in kept if place.tied]
    if tied:
        return min(tied, key=lambda place: milliseconds[place.name]).name
    return kept[0].name if kept else None


def pareto(quality: Sequence[float], speed: Sequence[float]) -> list[bool]:
    """Which points no other is both better and faster than."""
    return [
        not any(
            q >= own and s >= fast and (q > own or s > fast)
            for q, s in zip(quality, speed, strict=True)
        )
        for own, fast in zip(quality, speed, strict=True)
    ]


def _p_value(best: Judged, other: Judged) -> float:
    difference = best.values[AUROC] - other.values[AUROC]
    spread = float(np.nanstd(best.replicates[AUROC] - other.replicates[AUROC], ddof=1))
    spread *= max(best.widening[AUROC], other.widening[AUROC])
    if not spread:
        return 1.0 if not difference else 0.0
    return float(2 * norm.sf(abs(difference) / spread))
