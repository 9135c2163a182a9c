"""What is noted of one request while it is answered."""

from dataclasses import dataclass, field

from starlette.types import Scope

from app.schemas import ModelFacts

KEY = "mmtl.trace"


@dataclass(slots=True)
class Trace:
    """One request: its id, and what it spent its time on.

    Attributes:
        request_id: The caller's `X-Request-ID` where it has a sane form, else a new one.
        stages: Seconds by stage; of several images, the slowest.
        images: How many were sent.
        model: The network that the images were given to; None before.
        key: Id of the caller's key, where there are keys.
        spans: Stage, beginning and end of each image's, on `time.monotonic`'s clock.
        trace_id: Of the OpenTelemetry trace that it is sampled into; else empty.
        problems: Names of the problems that the request, or its images, were answered with.
        unread: Whether the caller did not read the answer in time, and was cut off.
    """

    request_id: str
    stages: dict[str, float] = field(default_factory=dict)
    images: int = 0
    model: ModelFacts | None = None
    key: str | None = None
    trace_id: str = ""
    problems: list[str] = field(default_factory=list)
    unread: bool = False
    spans: list[tuple[str, float, float]] = field(default_factory=list)

    def spent(self, stage: str, seconds: float) -> None:
        """Note an image's time in a stage."""
        self.stages[stage] = max(seconds, self.stages.get(stage, 0.0))


def trace_of(scope: Scope) -> Trace:
    """The trace of the request that a scope belongs to."""
    trace = scope[KEY]
    assert isinstance(trace, Trace)
    return trace
