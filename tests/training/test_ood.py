"""The distance is Mahalanobis, and grows most where training images do not vary."""

import numpy as np
import pytest
import torch

from training.config import Config
from training.ood import choose_ood_threshold, fit_feature_distance, middle_features


def score(distance: torch.nn.Module, features: np.ndarray) -> np.ndarray:
    return distance(torch.from_numpy(features.astype(np.float32))).numpy()


def test_the_distance_is_mahalanobis_under_probabilistic_pca() -> None:
    generator = np.random.default_rng(0)
    widths = np.array([9.0, 4.0, *[0.5] * 18])
    middle = np.arange(20.0)
    features = generator.normal(size=(5000, 20)) * widths + middle
    distance = fit_feature_distance(features, axes=2)
    assert (score(distance, features) ** 2).mean() == pytest.approx(1, rel=0.02)
    along, across = middle[None].copy(), middle[None].copy()
    along[0, 0] += 9
    across[0, 9] += 9
    # One standard deviation of twenty directions, against eighteen.
    assert score(distance, along)[0] == pytest.approx(np.sqrt(1 / 20), rel=0.05)
    assert score(distance, across)[0] == pytest.approx(np.sqrt(18**2 / 20), rel=0.05)


def test_few_images_and_few_features_are_enough() -> None:
    features = np.random.default_rng(1).normal(size=(5, 8))
    assert np.isfinite(score(fit_feature_distance(features), features)).all()


def test_the_threshold_is_a_quantile() -> None:
    assert choose_ood_threshold(np.arange(101.0), 0.95) == 95


class Colours:
    """A network whose map on the way is the image itself."""

    def maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, images.float()


def test_each_image_has_its_own_features_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.ood._BATCH", 2)
    monkeypatch.setattr("training.ood.training_transform", lambda size, augmentation: lambda i: i)
    pixels = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    found = middle_features(Colours(), pixels, [4, 0, 3, 1, 2], Config(size=32))
    assert found[:, 0].tolist() == [4, 0, 3, 1, 2]


def test_training_images_are_taken_as_augmentation_shows_them_always_the_same() -> None:
    pixels = np.full((3, 32, 32, 3), 128, np.uint8)
    first = middle_features(Colours(), pixels, [0, 2], Config(size=32))
    assert first.shape == (2, 3)
    assert len(np.unique(first, axis=0)) == 2  # alike, but each is recoloured by itself
    np.testing.assert_array_equal(
        first, middle_features(Colours(), pixels, [0, 2], Config(size=32))
    )
