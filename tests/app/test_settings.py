import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import DEFAULT_BUNDLE, OF_COMPOSE, Settings, SettingsError, load_settings
from tests.conftest import ROOT


def test_defaults() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.device) == ("127.0.0.1", 8000, "auto")
    assert settings.bundle == DEFAULT_BUNDLE
    assert settings.limits.max_pixels == 100_000_000
    assert settings.limits.max_pixels_in_full == 30_000_000


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMTL_PORT", "9000")
    monkeypatch.setenv("MMTL_BUNDLE", "/some/where")
    monkeypatch.setenv("MMTL_CORS_ORIGINS", '["https://viewer.example", "http://[::1]:3000", "*"]')
    settings = load_settings()
    assert settings.port == 9000
    assert settings.bundle == Path("/some/where")
    assert settings.cors_origins == ("https://viewer.example", "http://[::1]:3000", "*")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("MMTL_PROT", "1", r"MMTL_PROT is not a setting\. Did you mean MMTL_PORT\?"),
        ("MMTL_MAXBYTES", "1", "Did you mean MMTL_MAX_BYTES"),
        ("MMTL_MEMROY", "1", r"Did you mean MMTL_MEMORY\?"),
        ("MMTL_GPU", "1", "is not a setting. `mmtl settings` lists them"),
        ("MMTL_WORKERS", "1", "is not a setting. `mmtl settings` lists them"),
        ("MMTL_PORT", "http", r"MMTL_PORT: .*integer"),
        ("MMTL_DEVICE", "gpu", r"MMTL_DEVICE: gpu does not fit\. `auto` .*`cuda:0`\.$"),
        ("MMTL_SOMETHING_ELSE", "1", "is not a setting. `mmtl settings` lists them"),
        ("MMTL_CORS_ORIGINS", '["https://viewer.example/"]', "is no origin, such as https"),
        ("MMTL_CORS_ORIGINS", '["viewer.example"]', "viewer.example is no origin"),
        ("MMTL_CORS_ORIGINS", '["https://Viewer.example"]', "in lower case"),
        ("MMTL_DEADLINE_SECONDS", "0", r"MMTL_DEADLINE_SECONDS: .*greater than 0"),
        ("MMTL_DEADLINE_SECONDS", "inf", r"MMTL_DEADLINE_SECONDS: .*finite"),
        ("MMTL_QUEUE_SIZE", "1", r"^MMTL_QUEUE_SIZE must be at least MMTL_MAX_FILES"),
        ("MMTL_CORS_ORIGINS", "https://viewer.example", r'MMTL_CORS_ORIGINS must be .*\["https'),
        ("MMTL_JWT_ISSUER", "https://a.example", "belong together: set all three, or none"),
        ("MMTL_KEYS", "", "MMTL_KEYS is set, but empty: unset it"),
        ("MMTL_CPUS", "2", "MMTL_CPUS is for docker-compose.yml, not for the service"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=sentence) as caught:
        load_settings()
    assert "\n" not in str(caught.value)


def test_what_compose_reads_is_known() -> None:
    files = [path.read_text() for path in ROOT.glob("docker-compose*.yml")]
    assert {name for text in files for name in re.findall(r"\$\{(MMTL_\w+)", text)} == OF_COMPOSE
    # Or the service, which is given it on, would refuse to start.
    assert not OF_COMPOSE & {f"MMTL_{name.upper()}" for name in Settings.model_fields}


def test_processes_share_cores_queue_bytes_and_connections() -> None:
    whole = Settings(processes=3, threads=8, queue_size=100, max_bytes_in_flight=10**9)
    part = whole.share()
    assert (part.threads, part.queue_size, part.max_connections) == (2, 33, 334)
    assert part.max_bytes_in_flight == 333_333_333
    assert Settings(threads=1, processes=4).share().threads == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MMTL_PROCESSES", "9", "MMTL_MAX_FILES times MMTL_PROCESSES"),
        (
            "MMTL_MAX_BYTES",
            "400000000",
            "MMTL_MAX_BYTES times MMTL_PROCESSES",
        ),
    ],
)
def test_a_request_fits_into_the_part_of_one_process(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMTL_PROCESSES", "3")
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        load_settings()


# What is refused, and what is just taken (with the others that it asks for).
BOUNDS: dict[str, tuple[list[object], list[dict[str, object]]]] = {
    "port": ([-1, 65536], [{"port": 0}, {"port": 65535}]),
    "processes": ([0, 65], [{"processes": 1}, {"processes": 8, "max_files": 32}]),
    "threads": ([-1], [{"threads": 0}]),
    "max_batch": ([0, 257], [{"max_batch": 1}, {"max_batch": 256}]),
    "queue_size": ([0, 31], [{"queue_size": 1, "max_files": 1}, {"queue_size": 32}]),
    "deadline_seconds": ([0], [{"deadline_seconds": 1e-9}]),
    "hang_seconds": ([0], [{"hang_seconds": 1e-9}]),
    "max_files": ([0, 257], [{"max_files": 1}, {"max_files": 256}]),
    "max_bytes": ([0, 1_000_000_001], [{"max_bytes": 1}, {"max_bytes": 1_000_000_000}]),
    "max_bytes_in_flight": ([0], [{"max_bytes_in_flight": 1, "max_bytes": 1}]),
    "upload_seconds": ([0], [{"upload_seconds": 1e-9}]),
    "keep_alive_seconds": ([0], [{"keep_alive_seconds": 1}]),
    "header_seconds": ([0], [{"header_seconds": 1e-9}]),
    "max_header_bytes": ([1023], [{"max_header_bytes": 1024}]),
    "max_connections": ([0], [{"max_connections": 1}]),
    "max_pixels": ([0], [{"max_pixels": 1}]),
    "max_pixels_in_full": ([0], [{"max_pixels_in_full": 1}]),
    "audit_log_bytes": ([0], [{"audit_log_bytes": 1}]),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_is_within_its_bounds(name: str) -> None:
    refused, taken = BOUNDS[name]
    for value in refused:
        with pytest.raises(ValidationError):
            Settings(**{name: value})
    for values in taken:
        assert getattr(Settings(**values), name) == values[name]


def test_every_number_has_bounds() -> None:
    numbers = {n for n, field in Settings.model_fields.items() if field.annotation in (int, float)}
    assert numbers == set(BOUNDS)


@pytest.mark.parametrize(
    ("url", "taken"),
    [
        ("https://idp.example/keys", True),
        ("http://localhost:8080/keys", True),
        ("http://127.0.0.1/keys", True),
        ("http://idp.example/keys", False),
        ("http://localhost.example/keys", False),
        ("file:///etc/keys", False),
    ],
)
def test_a_provider_s_keys_are_not_fetched_where_others_may_change_them(
    url: str, taken: bool
) -> None:
    given = {"jwt_issuer": "https://idp.example", "jwt_audience": "mmtl", "jwt_jwks_url": url}
    with nullcontext() if taken else pytest.raises(ValidationError, match="jwt_jwks_url"):
        assert Settings(**given).jwt_jwks_url == url


def test_nothing_is_open_or_trusted_or_sent_unasked() -> None:
    settings = Settings()
    assert (settings.open_metrics, settings.trust_torch, settings.traces) == (False,) * 3
    assert settings.cors_origins == ()


def test_settings_do_not_change_under_a_running_service() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1
