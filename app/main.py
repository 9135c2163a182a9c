"""The application: settings -> networks -> predictor -> routes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline
from starlette.types import Lifespan

from app import problems
from app.access import EXPOSED_HEADERS
from app.audit import AuditError, AuditLog
from app.engines import warm_up_failed
from app.keys import Keys, KeysError
from app.networks import Networks, ReloadError
from app.predictor import Predictor
from app.routes import admin, health, metrics, model, predict, web
from app.settings import PREFIX, Settings
from app.siblings import RELOADED, Siblings
from app.spans import Spans
from app.telemetry import HEADERS, Metrics, Telemetry
from app.tokens import tokens_of
from app.uploads import Held

DESCRIPTION = (
    "Calibrated melanoma probability, age bin, anatomical site, sex and diagnosis from dermoscopic "
    "images. "
    "**Research software, not a medical device.**"
)
API_VERSION = "1.3.0"
_WAIT_SECONDS = 0.02


def create_app(
    settings: Settings,
    siblings: Siblings | None = None,
    may_listen: Callable[[], bool] = lambda: True,
) -> FastAPI:
    """Load the bundle and wire the service.

    Args:
        settings: All of them.
        siblings: The other processes of the service, where there are any.
        may_listen: Asked again and again once the network is warm, where there are other processes:
            whether this one may take connections.

    Raises:
        models.bundle.BundleError: The bundle cannot be used.
        app.engines.EngineError: The runtime or the device is not there.
        app.keys.KeysError: The key file cannot be used.
        app.audit.AuditError: The audit log cannot be written.
        app.spans.SpansError: Traces are asked for, and OpenTelemetry is not installed.
        app.settings.SettingsError: Tokens are asked for, and what reads them is not installed.
    """
    # Before the network, which takes a while to load.
    try:
        keys = Keys(settings.keys, siblings.folder if siblings else None) if settings.keys else None
    except KeysError as error:
        raise KeysError(f"{PREFIX}KEYS: {error}") from None
    tokens = tokens_of(settings)
    try:
        audit = (
            AuditLog(settings.audit_log, settings.audit_log_bytes) if settings.audit_log else None
        )
    except AuditError as error:
        raise AuditError(f"{PREFIX}AUDIT_LOG: {error}") from None
    measured = Metrics(settings.max_batch, problems.KINDS)
    measured.processes.set(1 if siblings is None else siblings.count)
    if keys is not None:
        measured.keys_stale.set_function(lambda: keys.stale)
    spans = Spans() if settings.traces else None
    networks = Networks(settings, measured)
    predictor = Predictor(networks, settings, measured)

    async def tell_metrics(accept: str) -> bytes:
        return measured.expose(accept)[0]

    async def tell_reload(_: str) -> bytes:
        try:
            await asyncio.wrap_future(networks.begin_reload())
        except ReloadError as error:
            return str(error).encode()
        return RELOADED

    async def wait_for_others() -> None:
        while not networks.draining and not (networks.current.batcher.ready and may_listen()):
            if networks.failed:
                raise warm_up_failed()
            await asyncio.sleep(_WAIT_SECONDS)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        networks.start()
        longest = settings.deadline_seconds
        try:
            if siblings is not None:
                await wait_for_others()
                await siblings.listen({"metrics": tell_metrics, "reload": tell_reload})
            yield
        except asyncio.CancelledError:
            longest = 0.0  # a second signal, or Ctrl-C: nothing is waited for
            raise
        finally:
            if siblings is not None:
                siblings.close()
            networks.close(longest)
            for last in (audit, spans):
                if last is not None:
                    last.close()

    app = build_api(lifespan)
    app.state.settings = settings
    app.state.siblings = siblings
    app.state.predictor = predictor
    app.state.networks = networks
    app.state.metrics = measured
    app.state.audit = audit
    app.state.keys = keys
    app.state.tokens = tokens
    app.state.held = Held(settings.max_bytes_in_flight, settings.max_bytes)
    app.add_middleware(predict.Direct)
    app.add_middleware(
        Telemetry,
        metrics=measured,
        model_version=networks.version,
        spans=spans,
    )
    if settings.cors_origins:
        # Outside of Telemetry, so that a browser can read the answer to a failure too.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    return app


def build_api(lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """The routes and their description, without a bundle behind them."""
    app = FastAPIOffline(
        title="mmtl",
        version=API_VERSION,
        description=DESCRIPTION,
        docs_url=None,  # routes/web.py
        redoc_url=None,
        static_url=web.ASSETS,
        # Behind TLS, it would send the picture again where it is told to, by plain HTTP.
        redirect_slashes=False,
        lifespan=lifespan,
        # FastAPI would send spans of its own, which nobody has read for what they say of a patient.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    problems.install(app)
    described = {200: {"headers": problems.as_headers(HEADERS)}, **problems.describe("default")}
    for module in (predict, health, model, metrics, admin, web):
        app.include_router(module.router, responses=described)
    return app
