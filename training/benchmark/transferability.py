"""Scores that guess, without training a probe, how well features transfer: each from its paper."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

Floats = NDArray[np.floating]
Truth = NDArray[np.int64]

_ITERATIONS = 100
_TOLERANCE = 1e-6


def log_me(features: Floats, truth: Truth) -> float:
    """LogME: the maximum log evidence of Bayesian linear regression on the labels, per image.

    You et al. 2021 (arXiv:2102.11005), by the fixed point of their optimised version (2022,
    arXiv:2110.10545), averaged over the one-hot columns of the classes.

    Args:
        features: [N, C].
        truth: Class numbers, [N].
    """
    images, channels = features.shape
    u, singular, _ = np.linalg.svd(np.asarray(features, np.float64), full_matrices=False)
    sigma = singular**2
    evidences = []
    for label in np.unique(truth):
        y = (truth == label).astype(np.float64)
        projected = (u.T @ y) ** 2
        outside = float(y @ y - projected.sum())
        alpha = beta = 1.0
        for _ in range(_ITERATIONS):
            shrunk = sigma / (sigma + alpha / beta)
            gamma = float(shrunk.sum())
            weights = float((sigma * projected / (sigma + alpha / beta) ** 2).sum())
            residual = float(((1 - shrunk) ** 2 * projected).sum()) + outside
            ratio = alpha / beta
            alpha = gamma / max(weights, 1e-12)
            beta = max(images - gamma, 1e-12) / max(residual, 1e-12)
            if abs(alpha / beta - ratio) <= _TOLERANCE * ratio:
                break
        shrunk = sigma / (sigma + alpha / beta)
        weights = float((sigma * projected / (sigma + alpha / beta) ** 2).sum())
        residual = float(((1 - shrunk) ** 2 * projected).sum()) + outside
        determinant = np.log(alpha + beta * sigma).sum() + (channels - len(sigma)) * np.log(alpha)
        evidences.append(
            0.5
            * (
                channels * np.log(alpha)
                + images * np.log(beta)
                - images * np.log(2 * np.pi)
                - beta * residual
                - alpha * weights
                - determinant
            )
            / images
        )
    return float(np.mean(evidences))


def leep(logits: Floats, truth: Truth) -> float:
    """LEEP: mean log likelihood of the labels by way of the source classes' probabilities.

    Nguyen et al. 2020 (arXiv:2002.12462): with P(y | z) estimated from the same images, the mean
    of log sum_z P(y | z) p(z | x).

    Args:
        logits: Of the source classes, [N, Z].
        truth: Class numbers, [N].
    """
    source = softmax(np.asarray(logits, np.float64), axis=1)
    # A class that no image may be of says nothing, and has no conditional.
    source = source[:, source.sum(axis=0) > 0]
    labels, numbers = np.unique(truth, return_inverse=True)
    joint = np.stack([source[numbers == k].sum(axis=0) for k in range(len(labels))])
    conditional = joint / joint.sum(axis=0)
    likelihood = (source * conditional[numbers]).sum(axis=1)
    return float(np.log(likelihood).mean())


def nce(logits: Floats, truth: Truth) -> float:
    """NCE: minus the conditional entropy of the labels given the source class (Tran et al. 2019).

    arXiv:1908.08142, with the most probable source class as the source's label.

    Args:
        logits: Of the source classes, [N, Z].
        truth: Class numbers, [N].
    """
    _, source = np.unique(np.argmax(logits, axis=1), return_inverse=True)
    _, numbers = np.unique(truth, return_inverse=True)
    joint = np.zeros((source.max() + 1, numbers.max() + 1))
    np.add.at(joint, (source, numbers), 1 / len(truth))
    conditional = joint / joint.sum(axis=1, keepdims=True)
    known = joint > 0
    return float((joint[known] * np.log(conditional[known])).sum())


def h_score(features: Floats, truth: Truth) -> float:
    """H-score: the classes' share of the features' variance, tr(cov(f)^-1 cov(E[f | y])).

    Bao et al. 2019 (arXiv:2212.10082).

    Args:
        features: [N, C], with C well below N: else it is one whatever they are.
        truth: Class numbers, [N].
    """
    centred = np.asarray(features, np.float64) - features.mean(axis=0)
    means = np.zeros_like(centred)
    for label in np.unique(truth):
        means[truth == label] = centred[truth == label].mean(axis=0)
    inverse = np.linalg.pinv(centred.T @ centred / len(truth), rcond=1e-10, hermitian=True)
    return float(np.trace(inverse @ (means.T @ means) / len(truth)))
