"""`mmtl serve`, whose network fails or hangs when a file says so: for the drills beside it.

FAULTS names a folder. A file `fail` there makes the next run of the network raise; `hang` makes it
never come back. Either file is taken away by the run that obeys it.
"""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from app import networks
from app.cli import main
from app.engines import Engine
from app.settings import Settings
from models.bundle import Artifact, Bundle, Outputs

Run = Callable[[NDArray[np.uint8]], Outputs]
FAULTS = Path(os.environ.pop("FAULTS"))
open_engine = networks.open_engine


def taken(name: str) -> bool:
    """Whether the fault was asked for, and nobody else has it."""
    try:
        (FAULTS / name).unlink()
    except FileNotFoundError:
        return False
    return True


class FaultyEngine:
    """The service's engine, whose later runs obey."""

    def __init__(self, engine: Engine):
        # Not in the engine's place: the two would be in a cycle, and a network that has retired
        # would stay in memory until garbage is collected.
        self._engine = engine
        self.run = with_faults(engine.run)
        self.run_alone = with_faults(engine.run_alone)

    def __getattr__(self, name: str) -> Any:
        """All else is the engine's."""
        return getattr(self._engine, name)


def open_faulty_engine(bundle: Bundle, settings: Settings) -> tuple[Artifact, Engine]:
    """As the service opens one."""
    artifact, engine = open_engine(bundle, settings)
    return artifact, cast(Engine, FaultyEngine(engine))


def with_faults(run: Run) -> Run:
    """One of an engine's two ways to run."""

    def run_with_faults(images: NDArray[np.uint8]) -> Outputs:
        if taken("fail"):
            raise RuntimeError("injected: the run failed")
        if taken("hang"):
            threading.Event().wait()
        return run(images)

    return run_with_faults


networks.open_engine = open_faulty_engine  # type: ignore[attr-defined]  # which it imports
sys.argv = ["mmtl", "serve"]
main()
