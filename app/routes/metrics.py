"""`GET /metrics`."""

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client.exposition import choose_encoder

from app.access import REFUSALS, bearer, require
from app.telemetry import Metrics

router = APIRouter(responses=REFUSALS, dependencies=[bearer, Depends(require("metrics"))])


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format or, where it is asked for, as OpenMetrics.

    OpenMetrics has exemplars: the trace of a request, beside the bucket of its time.
    """
    measured: Metrics = request.app.state.metrics
    try:
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        text = encode(measured.registry)
    except (TypeError, ValueError):  # of a version that is no number
        encode, media_type = choose_encoder("")
        text = encode(measured.registry)
    return Response(text, media_type=media_type)
