"""`GET /metrics`."""

from fastapi import APIRouter, Depends, Request, Response

from app.access import REFUSALS, bearer, require
from app.problems import as_headers
from app.siblings import Siblings, merge_metrics
from app.telemetry import HEADERS, Metrics

# Longest that another process is waited for.
_SECONDS = 2.0
router = APIRouter(responses=REFUSALS, dependencies=[bearer, Depends(require("metrics"))])


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "headers": as_headers(HEADERS),
            "content": {
                "text/plain": {"schema": {"type": "string"}},
                "application/openmetrics-text": {"schema": {"type": "string"}},
            },
        }
    },
)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format or, where it is asked for, as OpenMetrics.

    Of a service of several processes, those of all, each with a label `process`.

    OpenMetrics has exemplars: the trace of a request, beside the bucket of its time.
    """
    measured: Metrics = request.app.state.metrics
    siblings: Siblings | None = request.app.state.siblings
    accept = request.headers.get("accept", "")
    text, media_type = measured.expose(accept)
    if siblings is not None:
        others = await siblings.ask("metrics", accept, _SECONDS)
        text = merge_metrics({siblings.number: text, **others})
    return Response(text, media_type=media_type)
