"""What age, sex and site alone can say: the baseline that a network must beat."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from training.data.manifest import Record
from training.data.vocabulary import Sex, Site
from training.metrics import categorical
from training.statistics import LEAST_CLUSTERS
from training.tasks import MISSING

Floats = NDArray[np.floating]
Classes = NDArray[np.int64]


class MetadataModel:
    """Logistic regressions on metadata, fitted to training rows, pixels or not.

    Args:
        training: Rows to learn from; with too few, every figure is None.
        labels: Of the tasks, in order.
        age_edges: The first age, in years, of every age bin but the first.
    """

    def __init__(
        self,
        training: Sequence[Record],
        labels: Mapping[str, Sequence[str]],
        age_edges: Sequence[float],
    ):
        self.training = training
        self.labels = labels
        self.age_edges = age_edges

    def melanoma(self, records: Sequence[Record], truth: Classes) -> dict[str, Any] | None:
        """What metadata alone reach on melanoma; None where there is too little to learn from.

        A record is called melanoma where its probability is above the training rows' share.
        """
        known = [record for record in self.training if record.melanoma is not None]
        learned = np.array([bool(record.melanoma) for record in known], bool)
        if min(int(learned.sum()), int((~learned).sum())) < LEAST_CLUSTERS or not len(records):
            return None
        model = LogisticRegression(max_iter=1000).fit(_features(known, ""), learned)
        score = model.predict_proba(_features(records, ""))[:, 1]
        called = (score >= learned.mean()).astype(np.int64)
        both = len(np.unique(truth)) == 2
        return {
            "training_rows": len(known),
            "auroc": float(roc_auc_score(truth, score)) if both else None,
            **_figures(truth, called, range(2)),
        }

    def task(self, task: str, records: Sequence[Record], truth: Classes) -> dict[str, Any] | None:
        """What the other metadata reach on a task; None where there is too little to learn from."""
        labels = self.labels[task]
        classes = truth_of(task, self.training, labels, self.age_edges)
        rows = np.flatnonzero(classes != MISSING).tolist()
        if len(set(classes[rows].tolist())) < 2 or not len(records):
            return None
        model = LogisticRegression(max_iter=1000).fit(
            _features([self.training[row] for row in rows], task), classes[rows]
        )
        return _figures(truth, model.predict(_features(records, task)), range(len(labels)))

    def median_age_error(self, records: Sequence[Record]) -> float | None:
        """Mean absolute error, in years, of always answering the training rows' median age."""
        ages = [record.age for record in self.training if record.age is not None]
        if not ages:
            return None
        years = np.array([record.age for record in records if record.age is not None])
        return float(np.abs(years - np.median(ages)).mean())


def truth_of(
    task: str, records: Sequence[Record], labels: Sequence[str], age_edges: Sequence[float]
) -> Classes:
    """The class of each record, MISSING where it is unknown or none of the labels."""
    if task == "age":
        return np.array(
            [
                MISSING if r.age is None else int(np.searchsorted(age_edges, r.age, side="right"))
                for r in records
            ]
        )
    numbers = {label: number for number, label in enumerate(labels)}
    return np.array([numbers.get(str(getattr(record, task, None)), MISSING) for record in records])


def majority(truth: Classes, labels: Sequence[int]) -> dict[str, float]:
    """What always answering the commonest class reaches."""
    return _figures(truth, np.full_like(truth, np.bincount(truth).argmax()), labels)


def _figures(truth: Classes, found: Classes, labels: Sequence[int]) -> dict[str, float]:
    return {name: of(truth, found) for name, of in categorical(truth, labels).items()}


def _features(records: Sequence[Record], task: str) -> Floats:
    """Age, sex and site as numbers, less the task itself: float [N, F]."""
    columns: list[Floats] = []
    if task != "age":
        age = np.array([np.nan if r.age is None else r.age for r in records]) / 100
        columns += [np.nan_to_num(age, nan=0.5), np.isnan(age).astype(float)]
    words: tuple[tuple[str, type[Sex] | type[Site]], ...] = (("sex", Sex), ("site", Site))
    for name, vocabulary in words:
        if task != name:
            columns += [
                np.array([float(getattr(record, name) is word) for record in records])
                for word in vocabulary
            ]
    return np.stack(columns, axis=1)
