"""The frozen configuration of a run: defaults, a TOML file, flags; checked before anything runs."""

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.data.manifest import DataError


class Config(BaseModel):
    """Everything that decides what a run's network becomes, besides its data.

    Attributes:
        train_on: Datasets of a data folder to learn from, by name; a manifest has its own splits.
        backbone: Of the zoo, by name.
        weights_dir: Of files NAME.pth with its weights; empty for its package or download.
        weights_notes: TOML with `mean` and `std` by NAME, for files that want others than the
            zoo's; empty for weights.toml in that folder.
        start_from: A fitted run whose best weights are the first of this one: to go on at another
            size, or with other data. Empty for the backbone's.
        seed: Of initialisation, order and augmentation.
        size: Side of the network's input, in pixels.
        epochs: At most.
        batch_size: Images a step.
        accumulate: Batches that one step of the optimiser is averaged over.
        learning_rate: Peak, after the warm-up.
        backbone_rate: The backbone's learning rate as a share of that.
        weight_decay: AdamW's.
        warmup_epochs: Of linear warm-up; cosine to zero after it.
        frozen_epochs: At the beginning, in which the backbone is not trained.
        freeze_batch_norm: Keep the backbone's batch norm as it was pretrained; needed where it was
            folded into the weights.
        patience: Epochs without a better validation AUROC before training stops.
        ema_decay: Of the averaged weights that are evaluated and kept, per step.
        trunk_channels: Of the features that the heads share.
        drop_path: Stochastic depth of the backbone, where it has it, in training.
        imbalance: What is done about rare melanoma: images drawn so that classes are equal,
            logits moved by the log-odds of the prevalence in training (Menon et al. 2021,
            arXiv:2007.07314), or focal loss (Lin et al. 2017, arXiv:1708.02002).
        task_balancing: Fixed weights, or learned ones (Kendall, Gal & Cipolla 2018,
            arXiv:1705.07115) that multiply them.
        teachers: Folders of bundles, fitted before, whose mean answers are learned from beside the
            labels.
        distillation: The share of a taught task's loss that follows the teachers.
        validate_on: The dataset that stops training and calibrates, by the beginning of its name;
            empty for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    train_on: tuple[str, ...] = ("HAM10000",)
    backbone: str = "tf_efficientnet_lite0"
    weights_dir: str = ""
    weights_notes: str = ""
    start_from: str = ""
    seed: int = Field(0, ge=0, lt=2**32)
    size: int = Field(160, ge=32, le=1024)
    epochs: int = Field(14, ge=1)
    batch_size: int = Field(32, ge=2)
    accumulate: int = Field(1, ge=1)
    learning_rate: float = Field(6e-4, gt=0)
    backbone_rate: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.02, ge=0)
    warmup_epochs: float = Field(1.0, ge=0)
    frozen_epochs: int = Field(0, ge=0)
    freeze_batch_norm: bool = False
    patience: int = Field(4, ge=1)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    trunk_channels: int = Field(256, ge=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    imbalance: Literal["none", "balanced_sampling", "logit_adjustment", "focal"] = "none"
    task_balancing: Literal["fixed", "uncertainty"] = "fixed"
    teachers: tuple[str, ...] = ()
    distillation: float = Field(0.5, ge=0, le=1)
    validate_on: str = "HAM10000"


def configure(path: Path | None = None, **flags: Any) -> Config:
    """The defaults, overridden by a TOML file, overridden by flags.

    Args:
        path: A TOML file with any of the fields.
        flags: Fields; None where a flag was not given.

    Raises:
        DataError: The file cannot be read, or a value is none.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not TOML: {error}.") from None
    given = {name: value for name, value in flags.items() if value is not None}
    return parse_config(values | given, str(path or "the configuration"))


def parse_config(values: dict[str, Any], where: str) -> Config:
    """A configuration of these values and the defaults.

    Args:
        values: By field.
        where: They are from, for the error.

    Raises:
        DataError: A name or a value is none of a configuration.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
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
