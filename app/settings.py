"""Settings: `MMTL_*` environment variables, each with its meaning beside it."""

import os
import re
from difflib import get_close_matches
from math import ceil
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as SettingsSourceError

import models
from models.bundle import ArtifactFormat, Precision
from models.cores import available_cores
from models.images import Limits

PREFIX = "MMTL_"
DEFAULT_BUNDLE = Path(models.__file__).parent / "default"
# What docker-compose.yml reads, and the service does not: a setting that is given on there needs a
# name of its own in it (MMTL_BUNDLE: …/${MMTL_BUNDLE_NAME}), or is written into the file.
OF_COMPOSE = frozenset(
    {
        "MMTL_BUNDLE_NAME",
        "MMTL_BUNDLES_FOLDER",
        "MMTL_CPUS",
        "MMTL_DOMAIN",
        "MMTL_MEMORY",
        "MMTL_PUBLISH",
    }
)

# Where a provider's keys come from: nobody on the way may change them.
JWKS_URL = r"^(https://|http://(127\.0\.0\.1|localhost)[:/])"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")


class SettingsError(Exception):
    """Settings that do not fit; the message names the variable and says what would."""


class Settings(BaseSettings):
    """What an operator may set."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    host: str = "127.0.0.1"
    """Address to listen on."""

    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""

    bundle: Path = DEFAULT_BUNDLE
    """Folder of the bundle to serve; the shipped one by default."""

    bundle_signed_by: Path | None = None
    """Public key (PEM, Ed25519) that the bundle must be signed with (`mmtl bundle sign`)."""

    artifact: ArtifactFormat = "onnx"
    """Which of the bundle's artifacts to run: `onnx`, or `torch_export` or `torchscript`, which
    need torch and MMTL_TRUST_TORCH."""

    precision: Literal["auto", Precision] = "auto"
    """`fp32`, `int8`, or `fp16` where a bundle has it (`mmtl-train` writes none). `auto` takes int8
    on a CPU where the bundle has it, else fp32, and lets OpenVINO compute in bfloat16 what stays in
    floats, where the CPU multiplies such numbers (`amx_bf16` or `avx512_bf16` among its flags;
    docs/int8.md). Some older CPUs are no faster in int8 than in fp32 (docs/performance-avx2.md)."""

    runtime: Literal["auto", "onnxruntime", "openvino"] = "auto"
    """Of ONNX artifacts. `auto` takes OpenVINO for an int8 artifact, where no precision is named,
    on a CPU that multiplies bfloat16 numbers and in at most eight threads a process: there it
    answers more small images, in more memory (docs/performance.md,
    docs/performance-avx-512-bf16.md). Else it takes ONNX Runtime."""

    trust_torch: bool = False
    """Allow torch artifacts. They are code: say yes only to a bundle that you made or trust."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda:\d+)$")
    """`auto` (a GPU where the runtime finds one), `cpu`, or `cuda:0`."""

    processes: int = Field(1, ge=1, le=64)
    """Processes that share the port, and the cores, queue, bytes and connections set here. On many
    cores several answer more (measured on sixteen with a GPU, docs/performance-gpu.md), each in
    memory of its own. `/metrics` tells them apart."""

    threads: int = Field(0, ge=0)
    """Threads of the runtime on the CPU, and of the decoder; 0 takes the container's CPU quota
    (cgroup v2). ONNX Runtime and OpenVINO run an image that is alone on two of them, where there
    are two."""

    max_batch: int = Field(8, ge=1, le=256)
    """Most images in one run of the network; on a CPU it takes four at most, for their memory.
    Larger ones pay on a GPU."""

    queue_size: int = Field(256, ge=1)
    """Most images admitted at once, over all requests; more answer 503. While a bundle is replaced,
    what the old network still has to answer does not count."""

    deadline_seconds: float = Field(30.0, gt=0)
    """Longest a request may take from its last byte to its answer; later ones answer 503, and at
    once where what waits already would most likely have them late. A slow disk under MMTL_AUDIT_LOG
    may add ten seconds."""

    hang_seconds: float = Field(30.0, gt=0)
    """Longest a decoding or a run of the network may take; then it is loaded anew. What hangs while
    it is loaded is given up after two minutes; at a start it is not, and `/health/ready` does not
    answer."""

    max_files: int = Field(32, ge=1)
    """Most images in one request."""

    max_bytes: int = Field(64_000_000, ge=1)
    """Most bytes in one request, all its images together; and in all requests of a process together
    that come without a Content-Length."""

    max_bytes_in_flight: int = Field(1_000_000_000, ge=1)
    """Most bytes of uploads, and of answers that are not yet read, held in memory at once, over all
    requests; more answer 503."""

    upload_seconds: float = Field(60.0, gt=0)
    """Longest an upload may take; slower ones answer 408. So long may the reading of a long answer
    take; then the connection is closed."""

    keep_alive_seconds: int = Field(75, ge=1)
    """How long a connection may rest between two requests. More than whatever is in front waits (a
    proxy, a load balancer, a client that keeps connections): it may send a request just as this
    service closes. One that rests makes room for a new one where there are too many."""

    header_seconds: float = Field(10.0, gt=0)
    """Longest a request's headers may take to arrive; slower ones answer 408."""

    max_header_bytes: int = Field(32_768, ge=1024)
    """Most bytes of a request's headers; more answer 431."""

    max_connections: int = Field(1_000, ge=1)
    """Most connections at once; more answer 503, but for `/health/*` and `/metrics`."""

    max_pixels: int = Field(100_000_000, ge=1)
    """Most pixels of a JPEG of one scan, which is decoded at a smaller scale."""

    max_pixels_in_full: int = Field(30_000_000, ge=1)
    """Most pixels of any other image, and of what is held at once of a JPEG that is too long and
    thin to be decoded small. Of images that hold more than four megapixels, at most one a core is
    decoded at a time, and no more than a third of the memory (cgroup v2) holds at twenty bytes for
    each pixel of this limit; at least one in each process."""

    cors_origins: tuple[str, ...] = ()
    """Origins that browsers may call from, as a JSON list: `["https://viewer.example"]`; `["*"]` is
    any."""

    keys: Path | None = None
    """File of API keys (`mmtl keys create`). Without one, nobody is asked for a key."""

    jwt_issuer: str | None = None
    """Issuer of JWT bearer tokens (OpenID Connect) that are taken beside, or instead of, keys."""

    jwt_audience: str | None = None
    """Audience that such a token must name."""

    jwt_jwks_url: str | None = Field(None, pattern=JWKS_URL)
    """Where that issuer publishes its keys, by HTTPS (or on this machine): `jwks_uri` of its OpenID
    configuration."""

    open_metrics: bool = False
    """Answer `/metrics` without a key, where there are keys."""

    traces: bool = False
    """Send OpenTelemetry traces; OTEL_EXPORTER_OTLP_ENDPOINT says where."""

    audit_log: Path | None = None
    """File that a line is added to for each image: request, key, network, SHA-256, outcome."""

    audit_log_bytes: int = Field(100_000_000, ge=1)
    """Size at which that file is renamed (and kept), and another begun."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """DEBUG adds the health and metrics requests."""

    @field_validator("log_level", mode="before")
    @classmethod
    def _in_capitals(cls, level: object) -> object:
        return level.upper() if isinstance(level, str) else level

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):  # which no browser would send
                raise ValueError(
                    f"{origin} is no origin, such as https://viewer.example or "
                    "http://localhost:3000: in lower case, without a path or a slash at its end"
                )
        return origins

    @model_validator(mode="after")
    def _fit_together(self) -> "Settings":
        each = " times MMTL_PROCESSES" if self.processes > 1 else ""
        if self.queue_size < self.max_files * self.processes:
            raise ValueError(f"MMTL_QUEUE_SIZE must be at least MMTL_MAX_FILES{each}")
        if self.max_bytes_in_flight < self.max_bytes * self.processes:
            raise ValueError(f"MMTL_MAX_BYTES_IN_FLIGHT must be at least MMTL_MAX_BYTES{each}")
        jwt = {self.jwt_issuer, self.jwt_audience, self.jwt_jwks_url}
        if None in jwt and jwt != {None}:
            raise ValueError(
                "MMTL_JWT_ISSUER, _AUDIENCE and _JWKS_URL belong together: set all three, or none"
            )
        return self

    def share(self) -> "Settings":
        """Of one of the processes: a part of what is divided among them, and all of the rest."""
        return self.model_copy(
            update={
                "processes": 1,
                "threads": max(self.cores // self.processes, 1),
                "queue_size": self.queue_size // self.processes,
                "max_bytes_in_flight": self.max_bytes_in_flight // self.processes,
                "max_connections": ceil(self.max_connections / self.processes),
            }
        )

    @property
    def cores(self) -> int:
        """Threads that decode and infer, in all processes together."""
        return self.threads or available_cores()

    @property
    def limits(self) -> Limits:
        """What an image may be."""
        return Limits(self.max_bytes, self.max_pixels, self.max_pixels_in_full)


def meaning(name: str) -> str:
    """What the field of this name is, in one line."""
    return " ".join((Settings.model_fields[name].description or "").split())


def load_settings() -> Settings:
    """Read the environment.

    Raises:
        SettingsError: An unknown `MMTL_*` name, or a value that is empty or does not fit.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name, value in os.environ.items():
        if not name.upper().startswith(PREFIX):
            continue
        if name.upper() in OF_COMPOSE:
            raise SettingsError(
                f"{name} is for docker-compose.yml, not for the service: unset it here."
            )
        if name.upper() not in known:
            # Without what all have in common, which would make any two alike.
            names = [other.removeprefix(PREFIX) for other in known | OF_COMPOSE]
            near = get_close_matches(name.upper().removeprefix(PREFIX), names, n=1, cutoff=0.7)
            hint = f"Did you mean {PREFIX}{near[0]}?" if near else "`mmtl settings` lists them."
            raise SettingsError(f"{name} is not a setting. {hint}")
        if not value:  # a variable of a script that was never set, most often
            raise SettingsError(f"{name} is set, but empty: unset it, or give it a value.")
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise SettingsError(f"{said}.") from None
        name = str(first["loc"][0])
        if first["type"] == "string_pattern_mismatch":
            said = f"{first['input']} does not fit. {meaning(name)}"
        raise SettingsError(f"{PREFIX}{name.upper()}: {said.removesuffix('.')}.") from None
    except SettingsSourceError as error:  # of a list, whose field it names
        name = str(error).split('"')[1]
        raise SettingsError(f"{PREFIX}{name.upper()} must be JSON. {meaning(name)}") from None
