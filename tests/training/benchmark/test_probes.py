"""Probes: figures of held-out folds, and intervals that know how folds hang together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from training.benchmark import probes
from training.benchmark.probes import FIGURES, design, figures, logistic, neighbours, project
from training.data.manifest import DataError
from training.metrics import partial_auroc

AUROC, PARTIAL, SPECIFICITY = FIGURES


def study_of(lesions: int = 120, seed: int = 0, replicates: int = 200):
    generator = np.random.default_rng(seed)
    lesion = np.repeat(np.arange(lesions), generator.integers(1, 4, lesions))
    truth = generator.integers(0, 2, lesions)[lesion]
    return design(truth, lesion.astype(str).tolist(), seed, replicates), truth, lesion


def test_a_lesion_is_in_one_fold_and_drawn_as_a_whole() -> None:
    study, _, lesion = study_of()
    for number in range(lesion.max() + 1):
        rows = lesion == number
        assert len(set(study.folds[rows])) == 1
        assert (study.weights[:, rows] == study.weights[:, rows][:, :1]).all()
    for fold in range(probes.FOLDS):
        held = study.folds == fold
        drawn = [study.weights[:, held & (lesion == n)].max(axis=1) for n in set(lesion[held])]
        assert (np.sum(drawn, axis=0) == len(drawn)).all()


def test_permutations_deal_labels_out_by_lesion() -> None:
    study, truth, lesion = study_of()
    for column in range(5):
        permuted = study.permuted[:, column]
        for number in range(lesion.max() + 1):
            assert len(set(permuted[lesion == number])) == 1
        for images in (1, 2, 3):
            chosen = np.bincount(lesion)[lesion] == images
            assert permuted[chosen].sum() == truth[chosen].sum()
    assert (study.permuted[:, 0] != truth).any()


@given(st.integers(0, 10_000))
def test_the_figures_are_scikit_learns(seed: int) -> None:
    generator = np.random.default_rng(seed)
    truth = np.append([0, 1], generator.integers(0, 2, 60))
    # Ties, too.
    scores = np.round(generator.normal(size=62) + truth, 1 if seed % 2 else 6)
    found = figures(truth, scores, np.ones((1, 62), np.float32))
    assert found[AUROC][0] == pytest.approx(roc_auc_score(truth, scores), abs=1e-5)
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    expected = 1 - min(f for f, t in zip(false, true, strict=True) if t >= 0.95 - 1e-9)
    assert found[SPECIFICITY][0] == pytest.approx(expected, abs=1e-5)
    assert found[PARTIAL][0] == pytest.approx(partial_auroc(truth, scores), abs=1e-5)


def test_a_weight_of_two_is_an_image_twice() -> None:
    generator = np.random.default_rng(3)
    truth, scores = generator.integers(0, 2, 40), generator.normal(size=40)
    weights = generator.integers(0, 3, (1, 40)).astype(np.float32)
    repeated = np.repeat(np.arange(40), weights[0].astype(int))
    ones = np.ones((1, len(repeated)), np.float32)
    once = figures(truth[repeated], scores[repeated], ones)
    for name, value in figures(truth, scores, weights).items():
        assert value[0] == pytest.approx(once[name][0], abs=1e-6)


def test_a_figure_without_a_class_is_not_a_number() -> None:
    found = figures(np.array([0, 0]), np.array([0.1, 0.2]), np.ones((1, 2), np.float32))
    assert all(np.isnan(value[0]) for value in found.values())


@pytest.mark.parametrize("probe", [logistic, neighbours])
def test_a_probe_finds_what_is_there(probe) -> None:
    study, truth, _ = study_of()
    generator = np.random.default_rng(1)
    features = generator.normal(size=(len(truth), 40))
    features[:, :5] += 1.2 * truth[:, None]
    judged = probe(project(features), study)
    low, high = judged.interval(AUROC)
    assert 0.5 < low < judged.values[AUROC] < high <= 1
    assert judged.values[AUROC] > 0.8
    assert judged.interval(PARTIAL)[1] <= 0.2


@pytest.mark.parametrize("probe", [logistic, neighbours])
def test_without_signal_the_interval_is_wider_than_a_bootstrap(probe) -> None:
    study, truth, _ = study_of()
    features = np.random.default_rng(2).normal(size=(len(truth), 40))
    judged = probe(project(features), study)
    low, high = judged.interval(AUROC)
    assert low < 0.5 < high
    assert judged.widening[AUROC] > 1.1


def test_neighbours_are_found_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    study, truth, _ = study_of()
    projected = project(np.random.default_rng(5).normal(size=(len(truth), 10)))
    whole = neighbours(projected, study)
    monkeypatch.setattr(probes, "_BLOCK", 7)
    assert neighbours(projected, study).scores == pytest.approx(whole.scores)


def test_projection_keeps_distances_where_there_is_room() -> None:
    features = np.random.default_rng(4).normal(size=(30, 10))
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    projected = project(features) * np.sqrt(10)
    before = np.linalg.norm(standard[:, None] - standard[None], axis=-1)
    after = np.linalg.norm(projected[:, None] - projected[None], axis=-1)
    assert after == pytest.approx(before, abs=1e-3)


def test_features_that_never_change_are_projected_to_nothing() -> None:
    study, truth, _ = study_of()
    for features in (np.ones((len(truth), 8)), np.zeros((len(truth), 1))):
        judged = logistic(project(features), study)
        assert judged.values[AUROC] == pytest.approx(0.5)


def test_too_few_lesions_are_refused() -> None:
    with pytest.raises(DataError, match="there are 2 and 3"):
        design(np.array([0, 0, 0, 1, 1]), list("abcde"))


def moved(sizes: np.ndarray) -> float:
    """Share of labels that another component's take the place of, on average."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    truth = groups % 2
    found = [probes._permute(truth, groups, generator) for _ in range(20)]
    return float(np.mean([dealt != truth for dealt in found]))


def test_labels_are_dealt_out_where_components_have_sizes_of_their_own() -> None:
    assert moved(np.arange(3, 43)) > 0.3
    assert moved(np.full(40, 7)) > 0.3


def test_labels_are_dealt_out_of_classes_that_stand_apart() -> None:
    sizes = np.concatenate([np.ones(1000, int), np.arange(11, 31)])
    groups = np.repeat(np.arange(len(sizes)), sizes)
    truth = (groups < 500).astype(int)
    generator = np.random.default_rng(0)
    dealt = [probes._permute(truth, groups, generator) for _ in range(20)]
    alike = [np.corrcoef(truth[groups < 1000], one[groups < 1000])[0, 1] for one in dealt]
    assert abs(np.mean(alike)) < 0.05


def test_labels_are_exchanged_among_components_of_one_size() -> None:
    sizes = np.repeat([1, 2, 5], [30, 20, 1])
    groups = np.random.default_rng(1).permutation(np.repeat(np.arange(51), sizes))
    truth = (groups % 3 == 0).astype(int)
    dealt = probes._permute(truth, groups, np.random.default_rng(0))
    for size in (1, 2, 5):
        own = np.isin(groups, np.flatnonzero(sizes == size))
        assert dealt[own].sum() == truth[own].sum()
    for group in range(51):
        assert len(set(dealt[groups == group])) == 1
