"""The images of an epoch: which are drawn, what each looks like, what is to be learned of it."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from training.augment import drawn_from, mix, training_transform
from training.config import Config
from training.data.cache import Pixels
from training.tasks import MISSING, Targets


def draw(
    positions: list[int], targets: Targets, config: Config, epoch: int
) -> list[tuple[int, int]]:
    """The images of one epoch, in order: position, and how often it was drawn before.

    Balanced, both classes are drawn alike often, with replacement; an image without a label as
    often as the average one.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    if config.imbalance != "balanced_sampling":
        order = torch.randperm(len(positions), generator=generator).tolist()
        return [(positions[i], 0) for i in order]
    melanoma = targets.classes["melanoma"][positions]
    known = melanoma != MISSING
    counts = torch.bincount(melanoma[known], minlength=2).clamp(min=1)
    weights = torch.ones(len(positions), dtype=torch.float64)
    weights[known] = known.sum() / (2 * counts[melanoma[known]]).double()
    chosen = torch.multinomial(weights, len(positions), replacement=True, generator=generator)
    before: Counter[int] = Counter()
    drawn = []
    for position in (positions[i] for i in chosen.tolist()):
        drawn.append((position, before[position]))
        before[position] += 1
    return drawn


class AugmentedImages(Dataset[tuple[Tensor, int, int, float]]):
    """Training images of one epoch, each drawn from (seed, epoch, sample).

    An item is an image (uint8 [H, W, 3]), its position, that of the image mixed into it (its own
    where none is), and its share of the mixture.

    Args:
        pixels: Of all images.
        draws: Of this epoch, in order: position, and how often it was drawn before.
        config: Of the run.
        epoch: From 0.
    """

    def __init__(
        self, pixels: Pixels, draws: Sequence[tuple[int, int]], config: Config, epoch: int
    ):
        self.pixels = pixels
        self.draws = draws
        self.config = config
        self.epoch = epoch
        self.transform = training_transform(config.training_size(epoch), config.augmentation)

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, item: int) -> tuple[Tensor, int, int, float]:
        position, before = self.draws[item]
        # Drawn again, it looks otherwise.
        sample = position + before * len(self.pixels)
        with drawn_from(self.config.seed, self.epoch, sample):
            image = self._look(position)
            if self.config.mixing == "none":
                return image.permute(1, 2, 0), position, position, 1.0
            partner, _ = self.draws[int(torch.randint(len(self), ()))]
            concentration = self.config.mixing_concentration
            image, share = mix(image, self._look(partner), self.config.mixing, concentration)
            return image.permute(1, 2, 0), position, partner, share

    def _look(self, position: int) -> Tensor:
        image: Tensor = self.transform(
            torch.from_numpy(np.array(self.pixels[position])).permute(2, 0, 1)
        )
        return image


def targets_of(
    targets: Targets, config: Config, positions: Tensor, partners: Tensor, shares: Tensor
) -> Targets:
    """Of a batch; of mixtures, those of the first images, then those of the second."""
    if config.mixing == "none":
        return targets.take(positions)
    both = targets.take(torch.cat([positions, partners]))
    return replace(both, weights=torch.cat([shares, 1 - shares]).float())


def context_of(workers: int) -> str | None:
    """How a loader of the images starts its workers.

    Forked, they share the pixels; Python 3.14 would start them anew, each with a copy.
    """
    return "fork" if workers and sys.platform == "linux" else None
