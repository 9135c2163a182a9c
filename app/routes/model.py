"""`GET /model`."""

from fastapi import APIRouter, Depends, Request

from app.access import bearer, require
from app.predictor import Predictor
from models.bundle import Manifest

router = APIRouter(dependencies=[bearer, Depends(require("predict"))])


@router.get("/model")
async def model(request: Request) -> Manifest:
    """The manifest of the served bundle: tasks, calibration, data, licences, held-out figures."""
    predictor: Predictor = request.app.state.predictor
    return predictor.bundle.manifest
