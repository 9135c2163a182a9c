"""Do the 95 % intervals cover the truth in 95 of 100 studies?

.venv/bin/python benchmarks/coverage.py > page.part &&
    mv page.part docs/coverage.md

Every study draws lesions with one to four images each: a lesion is melanoma or not, its images
share a difficulty, and the model answers a probability that is off by a known amount. What the
figures are in truth is measured once, on a large population.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import sklearn
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from training import metrics
from training.statistics import Clusters, Difference, Estimate, Statistic, bounded

FIGURES = (
    "AUROC",
    "sensitivity",
    "specificity",
    "positive predictive value",
    "Brier score",
    "mean probability less prevalence",
)
THRESHOLD = 0.15
PREVALENCE = 0.12
LESIONS = 600
# About twenty lesions with melanoma, as a group of a report may have.
FEW_LESIONS = 160
BETTER = "difference of AUROC to another model, paired"
FEW = " of a small group"
IN_FEW = ("AUROC", "sensitivity", "specificity")
POPULATION = 400_000
# Resampling is drawn from other seeds than the studies.
RESAMPLING = 10**6
NAIVE = "AUROC, images taken for independent"

Arrays = tuple[NDArray[np.int64], NDArray[np.float64], list[str]]


def study(seed: int, lesions: int) -> tuple[Arrays, NDArray[np.float64]]:
    """Truth, predicted probability and lesion of every image; and another model's probability."""
    generator = np.random.default_rng([seed, lesions])
    melanoma = generator.random(lesions) < PREVALENCE
    images = generator.choice([1, 2, 3, 4], size=lesions, p=[0.6, 0.25, 0.1, 0.05])
    shared = generator.normal(0, 1.0, lesions)
    lesion = np.repeat(np.arange(lesions), images)
    logit = 2.2 * melanoma - 3.0 + shared
    seen = logit[lesion] + generator.normal(0, 0.7, len(lesion))
    other = seen - 0.5 * melanoma[lesion] + generator.normal(0, 0.5, len(lesion))
    truth = melanoma[lesion].astype(np.int64)
    return (truth, _sigmoid(seen), lesion.astype(str).tolist()), _sigmoid(other)


def auroc(truth: NDArray[np.int64], score: NDArray[np.float64]) -> float:
    """By ranks, as fast as a million resamples need; the same as scikit-learn's."""
    positive = truth == 1
    count = int(positive.sum())
    below = rankdata(score)[positive].sum() - count * (count + 1) / 2
    return float(below / (count * (len(truth) - count)))


MEASURES = {**metrics.binary(THRESHOLD), "AUROC": auroc}


def truths_of(population: int) -> dict[str, float]:
    """What the figures are in truth."""
    (truth, probability, _), other = study(10**9, population)
    measures = MEASURES
    found = {name: measures[name](truth, probability) for name in FIGURES}
    assert abs(found["AUROC"] - roc_auc_score(truth, probability)) < 1e-12
    found[BETTER] = found["AUROC"] - measures["AUROC"](truth, other)
    found |= {name + FEW: found[name] for name in IN_FEW}
    return found | {NAIVE: found["AUROC"]}


def covered(seed: int, truths: dict[str, float], replicates: int) -> dict[str, int]:
    """By figure: 0 where one study's interval holds the truth, -1 below it, 1 above it."""
    measures = MEASURES

    def on(name: str, truth: NDArray[np.int64], values: NDArray[np.float64]) -> Statistic:
        return lambda chosen: measures[name](truth[chosen], values[chosen])

    found: dict[str, Estimate | Difference] = {}
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        (truth, probability, names), other = study(seed, LESIONS)
        clusters = Clusters(names)
        statistics = {name: on(name, truth, probability) for name in FIGURES}
        found |= clusters.bootstrap(statistics, RESAMPLING + seed, replicates)
        ours = {BETTER: on("AUROC", truth, probability)}
        theirs = {BETTER: on("AUROC", truth, other)}
        found |= clusters.compare(ours, theirs, RESAMPLING + seed, replicates)
        alone = Clusters([str(i) for i in range(len(names))])
        found |= alone.bootstrap({NAIVE: statistics["AUROC"]}, RESAMPLING + seed, replicates)

        (truth, probability, names), _ = study(seed, FEW_LESIONS)
        clusters = Clusters(names)
        few = {name + FEW: on(name, truth, probability) for name in IN_FEW}
        for name, estimate in clusters.bootstrap(few, RESAMPLING + seed, replicates).items():
            lesions = len({n for n, y in zip(names, truth, strict=True) if y == ("sens" in name)})
            found[name] = estimate if "AUROC" in name else bounded(estimate, lesions)
    return {
        name: -1 if interval.high < truths[name] else int(interval.low > truths[name])
        for name, interval in found.items()
    }


def lines(studies: int, replicates: int) -> Iterator[str]:
    """The page."""
    truths = truths_of(POPULATION)
    with ProcessPoolExecutor() as pool:
        work = pool.map(
            partial(covered, truths=truths, replicates=replicates), range(studies), chunksize=4
        )
        results = list(tqdm(work, "studies", studies))
    yield "# Do the intervals cover?\n"
    yield "<!-- Generated by `benchmarks/coverage.py`; do not edit. -->\n"
    yield (
        f"{studies:,} simulated studies of {LESIONS:,} lesions with one to four images each (a "
        f"small group: {FEW_LESIONS:,}), {PREVALENCE:.0%} of them melanoma, {replicates:,} "
        f"bootstrap replicates over lesions, seeds 0 to {studies - 1:,}. The truth is that of "
        f"{POPULATION:,} lesions. The last column is the range in which a true coverage of 95 % "
        "would be seen in 95 of 100 such simulations.\n"
    )
    yield "| figure | truth | covered | truth above | truth below | by chance |"
    yield "|---|---|---|---|---|---|"
    spread = 1.96 * (0.95 * 0.05 / studies) ** 0.5
    for name in results[0]:
        sides = np.array([result[name] for result in results])
        yield (
            f"| {name} | {truths[name]:.4f} | {(sides == 0).mean():.1%} | "
            f"{(sides < 0).mean():.1%} | {(sides > 0).mean():.1%} | "
            f"{0.95 - spread:.1%} to {0.95 + spread:.1%} |"
        )


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = 1 / (1 + np.exp(-values))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--replicates", type=int, default=500)
    arguments = parser.parse_args()
    print("\n".join(lines(arguments.studies, arguments.replicates)))
