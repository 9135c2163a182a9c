"""The last map of features of any backbone: its classifier removed, tokens laid out as a grid."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from training.backbones import (
    BUILT_PLAIN,
    Source,
    build,
    fill,
    has_listed_normalisation,
    load_classifier,
)
from training.data.manifest import DataError, first_line
from training.zoo import Backbone

# What stands behind the features in torchvision's networks.
_BEHIND = ("avgpool", "classifier", "fc", "head", "heads")
_HALF = (0.5, 0.5, 0.5)


class TimmMap(nn.Module):
    """A timm model without its classifier."""

    def __init__(self, model: Any):
        super().__init__()
        model.reset_classifier(0, "")
        self.model = model
        self.prefix = int(getattr(model, "num_prefix_tokens", 0))

    def forward(self, images: Tensor) -> Tensor:
        """float32 [N, 3, H, W] -> float32 [N, C, h, w]."""
        features: Tensor = self.model.forward_features(images)
        return self._laid_out(features)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Those on the way, and what `forward` gives."""
        features, found = self.model.forward_intermediates(images)
        return [*found, self._laid_out(features)]

    def _laid_out(self, features: Tensor) -> Tensor:
        return _grid(features, self.prefix) if features.ndim == 3 else features


class VitMap(nn.Module):
    """A vision transformer of torchvision without its heads."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        model.heads = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """float32 [N, 3, H, W] -> float32 [N, C, h, w]."""
        patches = self.model._process_input(images)
        token = self.model.class_token.expand(len(patches), -1, -1)
        tokens: Tensor = self.model.encoder(torch.cat([token, patches], dim=1))
        return _grid(tokens, 1)


class SwinMap(nn.Sequential):
    """A Swin transformer of torchvision without its head: features, norm, and channels first."""

    def maps(self, images: Tensor) -> list[Tensor]:
        """Those on the way, channels first as they are not there, and what `forward` gives."""
        found, values = [], images
        layers, norm, channels_first = self
        assert isinstance(layers, nn.Sequential)
        for layer in layers:
            values = layer(values)
            found.append(channels_first(values))
        return [*found, channels_first(norm(values))]


def build_feature_map(
    backbone: Backbone, source: Source | None, drop_path: float = 0.0, size: int | None = None
) -> tuple[nn.Module, int, Sequence[float], Sequence[float]]:
    """A backbone as a feature extractor.

    Args:
        backbone: Of the zoo.
        source: Of its pretrained weights; None for none.
        drop_path: Stochastic depth in training, where the backbone has it.
        size: Of the images that it will see, in pixels; None for the zoo's.

    Returns:
        The feature extractor (float32 [N, 3, H, W] -> [N, C, h, w]), C, and the mean and standard
        deviation (0 to 1, per channel) of the normalisation it wants.

    Raises:
        training.backbones.WeightsError: The weights cannot be had, or do not fit.
        DataError: It takes no images of this size.
    """
    model = _build(backbone, drop_path)
    if source is not None:
        if source.path is not None:
            fill(model, source.path, by_position=source.kind == "package")
        else:
            model.load_state_dict(load_classifier(backbone, source).model.state_dict())
    mean, std = backbone.mean, backbone.std
    if backbone.name in BUILT_PLAIN and has_listed_normalisation(backbone):
        # These two turn ImageNet's normalisation into this one in a step that is left out here.
        mean = std = _HALF
    features = _features(backbone, model)
    return features, _channels(features, backbone, size or backbone.input_size), mean, std


def last_and_middle(features: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The last map of a feature extractor, and one on the way to it.

    The last is what training bends to its labels. The one on the way, the last that is finer than
    it (the middle one where all are as coarse, and the last itself where its library gives out no
    other), still sees what the labels do not ask for.

    Args:
        features: Of `build_feature_map`.
        images: float32 [N, 3, H, W].

    Returns:
        float32 [N, C, h, w] and [N, C', h', w'].
    """
    if isinstance(features, TimmMap | SwinMap):
        found = features.maps(images)
    elif isinstance(features, nn.Sequential):
        found = _steps(features, images)
    else:
        found = [features(images)]
    last = found[-1]
    maps = [one for one in found if one.ndim == 4]
    finer = [one for one in maps if one.shape[2] > last.shape[2]]
    return last, finer[-1] if finer else maps[(len(maps) - 1) // 2]


def _steps(parts: nn.Sequential, images: Tensor) -> list[Tensor]:
    """What each layer of a sequence gives, sequences within it taken apart."""
    found = [images]
    for part in parts:
        if isinstance(part, nn.Sequential) and len(part) > 0:
            found += _steps(part, found[-1])
        else:
            found.append(part(found[-1]))
    return found[1:]


def _build(backbone: Backbone, drop_path: float) -> nn.Module:
    if backbone.library == "timm":
        # Some, such as Xception, know no such argument.
        try:
            model: nn.Module = timm.create_model(backbone.name, drop_path_rate=drop_path)
        except TypeError:
            model = timm.create_model(backbone.name)
        return model
    built = build(backbone)
    layers = [module for module in built.modules() if isinstance(module, StochasticDepth)]
    for number, layer in enumerate(layers):
        # Rising linearly with depth (Huang et al. 2016, arXiv:1603.09382), as timm does, too.
        layer.p = drop_path * number / max(len(layers) - 1, 1)
    return built


def _features(backbone: Backbone, model: nn.Module) -> nn.Module:
    if backbone.library == "timm":
        return TimmMap(model)
    if isinstance(model, torchvision.models.VisionTransformer):
        return VitMap(model)
    if isinstance(model, torchvision.models.SwinTransformer):
        return SwinMap(model.features, model.norm, model.permute)
    parts: list[nn.Module] = []
    for name, part in model.named_children():
        if name in _BEHIND:
            break
        parts.extend(part if isinstance(part, nn.ModuleList) else [part])
    if isinstance(model, torchvision.models.DenseNet):
        parts.append(nn.ReLU())
    return nn.Sequential(*parts)


@torch.inference_mode()
def _channels(features: nn.Module, backbone: Backbone, size: int) -> int:
    before = features.training
    try:
        channels = features.eval()(torch.zeros(1, 3, size, size)).shape[1]
    # Each library says it in its own way.
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = first_line(error)
        raise DataError(
            f"{backbone.name} takes no images of {size} px ({reason}). Set size = "
            f"{backbone.input_size}, and leave sizes out."
        ) from None
    features.train(before)
    return int(channels)


def _grid(tokens: Tensor, prefix: int) -> Tensor:
    """[N, prefix + h * h, C] -> [N, C, h, h]."""
    places = tokens[:, prefix:]
    side = round(places.shape[1] ** 0.5)
    if side * side != places.shape[1]:
        raise DataError("The tokens of this backbone are no square grid: choose another one.")
    return places.transpose(1, 2).reshape(places.shape[0], places.shape[2], side, side)
