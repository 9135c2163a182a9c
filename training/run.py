"""A run: the folder that preparing, fitting and evaluating share."""

import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from models.files import write_atomically
from training.config import Config, changed_fields, parse_config
from training.data.cache import Pixels, open_cache
from training.data.manifest import DataError, Record, load_manifest
from training.data.vocabulary import Split

# So long do processes that prepare images outlive one that was killed, and have what it had.
_LEFT_SECONDS = 15.0


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
    def inherited(self) -> Path:
        """The images that the run it goes on from has learned from; there only where one is."""
        return self.folder / "inherited.csv"

    @property
    def inherited_sources(self) -> Path:
        """The datasets that the teachers of those runs had learned from; likewise."""
        return self.folder / "inherited.json"

    @property
    def cache(self) -> Path:
        """The pixels, row for row with the manifest."""
        return self.folder / "pixels.npy"

    @property
    def cache_note(self) -> Path:
        """What the pixels are of."""
        return self.cache.with_suffix(".json")

    @property
    def checkpoint(self) -> Path:
        """The state after the last whole epoch, to resume from."""
        return self.folder / "checkpoint.pt"

    @property
    def best(self) -> Path:
        """The averaged weights of the best epoch."""
        return self.folder / "best.pt"

    @property
    def curves(self) -> Path:
        """Losses and AUROC over epochs, as the paper's Fig. 4."""
        return self.folder / "curves.svg"

    @property
    def teachers(self) -> Path:
        """What each teacher said of the training images."""
        return self.folder / "teachers"

    @property
    def tensorboard(self) -> Path:
        """The log for TensorBoard."""
        return self.folder / "tensorboard"

    @property
    def log(self) -> Path:
        """One row an epoch."""
        return self.folder / "log.csv"

    @property
    def bundle(self) -> Path:
        """The bundle that is exported, where no other folder is named."""
        return self.folder / "bundle"

    @property
    def report(self) -> Path:
        """The report of an evaluation, likewise."""
        return self.folder / "report"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have the folder while the block runs; where it is no folder, that is found out later.

        Raises:
            DataError: Another process has it.
        """
        if not self.folder.is_dir():
            yield
            return
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                deadline = time.monotonic() + _LEFT_SECONDS
                while not _locked(folder):
                    if time.monotonic() > deadline:
                        raise DataError(
                            f"Another process works on {self.folder}: wait for its end, or choose "
                            "another folder with --run."
                        )
                    time.sleep(0.1)
            yield
        finally:
            os.close(folder)

    def check_config(self, config: Config) -> None:
        """Whether the folder is free for a configuration.

        Raises:
            DataError: It already belongs to another one.
        """
        if self.config.is_file() and (before := self.load_config()) != config:
            changed = ", ".join(changed_fields(before, config))
            raise DataError(
                f"{self.folder} already holds a run with another configuration ({changed}). "
                "Choose another folder with --run, or delete this one."
            )

    def save_config(self, config: Config) -> None:
        """Write the configuration.

        Raises:
            DataError: The folder already belongs to another one.
        """
        self.check_config(config)
        with write_atomically(self.config) as temporary:
            temporary.write_text(json.dumps(config.model_dump(), indent=2) + "\n")

    def load_config(self) -> Config:
        """Read the configuration.

        Raises:
            DataError: There is none, or it does not fit this version.
        """
        try:
            return parse_config(json.loads(self.config.read_text()), str(self.config))
        except FileNotFoundError:
            raise DataError(
                f"{self.folder} is not a run folder. Run `mmtl-train prepare` first."
            ) from None
        except ValueError as error:
            raise DataError(f"{self.config} is damaged: {error}.") from None

    def take_pixels(self, other: "Run") -> None:
        """Have another run's pixels, on the disk once where the file system can."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for source, target in ((other.cache, self.cache), (other.cache_note, self.cache_note)):
            target.unlink(missing_ok=True)
            try:
                os.link(source, target)
            except OSError:  # of another file system
                shutil.copyfile(source, target)

    def load_data(self) -> tuple[list[Record], Pixels]:
        """The manifest and its pixels.

        Raises:
            DataError: One is missing, or they do not fit each other.
        """
        records = load_manifest(self.manifest)
        return records, open_cache(self.cache, len(records))


def _locked(folder: int) -> bool:
    """Lock an open folder until it is closed; whether nobody else has it."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def rows(records: list[Record], split: Split, dataset: str = "") -> list[int]:
    """Positions of the records of a split (and dataset, by the beginning of its name)."""
    return [
        position
        for position, record in enumerate(records)
        if record.split is split and record.dataset.startswith(dataset)
    ]


def to_calibrate_on(records: list[Record], config: Config) -> list[int]:
    """Positions of the validation images whose outcome is known."""
    validation = rows(records, Split.VALIDATION, config.validate_on)
    return [row for row in validation if records[row].melanoma is not None]


def to_learn_from(
    records: list[Record], config: Config, where: object
) -> tuple[list[int], list[int]]:
    """Positions of the images that a network trains on, and of those that stop and calibrate it.

    Args:
        records: Of its manifest.
        config: Of its run.
        where: They are from, for the error.

    Raises:
        DataError: Either do not have both classes; those to train on need none with teachers.
    """
    train = rows(records, Split.TRAIN)
    validation = rows(records, Split.VALIDATION, config.validate_on)
    for name, chosen in (("training", train), ("validation", validation)):
        counts = Counter(records[row].melanoma for row in chosen)
        taught = name == "training" and config.teachers and len(chosen) > 1
        if not (taught or (counts[True] and counts[False])):
            raise DataError(
                f"{where} must have {name} images with and without melanoma; of {len(chosen)} it "
                f"has {counts[True]} and {counts[False]}."
            )
    return train, validation
