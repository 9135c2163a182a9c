"""The zoo: pretrained backbones as data (zoo.csv), the paper's 86 and some light ones beside them.

The 86 are torchvision's classifiers of the paper's 17 families, and DeiT and Xception from timm.
A family is what torchvision keeps in one module (ResNeXt and Wide ResNet are ResNets there), the
MobileNets together.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from training.data.manifest import DataError

Library = Literal["torchvision", "timm"]


@dataclass(frozen=True, slots=True)
class Backbone:
    """One pretrained classifier.

    Attributes:
        name: As its library's builder is called.
        family: Of architectures.
        library: That builds it.
        weights: The pinned ones: torchvision's enumeration member, or timm's tag.
        input_size: Side of the square image that they were published for, in pixels.
        mean: Of the normalisation that they were trained with, per channel, 0 to 1.
        std: Likewise.
        parameters: Of the network that is run, without heads that only training uses.
        multiply_adds: For one image of that size.
        imagenet_top1: Accuracy in per cent, as the library publishes it.
        extra: Not one of the paper's 86.
        citation: Of the architecture.
    """

    name: str
    family: str
    library: Library
    weights: str
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    parameters: int
    multiply_adds: int
    imagenet_top1: float
    extra: bool
    citation: str

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


@cache
def load_zoo() -> tuple[Backbone, ...]:
    """Every entry, the 86 first."""
    text = files("training").joinpath("zoo.csv").read_text(encoding="utf-8")
    return tuple(_parse(row) for row in csv.DictReader(text.splitlines()))


def choose(names: Iterable[str] | None) -> list[Backbone]:
    """The entries of these names, in their order; without names, the whole zoo.

    Args:
        names: To choose; None for all.

    Raises:
        DataError: There is no entry of a name.
    """
    zoo = {backbone.name: backbone for backbone in load_zoo()}
    if names is None:
        return list(zoo.values())
    return [_named(name, zoo) for name in dict.fromkeys(names)]


def shard(backbones: Sequence[Backbone], text: str) -> list[Backbone]:
    """The i-th of n parts, dealt out by size, so that each takes about as long as it can.

    Args:
        backbones: All.
        text: "i/n", i from 1.

    Raises:
        DataError: It is not of that form.
    """
    try:
        number, parts = (int(part) for part in text.split("/"))
    except ValueError:
        number, parts = 0, 0
    if not 1 <= number <= parts:
        raise DataError(f"--shard {text}: write i/n, for example 2/4.")
    dealt: list[list[Backbone]] = [[] for _ in range(parts)]
    work = [0] * parts
    for backbone in sorted(backbones, key=lambda backbone: -backbone.multiply_adds):
        least = work.index(min(work))
        dealt[least].append(backbone)
        work[least] += backbone.multiply_adds
    return [backbone for backbone in backbones if backbone in dealt[number - 1]]


def _named(name: str, zoo: dict[str, Backbone]) -> Backbone:
    if name in zoo:
        return zoo[name]
    near = get_close_matches(name, zoo, 1)
    hint = f"Did you mean {near[0]}?" if near else "`mmtl-train zoo list` shows them."
    raise DataError(f"There is no backbone {name} in the zoo. {hint}")


def _parse(row: dict[str, str]) -> Backbone:
    return Backbone(
        name=row["name"],
        family=row["family"],
        library="torchvision" if row["library"] == "torchvision" else "timm",
        weights=row["weights"],
        input_size=int(row["input_size"]),
        mean=tuple(float(value) for value in row["mean"].split()),
        std=tuple(float(value) for value in row["std"].split()),
        parameters=int(row["parameters"]),
        multiply_adds=int(row["multiply_adds"]),
        imagenet_top1=float(row["imagenet_top1"]),
        extra=row["extra"] == "yes",
        citation=row["citation"],
    )
