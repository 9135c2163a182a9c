"""`GET /`."""

from fastapi import APIRouter
from starlette.responses import RedirectResponse

router = APIRouter(include_in_schema=False)


@router.get("/")
async def root() -> RedirectResponse:
    """Leads to the documentation, until there is a page."""
    return RedirectResponse("/docs")
