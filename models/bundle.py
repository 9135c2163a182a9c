"""A bundle: a fitted network's artifacts and the manifest that says what they are.

A folder with `bundle.json` (`Manifest`) and the artifacts that it lists by SHA-256. What is learned
from pixels is in the artifacts; what a clinic may have to change (calibration, prevalence,
thresholds) is in the manifest.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.files import read_small
from models.signatures import SIGNATURE, SignatureError, verify

MANIFEST = "bundle.json"
# Bytes; one is some ten thousand long. It is read before anything is known of who wrote it.
_MOST_OF_A_MANIFEST = 1_000_000
# All are in memory at once.
_MOST_GOLDEN = 64
# Of a golden output, in logits or years; beyond it nothing would be compared.
_MOST_TOLERANCE = 1.0
FORMAT_VERSION: Literal[1] = 1
NAME = r"^[a-z0-9][a-z0-9-]*$"
VERSION = r"^\d+\.\d+\.\d+$"
# Tasks, for each of which an answer of the service has a field.
REQUIRED_TASKS = frozenset({"melanoma", "age", "site"})
OPTIONAL_TASKS = frozenset({"sex", "diagnosis"})
# ISIC records `age_approx` in steps of five years, 0 to 90.
AGE_GRID = tuple(range(0, 91, 5))

ArtifactFormat = Literal["onnx", "torch_export", "torchscript"]
Precision = Literal["fp32", "fp16", "int8"]
Probability = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Logits = NDArray[np.floating]
Outputs = Mapping[str, NDArray[np.float32]]


class BundleError(Exception):
    """A bundle that cannot be used; the message says in one sentence why."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class InputSpec(_Part):
    """How an image becomes the network's input: see `models.images.decode`."""

    height: int = Field(ge=32, le=1024)
    width: int = Field(ge=32, le=1024)
    resize: Literal["crop_to_4_3_and_stretch"] = "crop_to_4_3_and_stretch"


class Task(_Part):
    """One thing the network predicts, its labels in the order of the output's columns.

    `bin_edges` is for ordinal tasks: the first value, in years, of every bin but the first.
    """

    name: str
    kind: Literal["binary", "categorical", "ordinal"]
    labels: tuple[str, ...] = Field(min_length=2)
    bin_edges: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _edges_fit(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels stand twice")
        edges = self.bin_edges
        if (edges is not None) != (self.kind == "ordinal"):
            raise ValueError("bin_edges are for ordinal tasks, and for all of them")
        if edges is not None and (
            len(edges) != len(self.labels) - 1 or list(edges) != sorted(set(edges))
        ):
            raise ValueError("bin_edges must rise, one fewer than labels")
        return self


class Calibration(_Part):
    """Platt scaling: probability = sigmoid(slope * logit + intercept)."""

    slope: float = Field(gt=0)
    intercept: float


class OperatingPoint(_Part):
    """Where the melanoma threshold came from."""

    criterion: str
    dataset: str
    images: int = Field(ge=1)
    melanomas: int = Field(ge=1)
    sensitivity: Probability
    specificity: Probability


# Limits that came later are validators, not `Field`'s: another limit in the API's description is a
# breaking change (tests/app/test_openapi.py).
class Golden(_Part):
    """What the network answers for `golden_image(seed, ...)`."""

    seed: int = Field(ge=0)
    outputs: dict[str, tuple[float, ...]]

    @field_validator("seed")
    @classmethod
    def _is_drawn_from_in_64_bits(cls, seed: int) -> int:
        if seed >= 2**31:
            raise ValueError("must be less than 2147483648")
        return seed

    @field_validator("outputs")
    @classmethod
    def _says_something(cls, outputs: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        if not outputs:
            raise ValueError("must have one output at least")
        return outputs


class Artifact(_Part):
    """One file of the network, and the scalars that turn its outputs into answers."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    format: ArtifactFormat
    precision: Precision
    bytes: int = Field(ge=1)
    sha256: Sha256
    calibration: Calibration
    melanoma_threshold: Probability
    ood_threshold: float
    tolerance: float = Field(gt=0, description="By how much a golden output may differ.")
    golden: tuple[Golden, ...] | None = Field(
        None, description="Its own golden predictions; None for those of the manifest."
    )
    operating_point: OperatingPoint | None = Field(
        None, description="Where its own threshold came from; None for that of the manifest."
    )

    @field_validator("tolerance")
    @classmethod
    def _compares_something(cls, tolerance: float) -> float:
        if tolerance > _MOST_TOLERANCE:
            raise ValueError(f"must be at most {_MOST_TOLERANCE:g}")
        return tolerance


class DataSource(_Part):
    """A dataset that the weights were learned from."""

    name: str
    licence: str
    url: str
    images: int = Field(ge=1)


class TrainingData(_Part):
    """What the weights were learned from, and on what terms they may be used."""

    fingerprint: Sha256
    sources: tuple[DataSource, ...] = Field(min_length=1)
    licence: str


class Metric(_Part):
    """A held-out figure with its 95 % confidence interval."""

    name: str
    dataset: str
    value: float
    low: float
    high: float
    images: int = Field(ge=1)


class Manifest(_Part):
    """`bundle.json`."""

    format_version: Literal[1] = FORMAT_VERSION
    name: str = Field(pattern=NAME)
    version: str = Field(pattern=VERSION)
    description: str
    input: InputSpec
    tasks: tuple[Task, ...] = Field(min_length=1)
    artifacts: tuple[Artifact, ...] = Field(min_length=1)
    prevalence: float = Field(
        gt=0, lt=1, description="Share of melanoma that the probability is calibrated to."
    )
    operating_point: OperatingPoint
    training_data: TrainingData
    metrics: tuple[Metric, ...] = ()
    golden: tuple[Golden, ...] = Field(min_length=1)

    @field_validator("version")
    @classmethod
    def _is_of_ascii(cls, version: str) -> str:
        if not version.isascii():  # it is sent in a header
            raise ValueError("must be of the digits 0 to 9")
        return version

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        for what, names in (
            ("task", [task.name for task in self.tasks]),
            ("artifact", [artifact.file for artifact in self.artifacts]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"a {what} stands twice")
        named = {task.name for task in self.tasks}
        if missing := REQUIRED_TASKS - named:
            raise ValueError(f"the task {sorted(missing)[0]} is missing")
        if unknown := named - REQUIRED_TASKS - OPTIONAL_TASKS:
            raise ValueError(
                f"the task {sorted(unknown)[0]} is none that this version of mmtl answers"
            )
        for task in self.tasks:
            if (task.kind == "binary") != (task.name == "melanoma"):
                raise ValueError(f"the task {task.name} cannot be {task.kind}")
        if len(self.golden) > _MOST_GOLDEN:
            raise ValueError(f"more than {_MOST_GOLDEN} golden images")
        seeds = [golden.seed for golden in self.golden]
        for artifact in self.artifacts:
            if artifact.golden and [golden.seed for golden in artifact.golden] != seeds:
                raise ValueError(f"{artifact.file} has golden predictions of other images")
        return self

    def point(self, artifact: Artifact) -> OperatingPoint:
        """Where the threshold of one of the artifacts came from."""
        return artifact.operating_point or self.operating_point

    def task(self, name: str) -> Task | None:
        """The task of this name, None where the bundle has no such head."""
        return next((task for task in self.tasks if task.name == name), None)

    def output_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Name and shape of every output of every artifact; None is a free dimension."""
        shapes: dict[str, tuple[int | None, ...]] = {
            "melanoma_logit": (None,),
            "age_years": (None,),
            "melanoma_map": (None, None, None),
            "ood_score": (None,),
        }
        for task in self.tasks:
            if task.kind != "binary":
                shapes[task.name] = (None, len(task.labels))
        return shapes


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle on disk.

    Attributes:
        folder: Where it is.
        manifest: Its manifest.
        manifest_sha256: Of `bundle.json`, as it was read; empty where it was not.
    """

    folder: Path
    manifest: Manifest
    manifest_sha256: str = ""

    def artifact(
        self, artifact_format: ArtifactFormat, precision: Precision | None = None
    ) -> Artifact:
        """The artifact of a format: the first whose file is there, or that of a precision.

        Raises:
            BundleError: The bundle has none, or its file is not there.
        """
        fitting = [
            artifact
            for artifact in self.manifest.artifacts
            if artifact.format == artifact_format and precision in (None, artifact.precision)
        ]
        for artifact in fitting:
            if self.path(artifact).is_file():
                return artifact
        if fitting:
            raise BundleError(
                f"{self.path(fitting[0])} is not there. Write it with `mmtl-train export`, or "
                "serve another format."
            )
        have = ", ".join(f"{a.format} {a.precision}" for a in self.manifest.artifacts)
        asked = f"{artifact_format} {precision}" if precision else artifact_format
        raise BundleError(f"{self.folder} has no {asked} artifact; it has {have}.")

    def artifact_for_cpu(self) -> Artifact:
        """The ONNX artifact that a CPU runs: int8 where there is one, as it is the faster; or fp32.

        Raises:
            BundleError: The bundle has no ONNX artifact.
        """
        for precision in ("int8", "fp32"):
            for artifact in self.manifest.artifacts:
                is_it = (artifact.format, artifact.precision) == ("onnx", precision)
                if is_it and self.path(artifact).is_file():
                    return artifact
        return self.artifact("onnx")

    def path(self, artifact: Artifact) -> Path:
        """Where an artifact's file is."""
        return self.folder / artifact.file

    def files(self, *without: str) -> dict[str, Path]:
        """Files to copy beside another manifest, by name: not this, its signature or `without`.

        A symbolic link is followed for an artifact only: another may lead to what its author could
        not read.
        """
        out = {MANIFEST, SIGNATURE, *without}
        artifacts = {artifact.file for artifact in self.manifest.artifacts}
        return {
            p.name: p
            for p in self.folder.iterdir()
            if p.is_file() and p.name not in out and (p.name in artifacts or not p.is_symlink())
        }

    def read(self, artifact: Artifact) -> bytes:
        """An artifact's bytes, which are verified: its file may have changed since the bundle was.

        Raises:
            BundleError: They cannot be read, or are not what the manifest says.
        """
        self._check_size(artifact)
        try:
            content = self.path(artifact).read_bytes()
        except OSError as error:
            raise self._unreadable(artifact, error) from None
        self._check(artifact, hashlib.sha256(content).hexdigest())
        return content

    def verify(self, artifact: Artifact) -> None:
        """Compare an artifact's file with its manifest.

        Raises:
            BundleError: As `read` does.
        """
        self._check_size(artifact)
        try:
            found = sha256_of(self.path(artifact))
        except OSError as error:
            raise self._unreadable(artifact, error) from None
        self._check(artifact, found)

    def _check_size(self, artifact: Artifact) -> None:
        """Before a file of any length is read into memory."""
        try:
            size = self.path(artifact).stat().st_size
        except OSError as error:
            raise self._unreadable(artifact, error) from None
        if not self.path(artifact).is_file():
            raise BundleError(f"{self.path(artifact)} cannot be read: it is no file.")
        if size != artifact.bytes:
            raise BundleError(
                f"{self.path(artifact)} is not the file that the manifest describes ({size:,} "
                f"bytes, expected {artifact.bytes:,}): fetch or export it again."
            )

    def _unreadable(self, artifact: Artifact, error: OSError) -> BundleError:
        return BundleError(f"{self.path(artifact)} cannot be read: {error.strerror}.")

    def _check(self, artifact: Artifact, found: str) -> None:
        if found != artifact.sha256:
            raise BundleError(
                f"{self.path(artifact)} is not the file that the manifest describes (SHA-256 "
                f"{found[:12]}…, expected {artifact.sha256[:12]}…): fetch or export it again."
            )


def load_bundle(folder: Path, signed_by: Path | None = None) -> Bundle:
    """Read a bundle and verify every artifact that is there.

    Args:
        folder: Of the bundle.
        signed_by: The public key that its manifest must be signed with; None asks for no signature.

    Raises:
        BundleError: No bundle, a manifest that does not fit or is not signed as asked, or a file
            that is not what the manifest says.
    """
    path = folder / MANIFEST
    try:
        content = read_small(path, _MOST_OF_A_MANIFEST)
        if signed_by is not None:
            verify(content, folder / SIGNATURE, signed_by)
        manifest = Manifest.model_validate_json(content)
    except SignatureError as error:
        raise BundleError(f"{folder} cannot be trusted: {error}.") from None
    except OSError as error:
        raise BundleError(
            f"{folder} is not a bundle: {MANIFEST} cannot be read ({error.strerror})."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise BundleError(f"{path} does not fit: {f'{where}: ' if where else ''}{said}.") from None
    bundle = Bundle(folder, manifest, hashlib.sha256(content).hexdigest())
    present = [artifact for artifact in manifest.artifacts if bundle.path(artifact).is_file()]
    if not present:
        raise BundleError(f"{folder} holds none of the artifacts that {MANIFEST} lists.")
    for artifact in present:
        bundle.verify(artifact)
    return bundle


def check_replaceable(folder: Path) -> None:
    """Refuse to write a bundle where something else is.

    Raises:
        BundleError: There is.
    """
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} exists and is not a bundle; choose another folder.")


def save_bundle(folder: Path, manifest: Manifest, files: Mapping[str, bytes | Path]) -> Bundle:
    """Write a bundle, replacing one that is there in one rename.

    A crash leaves the old bundle or the new one (the old one, between the two renames, under a name
    that ends in `.old`).

    Args:
        folder: Of the bundle.
        manifest: Its artifacts must be among `files`.
        files: Content, or a file to copy, by name; `bundle.json` is added.

    Raises:
        BundleError: `folder` is something else than a bundle, or a file does not fit the manifest.
    """
    check_replaceable(folder)
    folder = folder.resolve()  # a link stays one
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    old = new.with_suffix(".old")
    try:
        new.chmod(0o755)
        for name, content in files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, new / name)
            else:
                (new / name).write_bytes(content)
        # What is not used is not written: a version that does not know it reads the bundle, too.
        (new / MANIFEST).write_text(manifest.model_dump_json(indent=2, exclude_none=True) + "\n")
        read = load_bundle(new)
        for file in new.iterdir():
            file.chmod(0o644)  # as its folder: who makes a bundle is seldom who serves it
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return Bundle(folder, manifest, read.manifest_sha256)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def melanoma_probability(logits: Logits, calibration: Calibration) -> NDArray[np.float64]:
    """The calibrated probability of melanoma.

    Args:
        logits: `melanoma_logit`, any shape.
        calibration: The artifact's.

    Returns:
        Probabilities, of the same shape.
    """
    scaled = calibration.slope * np.asarray(logits, np.float64) + calibration.intercept
    # exp(-|x|) cannot overflow.
    small = np.exp(-np.abs(scaled))
    probability: NDArray[np.float64] = np.where(scaled >= 0, 1 / (1 + small), small / (1 + small))
    return probability


def one_melanoma_probability(logit: float, calibration: Calibration) -> float:
    """The calibrated probability of one image, as `melanoma_probability` has it.

    Not by NumPy: on one number, its dozen steps cost a service as much as writing the answer.
    """
    scaled = calibration.slope * logit + calibration.intercept
    small = exp(-abs(scaled))
    return 1 / (1 + small) if scaled >= 0 else small / (1 + small)


def golden_image(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """A picture that every machine draws alike (integers only): a dark disc on pale skin.

    Returns:
        uint8 [height, width, 3].
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    centre_y, centre_x = height * (3 + seed % 3) // 8, width * (5 - seed % 3) // 8
    distance = (y - centre_y) ** 2 * (2 + seed) + (x - centre_x) ** 2 * 3
    lesion = distance < (height * width) // (4 + seed % 4)
    texture = (x * x * (5 + seed) + y * x * 3 + y * (7 + seed)) // 16 % 23
    channels = [
        np.where(lesion, dark, pale) + texture
        for dark, pale in ((90 + 20 * (seed % 3), 215), (55 + 10 * (seed % 2), 170), (45, 150))
    ]
    return np.stack(channels, axis=-1).astype(np.uint8)


def golden_batch(manifest: Manifest) -> NDArray[np.uint8]:
    """The golden images of a manifest: uint8 [G, height, width, 3]."""
    size = manifest.input.height, manifest.input.width
    return np.stack([golden_image(golden.seed, *size) for golden in manifest.golden])


def check_golden(
    manifest: Manifest, artifact: Artifact, outputs: Outputs, rounding: float = 0.0
) -> None:
    """Compare an engine's outputs for `golden_batch`, or more images, with what the manifest says.

    Args:
        manifest: Of the artifact's bundle.
        artifact: That answered.
        outputs: Its answers.
        rounding: The engine's, as a share of an output's largest golden value (or of 1, where that
            is smaller): allowed in addition to the artifact's tolerance.

    Raises:
        BundleError: An output is missing or differs by more than the artifact's tolerance.
    """
    for row, golden in enumerate(artifact.golden or manifest.golden):
        for name, expected in golden.outputs.items():
            if name not in outputs:
                raise BundleError(f"{artifact.file} has no output {name}.")
            found = np.asarray(outputs[name][row], np.float64).ravel()
            allowed = artifact.tolerance + rounding * max([1.0, *map(abs, expected)])
            difference = (
                float(np.abs(found - expected).max()) if found.shape == (len(expected),) else np.inf
            )
            if not difference <= allowed:
                raise BundleError(
                    f"{artifact.file} on this machine differs from its golden prediction: {name} "
                    f"by {difference:.3g}, at most {allowed:.3g} is allowed."
                )
