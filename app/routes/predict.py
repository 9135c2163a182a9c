"""`POST /predict`."""

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Annotated, Any, TypeVar
from weakref import finalize

import structlog
from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app import problems
from app.access import asks, authorize, bearer
from app.audit import AuditError, AuditLog
from app.forms import FIELD
from app.predictor import Predictor
from app.problems import Problem, answer, respond
from app.schemas import Failure, ModelFacts, PredictResponse, ProblemBody, Result, Success
from app.telemetry import HEADERS
from app.trace import Trace, trace_of
from app.uploads import RAW_TYPES, Held, Upload, open_uploads
from models.threads import begin

T = TypeVar("T")


async def _look_at_query(request: Request) -> None:
    await authorize(request, "predict")  # who has no key is told nothing else
    if unknown := sorted(set(request.query_params) - {"explain"}):
        raise Problem(
            problems.INVALID_PARAMETER,
            f"query {unknown[0]}: there is no such parameter; `explain` is one.",
        )


router = APIRouter(dependencies=[bearer, Depends(_look_at_query)])

_PATH = "/predict"
# What a connection takes at once is not counted: an answer without heat maps is a few kilobytes.
_UNCOUNTED_BYTES = 65_536
# Longest that the audit log is waited for.
_AUDIT_SECONDS = 10.0
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "schema": {
        "type": "object",
        "required": [FIELD],
        "properties": {
            FIELD: {
                "type": "array",
                "minItems": 1,
                "items": {"type": "string", "format": "binary"},
                "description": "Images. In this page's form: choose a file in every row, and "
                "remove (−) empty ones.",
            },
        },
    }
}
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": _FORM,
        **dict.fromkeys(RAW_TYPES, _BINARY),
    },
}
# What is said of a patient is to be kept by no browser, and by no proxy on the way.
_NOT_KEPT = {"Cache-Control": "no-store"}
_STATUSES = (400, 401, 403, 408, 413, 415, 422, 429, 431, 500, 503)


@router.post(
    _PATH,
    response_model=PredictResponse,
    responses={
        200: {"headers": problems.as_headers(HEADERS | {"Cache-Control": "`no-store`."})},
        **problems.describe(*_STATUSES),
    },
    openapi_extra={"requestBody": _BODY},
    summary="Melanoma probability, age bin, anatomical site, sex and diagnosis of each image",
)
async def predict(
    request: Request,
    explain: Annotated[
        bool, Query(description="Add a heat map of the melanoma logit to each result.")
    ] = False,
) -> Response:
    """Send one or more images: as files in the form field `files`, or one as the body itself.

    Results keep the order of the upload. A file that cannot be used has its problem in its place;
    when none can be used, the whole answer is a problem. Research software, not a medical device.
    """
    predictor: Predictor = request.app.state.predictor
    trace = trace_of(request.scope)
    state = request.app.state

    async def check_open() -> None:
        await authorize(request, "predict", counts=True)
        predictor.check_open()

    opened = open_uploads(request, state.settings, state.held, check_open)
    answered: tuple[ModelFacts, list[Result]] | None = None
    answers = False
    try:
        async with opened as uploads:
            answered = await _while_connected(request, predictor.predict(uploads, explain, trace))
            if answered is None:
                state.metrics.images.labels("gone").inc(len(uploads))
            if state.audit is not None:
                results = answered[1] if answered else [None] * len(uploads)
                outcomes = await asyncio.to_thread(_outcomes, uploads, results)
        response = _respond(answered, trace, state.held)
    except Problem as refused:
        # Not of whoever has no key: anybody could fill the disk.
        if trace.key is not None or not asks(state):
            await _audit(state.audit, trace, [("", refused.kind.name)])
        raise
    else:
        if state.audit is not None:
            await _audit(state.audit, trace, outcomes)
        answers = True
        return response
    finally:
        if answered is not None:
            predictor.count(answered[1], answers)


def _respond(
    answered: tuple[ModelFacts, list[Result]] | None, trace: Trace, held: Held
) -> Response:
    """The HTTP answer of a request that was taken.

    Raises:
        Problem: There is no room for it.
    """
    if answered is None:
        return Response(status_code=499)  # nobody is there to read it
    model, results = answered
    errors = [result.error for result in results if isinstance(result, Failure)]
    if len(errors) < len(results):
        body = PredictResponse(request_id=trace.request_id, model=model, results=results)
        return _HeldResponse(body.model_dump_json(exclude_unset=True), held)
    if len(errors) == 1:
        return respond(Problem(problems.kind_of(errors[0]), errors[0].detail))
    # What failed here is no fault of theirs who sent them, and may go well another time.
    ours = [kind for error in errors if (kind := problems.kind_of(error)).status >= 500]
    problem = Problem(
        ours[0] if ours else problems.ALL_FILES_FAILED,
        f"None of the {len(errors)} images could be used; see results.",
    )
    if not ours:
        trace.problems.append(problem.kind.name)
    fields = problem.body().model_dump(exclude_unset=True)
    return respond(problem, ProblemBody(**fields, results=results), _NOT_KEPT)


class _HeldResponse(Response):
    """An answer that counts as held in memory until its caller has read nearly all of it.

    Args:
        text: JSON.
        held: Where it counts, until it is sent or nobody has it any more.

    Raises:
        Problem: There is no room.
    """

    def __init__(self, text: str, held: Held):
        super().__init__(text, headers=_NOT_KEPT, media_type="application/json")
        self._let_go: Callable[[], object] | None = None
        size = len(self.body)
        if size > _UNCOUNTED_BYTES:
            held.take(size, declared=True)
            self._let_go = finalize(self, held.give_back, size, True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        if self._let_go is None:
            await super().__call__(scope, receive, send)
            return
        try:
            start = {"type": "http.response.start", "status": self.status_code}
            await send({**start, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self.body, "more_body": True})
            # Which waits while the connection has more to send than it likes to hold.
            await send({"type": "http.response.body"})
        finally:
            self._let_go()


class Direct:
    """Middleware that answers `POST /predict` without a query past FastAPI's routing and parsing.

    benchmarks/serving/steps.py measures what that saves. FastAPI describes the route, and answers
    everything else, for which two things are done here: HEAD becomes GET, and a path with a control
    character is not found.

    Args:
        app: What answers everything else.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on; HEAD as GET, of which the server sends no body."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            as_get = {**scope, "method": "GET"}
            try:
                await self(as_get, receive, send)
            finally:
                scope["route"] = as_get.get("route")
            return
        asked = scope["type"] == "http" and (scope["method"], scope["path"], scope["query_string"])
        if asked != ("POST", _PATH, b""):
            if asked and not scope["path"].isprintable():
                # `/metrics%0a` is what the router takes for /metrics, and a proxy that keeps that
                # from the world does not.
                problem = Problem(problems.NOT_FOUND, "See /docs for what the service answers.")
                await answer(scope, problem)(scope, receive, send)
                return
            await self.app(scope, receive, send)
            return
        scope["route"] = _ROUTE  # as the router has it, for whoever names the request
        try:
            response = await predict(Request(scope, receive, send))
        except Problem as problem:
            response = answer(scope, problem)
        await response(scope, receive, send)


_ROUTE = router.routes[-1]


def _outcomes(uploads: list[Upload], results: Iterable[Result | None]) -> list[tuple[str, str]]:
    """SHA-256 and outcome of each image, for the audit log."""
    return [_outcome(*each) for each in zip(uploads, results, strict=True)]


def _outcome(upload: Upload, result: Result | None) -> tuple[str, str]:
    if isinstance(result, Success):
        return result.image.sha256, "ok"
    name = "gone" if result is None else problems.kind_of(result.error).name
    return hashlib.sha256(upload.data).hexdigest(), name


async def _audit(log: AuditLog | None, trace: Trace, outcomes: list[tuple[str, str]]) -> None:
    """Add what became of a request's images to the audit log, where there is one.

    Raises:
        Problem: It cannot be written, and what is not written down is not answered.
    """
    if log is None:
        return
    try:
        # In a thread that nobody waits for at the end: a disk may hang.
        written = begin(partial(log.write, trace.request_id, trace.key, trace.model, outcomes))
        await asyncio.wait_for(asyncio.wrap_future(written), _AUDIT_SECONDS)
    except (AuditError, TimeoutError, RuntimeError) as error:
        reason = str(error) or f"nothing was written in {_AUDIT_SECONDS:g} seconds"
        structlog.get_logger().error("audit log", reason=reason)
        raise Problem(
            problems.AUDIT_UNAVAILABLE, "Tell the operator; nothing is answered without it."
        ) from None


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Await `work`; when the caller goes first, cancel it and return None."""

    async def end_when_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        connected.reschedule(0)  # which is over

    connected = asyncio.timeout(None)
    try:
        async with connected:
            watching = asyncio.create_task(end_when_gone())
            try:
                return await work
            finally:
                watching.cancel()
    except TimeoutError:
        if connected.expired():
            return None
        raise
