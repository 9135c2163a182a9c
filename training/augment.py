"""What a training image may look like: framing, orientation, colour, blur, what lies on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor, nn
from torchvision.transforms import v2

from training.config import Augmentation, Mixing


class Resolution(nn.Module):
    """Shrink and enlarge again, as a thumbnail loses what an original has."""

    def __init__(self, smallest: float):
        super().__init__()
        self.smallest = smallest

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, H, W]."""
        scale = self.smallest + (1 - self.smallest) * float(torch.rand(()))
        height, width = image.shape[-2:]
        small = v2.functional.resize(image, [round(height * scale), round(width * scale)])
        out: Tensor = v2.functional.resize(small, [height, width])
        return out


class Jpeg(nn.Module):
    """Save as JPEG and read again (torchvision's own transform of this kind is deprecated)."""

    def __init__(self, lowest: int, highest: int):
        super().__init__()
        self.lowest, self.highest = lowest, highest

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, H, W]."""
        quality = int(torch.randint(self.lowest, self.highest + 1, ()))
        buffer = BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


class Hairs(nn.Module):
    """Thin curved lines across the picture, dark or fair, as hairs that were not shaved.

    Args:
        most: Of hairs.
    """

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, H, W]."""
        side = max(image.shape[-2:])
        drawn = Image.new("L", (image.shape[-1], image.shape[-2]))
        pen = ImageDraw.Draw(drawn)
        along = torch.linspace(0, 1, 9)[:, None]
        for _ in range(1 + int(torch.randint(self.most, ()))):
            # A quadratic Bezier curve, up to a picture long, bent by up to a quarter of it.
            start, step = side * torch.rand(2), side * (torch.rand(2) - 0.5)
            bent = side * (torch.rand(2) - 0.5) / 2
            points = start + along * 2 * step + along * (1 - along) * 2 * bent
            width = 1 + int(torch.randint(max(side // 80, 1), ()))
            pen.line([(float(x), float(y)) for x, y in points], fill=255, width=width)
        colour = torch.tensor([60.0, 45.0, 35.0]) * (0.3 + 2.2 * float(torch.rand(())))
        return _paint(image, drawn.filter(ImageFilter.GaussianBlur(0.5)), colour)


class Ruler(nn.Module):
    """Dark ticks at even distances along an edge, as a dermatoscope's scale."""

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, H, W]."""
        if torch.rand(()) < 0.5:
            return self._along_the_top(image.transpose(1, 2)).transpose(1, 2)
        return self._along_the_top(image)

    def _along_the_top(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        drawn = Image.new("L", (width, height))
        pen = ImageDraw.Draw(drawn)
        gap = width * (0.03 + 0.07 * float(torch.rand(())))
        edge = height * (0.02 + 0.18 * float(torch.rand(())))
        for number in range(int(width / gap) + 1):
            length = gap * (1.6 if number % 5 == 0 else 0.8)
            pen.line([(number * gap, edge), (number * gap, edge + length)], fill=255, width=1)
        pen.line([(0, edge), (width, edge)], fill=255, width=1)
        return _paint(image, drawn, torch.full((3,), 60 * float(torch.rand(()))))


def _paint(image: Tensor, mask: Image.Image, colour: Tensor) -> Tensor:
    share = 0.85 * torch.from_numpy(np.array(mask)).float()[None] / 255
    return (image + share * (colour[:, None, None] - image)).round().clamp(0, 255).byte()


def training_transform(size: int, out: int, augmentation: Augmentation = "clinic") -> v2.Transform:
    """uint8 [3, size, size] -> uint8 [3, out, out], drawn from torch's random state.

    The mirrored margin lets a rotation or a wider framing show skin; where it ends, black corners
    remain, of a fortieth of the picture at most, as a dermatoscope's rim leaves them.

    Args:
        size: Of the images, in pixels.
        out: Of what is learned from.
        augmentation: `plain` is what classifiers usually get; `clinic` adds what differs between
            a collection and a clinic's images, `occluded` hairs and rulers to that.
    """
    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    colour = v2.ColorJitter(brightness=0.15, contrast=0.15, saturation=0.15, hue=0.02)
    if augmentation == "plain":
        return v2.Compose([*flips, v2.RandomResizedCrop(out, scale=(0.5, 1.0)), colour])
    occlusion = [v2.RandomApply([Hairs(24)], p=0.3), v2.RandomApply([Ruler()], p=0.1)]
    return v2.Compose(
        [
            *flips,
            v2.Pad(size // 4, padding_mode="reflect"),
            v2.RandomRotation(180, interpolation=v2.InterpolationMode.BILINEAR),
            v2.CenterCrop(round(1.25 * size)),
            v2.RandomResizedCrop(out, scale=(0.4, 0.9), ratio=(3 / 4, 4 / 3)),
            *(occlusion if augmentation == "occluded" else []),
            colour,
            v2.RandomApply([Resolution(0.4)], p=0.3),
            v2.RandomApply([v2.GaussianBlur(5, (0.3, 1.5))], p=0.15),
            v2.RandomApply([Jpeg(40, 95)], p=0.3),
        ]
    )


def mix(one: Tensor, other: Tensor, mixing: Mixing, concentration: float) -> tuple[Tensor, float]:
    """Two images as one, drawn from torch's random state.

    Zhang et al. 2018 (mixup, arXiv:1710.09412) and Yun et al. 2019 (CutMix, arXiv:1905.04899).

    Args:
        one: uint8 [3, H, W].
        other: Of the same shape.
        mixing: How; not `none`.
        concentration: Of the Beta distribution of the first image's share; small values seldom mix.

    Returns:
        uint8 [3, H, W] and the share of the first image in it, above 0 and below 1.
    """
    share = float(torch.distributions.Beta(concentration, concentration).sample().clamp(0.01, 0.99))
    if mixing == "mixup":
        return (share * one + (1 - share) * other).round().byte(), share
    height, width = one.shape[-2:]
    tall, wide = (round(side * (1 - share) ** 0.5) for side in (height, width))
    top, left = (int(torch.randint(side + 1, ())) for side in (height - tall, width - wide))
    mixed = one.clone()
    mixed[:, top : top + tall, left : left + wide] = other[:, top : top + tall, left : left + wide]
    return mixed, min(max(1 - tall * wide / (height * width), 0.01), 0.99)


@contextmanager
def drawn_from(seed: int, epoch: int, sample: int) -> Iterator[None]:
    """A block whose random state depends on these three numbers alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(((seed * 1_000_003 + epoch) * 1_000_003 + sample) % 2**63)
        yield
