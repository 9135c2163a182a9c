"""`mmtl serve`, whose network fails or hangs when a file says so: for the drills beside it.

FAULTS names a folder. A file `fail` there makes the next run of the network raise; `hang` makes it
never come back. Either file is taken away by the run that obeys it.
"""

import os
import sys
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.cli import main
from app.engines.onnx import OnnxEngine
from models.bundle import Outputs

FAULTS = Path(os.environ.pop("FAULTS"))
run = OnnxEngine.run


def taken(name: str) -> bool:
    """Whether the fault was asked for, and nobody else has it."""
    try:
        (FAULTS / name).unlink()
    except FileNotFoundError:
        return False
    return True


def run_with_faults(engine: OnnxEngine, images: NDArray[np.uint8]) -> Outputs:
    """The engine's `run`."""
    if taken("fail"):
        raise RuntimeError("injected: the run failed")
    if taken("hang"):
        threading.Event().wait()
    return run(engine, images)


OnnxEngine.run = run_with_faults  # type: ignore[method-assign]  # the fault
sys.argv = ["mmtl", "serve"]
main()
