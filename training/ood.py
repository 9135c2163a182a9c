"""How far an image is from the training images in the backbone's features: the OOD score.

The features are those of a map on the way (Lee et al. 2018, arXiv:1807.03888): in the last one, a
network that was fitted to lesions sees nothing but lesions. The training images are taken as they
are learned from, turned, blurred and recoloured, so that another camera alone is not strange.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.augment import drawn_from, training_transform
from training.config import Config
from training.data.cache import Pixels

Floats = NDArray[np.floating]

# Share of validation images that the threshold lets pass.
IN_DISTRIBUTION = 0.99
# Along more of them, dermoscopy of another source becomes strange sooner than photographs do.
AXES = 16
_BATCH = 64


class _Sees(Protocol):
    """As `training.network.MultiTaskNetwork`."""

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


class FeatureDistance(nn.Module):
    """Mahalanobis distance under probabilistic PCA (Tipping & Bishop 1999).

    Along the first axes the training images vary by `variances`; across them, by `noise` each. What
    no training image varies in weighs most: that is where strange pictures stand out, and what a
    network's own heads have learned to ignore.

    Args:
        mean: float32 [C], of the training images' pooled features.
        axes: float32 [C, K], orthonormal.
        variances: float32 [K], along them.
        noise: Variance along every other direction.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor

    def __init__(self, mean: Tensor, axes: Tensor, variances: Tensor, noise: float):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("axes", axes)
        self.register_buffer("variances", variances)
        self.noise = noise

    def forward(self, features: Tensor) -> Tensor:
        """float32 [N, C] -> float32 [N]; a typical training image scores about 1."""
        centred = features - self.mean
        along = centred @ self.axes
        across = centred - along @ self.axes.T
        squared = (along**2 / self.variances).sum(dim=1) + (across**2).sum(dim=1) / self.noise
        return torch.sqrt(squared / features.shape[1])


@torch.inference_mode()
def middle_features(
    network: _Sees, pixels: Pixels, positions: Sequence[int], config: Config
) -> NDArray[np.float32]:
    """The pooled middle features of training images, each as it may look in training.

    Args:
        network: In evaluation mode.
        pixels: Of all images.
        positions: Of the training images.
        config: Of the run.

    Returns:
        float32 [len(positions), C].
    """
    transform = training_transform(pixels.shape[1], config.augmentation)

    def look(position: int) -> Tensor:
        # After the last epoch: none of them was learned from just so.
        with drawn_from(config.seed, config.epochs, position):
            image: Tensor = transform(torch.from_numpy(np.array(pixels[position])).permute(2, 0, 1))
        return image

    parts = []
    for start in range(0, len(positions), _BATCH):
        images = torch.stack([look(position) for position in positions[start : start + _BATCH]])
        _, middle = network.maps(images)
        parts.append(middle.mean(dim=(2, 3)).numpy())
    return np.concatenate(parts)


def fit_feature_distance(features: Floats, axes: int = AXES) -> FeatureDistance:
    """Fit the distance by maximum likelihood.

    Args:
        features: float [N, C], of the training images.
        axes: K, at most; fewer where there are fewer images or features.
    """
    values = np.asarray(features, np.float64)
    mean = values.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(values, rowvar=False))
    kept = max(1, min(axes, len(values) - 1, values.shape[1] - 1))
    noise = max(float(variances[:-kept].mean()), 1e-9)

    def tensor(array: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32))

    return FeatureDistance(
        tensor(mean),
        tensor(directions[:, -kept:]),
        tensor(np.maximum(variances[-kept:], noise)),
        noise,
    )


def choose_ood_threshold(scores: Floats, share: float = IN_DISTRIBUTION) -> float:
    """The score that this share of the validation images does not exceed."""
    return float(np.quantile(scores, share))
