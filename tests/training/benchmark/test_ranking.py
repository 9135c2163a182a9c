"""Which backbone is best, and which cannot be told from it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.benchmark.probes import Judged, design, logistic, project
from training.benchmark.ranking import Place, holm, pareto, rank, rank_correlation, recommend


def judged_of(gaps: dict[str, float]) -> dict[str, Judged]:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 2, 400)
    study = design(truth, [str(i) for i in range(400)], replicates=300)
    found = {}
    for name, gap in gaps.items():
        features = np.random.default_rng(sum(map(ord, name[0]))).normal(size=(400, 20))
        features[:, 0] += gap * truth
        found[name] = logistic(project(features), study)
    return found


def test_a_planted_best_is_found_and_its_copy_is_tied() -> None:
    # Names of one first letter are the same features.
    places = rank(judged_of({"b": 0.2, "a1": 2.5, "c": 0.0, "a2": 2.5}))
    assert [place.name for place in places[:2]] == ["a1", "a2"]
    assert places[1] == Place("a2", 0.0, 1.0, True)
    assert [place.tied for place in places] == [True, True, False, False]
    assert places[-1].behind > 0.2


def test_holm_by_hand() -> None:
    # Holm 1979: 0.01 x 3, then the larger of that and 0.04 x 1, 0.03 x 2.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_never_lowers_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_rank_correlation_is_of_what_both_have() -> None:
    assert rank_correlation([1, 2, 3, None], [10, 20, 30, 5]) == 1
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == -1
    assert rank_correlation([1, 2, None], [1, 2, 3]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


PLACES = [
    Place("slow", 0.0, 1.0, True),
    Place("quick", 0.01, 0.4, True),
    Place("quicker", 0.1, 0.001, False),
]
MILLISECONDS = {"slow": 90.0, "quick": 30.0, "quicker": 5.0}


@pytest.mark.parametrize(
    ("budget", "name"),
    [(None, "quick"), (100, "quick"), (20, "quicker"), (1, None)],
)
def test_the_fastest_of_the_tied_is_recommended(budget: float | None, name: str | None) -> None:
    assert recommend(PLACES, MILLISECONDS, budget) == name


def test_what_was_not_measured_is_not_recommended() -> None:
    assert recommend(PLACES, {"slow": 90.0}, None) == "slow"
    assert recommend(PLACES, {}, None) is None


def test_on_the_pareto_front_nothing_is_better_and_faster() -> None:
    assert pareto([0.9, 0.8, 0.7, 0.85], [1, 5, 4, 5]) == [True, False, False, True]
    assert pareto([0.5, 0.5], [1, 1]) == [True, True]
