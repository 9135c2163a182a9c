"""Each score against a case worked by hand, and on features that say all or nothing."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from training.benchmark.transferability import h_score, leep, log_me, nce

TRUTH = np.array([0, 0, 1, 1])


def test_nce_by_hand() -> None:
    # Source classes 0, 0, 0, 1: given class 0 two of three labels are 0; given class 1 it is known.
    logits = np.eye(2)[[0, 0, 0, 1]]
    expected = 2 / 4 * np.log(2 / 3) + 1 / 4 * np.log(1 / 3) + 1 / 4 * np.log(1)
    assert nce(logits, TRUTH) == pytest.approx(expected)


def test_leep_by_hand() -> None:
    # p(z | x): two images of each label, with 0.9 and 0.2 for source class 0.
    source = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
    # P(y=0 | z=0) = 1.8 / 2.2, P(y=0 | z=1) = 0.2 / 1.8, and likewise for y = 1.
    zero = 0.9 * 1.8 / 2.2 + 0.1 * 0.2 / 1.8
    one = 0.2 * 0.4 / 2.2 + 0.8 * 1.6 / 1.8
    assert leep(np.log(source), TRUTH) == pytest.approx((np.log(zero) + np.log(one)) / 2)


def test_a_source_class_that_is_nowhere_says_nothing() -> None:
    source = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
    logits = np.hstack([np.log(source), np.full((4, 1), -1e5)])
    assert leep(logits, TRUTH) == pytest.approx(leep(np.log(source), TRUTH))


def test_h_score_by_hand() -> None:
    # Variance 1 within both classes' means at -1 and +1: one of two parts is between the classes.
    features = np.array([[-2.0], [0.0], [0.0], [2.0]])
    # Total variance 2, between classes 1.
    assert h_score(features, TRUTH) == pytest.approx(0.5)


def test_h_score_of_features_that_say_all() -> None:
    assert h_score(np.array([[0.0], [0.0], [1.0], [1.0]]), TRUTH) == pytest.approx(1)


def test_log_me_is_the_largest_log_evidence() -> None:
    """Against the evidence as its definition has it: y ~ N(0, I / beta + F F' / alpha)."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(30, 4))
    truth = (features[:, 0] + generator.normal(size=30) > 0).astype(int)

    def evidence(y: np.ndarray, alpha: float, beta: float) -> float:
        covariance = np.eye(30) / beta + features @ features.T / alpha
        return float(multivariate_normal.logpdf(y, np.zeros(30), covariance)) / 30

    grid = np.exp(np.linspace(-3, 6, 61))
    best = [
        max(evidence((truth == label).astype(float), a, b) for a in grid for b in grid)
        for label in (0, 1)
    ]
    assert log_me(features, truth) == pytest.approx(np.mean(best), abs=2e-3)


@pytest.mark.parametrize("score", [leep, nce])
def test_outputs_that_say_more_score_higher(score) -> None:
    generator = np.random.default_rng(1)
    truth = generator.integers(0, 2, 400)
    noise = generator.normal(size=(400, 10))
    telling = noise.copy()
    telling[:, 0] += 4 * truth
    assert score(telling, truth) > score(noise, truth)


@pytest.mark.parametrize("score", [log_me, h_score])
def test_features_that_say_more_score_higher(score) -> None:
    generator = np.random.default_rng(2)
    truth = generator.integers(0, 2, 400)
    noise = generator.normal(size=(400, 10))
    telling = noise + truth[:, None]
    assert score(telling, truth) > score(noise, truth)
