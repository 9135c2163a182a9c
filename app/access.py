"""Who may call what: the routes' dependencies on API keys."""

from collections.abc import Awaitable, Callable

from fastapi import Request, Security
from fastapi.security import HTTPBearer

from app import problems
from app.keys import Keys, Scope
from app.problems import Problem
from app.settings import Settings
from app.trace import trace_of

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_bearer = HTTPBearer(auto_error=False, description="A key of `mmtl keys create`, where asked for.")
bearer = Security(_bearer)
Dependency = Callable[[Request], Awaitable[None]]


def authorize(request: Request, scope: Scope) -> None:
    """Refuse who has no key of a scope, or has used up its quota; without a key file, nobody.

    Raises:
        Problem: 401, 403 or 429.
    """
    keys: Keys | None = request.app.state.keys
    settings: Settings = request.app.state.settings
    if keys is None or (scope == "metrics" and settings.open_metrics):
        return
    scheme, _, presented = request.headers.get("authorization", "").partition(" ")
    key = keys.find(presented.strip()) if scheme.lower() == "bearer" else None
    if key is None:
        raise Problem(
            problems.UNAUTHORIZED,
            "Send `Authorization: Bearer KEY` with a key of this service's operator.",
            {"WWW-Authenticate": "Bearer"},
        )
    trace_of(request.scope).key = key.id
    if scope not in key.scopes:
        raise Problem(
            problems.FORBIDDEN,
            f"This key is for {', '.join(key.scopes)}; the path asks for one for {scope}.",
        )
    if scope == "predict" and (seconds := keys.wait_seconds(key)):
        raise Problem(
            problems.QUOTA_EXCEEDED,
            f"This key may send {key.per_minute} requests a minute. "
            "Try again after Retry-After seconds.",
            {"Retry-After": str(seconds)},
        )


def require(scope: Scope) -> Dependency:
    """`authorize` as a dependency of a route without a body."""

    async def check(request: Request) -> None:
        authorize(request, scope)

    return check


def check_exposure(settings: Settings, insecure: bool) -> None:
    """Refuse to listen to others than this machine without keys.

    Raises:
        Exposed: Nobody said that this is meant.
    """
    if settings.host not in LOOPBACK and settings.keys is None and not insecure:
        raise Exposed(
            f"MMTL_HOST={settings.host} lets other machines in, and no key is asked of them: make "
            "one with `mmtl keys create`, set MMTL_KEYS to its file, or say --insecure."
        )


class Exposed(Exception):
    """The service would answer anybody; the message says what to do."""
