"""JWT bearer tokens of an identity provider (OpenID Connect), checked against its published keys.

A token must be signed by one of the provider's keys (RFC 7517), be of its issuer and for this
audience, and not have expired (RFC 7519); its scopes `mmtl:predict`, `mmtl:metrics` and
`mmtl:admin` say what it is for.
"""

import asyncio
import hashlib
import json
import time
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import structlog

from app.keys import SCOPES, Scope
from app.settings import Settings

if TYPE_CHECKING:
    from jwt import PyJWK

# Signatures alone: a shared secret (HS256) or none at all is nobody's signature.
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA")
_PREFIX = "mmtl:"
# Of clocks that differ.
_LEEWAY_SECONDS = 30
# The provider is asked for its keys this often at most, whatever key a token names.
_FRESH_SECONDS = 30.0
_STALE_SECONDS = 3600.0
_PATIENCE_SECONDS = 5.0
_MOST_BYTES = 1_000_000
log = structlog.get_logger()


class ProviderUnreachable(Exception):
    """The identity provider's keys cannot be had; whose token it is, is not known."""


@dataclass(frozen=True, slots=True)
class Bearer:
    """Who presented a token.

    Attributes:
        id: A hash of issuer and subject: the same person has the same, and it names nobody.
        scopes: That the token has.
    """

    id: str
    scopes: tuple[Scope, ...]


class Tokens:
    """The tokens of one provider.

    Args:
        issuer: Of the tokens.
        audience: That they must name.
        jwks_url: Where the provider publishes its keys.
    """

    def __init__(self, issuer: str, audience: str, jwks_url: str):
        self._issuer = issuer
        self._audience = audience
        self._jwks_url = jwks_url
        self._keys: dict[str | None, PyJWK] = {}
        self._asked = self._got = -_STALE_SECONDS
        self._asking = asyncio.Lock()

    async def find(self, presented: str) -> Bearer | None:
        """Who presents a token, where it is one and holds now.

        Raises:
            ProviderUnreachable: The keys are not at hand.
        """
        import jwt

        try:
            named = jwt.get_unverified_header(presented).get("kid")
        except jwt.InvalidTokenError:
            return None
        key = await self._key(named)
        if key is None:
            return None
        try:
            claims = jwt.decode(
                presented,
                key,
                algorithms=[*_ALGORITHMS],
                audience=self._audience,
                issuer=self._issuer,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.InvalidTokenError:
            return None
        return Bearer(
            "jwt-" + hashlib.sha256(f"{self._issuer} {claims['sub']}".encode()).hexdigest()[:16],
            tuple(scope for scope in SCOPES if _PREFIX + scope in _scopes(claims)),
        )

    async def _key(self, named: str | None) -> "PyJWK | None":
        now = time.monotonic()
        wanted = now - self._got > _STALE_SECONDS or named not in self._keys
        if wanted and (now - self._asked > _FRESH_SECONDS or self._asking.locked()):
            async with self._asking:
                if time.monotonic() - self._asked > _FRESH_SECONDS:
                    await self._ask()
        if not self._keys:
            raise ProviderUnreachable
        return self._keys.get(named)

    async def _ask(self) -> None:
        import jwt

        self._asked = time.monotonic()
        try:
            document = await asyncio.to_thread(_fetch, self._jwks_url)
            keys = jwt.PyJWKSet.from_dict(document).keys
        except (
            OSError,
            ValueError,
            HTTPException,
            jwt.PyJWTError,
        ) as error:  # those at hand still hold
            log.error("identity provider's keys", error=type(error).__name__, reason=str(error))
            return
        self._keys = {key.key_id: key for key in keys}
        self._got = self._asked


def tokens_of(settings: Settings) -> Tokens | None:
    """The tokens that the settings ask for."""
    if settings.jwt_jwks_url is None:
        return None
    assert settings.jwt_issuer is not None
    assert settings.jwt_audience is not None
    return Tokens(settings.jwt_issuer, settings.jwt_audience, settings.jwt_jwks_url)


def _fetch(url: str) -> dict[str, Any]:
    request = Request(url, headers={"Accept": "application/json"})
    with urlopen(request, timeout=_PATIENCE_SECONDS) as answer:
        document = json.loads(answer.read(_MOST_BYTES))
    if not isinstance(document, dict):
        raise ValueError("the document is no key set")
    return document


def _scopes(claims: dict[str, Any]) -> set[str]:
    """As OAuth has them (`scope`, a string), or Microsoft and Okta (`scp`, a string or list)."""
    found: set[str] = set()
    for name in ("scope", "scp"):
        value = claims.get(name)
        if isinstance(value, str):
            found |= set(value.split())
        elif isinstance(value, list):
            found |= set(map(str, value))
    return found
