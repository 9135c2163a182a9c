"""`GET /model`."""

from fastapi import APIRouter, Depends, Request

from app.access import REFUSALS, bearer, require
from app.networks import Networks
from models.bundle import Manifest

router = APIRouter(responses=REFUSALS, dependencies=[bearer, Depends(require("predict"))])


@router.get("/model")
async def model(request: Request) -> Manifest:
    """The manifest of the served bundle: tasks, calibration, data, licences, held-out figures."""
    networks: Networks = request.app.state.networks
    return networks.current.bundle.manifest
