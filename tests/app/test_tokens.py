"""JWT bearer tokens: signed by the provider, for this service, and not of yesterday."""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.client import BadStatusLine
from http.server import BaseHTTPRequestHandler, HTTPServer

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from fastapi.testclient import TestClient
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from pydantic import ValidationError

from app import tokens as tokens_module
from app.access import check_exposure
from app.keys import create_key
from app.settings import Settings, SettingsError
from app.tokens import ProviderUnreachable, Tokens
from tests.conftest import started
from tests.lesions import flat

ISSUER, AUDIENCE = "https://login.example", "mmtl"
RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
FOREIGN = rsa.generate_private_key(65537, 2048)


class Provider:
    """Publishes keys, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.redirects: dict[str, str] = {}
        self.document: object = {"keys": [self.key("one", RSA), self.key("two", EC)]}
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked += 1
                if (to := provider.redirects.get(self.path)) is not None:
                    self.send_response(302)
                    self.send_header("Location", to)
                    self.end_headers()
                    return
                content = json.dumps(provider.document).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/keys"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()

    @staticmethod
    def key(name: str, private: object) -> dict[str, object]:
        algorithm = RSAAlgorithm if isinstance(private, rsa.RSAPrivateKey) else ECAlgorithm
        return {**json.loads(algorithm.to_jwk(private.public_key())), "kid": name, "use": "sig"}


@pytest.fixture
def provider() -> Iterator[Provider]:
    running = Provider()
    yield running
    running.server.shutdown()
    running.server.server_close()


@pytest.fixture
def asking(settings: Settings, provider: Provider) -> Settings:
    jwt_settings = {
        "jwt_issuer": ISSUER,
        "jwt_audience": AUDIENCE,
        "jwt_jwks_url": provider.url,
    }
    return settings.model_copy(update=jwt_settings)


@pytest.fixture
def client(asking: Settings) -> Iterator[TestClient]:
    with started(asking) as running:
        yield running


def token(key: object = RSA, kid: str = "one", algorithm: str = "RS256", **claims: object) -> str:
    now = int(time.time())
    full = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "Dr. Jane Doe",
        "exp": now + 300,
        "scope": "openid mmtl:predict",
        **claims,
    }
    kept = {name: value for name, value in full.items() if value is not None}
    return jwt.encode(kept, key, algorithm, headers={"kid": kid})


def ask(client: TestClient, presented: str, path: str = "/model"):
    return client.get(path, headers={"Authorization": f"Bearer {presented}"})


def test_a_token_of_the_provider_lets_in(client: TestClient, provider: Provider) -> None:
    assert client.get("/model").status_code == 401
    assert ask(client, token()).status_code == 200
    assert ask(client, token(EC, "two", "ES256")).status_code == 200
    assert ask(client, token(scope=None, scp=["mmtl:predict"])).status_code == 200
    posted = client.post(
        "/predict", files={"files": flat(1)}, headers={"Authorization": f"Bearer {token()}"}
    )
    assert posted.status_code == 200
    assert provider.asked == 1


def test_a_key_that_names_no_algorithm_signs_with_all_of_its_type(
    client: TestClient, provider: Provider
) -> None:
    for algorithm in ("RS256", "RS384", "RS512", "PS256"):
        assert ask(client, token(algorithm=algorithm)).status_code == 200
    assert ask(client, token(EC, "two", "ES256")).status_code == 200


def test_a_key_signs_with_the_algorithm_that_it_names_and_only_where_it_is_for_signing(
    client: TestClient, provider: Provider
) -> None:
    secrecy = {**provider.key("two", FOREIGN), "use": "enc"}
    provider.document = {"keys": [{**provider.key("one", RSA), "alg": "RS512"}, secrecy]}
    assert ask(client, token(algorithm="RS512")).status_code == 200
    assert ask(client, token(algorithm="RS256")).status_code == 401
    assert ask(client, token(FOREIGN, "two")).status_code == 401


def test_a_token_is_for_its_scopes(client: TestClient) -> None:
    refused = ask(client, token(), "/metrics")
    assert refused.status_code == 403
    assert "This token is for predict" in refused.json()["detail"]
    for nothing_of_ours in ("openid", "predict admin", "mmtl"):
        detail = ask(client, token(scope=nothing_of_ours)).json()["detail"]
        assert "nothing here" in detail
    for odd in (5, {"mmtl:predict": 1}, True):
        assert ask(client, token(scope=odd)).status_code == 403
    assert ask(client, token(scope="mmtl:metrics"), "/metrics").status_code == 200


UNFIT = {
    "expired": lambda: token(exp=int(time.time()) - 60),
    "without an end": lambda: token(exp=None),
    "not yet": lambda: token(nbf=int(time.time()) + 600),
    "of another issuer": lambda: token(iss="https://elsewhere.example"),
    "for another service": lambda: token(aud="another"),
    "for nobody": lambda: token(aud=None),
    "of nobody": lambda: token(sub=None),
    "signed by another": lambda: token(FOREIGN),
    "by a key of another name": lambda: token(kid="three"),
    "by the other key": lambda: token(RSA, "two"),
    "not signed": lambda: token(None, "one", "none"),
    "with a shared secret": lambda: token(b"x" * 32, "one", "HS256"),
    "of no algorithm": lambda: ".".join(["eyJ0eXAiOiJKV1QifQ", *token().split(".")[1:]]),
    "no token": lambda: "a.b.c",
    "nothing": lambda: "",
}


@pytest.mark.parametrize("name", UNFIT)
def test_another_token_does_not(client: TestClient, name: str) -> None:
    refused = ask(client, UNFIT[name]())
    assert refused.status_code == 401
    assert refused.json()["type"] == "urn:mmtl:problem:unauthorized"


@pytest.mark.parametrize("algorithm", ["ES384", "ES512"])
def test_a_token_for_another_curve_than_the_key_s_does_not(
    client: TestClient, algorithm: str
) -> None:
    header = {"alg": algorithm, "kid": "two", "typ": "JWT"}
    parts = [json.dumps(part).encode() for part in (header, {"sub": "x"})]
    forged = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)
    refused = client.get("/model", headers={"Authorization": f"Bearer {forged}.AAAA"})
    assert refused.status_code == 401


def test_a_subject_that_no_utf_8_holds_is_one(client: TestClient) -> None:
    given = {"Authorization": f"Bearer {token(sub=chr(0xD800))}"}
    assert client.post("/predict", files={"files": flat(1)}, headers=given).status_code == 200


def test_the_provider_may_change_its_keys_and_is_not_asked_too_often(
    client: TestClient, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(client, token()).status_code == 200
    provider.document = {"keys": [provider.key("three", FOREIGN)]}
    for _ in range(5):
        assert ask(client, token(FOREIGN, "three")).status_code == 401  # asked just before
    assert provider.asked == 1
    monkeypatch.setattr(tokens_module, "_FRESH_SECONDS", 0.0)
    assert ask(client, token(FOREIGN, "three")).status_code == 200
    assert ask(client, token()).status_code == 401


def test_old_keys_hold_while_the_provider_is_away_and_it_is_asked_again_soon(
    client: TestClient, provider: Provider
) -> None:
    assert ask(client, token()).status_code == 200
    document, provider.document = provider.document, "away"
    tokens = client.app.state.tokens
    tokens._got -= tokens_module._STALE_SECONDS
    tokens._asked -= tokens_module._FRESH_SECONDS
    for _ in range(3):
        assert ask(client, token()).status_code == 200  # which waits for nobody
    until(lambda: tokens._asking.done())
    assert provider.asked == 2
    provider.document = document
    before = tokens._got
    tokens._asked -= tokens_module._FRESH_SECONDS
    for _ in range(2):
        assert ask(client, token()).status_code == 200
    until(lambda: tokens._got > before)
    assert provider.asked == 3


@pytest.mark.anyio
async def test_keys_that_were_withdrawn_hold_no_longer_though_nobody_presents_a_token(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokens(ISSUER, AUDIENCE, provider.url)
    monkeypatch.setattr(tokens_module, "_STALE_SECONDS", 0.05)
    monkeypatch.setattr(tokens_module, "_FRESH_SECONDS", 0.0)
    assert await tokens.find(token())
    provider.document = {"keys": [provider.key("three", FOREIGN)]}
    asked = provider.asked
    async with asyncio.timeout(30):
        while provider.asked < asked + 2 or not tokens._asking.done():
            await asyncio.sleep(0.01)
    monkeypatch.undo()
    assert await tokens.find(token()) is None
    assert await tokens.find(token(FOREIGN, "three"))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.anyio
async def test_a_provider_that_hangs_holds_up_nobody_whose_key_is_at_hand(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokens(ISSUER, AUDIENCE, provider.url)
    assert await tokens.find(token())
    hangs = threading.Event()
    monkeypatch.setattr(tokens_module, "_read", lambda _: hangs.wait(30))
    monkeypatch.setattr(tokens_module, "_LONGEST_SECONDS", 0.2)
    tokens._got -= tokens_module._STALE_SECONDS
    tokens._asked -= tokens_module._FRESH_SECONDS
    assert await tokens.find(token())
    assert tokens._asking is not None
    assert not tokens._asking.done()
    assert await tokens.find(token(kid="three")) is None  # it has waited, and not for ever
    assert tokens._asking.done()
    tokens._got -= tokens_module._OLDEST_SECONDS
    with pytest.raises(ProviderUnreachable):
        await tokens.find(token())
    hangs.set()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("to", "found"),
    [("/keys", True), ("http://elsewhere.example/keys", False), ("file:///", False)],
)
async def test_a_redirect_is_followed_where_the_keys_could_have_been_asked_for_themselves(
    provider: Provider, to: str, found: bool
) -> None:
    tokens = Tokens(ISSUER, AUDIENCE, provider.url.replace("/keys", "/moved"))
    provider.redirects = {"/moved": to}
    if found:
        assert await tokens.find(token())
    else:
        with pytest.raises(ProviderUnreachable):
            await tokens.find(token())
    assert provider.asked == 1 + found


@pytest.mark.anyio
async def test_many_that_come_at_once_ask_the_provider_once(provider: Provider) -> None:
    tokens = Tokens(ISSUER, AUDIENCE, provider.url)
    found = await asyncio.gather(*(tokens.find(token()) for _ in range(20)))
    assert all(found)
    assert provider.asked == 1
    assert await asyncio.gather(*(tokens.find(token(kid="none")) for _ in range(5))) == [None] * 5
    assert provider.asked == 1


@pytest.mark.anyio
async def test_a_person_is_another_one_at_another_provider(provider: Provider) -> None:
    ids = set()
    for issuer in (ISSUER, "https://elsewhere.example"):
        found = await Tokens(issuer, AUDIENCE, provider.url).find(token(iss=issuer))
        assert found is not None
        ids.add(found.id)
    assert len(ids) == 2


@pytest.mark.parametrize(
    "document",
    [
        "text",
        [],
        {},
        {"keys": []},
        {"keys": 3},
        {"keys": [3, {"kty": "?"}, {"kty": "RSA", "n": 5}]},
    ],
)
def test_a_provider_that_makes_no_sense_is_a_problem_of_its_own(
    client: TestClient, provider: Provider, document: object
) -> None:
    provider.document = document
    refused = ask(client, token())
    assert refused.status_code == 503
    assert refused.json()["type"] == "urn:mmtl:problem:provider-unreachable"
    assert refused.headers["Retry-After"] == "30"


def test_keys_and_tokens_stand_beside_each_other(asking: Settings, tmp_path) -> None:
    keys = tmp_path / "keys.json"
    key = create_key(keys, "tool", ("predict",), None)
    audit = tmp_path / "audit.jsonl"
    with started(asking.model_copy(update={"keys": keys, "audit_log": audit})) as client:
        for presented in (key, token()):
            headers = {"Authorization": f"Bearer {presented}"}
            answer = client.post("/predict", files={"files": flat(1)}, headers=headers)
            assert answer.status_code == 200
    one, other = [json.loads(line)["key"] for line in audit.read_text().splitlines()]
    assert one == key.split("_")[1]
    assert other.startswith("jwt-")
    assert "Jane" not in audit.read_text()


def test_the_settings_belong_together_and_the_keys_come_over_tls(provider: Provider) -> None:
    with pytest.raises(ValidationError, match="belong together"):
        Settings(jwt_issuer=ISSUER)
    with pytest.raises(ValidationError, match="jwt_jwks_url"):
        Settings(jwt_issuer=ISSUER, jwt_audience="a", jwt_jwks_url="http://login.example/keys")
    check_exposure(
        Settings(host="0.0.0.0", jwt_issuer=ISSUER, jwt_audience="a", jwt_jwks_url=provider.url),
        insecure=False,
    )


def test_a_provider_that_speaks_no_http_is_unreachable(
    client: TestClient, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(_: str) -> object:
        raise BadStatusLine("220 mail.example")

    monkeypatch.setattr("app.tokens._read", fetch)
    assert ask(client, token()).json()["type"] == "urn:mmtl:problem:provider-unreachable"


def test_without_the_library_the_service_does_not_start(
    asking: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="install the extra `oidc`"):
        tokens_module.tokens_of(asking)


@pytest.mark.anyio
async def test_who_goes_while_keys_are_fetched_takes_them_from_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = threading.Event()

    def read(_: object) -> dict:
        go_on.wait(5)
        return {"keys": []}

    monkeypatch.setattr(tokens_module, "_read", read)
    monkeypatch.setattr(tokens_module, "_usable", lambda _: {("k", "RS256"): "key"})
    tokens = Tokens("i", "a", "https://x")
    gone, stays = (asyncio.create_task(tokens._key(("k", "RS256"))) for _ in range(2))
    await asyncio.sleep(0.05)
    gone.cancel()
    await asyncio.sleep(0.05)
    go_on.set()
    assert await asyncio.wait_for(stays, 5) == "key"
