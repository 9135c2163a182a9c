"""JWT bearer tokens of an identity provider (OpenID Connect), checked against its published keys.

A token must be signed by one of the provider's keys (RFC 7517), be of its issuer and for this
audience, and not have expired (RFC 7519); its scopes `mmtl:predict`, `mmtl:metrics` and
`mmtl:admin` say what it is for.
"""

import asyncio
import hashlib
import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

import structlog

from app.keys import SCOPES, Scope
from app.settings import JWKS_URL, Settings, SettingsError
from models.threads import begin

if TYPE_CHECKING:
    from jwt import PyJWK

# Signatures alone: a shared secret (HS256) or none at all is nobody's signature.
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA")
_PREFIX = "mmtl:"
# Of a key: its id, where it has one, and the algorithm of the signature.
_Name = tuple[str | None, str]
# Of clocks that differ.
_LEEWAY_SECONDS = 30
# The provider is asked for its keys this often at most, whatever key a token names.
_FRESH_SECONDS = 30.0
_STALE_SECONDS = 3600.0
# Longest that keys hold while the provider cannot be asked: one may have been withdrawn.
_OLDEST_SECONDS = 86_400.0
# That it may be silent; and that its whole answer may take.
_PATIENCE_SECONDS, _LONGEST_SECONDS = 5.0, 10.0
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
        self._keys: dict[_Name, PyJWK] = {}
        self._asked = self._got = -_STALE_SECONDS
        self._asking: asyncio.Task[None] | None = None
        self._next: asyncio.TimerHandle | None = None

    async def find(self, presented: str) -> Bearer | None:
        """Who presents a token, where it is one and holds now.

        Raises:
            ProviderUnreachable: The keys are not at hand.
        """
        import jwt

        try:
            header = jwt.get_unverified_header(presented)
        except jwt.InvalidTokenError:
            return None
        algorithm = header.get("alg")
        if algorithm not in _ALGORITHMS:
            return None
        key = await self._key((header.get("kid"), algorithm))
        if key is None:
            return None
        try:
            claims = jwt.decode(
                presented,
                key,
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError:  # of a key on another curve than the algorithm's, too
            return None
        subject = f"{self._issuer} {claims['sub']}".encode(errors="surrogatepass")
        return Bearer(
            "jwt-" + hashlib.sha256(subject).hexdigest()[:16],
            tuple(scope for scope in SCOPES if _PREFIX + scope in _scopes(claims)),
        )

    async def _key(self, named: _Name) -> "PyJWK | None":
        if time.monotonic() - self._got > _OLDEST_SECONDS:
            self._keys = {}
        known = self._keys.get(named)
        if known is None:
            if (asking := self._ask()) is not None:
                await asyncio.shield(asking)
            if not self._keys:
                raise ProviderUnreachable
            return self._keys.get(named)
        if time.monotonic() - self._got > _STALE_SECONDS:
            self._ask()  # which nobody waits for: a provider that hangs would hold up every request
        return known

    def _ask(self) -> "asyncio.Task[None] | None":
        """Ask the provider: the asking that is under way; None where it was asked just before."""
        if self._asking is None or self._asking.done():
            if time.monotonic() - self._asked <= _FRESH_SECONDS:
                return None
            self._asked = time.monotonic()
            self._asking = asyncio.create_task(self._fetch())
        return self._asking

    async def _fetch(self) -> None:
        began = self._asked
        try:
            fetching = begin(partial(_read, self._jwks_url))
            self._keys = _usable(
                await asyncio.wait_for(asyncio.wrap_future(fetching), _LONGEST_SECONDS)
            )
            self._got = began
        except (OSError, ValueError, HTTPException, RuntimeError) as error:  # those at hand hold
            log.error("identity provider's keys", error=type(error).__name__, reason=str(error))
        finally:
            # Whether or not somebody presents a token: a key that was withdrawn would hold for him.
            if self._next is not None:
                self._next.cancel()
            self._next = asyncio.get_running_loop().call_later(_STALE_SECONDS, self._ask)


def tokens_of(settings: Settings) -> Tokens | None:
    """The tokens that the settings ask for.

    Raises:
        SettingsError: What reads them is not installed.
    """
    if settings.jwt_jwks_url is None:
        return None
    for needed in ("jwt", "cryptography"):
        if find_spec(needed) is None:
            raise SettingsError(f"MMTL_JWT_ISSUER needs {needed}: install the extra `oidc`.")
    assert settings.jwt_issuer is not None
    assert settings.jwt_audience is not None
    return Tokens(settings.jwt_issuer, settings.jwt_audience, settings.jwt_jwks_url)


class _Redirects(HTTPRedirectHandler):
    """Follows none to where anybody on the way could put keys of his own."""

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        if not re.match(JWKS_URL, newurl):
            raise HTTPError(newurl, code, "redirects to what is no https", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read(url: str) -> object:
    request = Request(url, headers={"Accept": "application/json"})
    try:
        with build_opener(_Redirects).open(request, timeout=_PATIENCE_SECONDS) as answer:
            return json.loads(answer.read(_MOST_BYTES))
    except HTTPError as error:
        error.close()  # it holds the connection
        raise


def _usable(document: object) -> "dict[_Name, PyJWK]":
    """The keys of a set for each algorithm that they may sign with.

    A key says which one (`alg`), or leaves it to its type, and then signs with several
    (RFC 7517, section 4.4: `alg` is optional, and Microsoft leaves it out).

    Raises:
        ValueError: There are none.
    """
    import jwt

    published = document.get("keys") if isinstance(document, dict) else None
    found: dict[_Name, PyJWK] = {}
    for key in published if isinstance(published, list) else []:
        if not isinstance(key, dict) or key.get("use", "sig") != "sig":
            continue
        for algorithm in _ALGORITHMS:
            if key.get("alg", algorithm) == algorithm:
                # Of another type, or none that this library knows.
                with suppress(jwt.PyJWTError, ValueError, TypeError):
                    found[key.get("kid"), algorithm] = jwt.PyJWK(key, algorithm)
    if not found:
        raise ValueError("the document is no set of keys that sign")
    return found


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
