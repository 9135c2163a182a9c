"""Probes: what a simple classifier can learn from frozen features, in folds over components.

Scores of different folds come from different classifiers, so every figure is of each fold's own
scores, and their mean is reported. That mean varies by more than a bootstrap of the held-out images
shows, since the folds learn from each other's images: how much more is measured on permuted labels,
where the truth is known, and every interval is as much wider.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.utils.extmath import randomized_svd

from training.data.manifest import DataError
from training.metrics import LEAST_SENSITIVITY, PARTIAL_AUROC

Floats = NDArray[np.floating]
Truth = NDArray[np.int64]

FOLDS = 5
AXES = 128
REPLICATES = 1000
NEIGHBOURS = 20
HIGH_SENSITIVITY = 0.95
AUROC = "AUROC"
FIGURES = (AUROC, PARTIAL_AUROC, "specificity at 95 % sensitivity")
# The largest value of each.
MOST = dict(zip(FIGURES, (1.0, 1 - LEAST_SENSITIVITY, 1.0), strict=True))
_PENALTIES = (1.0, 10.0, 100.0, 1_000.0)
_TEMPERATURE = 0.07
# Held-out images at a time, so that memory does not grow with the square of their number.
_BLOCK = 512
_PERMUTATIONS = 200
# Labels are exchanged among as many components of about one size, where more images than that share
# are of components whose size no other has.
_ALIKE, _MOST_ALONE = 10, 0.1
_NULL_BOOTSTRAPS = 10
_NULL_REPLICATES = 200
_Z = 1.959964


@dataclass(frozen=True, slots=True)
class Study:
    """What all backbones are judged on: the same folds, resamples and permutations.

    Attributes:
        truth: 0 or 1, [N].
        folds: Number of the fold that holds each image out, [N].
        weights: How often each resample has each image, float32 [R, N]: whole components at a
            time, in each fold as many as it has.
        permuted: Labels that were dealt out anew among components of one size, [N, P].
    """

    truth: Truth
    folds: NDArray[np.int64]
    weights: Floats
    permuted: Truth


@dataclass(frozen=True, slots=True)
class Judged:
    """One probe of one backbone.

    Attributes:
        values: By figure, the mean over folds.
        replicates: By figure, on every resample, [R].
        widening: Of intervals by figure, since the folds are not independent; at least 1.
        scores: Held out, [N]; those of different folds do not compare.
    """

    values: dict[str, float]
    replicates: dict[str, Floats] = field(repr=False)
    widening: dict[str, float]
    scores: Floats = field(repr=False)

    def interval(self, figure: str) -> tuple[float, float]:
        """95 %, by the resamples' standard error."""
        spread = float(np.nanstd(self.replicates[figure], ddof=1))
        reach = _Z * self.widening[figure] * spread
        value = self.values[figure]
        return max(value - reach, 0.0), min(value + reach, MOST[figure])


def design(
    truth: Truth, components: Sequence[str], seed: int = 0, replicates: int = REPLICATES
) -> Study:
    """Folds, resamples and permutations for a data set.

    Raises:
        DataError: There are too few components of a class.
    """
    _, groups = np.unique(np.asarray(components), return_inverse=True)
    each = [len(np.unique(groups[truth == label])) for label in (0, 1)]
    if min(each) < FOLDS:
        raise DataError(
            f"Probes need images of {FOLDS} components (lesions, patients) with melanoma and as "
            f"many without; there are {each[1]} and {each[0]}."
        )
    folds = np.zeros(len(truth), np.int64)
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    for number, (_, held) in enumerate(splitter.split(truth, truth, groups)):
        folds[held] = number
    if any(len(np.unique(truth[folds == number])) < 2 for number in range(FOLDS)):
        raise DataError(
            f"The components of both classes cannot be dealt out to {FOLDS} folds; use more images."
        )
    generator = np.random.default_rng(seed)
    weights = np.zeros((replicates, len(truth)), np.float32)
    for number in range(FOLDS):
        chosen = folds == number
        _, local = np.unique(groups[chosen], return_inverse=True)
        count = local.max() + 1
        drawn = generator.multinomial(count, np.full(count, 1 / count), replicates)
        weights[:, chosen] = drawn[:, local]
    permuted = np.stack([_permute(truth, groups, generator) for _ in range(_PERMUTATIONS)], axis=1)
    return Study(truth, folds, weights, permuted)


def project(features: Floats) -> Floats:
    """The leading principal components of the standardised features, with total variance 1.

    No label is used, so all images take part. Probes see these instead of up to 4,096 features.

    Args:
        features: [N, C].

    Returns:
        float64 [N, min(AXES, N - 1, C)].
    """
    values: Floats = features.astype(np.float32)
    values = values - values.mean(axis=0)
    scale = values.std(axis=0)
    values = values[:, scale > 1e-6 * max(float(scale.max()), 1e-30)]
    values = values / values.std(axis=0) if values.shape[1] else np.zeros((len(features), 1))
    kept = max(1, min(AXES, len(values) - 1, values.shape[1]))
    u, singular, _ = randomized_svd(values, kept, n_iter=2, random_state=0)
    found = (u * singular).astype(np.float64)
    projected: Floats = found / max(float(np.sqrt((found**2).sum() / len(found))), 1e-30)
    return projected


def logistic(projected: Floats, study: Study) -> Judged:
    """L2-regularised logistic regression; its penalty is chosen on a fold of the training part."""

    def learn(train: Floats, held: Floats, rows: NDArray[np.bool_], permuted: Truth) -> Scores:
        truth = study.truth[rows]
        inner = study.folds[rows] == (study.folds[rows].max())
        losses = []
        for penalty in _PENALTIES:
            model = _fit(train[~inner], truth[~inner], penalty)
            losses.append(log_loss(truth[inner], model.predict_proba(train[inner]), labels=[0, 1]))
        penalty = _PENALTIES[int(np.argmin(losses))]
        scores = _fit(train, truth, penalty).decision_function(held)
        # Newton's first step from no weights at all is ridge regression, and for labels that mean
        # nothing there is little further to go: all permutations at once.
        share = truth.mean()
        centre = train.mean(axis=0)
        gram = (train - centre).T @ (train - centre)
        gram[np.diag_indices_from(gram)] += 1 / (penalty * share * (1 - share))
        slopes = np.linalg.solve(gram, (train - centre).T @ (permuted - permuted.mean(axis=0)))
        return scores, held @ slopes

    return _judge(projected, study, learn)


def neighbours(projected: Floats, study: Study) -> Judged:
    """The vote of the 20 nearest by cosine similarity, nearer ones weighing more."""
    unit = projected / np.maximum(np.linalg.norm(projected, axis=1, keepdims=True), 1e-12)

    def learn(train: Floats, held: Floats, rows: NDArray[np.bool_], permuted: Truth) -> Scores:
        count = min(NEIGHBOURS, len(train))
        parts = []
        for start in range(0, len(held), _BLOCK):
            similarity = held[start : start + _BLOCK] @ train.T
            nearest = np.argpartition(similarity, -count, axis=1)[:, -count:]
            votes = np.exp(np.take_along_axis(similarity, nearest, axis=1) / _TEMPERATURE)
            votes /= votes.sum(axis=1, keepdims=True)
            null = np.einsum("nk,nkp->np", votes, permuted[nearest].astype(np.float64))
            parts.append(((votes * study.truth[rows][nearest]).sum(axis=1), null))
        scores, null = (np.concatenate(part) for part in zip(*parts, strict=True))
        return scores, null

    return _judge(unit, study, learn)


Scores = tuple[Floats, Floats]
Learn = Callable[[Floats, Floats, NDArray[np.bool_], Truth], Scores]


def judge_scores(study: Study, scores: Floats, widening: dict[str, float] | None = None) -> Judged:
    """The figures of scores that were held out in the study's folds.

    Args:
        study: Its labels and folds.
        scores: Higher for melanoma, [N].
        widening: Of intervals by figure; None where it is not known, and not made up for.
    """
    single = _over_folds(study, study.truth, scores, np.ones((1, len(scores)), np.float32))
    return Judged(
        values={name: float(value[0]) for name, value in single.items()},
        replicates=_over_folds(study, study.truth, scores, study.weights),
        widening=widening or dict.fromkeys(FIGURES, 1.0),
        scores=scores,
    )


def figures(truth: Truth, scores: Floats, weights: Floats) -> dict[str, Floats]:
    """The three figures of weighted images, for all weights at once; NaN where a class is missing.

    Args:
        truth: 0 or 1, [N].
        scores: Higher for melanoma, [N].
        weights: [R, N].

    Returns:
        By name, [R].
    """
    order = np.argsort(-scores, kind="stable")
    truth, scores, weights = truth[order], scores[order], weights[:, order]
    new = np.flatnonzero(np.diff(scores, prepend=np.inf))
    last = np.append(new[1:], len(scores)) - 1
    tie = np.cumsum(np.diff(scores, prepend=np.inf) != 0) - 1
    positives = np.concatenate(
        [np.zeros((len(weights), 1), np.float32), np.cumsum(weights * (truth == 1), axis=1)], axis=1
    )
    benign = np.flatnonzero(truth == 0)
    above = positives[:, new[tie[benign]]]
    upto = positives[:, last[tie[benign]] + 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        all_positive = positives[:, -1:]
        share = weights[:, benign] / weights[:, benign].sum(axis=1, keepdims=True)
        sensitivity = (above + upto) / (2 * all_positive)
        # Within a tie the curve is a line: its mean height above the limit, not that of its middle.
        low, high = (np.maximum(end / all_positive - LEAST_SENSITIVITY, 0) for end in (above, upto))
        rise = (upto - above) / all_positive
        beyond = np.where(rise > 0, (high**2 - low**2) / (2 * np.where(rise > 0, rise, 1)), low)
        spared = above >= HIGH_SENSITIVITY * all_positive - 1e-4
        spared = np.where(all_positive > 0, spared, np.nan)
        found = (sensitivity, beyond, spared)
        return {
            name: (share * value).sum(axis=1) for name, value in zip(FIGURES, found, strict=True)
        }


def _judge(values: Floats, study: Study, learn: Learn) -> Judged:
    scores = np.empty(len(study.truth))
    null = np.empty(study.permuted.shape)
    for number in range(FOLDS):
        held = study.folds == number
        rows = ~held
        scores[held], null[held] = learn(values[rows], values[held], rows, study.permuted[rows])
    return judge_scores(study, scores, _widening(study, null))


def _over_folds(study: Study, truth: Truth, scores: Floats, weights: Floats) -> dict[str, Floats]:
    parts = []
    for number in range(FOLDS):
        held = study.folds == number
        parts.append(figures(truth[held], scores[held], weights[:, held]))
    # A resample may lack a class in one fold; the others speak for it.
    return {name: _mean([part[name] for part in parts]) for name in FIGURES}


def _mean(parts: Sequence[Floats]) -> Floats:
    values = np.stack(parts)
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(known, values, 0).sum(axis=0) / known.sum(axis=0)
    return mean


def _widening(study: Study, null: Floats) -> dict[str, float]:
    """How much further figures of permuted labels stray than their bootstrap says."""
    once, few = np.ones((1, len(study.truth)), np.float32), study.weights[:_NULL_REPLICATES]

    def on(column: int, weights: Floats) -> dict[str, Floats]:
        return _over_folds(study, study.permuted[:, column], null[:, column], weights)

    columns = range(null.shape[1])
    singles = [on(column, once) for column in columns]
    resampled = [on(column, few) for column in columns[:_NULL_BOOTSTRAPS]]
    widening = {}
    for figure in FIGURES:
        strays = np.nanvar([part[figure][0] for part in singles], ddof=1)
        believed = np.mean([np.nanvar(part[figure], ddof=1) for part in resampled])
        widening[figure] = max(1.0, float(np.sqrt(strays / max(float(believed), 1e-12))))
    return widening


def _fit(values: Floats, truth: Truth, penalty: float) -> LogisticRegression:
    return LogisticRegression(C=penalty, solver="newton-cholesky", max_iter=100).fit(values, truth)


def _permute(truth: Truth, groups: NDArray[np.intp], generator: np.random.Generator) -> Truth:
    """Deal the components' labels out anew among components of as many images, or about."""
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    permuted = truth.copy()
    for members in _alike(sizes, generator):
        # Of one with fewer images, the labels are repeated; of one with more, some are left out.
        steps = np.arange(sizes[members].max())
        givers = members[generator.permutation(len(members))]
        own = steps < sizes[members][:, None]
        taken = starts[givers][:, None] + steps % sizes[givers][:, None]
        places = starts[members][:, None] + steps
        permuted[order[places[own]]] = truth[order[taken[own]]]
    return permuted


def _alike(sizes: NDArray[np.intp], generator: np.random.Generator) -> list[NDArray[np.intp]]:
    """Components by size; where too many have one of their own, those of rare sizes by about it."""
    by_size = [np.flatnonzero(sizes == size) for size in np.unique(sizes)]
    alone = sum(int(sizes[members].sum()) for members in by_size if len(members) == 1)
    if alone <= _MOST_ALONE * sizes.sum():
        return by_size
    # Not in the order of their names, which may be that of the classes.
    rare = generator.permutation(np.concatenate([m for m in by_size if len(m) < _ALIKE]))
    rare = rare[np.argsort(sizes[rare], kind="stable")]
    parts = np.array_split(rare, max(len(rare) // _ALIKE, 1))
    return [*(members for members in by_size if len(members) >= _ALIKE), *parts]
