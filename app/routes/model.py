"""`GET /model`."""

from fastapi import APIRouter, Request

from app.predictor import Predictor
from models.bundle import Manifest

router = APIRouter()


@router.get("/model")
async def model(request: Request) -> Manifest:
    """The manifest of the served bundle: tasks, calibration, data, licences, held-out figures."""
    predictor: Predictor = request.app.state.predictor
    return predictor.bundle.manifest
