"""From the bytes of an image to its result: decode, queue, infer, and put into words."""

import asyncio
import hashlib
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from app import batcher as batching
from app import problems
from app.batcher import Answer
from app.heatmap import draw_overlay
from app.networks import Network, Networks
from app.problems import Kind, Problem
from app.quality import find_warnings
from app.schemas import (
    Age,
    Box,
    Category,
    Explanation,
    Failure,
    ImageFacts,
    Melanoma,
    ModelFacts,
    Prediction,
    Quality,
    QualityWarning,
    Result,
    Success,
)
from app.settings import Settings
from app.telemetry import Metrics
from app.trace import Trace
from app.uploads import Upload
from models.bundle import Outputs, one_melanoma_probability
from models.images import DecodedImage, ImageError, centred_box, decode

T = TypeVar("T")

# Of what stands in an answer; decisions are made on the full numbers.
DIGITS = 6
# Bytes that are hashed in a few milliseconds, which the event loop may well be late by.
_MOST_TO_HASH_HERE = 4_000_000
log = structlog.get_logger()

_REFUSALS: dict[type[batching.Refused], tuple[Kind, str]] = {
    batching.Saturated: (
        problems.SATURATED,
        "The queue is full. Try again after Retry-After seconds.",
    ),
    batching.Late: (
        problems.SATURATED,
        "With what waits already it would take longer than MMTL_DEADLINE_SECONDS. Try again after "
        "Retry-After seconds.",
    ),
    batching.Draining: (problems.DRAINING, "Send the request to another instance, or try again."),
    batching.NotReady: (
        problems.NOT_READY,
        "The network is being loaded, or has stopped. Try again after Retry-After seconds.",
    ),
    batching.DeadlineExceeded: (
        problems.DEADLINE_EXCEEDED,
        "The answer comes later than MMTL_DEADLINE_SECONDS. Try again after Retry-After seconds.",
    ),
    batching.InferenceFailed: (
        problems.INFERENCE_FAILED,
        "Tell the operator the X-Request-ID.",
    ),
}


def problem_of(refusal: type[batching.Refused]) -> Problem:
    """The problem that a refusal of the batcher is answered with."""
    return Problem(*_REFUSALS[refusal])


@dataclass(slots=True)
class _Picture:
    """An upload, and what its decoder found.

    Attributes:
        data: Encoded.
        image: Decoded.
        sha256: Of `data`, in hexadecimal.
        decode_began: On `time.monotonic`'s clock.
        decode_seconds: That it took.
    """

    data: bytes
    image: DecodedImage | None = None
    sha256: str = ""
    decode_began: float = 0.0
    decode_seconds: float = 0.0


class Predictor:
    """Everything that answers for an image.

    Args:
        networks: The served one and its successors.
        settings: Limits and deadline.
        metrics: Told of every image.
    """

    def __init__(self, networks: Networks, settings: Settings, metrics: Metrics):
        self.networks = networks
        self._deadline_seconds = settings.deadline_seconds
        self._limits = settings.limits
        self._metrics = metrics

    def check_open(self) -> None:
        """Refuse a request whose body need not be read.

        Raises:
            Problem: The network is not ready, or the service is shutting down.
        """
        try:
            with self.networks.reserve(1, deadline=time.monotonic() + self._deadline_seconds):
                pass
        except batching.Refused as refusal:
            raise problem_of(type(refusal)) from None

    async def predict(
        self, uploads: list[Upload], explain: bool, trace: Trace
    ) -> tuple[ModelFacts, list[Result]]:
        """The result of each image, in order, all by one network, and which that was.

        What becomes of them is counted by who answers: `count`.

        Args:
            uploads: The images.
            explain: With a heat map.
            trace: Told of the stages' times.

        Raises:
            Problem: The service cannot take the request as a whole.
        """
        trace.images = len(uploads)
        deadline = time.monotonic() + self._deadline_seconds
        refusal: type[batching.Refused]
        try:
            # Its upload may have begun before a drain.
            reserved = self.networks.reserve(len(uploads), begun=True, deadline=deadline)
            with reserved as network:
                trace.model = network.facts
                work = [
                    self._result(network, upload, explain, deadline, trace) for upload in uploads
                ]
                async with asyncio.timeout(self._deadline_seconds):
                    results = await _all(work)
                return network.facts, results
        except* batching.Refused as refused:
            refusal = type(_first(refused))
        except* TimeoutError:
            refusal = batching.DeadlineExceeded
        self._metrics.images.labels("refused").inc(len(uploads))
        raise problem_of(refusal)

    async def _result(
        self, network: Network, upload: Upload, explain: bool, deadline: float, trace: Trace
    ) -> Result:
        try:
            return await self._success(network, upload, explain, deadline, trace)
        except Problem as problem:
            return _failure(upload, problem, trace)
        except batching.Refused:
            raise
        except Exception:  # no memory for this image, most likely: the others are answered
            log.exception("image failed", request_id=trace.request_id)
            unknown = Problem(problems.INTERNAL, "Tell the operator the X-Request-ID.")
            return _failure(upload, unknown, trace)

    async def _success(
        self, network: Network, upload: Upload, explain: bool, deadline: float, trace: Trace
    ) -> Success:
        picture = _Picture(upload.data)
        future: Future[Answer] = Future()
        put = time.monotonic()
        network.batcher.put(partial(self._decode, network, picture), deadline, future)
        if network.batcher.admitted == 1 and len(upload.data) <= _MOST_TO_HASH_HERE:
            # While a worker decodes it: this core would be idle, and the answer later.
            picture.sha256 = _hash(upload.data)
        try:
            answer = await asyncio.wrap_future(future)
        except ImageError as error:
            raise Problem.of_image(error.with_traceback(None)) from None
        except batching.InferenceFailed as refusal:
            raise problem_of(type(refusal.with_traceback(None))) from None
        finally:
            if picture.decode_seconds:
                self._spent(trace, "decode", picture.decode_seconds)
        self._spent(trace, "queue", answer.queue_seconds)
        self._spent(trace, "inference", answer.inference_seconds)
        decoded = picture.decode_began + picture.decode_seconds
        run = answer.ended - answer.inference_seconds
        trace.spans += [
            ("queue", put, picture.decode_began),
            ("decode", picture.decode_began, decoded),
            ("queue", decoded, run),
            ("inference", run, answer.ended),
        ]
        image = picture.image
        assert image is not None
        prediction, quality = _interpret(network, image, answer.outputs)
        fields: dict[str, Explanation] = {}
        if explain:
            drawn: Future[str] = Future()
            heat = answer.outputs["melanoma_map"]
            draw = partial(draw_overlay, upload.data, image, heat, self._limits)
            asked = time.monotonic()
            network.batcher.finish(draw, deadline, drawn)
            try:
                overlay = await asyncio.wrap_future(drawn)
            except ImageError as error:  # damaged where only a larger picture shows it
                raise Problem.of_image(error.with_traceback(None)) from None
            had = time.monotonic()
            self._spent(trace, "explain", had - asked)
            trace.spans.append(("explain", asked, had))
            fields["explanation"] = Explanation(
                media_type="image/png", overlay=overlay, box=_box(image)
            )
        return Success(
            filename=upload.filename,
            status="ok",
            image=ImageFacts(
                width=image.width, height=image.height, format=image.format, sha256=picture.sha256
            ),
            prediction=prediction,
            quality=quality,
            **fields,
        )

    def _decode(self, network: Network, picture: _Picture) -> NDArray[np.uint8]:
        """In a worker's thread: the pixels, and what else there is to know of the picture."""
        began = picture.decode_began = time.monotonic()
        size = network.bundle.manifest.input
        try:
            image = decode(
                picture.data,
                size.height,
                size.width,
                self._limits,
                wait=False,
                sparing=network.batcher.others_wait,
            )
            picture.image = image
            picture.sha256 = picture.sha256 or _hash(picture.data)
        finally:
            picture.decode_seconds = time.monotonic() - began
        return image.pixels

    def _spent(self, trace: Trace, stage: str, seconds: float) -> None:
        trace.spent(stage, seconds)
        self._metrics.stage(stage).observe(seconds)

    def count(self, results: list[Result], answered: bool) -> None:
        """Count what became of a request's images.

        Args:
            results: Theirs.
            answered: Whether the caller gets them; else, the request was refused as a whole.
        """
        if not answered:
            self._metrics.images.labels("refused").inc(len(results))
            return
        for result in results:
            self._count(result)

    def _count(self, result: Result) -> None:
        metrics = self._metrics
        metrics.images.labels(result.status).inc()
        if isinstance(result, Failure):
            return
        prediction = result.prediction
        metrics.observe_probability(prediction.melanoma.probability)
        metrics.predicted_as("melanoma", prediction.melanoma.decision).inc()
        for task, found in prediction:
            if isinstance(found, Age | Category):
                metrics.predicted_as(task, found.label).inc()
        if not result.quality.in_distribution:
            metrics.out_of_distribution.inc()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _box(image: DecodedImage) -> Box:
    """What the network sees of an image."""
    left, top, right, bottom = centred_box((image.width, image.height))
    sides = {"left": left, "top": top, "width": right - left, "height": bottom - top}
    return Box(**{side: round(pixels, 2) for side, pixels in sides.items()})


def _failure(upload: Upload, problem: Problem, trace: Trace) -> Failure:
    trace.problems.append(problem.kind.name)
    return Failure(filename=upload.filename, status="error", error=problem.body())


def _interpret(
    network: Network, image: DecodedImage, outputs: Outputs
) -> tuple[Prediction, Quality]:
    artifact = network.artifact
    probability = one_melanoma_probability(float(outputs["melanoma_logit"]), artifact.calibration)
    above = probability >= artifact.melanoma_threshold
    melanoma = Melanoma(
        probability=round(probability, DIGITS),
        threshold=round(artifact.melanoma_threshold, DIGITS),
        decision="at_or_above_threshold" if above else "below_threshold",
    )
    categories: dict[str, Age | Category] = {}
    for task in network.bundle.manifest.tasks:
        if task.kind == "binary":
            continue
        probabilities = dict(zip(task.labels, _shares(outputs[task.name]), strict=True))
        label = max(probabilities, key=probabilities.__getitem__)
        if task.name == "age":
            years = round(float(outputs["age_years"]), 1)
            categories["age"] = Age(label=label, years=years, probabilities=probabilities)
        else:
            categories[task.name] = Category(label=label, probabilities=probabilities)
    score = float(outputs["ood_score"])
    inside = score <= artifact.ood_threshold
    size = network.bundle.manifest.input
    warnings = find_warnings(outputs, image.width, image.height, min(size.width, size.height))
    if not inside:
        warnings.append(QualityWarning.OUT_OF_DISTRIBUTION)
    return (
        Prediction.model_validate({"melanoma": melanoma, **categories}),
        Quality(ood_score=round(score, DIGITS), in_distribution=inside, warnings=warnings),
    )


def _shares(probabilities: NDArray[np.float32]) -> list[float]:
    """Of 1: a runtime that computes in bfloat16 gives some that add up to 1.004."""
    # Python's own numbers: for so few, NumPy takes several times as long.
    values = [min(max(value, 0.0), 1.0) for value in probabilities.tolist()]
    total = sum(values) or 1.0
    return [round(value / total, DIGITS) for value in values]


async def _all(work: list[Coroutine[Any, Any, T]]) -> list[T]:
    """What each returns; where one fails, the others are cancelled."""
    if len(work) == 1:  # needs no task of its own
        return [await work[0]]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
    return [task.result() for task in tasks]


def _first(group: BaseExceptionGroup[batching.Refused]) -> batching.Refused:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
