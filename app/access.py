"""Who may call what: the routes' dependencies on API keys and tokens, and browsers' origins."""

from collections.abc import Awaitable, Callable, Collection

from fastapi import Request, Security
from fastapi.security import HTTPBearer
from starlette.datastructures import State

from app import problems
from app.keys import Key, Keys, Scope
from app.problems import Problem
from app.settings import Settings
from app.telemetry import HEADERS
from app.tokens import Bearer, ProviderUnreachable, Tokens
from app.trace import trace_of

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
# That a page of another origin may read.
EXPOSED_HEADERS = (*HEADERS, "Retry-After")
bearer = Security(
    HTTPBearer(
        auto_error=False,
        description="A key of `mmtl keys create`, or an identity provider's token.",
    )
)
# What any route that asks for a key may answer.
REFUSALS = problems.describe(401, 403, 503)
Dependency = Callable[[Request], Awaitable[None]]


async def authorize(request: Request, scope: Scope, counts: bool = False) -> None:
    """Refuse who has no key or token of a scope, or has used up a quota.

    Where neither is asked for, nobody is refused.

    Args:
        request: Of the caller.
        scope: That the path asks for.
        counts: Whether the request is one of the key's quota.

    Raises:
        Problem: 401, 403, 429; or 503 where the identity provider cannot be asked.
    """
    state = request.app.state
    keys: Keys | None = state.keys
    tokens: Tokens | None = state.tokens
    if not asks(state) or (scope == "metrics" and state.settings.open_metrics):
        return
    scheme, _, presented = request.headers.get("authorization", "").partition(" ")
    key: Key | None = None
    caller: Key | Bearer | None = None
    if scheme.lower() == "bearer":
        caller = key = keys.find(presented.strip()) if keys else None
        if caller is None and tokens:
            try:
                caller = await tokens.find(presented.strip())
            except ProviderUnreachable:
                raise Problem(
                    problems.PROVIDER_UNREACHABLE,
                    "Whose token it is cannot be checked. Try again after Retry-After seconds.",
                ) from None
    if caller is None:
        raise Problem(
            problems.UNAUTHORIZED,
            "Send `Authorization: Bearer KEY` with a key of this service's operator"
            + (", or a token of its identity provider." if tokens else "."),
            {"WWW-Authenticate": "Bearer"},
        )
    trace_of(request.scope).key = caller.id
    if scope not in caller.scopes:
        raise Problem(
            problems.FORBIDDEN,
            f"This {'key' if key else 'token'} is for "
            f"{', '.join(caller.scopes) or 'nothing here'}; the path asks for one for {scope}"
            + ("." if key else f" (`mmtl:{scope}` in its `scope`)."),
        )
    if counts and keys and key and (seconds := keys.wait_seconds(key)):
        raise Problem(
            problems.QUOTA_EXCEEDED,
            f"This key may send {key.per_minute} requests to /predict a minute. "
            "Try again after Retry-After seconds.",
            {"Retry-After": str(seconds)},
        )


def asks(state: State) -> bool:
    """Whether callers are asked who they are."""
    return state.keys is not None or state.tokens is not None


def require(scope: Scope) -> Dependency:
    """`authorize` as a dependency of a route without a body."""

    async def check(request: Request) -> None:
        await authorize(request, scope)

    return check


def as_cors(origins: Collection[str], origin: str) -> dict[str, str]:
    """Headers by which a page may read an answer that Starlette's middleware has not seen.

    Args:
        origins: That may; "*" is any.
        origin: The page's; none of another has headers.
    """
    if not origin or not {origin, "*"} & set(origins):
        return {}
    return {
        "Access-Control-Allow-Origin": "*" if "*" in origins else origin,
        "Access-Control-Expose-Headers": ", ".join(EXPOSED_HEADERS),
        "Vary": "Origin",
    }


def check_exposure(settings: Settings, insecure: bool) -> None:
    """Refuse to listen to others than this machine without keys.

    Raises:
        Exposed: Nobody said that this is meant.
    """
    asked = settings.keys is not None or settings.jwt_jwks_url is not None
    if settings.host not in LOOPBACK and not asked and not insecure:
        raise Exposed(
            f"MMTL_HOST={settings.host} lets other machines in, and no key is asked of them: make "
            "one with `mmtl keys create NAME`, set MMTL_KEYS to its file, or say --insecure."
        )


class Exposed(Exception):
    """The service would answer anybody; the message says what to do."""
