"""Random heads: the paper's table, and how little it says."""

import numpy as np
import pytest
import torch
from torch import nn

from training.benchmark.zero_train import accuracies, chance, extremes_by_chance, wilson


def test_a_head_is_what_pytorch_draws_for_its_seed() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(50, 7)).astype(np.float32)
    truth = generator.integers(0, 2, 50)
    found = accuracies(features, truth, seeds=3)
    for seed in range(3):
        torch.manual_seed(seed)
        head = nn.Linear(7, 2)
        answers = head(torch.from_numpy(features)).argmax(dim=1).numpy()
        assert found[seed] == pytest.approx((answers == truth).mean())


def test_heads_are_right_by_chance_however_good_the_features() -> None:
    generator = np.random.default_rng(1)
    truth = generator.integers(0, 2, 300)
    features = generator.normal(size=(300, 32)).astype(np.float32)
    features[:, 0] += 3 * truth
    found = accuracies(features, truth, seeds=1000)
    assert found.mean() == pytest.approx(0.5, abs=0.02)
    assert found.std() > 0.05


def test_wilsons_interval_by_hand() -> None:
    # Wilson 1927 for 8 of 10.
    low, high = wilson(0.8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_backbones_that_are_alike_are_called_best_alike_often() -> None:
    generator = np.random.default_rng(2)
    table = list(generator.binomial(200, 0.5, (4, 1000)) / 200)
    found = chance(table)
    assert found.called_best == pytest.approx([0.25] * 4, abs=0.05)
    assert found.called_best.sum() == pytest.approx(1)
    assert found.tau == pytest.approx(0, abs=0.1)
    assert found.worst < 0.5 < found.best


def test_a_ranking_that_holds_has_a_tau_of_one() -> None:
    table = [np.full(10, value) for value in (0.4, 0.5, 0.6)]
    found = chance(table)
    assert found.tau == 1
    assert found.called_best.tolist() == [0, 0, 1]


def test_one_backbone_has_no_ranking() -> None:
    assert np.isnan(chance([np.array([0.5, 0.6])]).tau)


def test_coins_show_a_best_and_a_worst() -> None:
    worst, best = extremes_by_chance(1962, 86)
    # Of 86 normal draws the largest lies 2.4 standard errors out.
    assert best == pytest.approx(0.5 + 2.43 * 0.5 / 1962**0.5, abs=0.002)
    assert worst == pytest.approx(1 - best, abs=0.001)
