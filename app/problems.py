"""Every error the service can answer, in one table, as RFC 9457 problem+json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from app.schemas import ProblemBody
from app.trace import trace_of
from models.images import (
    CorruptImageError,
    EmptyImageError,
    ImageError,
    ImageTooLargeError,
    UnsupportedImageError,
)

MEDIA_TYPE = "application/problem+json"
_URN = "urn:mmtl:problem:"


@dataclass(frozen=True, slots=True)
class Kind:
    """A row of the table.

    Attributes:
        name: The end of the type's URN.
        status: Of the answer.
        title: The same for each occurrence.
        retry_after: Seconds after which trying again makes sense; None where it does not, or where
            each occurrence has its own.
    """

    name: str
    status: int
    title: str
    retry_after: int | None = None

    @property
    def type(self) -> str:
        """The stable `type` of the problem."""
        return _URN + self.name


EMPTY_IMAGE = Kind("empty-image", 400, "The image is empty")
UNSUPPORTED_IMAGE = Kind("unsupported-image", 415, "Not an image of a supported format")
CORRUPT_IMAGE = Kind("corrupt-image", 422, "The image is damaged")
IMAGE_TOO_LARGE = Kind("image-too-large", 413, "The image has too many pixels or bytes")
NO_FILES = Kind("no-files", 400, "The request holds no image")
TOO_MANY_FILES = Kind("too-many-files", 413, "The request holds too many images")
UNEXPECTED_FIELD = Kind("unexpected-field", 422, "A form field is not a file in `files`")
MALFORMED_FORM = Kind("malformed-form", 400, "The multipart body cannot be read")
BODY_TOO_LARGE = Kind("body-too-large", 413, "The request has too many bytes")
UPLOAD_TOO_SLOW = Kind("upload-too-slow", 408, "The request took too long to arrive")
MALFORMED_REQUEST = Kind("malformed-request", 400, "This is no HTTP request that can be read")
HEADERS_TOO_LARGE = Kind("headers-too-large", 431, "The request's headers have too many bytes")
UNSUPPORTED_MEDIA_TYPE = Kind(
    "unsupported-media-type", 415, "The request's content type is not supported"
)
ALL_FILES_FAILED = Kind("all-files-failed", 422, "None of the images could be used")
INVALID_PARAMETER = Kind("invalid-parameter", 422, "A parameter does not fit")
UNAUTHORIZED = Kind("unauthorized", 401, "A valid API key is asked for")
FORBIDDEN = Kind("forbidden", 403, "The API key is not for this path")
QUOTA_EXCEEDED = Kind("quota-exceeded", 429, "The API key's quota is used up")
NOT_FOUND = Kind("not-found", 404, "There is nothing at this path")
METHOD_NOT_ALLOWED = Kind("method-not-allowed", 405, "The path does not take this method")
ADMIN_CLOSED = Kind("admin-closed", 403, "The service has no key for administrators")
RELOAD_REFUSED = Kind("reload-refused", 409, "The served network stays")
RELOADED_IN_PART = Kind("reloaded-in-part", 409, "Not every process took the bundle")
SATURATED = Kind("saturated", 503, "The service is busy", 1)
DRAINING = Kind("draining", 503, "The service is shutting down", 5)
DEADLINE_EXCEEDED = Kind("deadline-exceeded", 503, "The request took too long", 5)
NOT_READY = Kind("not-ready", 503, "The service is not ready", 5)
PROVIDER_UNREACHABLE = Kind(
    "provider-unreachable", 503, "The identity provider cannot be asked", 30
)
AUDIT_UNAVAILABLE = Kind("audit-unavailable", 503, "The audit log cannot be written", 30)
INFERENCE_FAILED = Kind("inference-failed", 500, "The network failed on this image")
INTERNAL = Kind("internal", 500, "The service failed")

KINDS = {kind.name: kind for kind in list(globals().values()) if isinstance(kind, Kind)}
# Of an answer, by its status.
_HEADERS: dict[int | str, dict[str, str]] = {
    401: {"WWW-Authenticate": "`Bearer`."},
    415: {"Accept-Encoding": "`identity`, where another Content-Encoding is what was refused."},
    429: {"Retry-After": "Seconds after which the key's quota has a request again."},
    503: {"Retry-After": "Seconds after which trying again makes sense."},
}

_OF_IMAGE_ERROR: dict[type[ImageError], Kind] = {
    EmptyImageError: EMPTY_IMAGE,
    UnsupportedImageError: UNSUPPORTED_IMAGE,
    CorruptImageError: CORRUPT_IMAGE,
    ImageTooLargeError: IMAGE_TOO_LARGE,
}


def kind_of(body: ProblemBody) -> Kind:
    """Of a problem, as it stands in an answer."""
    return KINDS[body.type.removeprefix(_URN)]


def describe(*statuses: int | str) -> dict[int | str, dict[str, Any]]:
    """Problems as OpenAPI has them.

    FastAPI's `model` would promise application/json, which no problem is sent as.
    """
    return {status: _describe(status) for status in statuses}


def _describe(status: int | str) -> dict[str, Any]:
    headers = {"X-Request-ID": "Of the request, in the log as well."}
    return {
        "description": "A problem; its `type` says which.",
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemBody"}}},
        "headers": as_headers(headers | _HEADERS.get(status, {})),
    }


def as_headers(meanings: Mapping[str, str]) -> dict[str, Any]:
    """Headers of an answer as OpenAPI has them, by name."""
    return {
        name: {"description": meaning, "schema": {"type": "string"}}
        for name, meaning in meanings.items()
    }


class Problem(Exception):
    """A problem to answer with.

    Args:
        kind: A row of the table.
        detail: One sentence on this occurrence: what was wrong and what to do.
        headers: Of the answer, beside those of its kind.
    """

    def __init__(self, kind: Kind, detail: str, headers: Mapping[str, str] | None = None):
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.headers = headers

    @classmethod
    def of_image(cls, error: ImageError) -> "Problem":
        """The problem of an image that cannot be used."""
        return cls(_OF_IMAGE_ERROR[type(error)], str(error))

    def body(self) -> ProblemBody:
        """As it stands in an answer."""
        return ProblemBody(
            type=self.kind.type,
            title=self.kind.title,
            status=self.kind.status,
            detail=self.detail,
        )


def respond(
    problem: Problem,
    body: ProblemBody | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The HTTP answer of a problem (`body` where it says more than the problem does).

    `answer` is for a request that has a trace.
    """
    retry = problem.kind.retry_after
    return Response(
        (body or problem.body()).model_dump_json(exclude_unset=True),
        problem.kind.status,
        {
            **(problem.headers or {}),
            **(headers or {}),
            **({"Retry-After": str(retry)} if retry else {}),
        },
        MEDIA_TYPE,
    )


def answer(scope: Scope, problem: Problem) -> Response:
    """The HTTP answer to a request that a problem ended, which its trace is told of."""
    trace_of(scope).problems.append(problem.kind.name)
    return respond(problem)


def install(app: FastAPI) -> None:
    """Make every error that a route raises a problem; `app.telemetry` answers for the others."""

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return answer(request.scope, error)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = {404: NOT_FOUND, 405: METHOD_NOT_ALLOWED}.get(error.status_code)
        if kind is None:  # nobody here raises another
            raise error
        detail = "See /docs for what the service answers."
        headers = dict(error.headers or {})
        if "Allow" in headers:
            allowed = set(headers["Allow"].split(", "))
            if "GET" in allowed:
                allowed.add("HEAD")  # which app.routes.predict.Direct answers as GET
            headers["Allow"] = ", ".join(sorted(allowed))
        return answer(request.scope, Problem(kind, detail, headers))

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first: Mapping[str, Any] = error.errors()[0]
        where = " ".join(str(part) for part in first["loc"])
        return answer(request.scope, Problem(INVALID_PARAMETER, f"{where}: {first['msg']}."))

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
