"""`GET /` and `GET /docs`, the pages for people."""

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, RedirectResponse

router = APIRouter(include_in_schema=False)

# Of fastapi-offline, which serves Swagger UI's files.
ASSETS = "/static-offline-docs"
# Keys are typed there: no other page may hold it in a frame.
_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


@router.get("/")
async def root() -> RedirectResponse:
    """Leads to the documentation, until there is a page."""
    return RedirectResponse("/docs")


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """The API's description, to read and to try; FastAPI's own page names no language."""
    at = request.scope.get("root_path", "")
    page = get_swagger_ui_html(
        openapi_url=f"{at}{request.app.openapi_url}",
        title=f"{request.app.title}: API",
        swagger_js_url=f"{at}{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{at}{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{at}{ASSETS}/favicon.png",
    )
    content = bytes(page.body).decode().strip().replace("<html>", '<html lang="en">', 1)
    return HTMLResponse(content, headers=_HEADERS)
