"""What a training image may look like: framing, orientation, colour, blur, what lies on it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor, nn
from torchvision.transforms import v2

from training.config import Augmentation, Mixing
from training.data.cache import Pixels

_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)

# The data loader has a process a core already, and OpenCV's threads do not survive a fork.
cv2.setNumThreads(0)


class Framing(nn.Module):
    """Mirror, turn, move and stretch the picture, in one resampling.

    What lies beyond the picture's edge is its mirror image, so that a rotation shows skin.

    Args:
        out: Of what is returned, in pixels.
        reach: How far from the picture's middle the view may go, in half pictures.
        shares: Smallest and largest view, as shares of the area within reach.
        ratio: Widest view, as width over height; the tallest is its inverse.
    """

    def __init__(self, out: int, reach: float, shares: tuple[float, float], ratio: float):
        super().__init__()
        self.out, self.reach, self.shares, self.ratio = out, reach, shares, ratio

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [3, H, H] -> uint8 [3, out, out]."""
        mirrored, angle, share, stretch, *position = torch.rand(6).tolist()
        side = self.reach * (self.shares[0] + (self.shares[1] - self.shares[0]) * share) ** 0.5
        stretched = self.ratio ** (stretch - 0.5)
        half = [min(side * stretched, self.reach), min(side / stretched, self.reach)]
        middle = [
            (self.reach - extent) * (2 * p - 1) for extent, p in zip(half, position, strict=True)
        ]
        cosine, sine = math.cos(math.tau * angle), math.sin(math.tau * angle)
        rotation = np.array([[cosine, -sine], [sine, cosine]])
        view = np.array([[half[0], 0, middle[0]], [0, half[1], middle[1]]])
        if mirrored < 0.5:
            view[:, 0] *= -1
        # Points close enough that no pixel of the picture is skipped, then their means.
        whole = image.shape[-1]
        finer = max(round(max(half) * whole / self.out), 1)
        points = self.out * finer
        # From the result's pixels, whose centres are whole numbers, to the middle of the picture,
        # in half pictures; then by the view; then to the picture's pixels.
        inward = np.array([[2 / points, 0, 1 / points - 1], [0, 2 / points, 1 / points - 1]])
        inward = np.vstack([inward, [0, 0, 1]])
        outward = whole / 2 * (rotation @ view @ inward)
        outward[:, 2] += (whole - 1) / 2
        # With a fourth channel, as OpenCV computes four at once, but three one by one.
        seen = cv2.warpAffine(
            cv2.cvtColor(_pixels(image), cv2.COLOR_RGB2RGBA),
            outward,
            (points, points),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT,
        )
        seen = cv2.cvtColor(seen, cv2.COLOR_RGBA2RGB)
        if finer > 1:
            seen = cv2.resize(seen, (self.out, self.out), interpolation=cv2.INTER_AREA)
        return _image(seen)


class Colour(nn.Module):
    """Brightness, contrast, saturation and hue, as one linear map of the colours.

    The hue turns in the plane of I and Q of YIQ (SMPTE 170M), which the saturation shrinks.

    Args:
        most: How far brightness, contrast and saturation go from 1.
        turn: How far the hue turns, as a share of the circle.
    """

    def __init__(self, most: float, turn: float):
        super().__init__()
        self.most, self.turn = most, turn

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, H, W]."""
        *drawn, hue = (2 * torch.rand(4) - 1).tolist()
        brightness, contrast, saturation = (1 + self.most * by for by in drawn)
        angle = math.tau * self.turn * hue
        cosine, sine = saturation * math.cos(angle), saturation * math.sin(angle)
        chroma = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
        colours = brightness * _FROM_YIQ @ chroma @ _TO_YIQ
        pixels = _pixels(image)
        grey = brightness * float(_TO_YIQ[0] @ cv2.mean(pixels)[:3])
        mapping = np.column_stack([contrast * colours, np.full(3, (1 - contrast) * grey)])
        return _image(cv2.transform(pixels, mapping))


class Blur(nn.Module):
    """Out of focus: a Gaussian blur, over five pixels.

    Args:
        least: Its smallest standard deviation, in pixels.
        most: Its largest.
    """

    def __init__(self, least: float, most: float):
        super().__init__()
        self.least, self.most = least, most

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, H, W]."""
        sigma = self.least + (self.most - self.least) * float(torch.rand(()))
        return _image(cv2.GaussianBlur(_pixels(image), (5, 5), sigma))


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
        pixels = cv2.cvtColor(_pixels(image), cv2.COLOR_RGB2BGR)
        _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
        return _image(cast(Pixels, cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)))


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


def _pixels(image: Tensor) -> Pixels:
    """As OpenCV and Pillow have it: [H, W, 3]; of what `_image` returned, without a copy."""
    pixels: Pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return pixels


def _image(pixels: NDArray[Any]) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [3, H, W]."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _paint(image: Tensor, mask: Image.Image, colour: Tensor) -> Tensor:
    share = 0.85 * torch.from_numpy(np.array(mask)).float()[None] / 255
    return (image + share * (colour[:, None, None] - image)).round().clamp(0, 255).byte()


def training_transform(out: int, augmentation: Augmentation = "clinic") -> v2.Transform:
    """uint8 [3, H, H] -> uint8 [3, out, out], drawn from torch's random state.

    Args:
        out: Of what is learned from, in pixels.
        augmentation: `plain` is what classifiers usually get; `clinic` adds what differs between
            a collection and a clinic's images, `occluded` hairs and rulers to that.
    """
    colour = Colour(0.15, 0.02)
    if augmentation == "plain":
        flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
        return v2.Compose([*flips, v2.RandomResizedCrop(out, scale=(0.5, 1.0)), colour])
    occlusion = [v2.RandomApply([Hairs(24)], p=0.3), v2.RandomApply([Ruler()], p=0.1)]
    return v2.Compose(
        [
            Framing(out, reach=1.25, shares=(0.4, 0.9), ratio=4 / 3),
            *(occlusion if augmentation == "occluded" else []),
            colour,
            v2.RandomApply([Resolution(0.4)], p=0.3),
            v2.RandomApply([Blur(0.3, 1.5)], p=0.15),
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
    before = torch.get_rng_state()
    # torch.manual_seed would note a traceback for the GPUs, which takes as long as a crop.
    torch.default_generator.manual_seed(((seed * 1_000_003 + epoch) * 1_000_003 + sample) % 2**63)
    try:
        yield
    finally:
        torch.set_rng_state(before)
