"""What a training image may look like: framing, orientation, colour, blur, resolution, JPEG."""

from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2


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


def training_transform(size: int) -> v2.Transform:
    """uint8 [3, size, size] -> uint8 [3, size, size], drawn from torch's random state.

    The mirrored margin lets a rotation or a wider framing show skin; where it ends, black corners
    remain, of a fortieth of the picture at most, as a dermatoscope's rim leaves them.
    """
    margin = size // 4
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.Pad(margin, padding_mode="reflect"),
            v2.RandomRotation(180, interpolation=v2.InterpolationMode.BILINEAR),
            v2.CenterCrop(round(1.25 * size)),
            v2.RandomResizedCrop(size, scale=(0.4, 0.9), ratio=(3 / 4, 4 / 3)),
            v2.ColorJitter(brightness=0.15, contrast=0.15, saturation=0.15, hue=0.02),
            v2.RandomApply([Resolution(0.4)], p=0.3),
            v2.RandomApply([v2.GaussianBlur(5, (0.3, 1.5))], p=0.15),
            v2.RandomApply([Jpeg(40, 95)], p=0.3),
        ]
    )


def seeded(transform: v2.Transform, image: Tensor, seed: int, epoch: int, sample: int) -> Tensor:
    """Apply a transform with a random state that depends on these three numbers alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(((seed * 1_000_003 + epoch) * 1_000_003 + sample) % 2**63)
        out: Tensor = transform(image)
        return out
