"""`POST /predict`."""

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response

from app import problems
from app.access import authorize, bearer
from app.forms import FIELD
from app.predictor import Predictor
from app.problems import MEDIA_TYPE, Problem, respond
from app.schemas import Failure, PredictResponse, ProblemBody
from app.trace import trace_of
from app.uploads import open_uploads
from models.images import MEDIA_TYPES

router = APIRouter(dependencies=[bearer])
T = TypeVar("T")

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "schema": {
        "type": "object",
        "required": [FIELD],
        "properties": {
            FIELD: {"type": "array", "items": {"type": "string", "format": "binary"}},
        },
    }
}
_BODY = {
    "required": True,
    "content": {"multipart/form-data": _FORM, **dict.fromkeys(MEDIA_TYPES, _BINARY)},
}
_PROBLEM: dict[str, Any] = {
    "model": ProblemBody,
    "content": {MEDIA_TYPE: {}},
    "description": "The type says why.",
}


@router.post(
    "/predict",
    response_model=PredictResponse,
    responses=dict.fromkeys((400, 401, 403, 408, 413, 415, 422, 429, 500, 503), _PROBLEM),
    openapi_extra={"requestBody": _BODY},
    summary="Melanoma probability, age bin and anatomical site of dermoscopic images",
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

    def check_open() -> None:
        authorize(request, "predict")
        predictor.check_open()

    opened = open_uploads(request, state.settings, state.held, check_open)
    async with opened as uploads:
        answered = await _while_connected(request, predictor.predict(uploads, explain, trace))
    if answered is None:
        return Response(status_code=499)  # nobody is there to read it
    model, results = answered
    errors = [result.error for result in results if isinstance(result, Failure)]
    if len(errors) < len(results):
        body = PredictResponse(request_id=trace.request_id, model=model, results=results)
        return Response(body.model_dump_json(exclude_unset=True), media_type="application/json")
    if len(errors) == 1:
        kind = problems.KINDS[errors[0].type.rpartition(":")[2]]
        return respond(Problem(kind, errors[0].detail))
    problem = Problem(
        problems.ALL_FILES_FAILED, f"None of the {len(errors)} images could be used; see results."
    )
    trace.problems.append(problem.kind.name)
    fields = problem.body().model_dump(exclude_unset=True)
    return respond(problem, ProblemBody(**fields, results=results))


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Await `work`; when the caller goes first, cancel it and return None."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, going = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, going), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        going.cancel()
        working.cancel()
