"""A run: the folder that preparing, fitting and evaluating share, and its frozen configuration."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from models.files import write_atomically
from training.data.cache import Pixels, open_cache
from training.data.manifest import DataError, Record, load_manifest
from training.data.vocabulary import Split


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that decides what a run's network becomes, besides its data.

    Attributes:
        backbone: Of the zoo, by name.
        weights_dir: Of files NAME.pth with its weights; empty for its package or download.
        seed: Of initialisation, order and augmentation.
        size: Side of the network's input, in pixels.
        epochs: At most.
        batch_size: Images a step.
        learning_rate: Peak, after the warm-up.
        weight_decay: AdamW's.
        warmup_epochs: Of linear warm-up; cosine to zero after it.
        patience: Epochs without a better validation AUROC before training stops.
        ema_decay: Of the averaged weights that are evaluated and kept, per step.
        trunk_channels: Of the features that the heads share.
        drop_path: Stochastic depth of the backbone, in training.
    """

    backbone: str = "tf_efficientnet_lite0"
    weights_dir: str = ""
    seed: int = 0
    size: int = 160
    epochs: int = 14
    batch_size: int = 32
    learning_rate: float = 6e-4
    weight_decay: float = 0.02
    warmup_epochs: float = 1.0
    patience: int = 4
    ema_decay: float = 0.998
    trunk_channels: int = 256
    drop_path: float = 0.1


@dataclass(frozen=True, slots=True)
class Run:
    """The files of a run folder."""

    folder: Path

    @property
    def config(self) -> Path:
        """The frozen configuration, written by `prepare`."""
        return self.folder / "config.json"

    @property
    def manifest(self) -> Path:
        """The canonical manifest with its splits."""
        return self.folder / "manifest.csv"

    @property
    def cache(self) -> Path:
        """The pixels, row for row with the manifest."""
        return self.folder / "pixels.npy"

    @property
    def checkpoint(self) -> Path:
        """The state after the last whole epoch, to resume from."""
        return self.folder / "checkpoint.pt"

    @property
    def best(self) -> Path:
        """The averaged weights of the best epoch."""
        return self.folder / "best.pt"

    @property
    def log(self) -> Path:
        """One row an epoch."""
        return self.folder / "log.csv"

    def save_config(self, config: Config) -> None:
        """Write the configuration.

        Raises:
            DataError: The folder already belongs to another configuration.
        """
        if self.config.is_file() and (before := self.load_config()) != config:
            changed = ", ".join(
                f"{field.name} {getattr(before, field.name)} -> {getattr(config, field.name)}"
                for field in fields(Config)
                if getattr(before, field.name) != getattr(config, field.name)
            )
            raise DataError(
                f"{self.folder} already holds a run with another configuration ({changed}). "
                "Choose another folder with --run, or delete this one."
            )
        with write_atomically(self.config) as temporary:
            temporary.write_text(json.dumps(asdict(config), indent=2) + "\n")

    def load_config(self) -> Config:
        """Read the configuration.

        Raises:
            DataError: There is none, or it does not fit this version.
        """
        try:
            return replace(Config(), **json.loads(self.config.read_text()))
        except FileNotFoundError:
            raise DataError(
                f"{self.folder} is not a run folder. Run `mmtl-train prepare` first."
            ) from None
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.config} does not fit this version: {error}.") from None

    def load_data(self) -> tuple[list[Record], Pixels]:
        """The manifest and its pixels.

        Raises:
            DataError: One is missing, or they do not fit each other.
        """
        records = load_manifest(self.manifest)
        return records, open_cache(self.cache, len(records))


def rows(records: list[Record], split: Split, dataset: str | None = None) -> list[int]:
    """Positions of the records of a split (and dataset, by the beginning of its name)."""
    return [
        position
        for position, record in enumerate(records)
        if record.split is split and (dataset is None or record.dataset.startswith(dataset))
    ]
