"""The frozen configuration of a run: defaults, a TOML file, flags; checked before anything runs."""

import tomllib
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.data.manifest import DataError

Augmentation = Literal["plain", "clinic", "occluded"]
Mixing = Literal["none", "mixup", "cutmix"]
Precision = Literal["float32", "bfloat16"]


class Config(BaseModel):
    """Everything that decides what a run's network becomes, besides its data.

    Attributes:
        train_on: Datasets of a data folder to learn from, by name; a manifest has its own splits.
        test_on: Datasets of a data folder to test on as a whole, beside the fixed test split:
            neither they nor images of the same lesions are learned from or tuned on.
        backbone: Of the zoo, by name.
        weights_dir: Of files NAME.pth with its weights; empty for its package or download.
        weights_notes: TOML with `mean` and `std` by NAME, for files that want others than the
            zoo's; empty for weights.toml in that folder.
        start_from: A fitted run whose best weights are the first of this one: to go on at another
            size, or with other data. Empty for the backbone's.
        augmentation: `plain` is flips, crops and colour; `clinic` adds rotation, wider framing,
            blur, resolution and JPEG; `occluded` hairs and rulers to that.
        mixing: Two images as one with their labels in proportion: laid over each other, or a
            rectangle of one put into the other.
        mixing_concentration: Of the Beta distribution that the proportion is drawn from.
        seed: Of initialisation, order and augmentation.
        size: Side of the network's input, in pixels.
        sizes: Of the images it learns from, over equal parts of the epochs; none larger than
            `size`, which an empty list means throughout (Tan & Le 2021, arXiv:2104.00298). Small
            images take less time.
        folds: Networks that answer together, each fitted with another part of the training images
            held out; 1 is a single network that learns from all of them.
        epochs: At most.
        batch_size: Images a step.
        accumulate: Batches that one step of the optimiser is averaged over.
        learning_rate: Peak, after the warm-up.
        backbone_rate: The backbone's learning rate as a share of that.
        first_layer_rate: Its first layer's as a share of its last one's; in geometric steps between
            them (Howard & Ruder 2018, arXiv:1801.06146).
        weight_decay: AdamW's.
        warmup_epochs: Of linear warm-up; cosine to zero after it.
        frozen_epochs: At the beginning, in which the backbone is not trained.
        freeze_batch_norm: Keep the statistics of the backbone's batch norm as they were
            pretrained; needed where they were folded into the weights.
        patience: Epochs without a better validation AUROC before training stops.
        ema_decay: Of the averaged weights that are evaluated and kept, per step; less in the first
            steps.
        trunk_channels: Of the features that the heads share.
        drop_path: Stochastic depth of the backbone, where it has it, in training.
        imbalance: What is done about rare melanoma: images drawn so that classes are equal,
            logits moved by the log-odds of the prevalence in training (Menon et al. 2021,
            arXiv:2007.07314), or focal loss (Lin et al. 2017, arXiv:1708.02002).
        task_balancing: Fixed weights, or learned ones (Kendall, Gal & Cipolla 2018,
            arXiv:1705.07115; FAMO, Liu et al. 2023, arXiv:2306.03792, which takes a forward pass
            more) that multiply them.
        teachers: Folders of bundles, fitted before, whose mean answers are learned from beside the
            labels.
        distillation: The share of a taught task's loss that follows the teachers.
        precision: Of the network's arithmetic in training; what is kept is float32. `auto` is
            bfloat16 on GPUs that have it and on CPUs with Intel's AMX; a run goes on with what it
            has begun with.
        compile: With torch.compile, which takes minutes once and wants a C++ compiler on a CPU.
        validate_on: The dataset that stops training and calibrates, by the beginning of its name;
            empty for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    train_on: tuple[str, ...] = Field(("HAM10000",), min_length=1)
    test_on: tuple[str, ...] = ()
    backbone: str = "tf_efficientnet_lite0"
    weights_dir: str = ""
    weights_notes: str = ""
    start_from: str = ""
    augmentation: Augmentation = "clinic"
    mixing: Mixing = "none"
    mixing_concentration: float = Field(0.2, gt=0)
    seed: int = Field(0, ge=0, lt=2**32)
    size: int = Field(160, ge=32, le=1024)
    sizes: tuple[Annotated[int, Field(ge=32)], ...] = ()
    folds: int = Field(1, ge=1, le=100)
    epochs: int = Field(14, ge=1)
    batch_size: int = Field(32, ge=2)
    accumulate: int = Field(1, ge=1)
    learning_rate: float = Field(6e-4, gt=0)
    backbone_rate: float = Field(1.0, gt=0)
    first_layer_rate: float = Field(1.0, gt=0, le=1)
    weight_decay: float = Field(0.02, ge=0)
    warmup_epochs: float = Field(1.0, ge=0)
    frozen_epochs: int = Field(0, ge=0)
    freeze_batch_norm: bool = False
    patience: int = Field(4, ge=1)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    trunk_channels: int = Field(256, ge=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    imbalance: Literal["none", "balanced_sampling", "logit_adjustment", "focal"] = "none"
    task_balancing: Literal["fixed", "uncertainty", "famo"] = "fixed"
    teachers: tuple[str, ...] = ()
    distillation: float = Field(0.5, ge=0, le=1)
    precision: Literal["auto", Precision] = "auto"
    compile: bool = False
    validate_on: str = "HAM10000"

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.sizes and max(self.sizes) > self.size:
            raise ValueError(f"sizes: {max(self.sizes)} is larger than size ({self.size})")
        if len(self.sizes) > self.epochs:
            raise ValueError(
                f"sizes: {len(self.sizes)} of them take more than {self.epochs} epochs"
            )
        return self

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs: the learning rate would never be reached in {self.epochs} epochs"
            )
        return self

    @model_validator(mode="after")
    def _sources_differ(self) -> Self:
        if both := sorted(set(self.train_on) & set(self.test_on)):
            raise ValueError(f"test_on: {both[0]} is in train_on, too")
        return self

    @model_validator(mode="after")
    def _folds_begin_anew(self) -> Self:
        if self.folds > 1 and self.start_from:
            raise ValueError(
                "start_from: with folds, the other run has learned from every part that is held out"
            )
        return self

    def training_size(self, epoch: int) -> int:
        """The side of the images that an epoch (from 0) learns from, in pixels."""
        if not self.sizes:
            return self.size
        return self.sizes[min(epoch * len(self.sizes) // self.epochs, len(self.sizes) - 1)]


def configure(path: Path | None = None, **flags: Any) -> Config:
    """The defaults, overridden by a TOML file, overridden by flags.

    Args:
        path: A TOML file with any of the fields.
        flags: Fields; None where a flag was not given.

    Raises:
        DataError: The file cannot be read, or a value is none.
    """
    values = {} if path is None else read_toml(path)
    given = {name: value for name, value in flags.items() if value is not None}
    return parse_config(values | given, str(path or "the configuration"), given)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        DataError: It cannot be read, or is none.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not TOML: {error}.") from None


def parse_config(values: dict[str, Any], where: str, options: Collection[str] = ()) -> Config:
    """A configuration of these values and the defaults.

    Args:
        values: By field.
        where: They are from, for the error.
        options: Those that are from the command line instead.

    Raises:
        DataError: A name or a value is none of a configuration.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # of several fields together
            raise DataError(f"{where}: {first['msg'].removeprefix('Value error, ')}.") from None
        name = ".".join(str(part) for part in first["loc"])
        if first["loc"][0] in options:
            where = "the command line"
        if first["type"] == "extra_forbidden":
            near = get_close_matches(name, Config.model_fields, 1)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else f"known are {', '.join(Config.model_fields)}."
            )
            raise DataError(f"{where}: there is no setting {name}; {hint}") from None
        raise DataError(f"{where}: {name}: {first['msg']} (found {first['input']!r}).") from None


def changed_fields(before: Config, after: Config) -> list[str]:
    """The fields that differ, as a sentence names them."""
    return [
        f"{name} {getattr(before, name)} -> {getattr(after, name)}"
        for name in Config.model_fields
        if getattr(before, name) != getattr(after, name)
    ]
