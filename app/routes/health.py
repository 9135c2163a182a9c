"""`GET /health/live` and `/health/ready`."""

from fastapi import APIRouter, Request

from app.batcher import NotReady
from app.networks import Networks
from app.predictor import problem_of
from app.problems import describe
from app.schemas import Health

router = APIRouter(prefix="/health")


@router.get("/live")
async def live() -> Health:
    """Answers while the process runs."""
    return Health(status="live")


@router.get("/ready", responses=describe(503))
async def ready(request: Request) -> Health:
    """Answers 200 when images are taken: the network is warm, its workers alive, not draining."""
    networks: Networks = request.app.state.networks
    if not networks.current.batcher.ready:
        raise problem_of(NotReady)
    return Health(status="ready")
