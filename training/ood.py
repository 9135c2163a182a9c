"""How far an image is from the training images in the backbone's features: the OOD score."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Floats = NDArray[np.floating]

# Share of validation images that the threshold lets pass.
IN_DISTRIBUTION = 0.99
AXES = 64


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


def fit_feature_distance(features: Floats, axes: int = AXES) -> FeatureDistance:
    """Fit the distance by maximum likelihood.

    Args:
        features: float [N, C], of the training images.
        axes: K, at most; fewer where there are fewer images or features.
    """
    values = np.asarray(features, np.float64)
    mean = values.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(values - mean, rowvar=False))
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
