"""Request and response models: the public contract."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from models.bundle import Probability


class QualityWarning(StrEnum):
    """What may make an answer less reliable; each by a rule in docs/quality.md."""

    BLURRED = "blurred"
    TOO_DARK = "too_dark"
    TOO_BRIGHT = "too_bright"
    LOW_RESOLUTION = "low_resolution"
    DARK_BORDER = "dark_border"
    OUT_OF_DISTRIBUTION = "out_of_distribution"


class Part(BaseModel):
    """Of an answer. Fields that were not set are left out."""

    model_config = ConfigDict(frozen=True)


class Melanoma(Part):
    """Calibrated probability of melanoma, and the decision at the bundle's threshold.

    The decision is made before the two are rounded.
    """

    probability: Probability
    threshold: Probability
    decision: Literal["at_or_above_threshold", "below_threshold"]


class Category(Part):
    """The most probable label, and the probability of each."""

    label: str
    probabilities: dict[str, Probability]


class Age(Part):
    """The most probable age bin, the expected age in years, and the probability of each bin."""

    label: str
    years: float
    probabilities: dict[str, Probability]


class Prediction(Part):
    """What the network answers; `sex` and `diagnosis` where the bundle has those heads."""

    melanoma: Melanoma
    age: Age
    site: Category
    sex: Category | None = None
    diagnosis: Category | None = None


class Quality(Part):
    """Whether the image is one that the answer can be relied on for."""

    ood_score: float = Field(description="Distance from the training images; higher is stranger.")
    in_distribution: bool
    warnings: list[QualityWarning]


class Box(Part):
    """A part of an image, in pixels of the upright original."""

    left: float
    top: float
    width: float
    height: float


class Explanation(Part):
    """A heat map of what raised (red) and lowered (blue) the melanoma logit, over the image.

    Over the part of it that the network sees: the middle, no longer than 4:3.
    """

    media_type: Literal["image/png"]
    overlay: str = Field(description="The picture, in base64, at most 512 pixels a side.")
    box: Box = Field(description="The part of the image that it shows.")


class ImageFacts(Part):
    """What was received."""

    width: int = Field(description="Of the upright picture: EXIF's orientation is applied.")
    height: int = Field(description="Likewise.")
    format: str
    sha256: str = Field(description="Of the bytes received.")


_PROBLEM_EXAMPLE: JsonDict = {
    "type": "urn:mmtl:problem:unsupported-image",
    "title": "Not an image of a supported format",
    "status": 415,
    "detail": "The bytes are not an image of a supported format (JPEG, PNG, WEBP, TIFF, BMP).",
}


class ProblemBody(Part):
    """RFC 9457 problem details. `type` is stable; `detail` is for people."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"example": _PROBLEM_EXAMPLE})

    type: str
    title: str
    status: int
    detail: str
    results: "list[Result] | None" = Field(None, description="Each file's own problem.")


class Success(Part):
    """An image that was answered."""

    filename: str | None
    status: Literal["ok"]
    image: ImageFacts
    prediction: Prediction
    quality: Quality
    explanation: Explanation | None = Field(None, description="With ?explain=true.")


class Failure(Part):
    """An image that could not be used."""

    filename: str | None
    status: Literal["error"]
    error: ProblemBody


Result = Annotated[Success | Failure, Field(discriminator="status")]


class ModelFacts(Part):
    """Which network answered."""

    name: str
    version: str
    sha256: str = Field(description="Of the artifact that ran.")
    manifest_sha256: str = Field(
        description="Of the bundle's bundle.json, which has the calibration and the thresholds."
    )


_EXAMPLE: JsonDict = {
    "request_id": "4f6d1c0e9b3a4a4f8f0c1d2e3f4a5b6c",
    "model": {
        "name": "mmtl-lite2",
        "version": "0.4.0",
        "sha256": "9f2c…",
        "manifest_sha256": "51e3…",
    },
    "results": [
        {
            "filename": "a.jpg",
            "status": "ok",
            "image": {"width": 1024, "height": 768, "format": "JPEG", "sha256": "b5bb…"},
            "prediction": {
                "melanoma": {
                    "probability": 0.12,
                    "threshold": 0.31,
                    "decision": "below_threshold",
                },
                "age": {
                    "label": "45-59",
                    "years": 51.0,
                    "probabilities": {"0-29": 0.05, "30-44": 0.2, "45-59": 0.5, "60-74": 0.25},
                },
                "site": {"label": "torso", "probabilities": {"torso": 0.7}},
            },
            "quality": {"ood_score": 1.1, "in_distribution": True, "warnings": []},
        },
        {
            "filename": "b.txt",
            "status": "error",
            "error": _PROBLEM_EXAMPLE,
        },
    ],
}


class PredictResponse(Part):
    """One result an image, in the order of the upload."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"example": _EXAMPLE})

    request_id: str
    model: ModelFacts
    results: list[Result]


class Health(Part):
    """Whether the service runs, or may be sent requests."""

    status: Literal["live", "ready"]
