"""Are the backbone benchmark's statistics right? Simulated features with known truth.

.venv/bin/python benchmarks/probe_coverage.py > page.part &&
    mv page.part docs/probe-coverage.md

Every study draws lesions with one to three images each. Without signal, every probe's AUROC is 0.5
in truth, and the 95 % intervals must hold it in 95 of 100 studies. With a planted best backbone the
ranking must find it, and a copy of it must be tied with it.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from training.benchmark import probes, ranking
from training.statistics import Clusters

LESIONS = 300
CHANNELS = 96
PREVALENCE = 0.4
# Of the planted backbones: how far apart the classes are in one direction.
EQUAL, BACKBONES = 0.9, 12
BEST, OTHERS = 1.6, (0.9, 0.9, 0.6, 0.6, 0.3, 0.0)
NOTHING = ("logistic probe", "neighbours", "logistic probe, pooled scores, plain bootstrap")

Floats = NDArray[np.float64]


def draw(
    generator: np.random.Generator, lesions: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Truth and lesion of every image."""
    lesion = np.repeat(np.arange(lesions), generator.choice([1, 2, 3], lesions, p=[0.6, 0.3, 0.1]))
    truth = (generator.random(lesions) < PREVALENCE).astype(np.int64)
    return truth[lesion], lesion


def features(
    generator: np.random.Generator, truth: NDArray[np.int64], lesion: NDArray[np.int64], gap: float
) -> Floats:
    """Images of one lesion look alike; the classes are `gap` apart."""
    values = 0.7 * generator.normal(size=(lesion.max() + 1, CHANNELS))[lesion]
    values += 0.7 * generator.normal(size=values.shape)
    values[:, 0] += gap * truth
    return values


def without_signal(seed: int) -> dict[str, bool]:
    """Whether each interval holds 0.5."""
    generator = np.random.default_rng([seed, 0])
    truth, lesion = draw(generator, LESIONS)
    names = lesion.astype(str).tolist()
    with threadpool_limits(1):
        study = probes.design(truth, names, seed, replicates=400)
        projected = probes.project(features(generator, truth, lesion, 0.0))
        found = [probes.logistic(projected, study), probes.neighbours(projected, study)]
        intervals = [judged.interval(probes.FIGURES[0]) for judged in found]
        # What one would do without thinking: one AUROC over the scores of all folds.
        scores = found[0].scores
        pooled = Clusters(names).bootstrap(
            {"AUROC": lambda chosen: float(roc_auc_score(truth[chosen], scores[chosen]))}, seed, 300
        )["AUROC"]
    intervals.append((pooled.low, pooled.high))
    return {name: low <= 0.5 <= high for name, (low, high) in zip(NOTHING, intervals, strict=True)}


def with_planted(seed: int) -> tuple[bool, bool, float, float, float, float]:
    """Whether the best is found, its copy tied, the share of others tied; its AUROC, interval."""
    generator = np.random.default_rng([seed, 1])
    truth, lesion = draw(generator, LESIONS)
    with threadpool_limits(1):
        study = probes.design(truth, lesion.astype(str).tolist(), seed, replicates=400)
        best = features(generator, truth, lesion, BEST)
        every = {"best": best, "copy": best.copy()}
        every |= {
            f"other {i}": features(generator, truth, lesion, gap) for i, gap in enumerate(OTHERS)
        }
        judged = {n: probes.logistic(probes.project(v), study) for n, v in every.items()}
    places = {place.name: place for place in ranking.rank(judged)}
    tied = sum(place.tied for name, place in places.items() if name.startswith("other"))
    figure = probes.FIGURES[0]
    value, (low, high) = judged["best"].values[figure], judged["best"].interval(figure)
    return places["best"].tied, places["copy"].tied, tied / len(OTHERS), value, low, high


def all_equal(seed: int) -> bool:
    """Whether any of several equally good backbones is called worse than the best."""
    generator = np.random.default_rng([seed, 2])
    truth, lesion = draw(generator, LESIONS)
    with threadpool_limits(1):
        study = probes.design(truth, lesion.astype(str).tolist(), seed, replicates=400)
        every = [features(generator, truth, lesion, EQUAL) for _ in range(BACKBONES)]
        judged = {str(i): probes.logistic(probes.project(v), study) for i, v in enumerate(every)}
    return not all(place.tied for place in ranking.rank(judged))


def lines(studies: int) -> Iterator[str]:
    """The page."""
    with ProcessPoolExecutor() as pool:
        run = partial(pool.map, chunksize=2)
        nothing = list(tqdm(run(without_signal, range(studies)), "no signal", studies))
        planted = list(tqdm(run(with_planted, range(studies)), "planted", studies))
        equal = list(tqdm(run(all_equal, range(studies)), "equal", studies))
    spread = 1.96 * (0.95 * 0.05 / studies) ** 0.5
    yield "# Are the backbone benchmark's statistics right?\n"
    yield "<!-- Generated by `benchmarks/probe_coverage.py`; do not edit. -->\n"
    yield (
        f"{studies:,} simulated studies of {LESIONS:,} lesions with one to three images, "
        f"{PREVALENCE:.0%} melanoma, {CHANNELS} features, seeds 0 to {studies - 1:,}.\n"
    )
    yield "Without any signal, the truth is an AUROC of 0.5:\n"
    yield "| 95 % interval of | holds 0.5 in | a true 95 % would show |"
    yield "|---|---|---|"
    for name in NOTHING:
        share = np.mean([study[name] for study in nothing])
        yield f"| {name} | {share:.1%} | {0.95 - spread:.1%} to {0.95 + spread:.1%} |"
    found, copied, tied, values, low, high = (
        np.array(column) for column in zip(*planted, strict=True)
    )
    yield "\nWith one planted best backbone, a copy of it and six worse ones:\n"
    yield "| | share of studies |"
    yield "|---|---|"
    yield f"| the planted best is found (first, or tied for it) | {found.mean():.1%} |"
    yield f"| its copy is tied with it | {copied.mean():.1%} |"
    yield f"| of the worse ones, still tied | {tied.mean():.1%} |"
    expected = values.mean()
    inside = ((low <= expected) & (expected <= high)).mean()
    yield f"| its interval holds its mean AUROC over studies ({expected:.3f}) | {inside:.1%} |"
    yield (
        f"| of {BACKBONES} equally good, independent ones, any is called worse than the best | "
        f"{np.mean(equal):.1%} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=400)
    print("\n".join(lines(parser.parse_args().studies)))
