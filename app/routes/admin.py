"""`POST /admin/reload`."""

import asyncio

from fastapi import APIRouter, Depends, Request

from app import problems
from app.access import REFUSALS, asks, authorize, bearer
from app.networks import Networks, ReloadError
from app.problems import Problem
from app.schemas import ModelFacts
from app.siblings import RELOADED, Siblings

# Longest that another process is waited for.
_SECONDS = 120.0


async def administrator(request: Request) -> None:
    """Let in who has a key with the scope admin; where there are no keys, nobody.

    Raises:
        Problem: 401 or 403, or 503 where an identity provider cannot be asked.
    """
    if not asks(request.app.state):
        raise Problem(
            problems.ADMIN_CLOSED,
            "Set MMTL_KEYS to a key file, and make a key with "
            "`mmtl keys create NAME --scope admin`; or send the process SIGHUP.",
        )
    await authorize(request, "admin")


router = APIRouter(
    prefix="/admin", responses=REFUSALS, dependencies=[bearer, Depends(administrator)]
)


@router.post("/reload", responses=problems.describe(409))
async def reload(request: Request) -> ModelFacts:
    """Load the bundle of MMTL_BUNDLE again; answers once it has taken over, with which it is.

    It is verified, warmed up and asked its golden predictions beside the served one, which stays
    when anything does not fit (409). Of a service of several processes, all load it; where some do
    not, it is said which (409).
    """
    networks: Networks = request.app.state.networks
    try:
        network = await asyncio.wrap_future(networks.begin_reload())
    except ReloadError as error:
        raise Problem(problems.RELOAD_REFUSED, str(error)) from None
    siblings: Siblings | None = request.app.state.siblings
    if siblings is not None:
        told = await siblings.ask("reload", "", _SECONDS)
        others = [number for number in range(siblings.count) if number != siblings.number]
        left = {n: told.get(n, b"no answer") for n in others if told.get(n) != RELOADED}
        if left:
            reasons = "; ".join(f"process {n}: {why.decode()}" for n, why in left.items())
            raise Problem(
                problems.RELOADED_IN_PART,
                f"{siblings.count - len(left)} of {siblings.count} processes have it, and answer "
                f"by it. Ask again. Not so {reasons}",
            )
    return network.facts
